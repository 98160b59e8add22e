"""The rooms of the package (architecture.md), and what is not allowed in them: `python tests/rooms.py` prints what stands where it should not."""
import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGE = "grocery_nb"
ROOT = Path(__file__).resolve().parent.parent

# The parts: which rooms, modules of rooms and chapters the modules of a room may import; `core` and their own room always.
PARTS = {
    "drawing": set(),
    "artifacts": set(),
    "examining": set(),
    "data": {"drawing", "synthetic", "catalog"},
    "training": {"data", "synthetic", "catalog"},
    "analysis": {"data", "synthetic", "catalog", "edge"},
    "serving": {"data.pictures", "artifacts", "synthetic", "catalog", "edge"},
}
# What they may import inside functions too: `analysis` and the one predictor of `serving` load torch only when it is asked for.
INSIDE = {"analysis": {"training"}, "serving": {"training"}}
# The chapters in their order, and the rooms that each opens, for itself and for the chapters after it.
CHAPTERS = {
    "synthetic": {"drawing"},
    "catalog": {"data"},
    "data_utils": set(),
    "model_utils": {"training"},
    "train_utils": set(),
    "evaluation": {"analysis"},
    "run_training": set(),
    "s3_utils": {"artifacts"},
    "edge": {"serving"},
    "backend": set(),
    "frontend": set(),
    "scaling": set(),
    "generative": set(),
    "exam": {"examining"},
}
# Modules and rooms that load torch when they are imported. Everything else does not.
WITH_TORCH = {"training", "data.pixels", "data_utils", "model_utils", "train_utils", "scaling", "generative"}
LINES, MOST_LINES = 400, 520
LONG = {"synthetic": "options, splits, manifest and writing of one data set; all that draws has left it"}  # module: why it is longer than LINES


class Import(NamedTuple):
    module: str # The imported module's name inside the package: `data.rows`, `catalog`, or the name of another package
    inside: bool # Whether it is imported inside a function
    ours: bool # Whether it is a module of this package


def modules(root: Path=ROOT) -> dict:
    "All modules of the package by their dotted name inside it"
    package = root / PACKAGE
    paths = [path for path in package.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")]
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(paths)}


def room(name: str) -> str:
    "The room of a module: the folder it is in, or its own name at the top"
    return name.split(".")[0]


def absolute(node: ast.ImportFrom, name: str) -> str:
    "The full name of what is imported `from`, seen from the module `name`"
    if not node.level: return node.module
    parents = [PACKAGE, *name.split(".")][:-node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def imports(name: str, path: Path, known: set) -> list:
    "What a module imports, at its top and inside functions, absolute and relative"
    found = []
    def add(full: str, names: list, inside: bool):
        if full.split(".")[0] != PACKAGE: found.append(Import(full, inside, False))
        else:
            inner = full.removeprefix(PACKAGE).lstrip(".")
            parts = [".".join(filter(None, [inner, n])) for n in names]
            modules_named = [part for part in parts if part in known]
            found.extend(Import(part, inside, True) for part in modules_named or ([inner] if inner else []))
    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom): add(absolute(child, name), [n.name for n in child.names], inside)
            elif isinstance(child, ast.Import):
                for n in child.names: add(n.name, [], inside)
            else: walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    walk(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def allowed(name: str, inside: bool) -> set:
    "The rooms, chapters and modules that a module may import, besides `core` and its own room"
    here = room(name)
    if here == "core": return set()
    if here == "cli": return {*PARTS, *CHAPTERS}
    if here in PARTS: return PARTS[here] | (INSIDE.get(here, set()) if inside else set())
    before = list(CHAPTERS)[:list(CHAPTERS).index(here)]
    return {*before}.union(*(CHAPTERS[chapter] for chapter in [*before, here]))


def wrong_arrows(root: Path=ROOT) -> list:
    "Imports that architecture.md does not allow, one sentence each"
    paths, found = modules(root), []
    graph = {name: imports(name, path, set(paths)) for name, path in paths.items()}
    knows_only_core = {"core"}  # and what is made of such modules
    serving = {name: {i.module for i in its if i.ours} for name, its in graph.items() if room(name) == "serving"}
    while more := {name for name, known in serving.items() if known <= knows_only_core} - knows_only_core: knows_only_core |= more
    torch = []
    for name, its in graph.items():
        here = room(name)
        if here not in {"core", "cli", *PARTS, *CHAPTERS} or (here in PARTS) != ("." in name):
            found.append(f"{name}: no such place in the table of rooms")
            continue
        for module, inside, ours in its:
            place = f"{name} imports {module}{' inside a function' if inside else ''}"
            if here == "serving" and room(module) in ("torch", "torchvision", "timm", "training"):
                torch.append(name)
                if not inside: found.append(f"{place}: serving imports torch only inside the torch predictor")
            if here == "analysis" and room(module) in ("torch", "torchvision", "timm") and not inside: found.append(f"{place}: not at the top of analysis")
            if not ours or module == "core" or room(module) == here: continue
            if here == "frontend":
                if room(module) != "serving" or module not in knows_only_core: found.append(f"{place}: the front end speaks HTTP and knows nothing else")
            elif not {module, room(module)} & allowed(name, inside): found.append(f"{place}: no arrow leads there")
    if len(set(torch)) > 1: found.append(f"torch and training are imported by {', '.join(sorted(set(torch)))}: in serving one predictor is enough")
    return list(dict.fromkeys(found))


def circle(root: Path=ROOT) -> list:
    "The modules of a circle of imports, or an empty list"
    paths = modules(root)
    graph = {name: sorted({i.module for i in imports(name, path, set(paths)) if i.ours and i.module != name}) for name, path in paths.items()}
    done = set()
    def visit(name, way):
        if name in way: return [*way[way.index(name):], name]
        if name in done: return []
        for other in graph.get(name, []):
            if found := visit(other, [*way, name]): return found
        done.add(name)
        return []
    return next(filter(None, (visit(name, []) for name in graph)), [])


def too_long(root: Path=ROOT) -> list:
    "Modules over the budget of lines"
    found = []
    for name, path in modules(root).items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (MOST_LINES if name in LONG else LINES): found.append(f"{name}: {lines} lines, budget {LINES}")
    return found


# A closing tag; a declaration of CSS in braces; a statement of JavaScript.
PAGE = re.compile(r"</\w+>|\{[^{}]*[\w-]+ *:[^{};]+;[^{}]*\}|\b(?:const|let|function)\b[^;]*[;{]")


def page_strings(root: Path=ROOT) -> list:
    "Strings of more than four lines that are HTML, CSS or JavaScript: those are files in `grocery_nb/assets/`"
    found = []
    for name, path in modules(root).items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed = {id(value) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for value in n.values}  # parts of an f-string
        passed |= {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                      and n.body and isinstance(n.body[0], ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Constant, ast.JoinedStr)) or id(node) in passed: continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))
            if (node.end_lineno - node.lineno >= 4 or text.count("\n") >= 4) and PAGE.search(text):
                found.append(f"{name}, line {node.lineno}: {text.strip().splitlines()[0][:40]!r}")
    return found


def torch_loaders(names: list) -> str:
    "Import modules one after another in a fresh interpreter; the first that loads torch, or nothing"
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    if "torch" in sys.modules or "timm" in sys.modules: sys.exit(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def without_torch(root: Path=ROOT) -> list:
    "The modules that must not load torch when they are imported"
    return [f"{PACKAGE}.{name}" for name in modules(root) if not {name, room(name)} & WITH_TORCH]


def wrong_tests(tests: Path) -> list:
    "Test files outside the rooms, names used twice, folders that hide a module from pytest"
    found, seen = [], {}
    for path in sorted(tests.rglob("test_*.py")):
        place = path.relative_to(tests)
        if place.parts[:2] == ("labs", "scripts"): continue  # what a student has, not collected
        if len(place.parts) > 2 or len(place.parts) == 2 and place.parts[0] not in {*PARTS, "labs"}: found.append(f"{place}: no room of that name")
        if path.name in seen: found.append(f"{place}: the name is taken by {seen[path.name]}")
        seen[path.name] = place
    found += [f"{path.relative_to(tests)}: tests are no packages" for path in tests.rglob("__init__.py")]
    found += [f"{path.name}: the name of a room" for path in tests.glob("*.py") if path.stem in {*PARTS, "labs"} - {"serving"}]
    return found


if __name__ == "__main__":
    found = [*wrong_arrows(), *too_long(), *page_strings(), *wrong_tests(ROOT / "tests")]
    if way := circle(): found.append(" -> ".join(way) + ": a circle")
    if first := torch_loaders(without_torch()): found.append(f"{first}: loads torch")
    print("\n".join(found))
    sys.exit(bool(found))
