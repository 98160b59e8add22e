"""The budget of style.md, measured on a notebook: `python tests/style_budget.py nbs/*.ipynb` prints what is over it."""
import ast
import json
import re
import statistics
import sys
from pathlib import Path

PICTURE_BYTES = 100_000
CELLS = 130  # of a deep dive
WIDTH = {"chapter": 100, "deep dive": 120}  # characters of a line of code
IMPORT_LINES = 8
EXPORT = re.compile(r"^\s*#\|\s*exports?\b", re.MULTILINE)
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.DOTALL | re.MULTILINE)
DEEP_DIVE = re.compile(r"^> \*\*Optional for the exam\.\*\* A deep dive of \[", re.MULTILINE)
DROPPED = re.compile(r"<(?:iframe|script|style|object|embed|form)\b")  # what JupyterLab drops from HTML while a notebook is not trusted
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


def kind(name: str) -> str:
    "What a notebook is, by its name: a number and a letter is a deep dive, and so is what stands under the floor (80 and up)"
    return "deep dive" if re.match(r"\d+[a-z]_|[89]\d_", name) else "chapter"


def text_lines(cells: list, cell_type: str) -> list:
    return [line for cell in cells if cell["cell_type"] == cell_type for line in source(cell).splitlines()]


def import_lines(cell: dict) -> int:
    "The lines that a cell's imports take"
    text = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source(cell).splitlines())
    return sum(node.end_lineno - node.lineno + 1 for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom)))


def folding_faults(cell: dict) -> list:
    "What keeps a `<details>` from folding everywhere: not closed, or no blank lines around the Markdown in it"
    text = FENCED.sub("", source(cell))
    opened, closed = len(re.findall(r"<details\b", text)), text.count("</details>")
    if opened != closed: return [f"<details> opened {opened} times and closed {closed} times: {text.strip().splitlines()[0][:50]!r}"]
    good = len(re.findall(r"^<details><summary>.+</summary>\n\n", text, re.MULTILINE)), len(re.findall(r"\n\n</details>$", text, re.MULTILINE))
    return [] if good == (opened, opened) else [f"<details> without blank lines inside: {text.strip().splitlines()[0][:50]!r}"]


def without_picture(cell: dict) -> bool:
    "Whether a cell shows HTML that an untrusted notebook drops, or a widget, and no picture beside it"
    kinds = {kind: "".join(data) if isinstance(data, (list, str)) else "" for output in cell.get("outputs", [])
             for kind, data in output.get("data", {}).items()}
    lost = DROPPED.search(kinds.get("text/html", "")) or "application/vnd.jupyter.widget-view+json" in kinds
    return bool(lost) and not any(kind.startswith("image/") for kind in kinds)


def minutes(notebook: dict) -> float:
    "How long a notebook is to read: 180 words a minute, 6 seconds a line of code, 15 a picture"
    words = sum(len(line.split()) for line in text_lines(notebook["cells"], "markdown"))
    code = sum(code_lines(cell) for cell in notebook["cells"] if cell["cell_type"] == "code")
    return words / 180 + code * 6 / 60 + len(picture_bytes(notebook["cells"])) * 15 / 60


def in_jupyterlab(notebook: dict, name: str) -> list:
    "What would not read well as the notebook stands, in JupyterLab first, one sentence each"
    cells = [cell for cell in notebook["cells"] if source(cell).strip()]
    markdown = [cell for cell in cells if cell["cell_type"] == "markdown"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    width, found = WIDTH[kind(name)], []
    wide = [line for line in text_lines(cells, "code") if len(line) > width]
    if wide: found.append(f"{len(wide)} lines of code over {width} characters, the longest {max(map(len, wide))}: {max(wide, key=len).strip()[:60]!r}")
    found += [f"a cell with {import_lines(cell)} lines of imports, budget {IMPORT_LINES}" for cell in code if import_lines(cell) > IMPORT_LINES]
    raw = [line for line in text_lines(cells, "markdown") if re.match(r"\s*(:::|`{3,}\{mermaid)", line)]
    found += [f"raw text in JupyterLab: {line.strip()[:50]!r}" for line in raw]
    found += [fault for cell in markdown for fault in folding_faults(cell)]
    found += ["HTML or a widget without a picture beside it: " + repr(source(cell).splitlines()[0][:50]) for cell in code if without_picture(cell)]
    if kind(name) == "deep dive":
        if len(cells) > CELLS: found.append(f"{len(cells)} cells, budget {CELLS}")
        opening = "\n\n".join(source(cell) for cell in markdown[:2])
        if re.match(r"\d+[a-z]", name) and not DEEP_DIVE.search(opening): found.append("the opening does not say that it is optional, and a deep dive of what")
    return found


def violations(notebook: dict) -> list:
    "What is over the budget, one sentence each"
    cells = [cell for cell in notebook["cells"] if source(cell).strip()]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    if not code: return []  # a page to read, such as the glossary
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
    for path in map(Path, sys.argv[1:]):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        words = sum(len(line.split()) for line in text_lines(notebook["cells"], "markdown"))
        print(f"{path}: {kind(path.name)}, {len(notebook['cells'])} cells, {words:,} words, {minutes(notebook):.0f} minutes")
        for fault in violations(notebook) + in_jupyterlab(notebook, path.name):
            print(f"{path}: {fault}")
            total += 1
    sys.exit(bool(total))
