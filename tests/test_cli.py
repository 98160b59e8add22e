"The command `grocery` as a user meets it: real processes, real files, and what happens to bad input."
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("--epochs", "1", "--quiet", "--batch-size", "16")


@pytest.fixture
def data(tiny, tmp_path) -> Path:
    "A copy of the tiny set, to be damaged"
    return Path(shutil.copytree(tiny, tmp_path / "data"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    "A model trained for one epoch on the tiny set, by the command itself"
    folder = tmp_path_factory.mktemp("trained")
    command = [str(Path(sys.executable).with_name("grocery")), "train", "--data", str(tiny), *QUICK]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env={**os.environ, "GROCERY_CACHE_DIR": str(folder / "caches")})
    return folder / "model.pth"


def refused(done, *words):
    "One sentence on standard error, exit code 2, no traceback"
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(said) == 1 and said[0].startswith("grocery: "), done.stderr
    for word in words: assert word in said[0], said[0]


def first_row(data: Path, change) -> Path:
    "Rewrite the first row of train.txt"
    index = data / "train.txt"
    rows = index.read_text().splitlines()
    index.write_text("\n".join([change(rows[0]), *rows[1:]]) + "\n")
    return data / rows[0].split(",")[0]


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:400])


BAD_DATA = {
    "wrong column count": (lambda data: first_row(data, lambda row: row + ", 7"), ["train.txt", "row 1", "4"]),
    "label outside classes.csv": (lambda data: first_row(data, lambda row: row.split(",")[0] + ", 999, 0"), ["train.txt", "row 1", "999"]),
    "label that is no number": (lambda data: first_row(data, lambda row: row.split(",")[0] + ", apple, 0"), ["train.txt", "row 1", "apple"]),
    "zero-byte photo": (lambda data: first_row(data, str).write_bytes(b""), ["row 1", "0 bytes"]),
    "truncated photo": (lambda data: truncate(first_row(data, str)), ["row 1", "train.txt"]),
    "photo that is text": (lambda data: first_row(data, str).write_text("hello"), ["row 1", "train.txt"]),
    "missing photo": (lambda data: first_row(data, str).unlink(), ["row 1", "train.txt"]),
    "no train split": (lambda data: (data / "train.txt").unlink(), ["train"]),
    "no classes.csv": (lambda data: (data / "classes.csv").unlink(), ["classes.csv"]),
}


@pytest.mark.parametrize("damage", BAD_DATA, ids=list(BAD_DATA))
def test_bad_data_is_one_sentence_and_costs_nothing(damage, data, trained, here, caches, tmp_path):
    spoil, words = BAD_DATA[damage]
    spoil(data)
    shutil.copy(trained, tmp_path)
    refused(here("train", "--data", data, *QUICK), *words)
    assert (tmp_path / "model.pth").read_bytes() == trained.read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "model.pth.json"]


def test_missing_folder(grocery):
    refused(grocery("train", "--data", "no/such/folder", *QUICK), "no/such/folder", "no folder")


def test_output_that_cannot_be_is_found_before_the_training(here, tiny, tmp_path):
    (tmp_path / "file").touch()
    refused(here("train", "--data", tiny, "--output", "file/model.pth"), "file", "--output")


def test_test_split_that_is_not_there(here, data, trained):
    (data / "test.txt").unlink()
    refused(here("evaluate", trained, "--data", data, "--split", "test"), "test", "train and val")


def test_model_of_another_class_count(here, trained, tiny, tmp_path):
    from grocery_nb.synthetic import make_dataset
    other = make_dataset(tmp_path / "other", train=1, val=1, test=1, size=32, jobs=1)
    classes = (other / "classes.csv").read_text().splitlines()
    index = (other / "val.txt").read_text().splitlines()
    few = [row for row in classes[1:] if row.split(",")[3] in ("0", "1")]
    fine = {row.split(",")[1] for row in few}
    (other / "classes.csv").write_text("\n".join([classes[0], *few]) + "\n")
    (other / "val.txt").write_text("\n".join(row for row in index if row.split(",")[1].strip() in fine) + "\n")
    refused(here("evaluate", trained, "--data", other), "21 classes", "2")


class Malicious:
    "A pickle that writes a file where it is read"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (os.system, (f"touch {self.path}",))


def test_malicious_pickle_is_refused_and_not_run(grocery, tmp_path):
    (tmp_path / "model.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "was-here")))
    done = grocery("evaluate", "model.pth")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "model.pth" in done.stderr
    assert not (tmp_path / "was-here").exists()
    os.system(f"{sys.executable} -c 'import pickle; pickle.load(open(\"{tmp_path / 'model.pth'}\", \"rb\"))'")
    assert (tmp_path / "was-here").exists(), "the pickle must be a live one, or this test proves nothing"


def test_changed_weights_are_refused(here, trained, tmp_path):
    for suffix in ("", ".json"): shutil.copy(Path(f"{trained}{suffix}"), tmp_path)
    weights = bytearray((tmp_path / "model.pth").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.pth").write_bytes(weights)
    refused(here("evaluate", "model.pth"), "model.pth")


def test_no_model(here):
    refused(here("report", "no-such.pth"), "no-such.pth", "train a model first")


def test_usage_errors_have_exit_code_2(grocery):
    for wrong in (["train", "--epochs", "-1"], ["train", "--learning-rate", "fast"], ["train", "--label", "medium"], ["train", "--ema", "1"], ["bake"], []):
        done = grocery(*wrong)
        assert done.returncode == 2 and "usage: grocery" in done.stderr and "Traceback" not in done.stderr


def test_train_evaluate_report(here, trained, caches, tmp_path):
    card = json.loads(Path(f"{trained}.json").read_text())
    done = here("evaluate", trained, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == pytest.approx(card["metrics"]["top1"])
    done = here("report", trained, "--split", "test", "--output", "pages/report.html")
    assert done.returncode == 0, done.stderr
    assert "Learning curves" in (tmp_path / "pages" / "report.html").read_text(encoding="utf-8")


def test_evaluate_writes_the_report_beside_the_model(here, trained, caches, tmp_path):
    for suffix in ("", ".json"): shutil.copy(Path(f"{trained}{suffix}"), tmp_path)
    done = here("evaluate", "model.pth", "--split", "test")
    assert done.returncode == 0 and "top-1 accuracy" in done.stdout and "Report: model.pth.test.html" in done.stdout, done.stderr
    assert "<html" in (tmp_path / "model.pth.test.html").read_text(encoding="utf-8")
    assert here("evaluate", "model.pth", "--json", "--report", "here.html").returncode == 0 and (tmp_path / "here.html").exists()
    assert not (tmp_path / "model.pth.val.html").exists(), "--json alone writes no page"


def test_compare_two_models(here, trained, tiny, caches, tmp_path):
    assert here("train", "--data", tiny, *QUICK, "--label", "fine", "--seed", 5, "--output", "fine.pth").returncode == 0
    done = here("compare", trained, "fine.pth", "--split", "test", "--json")
    found = json.loads(done.stdout)
    assert found["level"] == "coarse" and found["both"] + found["only_a"] + found["only_b"] + found["neither"] == 72
    done = here("compare", trained, "fine.pth", "--split", "test")
    assert done.returncode == 0 and "comparison.html" in done.stdout and (tmp_path / "comparison.html").exists(), done.stderr
    refused(here("compare", trained, "nowhere.pth"), "nowhere.pth")


def test_card_of_a_fine_model_serves_coarse_questions(here, tiny, caches, tmp_path):
    assert here("train", "--data", tiny, *QUICK, "--label", "fine").returncode == 0
    card = json.loads((tmp_path / "model.pth.json").read_text())
    assert len(card["coarse"]["of"]) == card["num_classes"] == 36 and len(card["coarse"]["classes"]) == 21
    assert card["temperature"] > 0 and set(card["metrics"]["hierarchy"]) >= {"fine_top1", "coarse_top1", "agreement"}


def test_model_without_a_card(here, trained, tmp_path):
    shutil.copy(trained, tmp_path / "bare.pth")
    refused(here("evaluate", "bare.pth"), "bare.pth has no card bare.pth.json beside it")


def test_unfinished_training_is_not_overwritten(here, tiny, caches, tmp_path):
    from grocery_nb.training.checkpoints import CheckpointFolder
    assert here("train", "--data", tiny, *QUICK).returncode == 0
    path, state = CheckpointFolder(tmp_path / "model.pth.checkpoints").newest()
    CheckpointFolder(tmp_path / "model.pth.checkpoints").save({**state, "finished": False}, state["total_steps"] + 1)
    refused(here("train", "--data", tiny, *QUICK), "not finished", "--resume")
    refused(here("train", "--data", tiny, *QUICK, "--resume", "--learning-rate", 0.5), "learning rate", "0.001", "0.5")
    assert here("train", "--data", tiny, *QUICK, "--resume").returncode == 0


def test_probe_is_repeatable(here, tiny, caches, tmp_path):
    def run(name):
        done = here("train", "--data", tiny, "--probe", "--epochs", "3", "--quiet", "--label", "fine", "--output", name)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / f"{name}.json").read_text())
    cold, warm = run("a.pth"), run("b.pth")
    assert cold["sha256"] == warm["sha256"], "features from the cache give the same head"
    assert cold["num_classes"] == 36 and cold["label"] == "fine" and cold["history"][2]["epoch"] == 3


def test_interrupted_training_leaves_nothing(tiny, caches, tmp_path):
    command = [str(Path(sys.executable).with_name("grocery")), "train", "--data", str(tiny), "--epochs", "500"]
    def listen(): signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background ignores Ctrl-C
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    for piece in iter(lambda: process.stderr.read(1), ""):
        if piece == "%": break  # the first progress bar: the training runs
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "interrupted" in said and "--resume" in said and "Traceback" not in said
    assert not (tmp_path / "model.pth").exists() and not list(tmp_path.rglob("*.tmp"))


def test_data_commands(here, tmp_path):
    done = here("data", "mini", "--output", "noisy", "--train", 2, "--val", 1, "--test", 1, "--size", 48, "--corrupt-files", 2,
                   "--label-noise", 0.1, "--quiet")
    assert done.returncode == 0, done.stderr
    done = here("data", "validate", "noisy")
    assert done.returncode == 1 and len(re.findall("corrupt file", done.stdout)) == 2
    refused(here("data", "mini", "--output", "x", "--label-noise", 2, "--quiet"), "label_noise", "2")
    assert not (tmp_path / "x").exists()
    assert here("data", "sheet", "--output", "sheet.jpg").returncode == 0 and (tmp_path / "sheet.jpg").stat().st_size > 50_000


def test_help_loads_no_torch():
    for arguments in (["--help"], ["train", "--help"], ["demo", "--help"], ["data", "mini", "--help"]):
        code = f"import sys\nfrom grocery_nb.cli import main\ntry: main({arguments})\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False" and "usage: grocery" in done.stdout


def test_demo(grocery, tmp_path):
    "The promise of the front page, on the default set (drawn into the user's cache if it is not there)"
    done = grocery("demo", "--quiet", "--output", "demo")
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)%", done.stdout)[1])
    assert 85 <= accuracy < 100
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"model.pth", "model.pth.json", "model.pth.checkpoints", "report.html"}


@pytest.mark.slow
def test_probe_on_the_real_photos(grocery, photos, tmp_path):
    done = grocery("train", "--data", "grocery", "--probe", "--quiet", GROCERY_DATA_DIR=str(photos))
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "model.pth.json").read_text())["metrics"]
    assert metrics["n"] == 296 and metrics["top1"] >= 0.78
