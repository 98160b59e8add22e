"""The scripts of the course's labs on our package: `data_utils.py`, `model_utils.py` and `train_utils.py` are one line each, all else calls them as the labs do.

The scripts are our own; they make the labs' calls. Without a network there are no ImageNet weights, so a file of random ones stands in their place in torch's
cache. Our package would refuse it, since its digest is not the one in its name: that one check is switched off in the processes started here.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NO_DIGEST = "import grocery_nb.training.backbones as b; b.check_name = lambda path: None"  # a sitecustomize.py
SCRIPTS = Path(__file__).with_name("scripts")


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory) -> Path:
    "A cache of torch that holds a file of weights with the name of the pretrained ones"
    import torch
    from torchvision.models import MobileNet_V3_Small_Weights, mobilenet_v3_small
    folder = tmp_path_factory.mktemp("torch")
    file = folder / "hub" / "checkpoints" / MobileNet_V3_Small_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(mobilenet_v3_small().state_dict(), file)
    (folder / "sitecustomize.py").write_text(NO_DIGEST, encoding="utf-8")
    return folder


@pytest.fixture
def lab(tmp_path, tiny, torch_home):
    "A student's folder with the scripts, and the photos where the labs have them: run a Python command line in it"
    scripts, home = tmp_path / "mlops-workshops", tmp_path / "home"
    shutil.copytree(SCRIPTS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    home.mkdir()
    (home / "GroceryStoreDataset").mkdir()
    (home / "GroceryStoreDataset" / "dataset").symlink_to(tiny)

    def run(*arguments, **environment):
        settings = {**os.environ, "HOME": str(home), "USERPROFILE": str(home), "TORCH_HOME": str(torch_home), "PYTHONPATH": str(torch_home), "GROCERY_CACHE_DIR": str(tmp_path / "caches"),
                    "GROCERY_DATA_DIR": str(home / "GroceryStoreDataset"), "OMP_NUM_THREADS": "1",
                    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1", **environment}
        return subprocess.run([sys.executable, *arguments], cwd=scripts, capture_output=True, text=True, env=settings, timeout=300)
    run.folder = scripts
    return run


def test_the_training_script(lab):
    done = lab("run_training.py", "--batch-size", "32", "--epochs", "1", "--learning-rate", "1e-3", "--output", "model.pt")
    assert done.returncode == 0, done.stderr
    first, second = (float(word.split(" ")[-1]) for word in done.stdout.strip().replace("again ", "").split(", loaded"))
    assert first == second and (lab.folder / "model.pt").exists()


def test_the_notebook_by_position_and_default(lab):
    done = lab("notebook_script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accuracy ") and (lab.folder / "model.pth").exists()


def test_the_unit_tests(lab):
    done = lab("-m", "pytest", "-q", "-p", "no:dash", "-p", "no:cacheprovider")
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


def test_weights_that_cannot_be_had_are_one_sentence(lab, tmp_path):
    done = lab("run_training.py", "--epochs", "1", TORCH_HOME=str(tmp_path / "empty"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "ModelError" in last and "weights=None" in last, done.stderr
    assert not (lab.folder / "model.pth").exists()


def test_the_front_end_asks_the_backend(lab, models, tiny):
    from servers import running
    with running(models, MODEL_PATH=models / "model.onnx", DATA=tiny) as backend:
        done = lab("ask.py", backend.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["image/jpeg", "True", "400"]


def test_a_file_that_is_not_the_pretrained_one_is_refused(lab, torch_home):
    done = lab("run_training.py", "--epochs", "1", PYTHONPATH="")
    assert done.returncode == 1 and "is damaged" in done.stderr.strip().splitlines()[-1], done.stderr
