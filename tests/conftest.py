import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PHOTOS = os.environ.pop("GROCERY_DATA_DIR", None)  # the tests mean Mini Grocery unless they ask for `photos`


@pytest.fixture
def photos() -> Path:
    "The folder of the real photos, or a skip that says how to have them"
    for folder in (PHOTOS, ROOT.parent / "shared" / "data" / "grocery-store"):
        if folder and (Path(folder) / "train.txt").exists(): return Path(folder)
    pytest.skip("no real photos: set GROCERY_DATA_DIR to a copy of the Grocery Store Dataset to enable this test")


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    "An empty cache folder of its own for one test, also for the processes it starts"
    folder = tmp_path / "caches"
    monkeypatch.setenv("GROCERY_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    "A very small Mini Grocery: 3 + 2 + 2 pictures a class at 64 pixels"
    from grocery_nb.synthetic import make_dataset
    return make_dataset(tmp_path_factory.mktemp("tiny") / "mini", train=3, val=2, test=2, size=64, jobs=1)


@pytest.fixture
def grocery(tmp_path):
    "Run the command `grocery` as a user would; returns the finished process"
    def run(*arguments, **environment):
        return subprocess.run([str(Path(sys.executable).with_name("grocery")), *map(str, arguments)], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    return run
