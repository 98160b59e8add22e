"""The budget of style.md, measured on a notebook: `python tests/style_budget.py nbs/*.ipynb` prints what is over it."""
import ast
import json
import re
import statistics
import sys
from pathlib import Path

PICTURE_BYTES = 100_000
EXPORT = re.compile(r"^\s*#\|\s*exports?\b", re.MULTILINE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_lines(cell: dict) -> int:
    "Lines that are not blank and no directive"
    return sum(bool(line.strip()) and not line.lstrip().startswith("#|") for line in source(cell).splitlines())


def is_export(cell: dict) -> bool:
    return cell["cell_type"] == "code" and bool(EXPORT.search(source(cell)))


def definitions(cell: dict) -> list:
    "The functions and classes that a cell defines at its top level"
    text = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source(cell).splitlines())
    return [node for node in ast.parse(text).body if isinstance(node, DEFINITIONS)]


def percentile(values: list, share: float) -> float:
    "The value at `share` of the sorted list (nearest rank)"
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def proves(cell: dict, name: str) -> bool:
    "Whether a cell uses `name` and asserts something or shows a result"
    text = source(cell)
    shown = "assert" in text or "raises" in text or bool(cell.get("outputs"))
    return shown and re.search(rf"\b{re.escape(name)}\b", text) is not None


def unproved(cells: list) -> list:
    "Exported names that no assert or visible demo uses before the next exported definition"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    for position, cell in enumerate(code):
        if not is_export(cell): continue
        names = [node.name for node in definitions(cell)]
        following = []
        for later in code[position + 1:]:
            if is_export(later) and definitions(later): break
            following.append(later)
        found += [name for name in names if not any(proves(later, name) for later in following)]
    return found


def docstring_faults(cells: list) -> list:
    "Public exported definitions whose docstring is absent or longer than a line, or whose parameters share lines"
    found = []
    for cell in filter(is_export, cells):
        for node in definitions(cell):
            if node.name.startswith("_"): continue
            doc = ast.get_docstring(node)
            if not doc or len(doc.splitlines()) != 1: found.append(f"{node.name}: the docstring is not one line")
            if isinstance(node, ast.ClassDef): continue
            parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            rows = {parameter.lineno for parameter in parameters}
            if len(parameters) > 2 and len(rows) < len(parameters):
                found.append(f"{node.name}: more than two parameters and not one a line")
    return found


def picture_bytes(cells: list) -> list:
    "The sizes of the pictures in the outputs, as stored"
    return [len("".join(data)) for cell in cells for output in cell.get("outputs", [])
            for kind, data in output.get("data", {}).items() if kind.startswith("image/")]


def violations(notebook: dict) -> list:
    "What is over the budget, one sentence each"
    cells = [cell for cell in notebook["cells"] if source(cell).strip()]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    lines = [code_lines(cell) for cell in code]
    exported = [code_lines(cell) for cell in code if is_export(cell) and definitions(cell)]
    markdown = sum(cell["cell_type"] == "markdown" for cell in cells) / len(cells)
    found = []
    if statistics.median(lines) > 6: found.append(f"median code cell: {statistics.median(lines)} lines, budget 6")
    if percentile(lines, 0.9) > 18: found.append(f"p90 code cell: {percentile(lines, 0.9)} lines, budget 18")
    if max(lines) > 40: found.append(f"longest code cell: {max(lines)} lines, budget 40")
    if exported and statistics.median(exported) > 10:
        found.append(f"median exported cell: {statistics.median(exported)} lines, budget 10")
    if not 0.35 <= markdown <= 0.55: found.append(f"markdown cells: {markdown:.0%}, budget 35-55%")
    found += [f"{name}: exported, but no assert or demo before the next export" for name in unproved(cells)]
    found += docstring_faults(cells)
    found += [f"a picture of {size:,} bytes, budget {PICTURE_BYTES:,}" for size in picture_bytes(cells) if size > PICTURE_BYTES]
    found += [f"leftover in a cell: {mark}" for mark in ("TODO", "FIXME") if any(mark in source(cell) for cell in cells)]
    return found


if __name__ == "__main__":
    total = 0
    for path in sys.argv[1:]:
        for fault in violations(json.loads(Path(path).read_text(encoding="utf-8"))):
            print(f"{path}: {fault}")
            total += 1
    sys.exit(bool(total))
