import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
collect_ignore = ["labs/scripts"]  # a student's folder: tests/labs/test_labs.py runs it in a place of its own
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


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    "A folder with model.pth and model.onnx, of random weights"
    from servers import make_models
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def grocery(tmp_path):
    "Run the command `grocery` as a user would; returns the finished process"
    def run(*arguments, **environment):
        return subprocess.run([str(Path(sys.executable).with_name("grocery")), *map(str, arguments)], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)
    return run


@pytest.fixture
def here(tmp_path, monkeypatch, capfd):
    "The command in this process, which has torch in memory already; returns what a finished process would"
    from grocery_nb.cli import main
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        try: code = main([str(argument) for argument in arguments])
        except SystemExit as usage: code = usage.code
        return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capfd.readouterr())))
    return run


@pytest.fixture
def one_thread():
    "Torch with a single thread: the same sums on every machine, and no waiting for each other in small work"
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loaders(tiny, caches):
    "Make training and validation loader of the tiny set, at 48 pixels"
    from grocery_nb.data_utils import Preprocessing, get_loaders

    def make(**options):
        return get_loaders(batch_size=32, root=tiny, preprocessing=Preprocessing(size=48, resize=56), **options)
    return make


@pytest.fixture
def classes(loaders) -> int:
    return len(loaders()[0].dataset.classes)


def weights(model) -> bytes:
    "Everything in a model's state_dict, to the bit"
    return b"".join(t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values())


def random_case(seed: int, classes: int = 12, photos: int = 200, absent: int = 3):
    "Logits of a middling model, with classes that do not occur and some that are never answered"
    import numpy as np
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - absent, size=photos)
    logits = rng.normal(size=(photos, classes)) + 1.5 * np.eye(classes)[labels]
    logits[:, 1] -= 100
    return logits, labels
