"""The course line: what a student reads, in order. `python tests/course_line.py` prints the minutes of every chapter and what is over its budget."""
import ast
import csv
import json
import re
import sys
from pathlib import Path

from style_budget import kind, minutes, source, text_lines

NBS = Path(__file__).resolve().parent.parent / "nbs"
POINTS = Path(__file__).with_name("course_points.csv")
CELLS, WORDS, MINUTES, HOURS = 70, 2_200, 45, 9
COMING = {"07_artifacts", "11_delivery"}  # chapters that are not written yet; a point of theirs gets its heading with them
NO_CHAPTER = {"index"}  # a home page: no opening, no questions
UNWRITTEN = {"09_backend"}  # they stand as they were before the course line: over the budget, names before their explanation
QUESTION = re.compile(r"<details><summary>Answer</summary>\n\n")


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def chapters() -> list:
    "The notebooks of the course line, in order"
    return [path for path in sorted(NBS.glob("*.ipynb")) if kind(path.name) == "chapter" and path.stem not in NO_CHAPTER]


def cells_of(notebook: dict) -> list:
    return [cell for cell in notebook["cells"] if source(cell).strip()]


def opening_minutes(notebook: dict) -> "re.Match | None":
    "What the opening says of the minutes that a notebook takes"
    return next((re.search(r"(\d+) minutes", source(cell)) for cell in notebook["cells"] if "you can explain**" in source(cell)), None)


def opening_faults(notebook: dict) -> list:
    "Where the minutes that an opening speaks of are not within a fifth of those that are computed"
    said = opening_minutes(notebook)
    if said is None: return ["no opening that says what one can explain afterwards, and how many minutes it takes"]
    found, real = int(said[1]), minutes(notebook)
    return [] if abs(found - real) <= real / 5 else [f"the opening says {found} minutes, and it is {real:.0f}"]


def heading_texts(notebook: dict) -> list:
    "The headings of a notebook, without marks of code, outside fences"
    text = "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [plain(line) for line in re.findall(r"^#+ +(.+)$", text, re.MULTILINE)]


def plain(heading: str) -> str:
    return heading.replace("`", "").strip()


def section(notebook: dict, heading: str) -> str:
    "The Markdown below a heading, up to the next one"
    text = "\n\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    found = re.search(rf"^#+ +{re.escape(heading)}\s*$(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def budget_faults(notebook: dict) -> list:
    "What is over the budget of a chapter, one sentence each"
    cells, found = cells_of(notebook), []
    words, read = sum(len(line.split()) for line in text_lines(cells, "markdown")), minutes(notebook)
    if len(cells) > CELLS: found.append(f"{len(cells)} cells, budget {CELLS}")
    if words > WORDS: found.append(f"{words:,} words, budget {WORDS:,}")
    if read > MINUTES: found.append(f"{read:.0f} minutes, budget {MINUTES}")
    asked = len(QUESTION.findall(section(notebook, "Questions")))
    if asked != 3: found.append(f"{asked} questions with a folded answer under the heading Questions, and not three")
    return found + opening_faults(notebook)


def imported(node: ast.AST) -> set:
    "The names that an import takes from the package"
    mine = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "grocery_nb"
    return {alias.asname or alias.name for alias in node.names} - {"*"} if mine else set()


def unexplained(notebook: dict) -> list:
    "Names of the package that a cell uses before any text has spoken of them"
    told, known, found = set(), set(), {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            told |= {word for span in re.findall(r"`([^`\n]+)`", source(cell)) for word in re.findall(r"\w+", span)}
            continue
        if cell["cell_type"] != "code": continue
        tree = ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in source(cell).splitlines()))
        for node in ast.walk(tree): known |= imported(node)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in sorted(used & known - told): found.setdefault(name, source(cell).strip().splitlines()[-1].strip())
    return [f"{name} is used before the text has said what it is: {line[:60]!r}" for name, line in found.items()]


def points() -> list:
    "The study points of the notes and the labs: dicts of note, point, notebook, heading"
    with POINTS.open(encoding="utf-8", newline="") as file: return list(csv.DictReader(file))


def point_faults(rows: list, folder: Path=NBS) -> list:
    "Study points that no chapter answers where the table says"
    found, headings = [], {}
    for row in rows:
        name, where = row["notebook"], f"{row['note']}: {row['point']}"
        path = folder / f"{name}.ipynb"
        if not path.exists():
            if name not in COMING or row["heading"]: found.append(f"{where}: there is no chapter {name}")
            continue
        if kind(path.name) != "chapter":
            found.append(f"{where}: {name} is a deep dive")
            continue
        if name not in headings: headings[name] = heading_texts(load(path))
        if plain(row["heading"]) not in headings[name]: found.append(f"{where}: {name} has no heading {row['heading']!r}")
    return found


if __name__ == "__main__":
    total = faults = 0
    for path in chapters():
        notebook = load(path)
        words = sum(len(line.split()) for line in text_lines(notebook["cells"], "markdown"))
        total += minutes(notebook)
        print(f"{path.stem:16} {len(cells_of(notebook)):3} cells {words:5,} words {minutes(notebook):3.0f} minutes")
        for fault in budget_faults(notebook) + unexplained(notebook):
            print(f"  {fault}")
            faults += 1
    for fault in point_faults(points()):
        print(fault)
        faults += 1
    print(f"all chapters: {total / 60:.1f} hours of {HOURS}")
    sys.exit(bool(faults))
