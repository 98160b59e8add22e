"The project as a whole: package and notebooks agree, arrows point up, the budget of style.md is kept, the site's filter works."
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import NOTEBOOKS, ROOT
from style_budget import violations

BIN = Path(sys.executable).parent
# Which modules of the package a module may import (architecture.md); `core` is the floor under all of them.
ARROWS = {
    "core": set(),
    "synthetic": set(),
    "catalog": {"synthetic"},
    "pictures": {"catalog"},
    "data_utils": {"catalog", "pictures"},
    "model_utils": set(),
    "checkpoint": {"model_utils"},
    "train_utils": {"model_utils", "checkpoint"},
    "transfer": {"model_utils", "checkpoint", "train_utils"},
    "evaluation": set(),
    "report": {"evaluation"},
    "run_training": {"catalog", "data_utils", "model_utils", "train_utils", "transfer", "evaluation"},
    "edge": {"synthetic", "catalog", "pictures", "model_utils"},
    "uploads": {"pictures"},
    "batching": set(),
    "operations": set(),
    "service": {"catalog", "pictures", "edge", "uploads", "batching", "operations", "model_utils"},
    "backend": {"catalog", "pictures", "edge", "uploads", "batching", "operations", "service"},
    "frontend": set(),
    "measuring": {"synthetic", "catalog", "data_utils", "model_utils", "train_utils", "evaluation", "report", "run_training"},
    "cli": {"synthetic", "catalog", "data_utils", "model_utils", "train_utils", "evaluation", "run_training", "measuring",
            "edge", "operations", "backend", "frontend"},
}
WITHOUT_TORCH = {"core", "synthetic", "catalog", "pictures", "evaluation", "report", "edge", "uploads", "batching", "operations", "service", "backend",
                 "frontend"}


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def ids(paths: list) -> list:
    return [path.stem for path in paths]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The project's sources without its history and caches, to run nbdev's commands on"
    folder = tmp_path_factory.mktemp("copy") / "grocery-nb"
    folder.mkdir()
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"): shutil.copy(ROOT / name, folder)
    for command in ("nbdev_export", "nbdev_clean"):
        environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
        subprocess.run([BIN / command], cwd=folder, check=True, capture_output=True, env=environment)
    return folder


def test_package_equals_notebooks(copy):
    def modules(folder): return {path.name for path in (folder / "grocery_nb").glob("*.py")}
    assert modules(copy) == modules(ROOT)
    _, different, unreadable = filecmp.cmpfiles(copy / "grocery_nb", ROOT / "grocery_nb", modules(ROOT), shallow=False)
    assert not different + unreadable, "run `make export`: these modules differ from their notebooks"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_notebook_is_clean(copy, path):
    assert (copy / "nbs" / path.name).read_bytes() == path.read_bytes(), "run `make export`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_notebook_keeps_the_budget(path):
    assert violations(load(path)) == []


def bad_notebook() -> dict:
    "A notebook that breaks every rule of the budget once"
    def code(text, **more): return {"cell_type": "code", "source": text, "outputs": [], **more}
    picture = {"output_type": "display_data", "data": {"image/png": "x" * 200_000}}
    long_export = "#| export\ndef lonely(a, b, c):\n" + "    a += 1\n" * 60 + "    return a"
    return {"cells": [code(long_export), code("y = 1  # TODO\n" * 30, outputs=[picture]),
                      {"cell_type": "markdown", "source": "# Title"}]}


def test_budget_fails_on_a_bad_notebook():
    found = "\n".join(violations(bad_notebook()))
    for rule in ("median code cell", "p90", "longest", "median exported", "markdown cells", "lonely: exported, but no assert",
                 "docstring is not one line", "not one a line", "a picture of", "leftover in a cell: TODO"):
        assert rule in found, rule


def test_budget_sees_a_proof_only_before_the_next_export():
    def code(text): return {"cell_type": "code", "source": text, "outputs": []}
    def faults(*cells): return [f for f in violations({"cells": [*cells, *[{"cell_type": "markdown", "source": "x"}] * 2]}) if "demo" in f]
    first, second = "#| exports\ndef one():\n    'One'", "#| exports\ndef two():\n    'Two'"
    assert faults(code(first), code("assert one() is None")) == []
    assert faults(code(first), code("one()")), "a use without assert or visible result is no proof"
    assert faults(code(first), code(second), code("assert one() is two()")), "too late for the first"


def imported(module: Path) -> set:
    "The modules of this package that a module imports, at its top or inside a function"
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level and node.module: found.add(node.module.split(".")[0])
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grocery_nb."): found.add(node.module.split(".")[1])
        if isinstance(node, ast.Import): found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("grocery_nb.")}
    return found


def test_arrows_point_up():
    modules = {path.stem: path for path in (ROOT / "grocery_nb").glob("[!_]*.py")}
    assert set(modules) == set(ARROWS), "a new module needs a row in ARROWS"
    for name, path in modules.items():
        assert imported(path) <= ARROWS[name] | {"core"}, f"{name} imports what architecture.md does not allow"


def test_arrows_see_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from grocery_nb.cli import main\n    from .model_utils import DEVICE\n    import grocery_nb.catalog")
    assert imported(wrong) == {"cli", "model_utils", "catalog"}


def loaded(code: str) -> set:
    "The top-level modules in memory after running some code in a fresh interpreter"
    out = subprocess.run([sys.executable, "-c", code + "\nimport sys; print(' '.join(sys.modules))"], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in out.stdout.split()}


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH | {"run_training", "measuring", "cli"}))
def test_no_torch_where_none_is_needed(module):
    assert "torch" not in loaded(f"import grocery_nb.{module}")


def test_importing_the_package_imports_nothing_heavy():
    assert not {"torch", "numpy", "PIL", "matplotlib", "pandas", "nbdev", "fastcore"} & loaded("import grocery_nb")


def test_package_never_needs_nbdev():
    for path in (ROOT / "grocery_nb").glob("[!_]*.py"):
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore)\b", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


@pytest.mark.parametrize("module, absent, extra", [
    ("data_utils", "torch", "train"), ("model_utils", "torch", "train"), ("model_utils", "torchvision", "train"), ("train_utils", "torch", "train")])
def test_missing_extra_says_its_name(module, absent, extra):
    code = f"import sys; sys.modules[{absent!r}] = None; import grocery_nb.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"MissingExtra: The Python package {absent!r} is not installed" in done.stderr
    assert f"pip install 'grocery-nb[{extra}]'" in done.stderr


@pytest.fixture(scope="module")
def filtered() -> dict:
    "Every notebook as Quarto gets it; two at a time, since each costs a start of Python with nbdev"
    def run(path):
        return subprocess.run([sys.executable, ROOT / "nbs" / "_filter.py"], input=path.read_text(encoding="utf-8"),
                              capture_output=True, text=True, cwd=ROOT / "nbs", timeout=120)
    with ThreadPoolExecutor(2) as pool: return dict(zip(NOTEBOOKS, pool.map(run, NOTEBOOKS)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids(NOTEBOOKS))
def test_site_filter(path, filtered):
    done = filtered[path]
    assert done.returncode == 0, done.stderr
    assert "imports and other code" not in done.stderr, "a cell with an import and other code would run at every render"
    cells = json.loads(done.stdout)["cells"]
    front = "".join(cells[0]["source"])
    assert cells[0]["cell_type"] == "raw" and "title:" in front and "output-file" not in front
    shown = [cell for cell in cells if "show_doc(" in "".join(cell["source"])]
    assert all(cell["outputs"] for cell in shown), "show_doc ran without a result"
    if path.stem != "index": assert any("callout-note" in "".join(cell["source"]) for cell in cells), "the opening callout got lost"


def test_every_chapter_is_on_the_maps():
    chapters = [path.name for path in NOTEBOOKS]
    for place in ("_quarto.yml", "README.md", "nbs/index.ipynb"):
        text = (ROOT / place).read_text(encoding="utf-8")
        missing = [name for name in chapters if name not in text and name != "index.ipynb"]
        assert not missing, f"{place} does not name {missing}"


def test_nothing_of_the_real_photos_is_committed():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    drawn = {"nbs/images/frontend.jpg"}  # a screenshot of the page, with pictures of Mini Grocery
    assert not [name for name in files if name.endswith((".jpg", ".jpeg", ".pth")) and name not in drawn]
