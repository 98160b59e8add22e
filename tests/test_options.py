"What a user may say on the command line, and what is refused before the first step: values, places, flags without effect."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("--epochs", "1", "--batch-size", "16")
NASTY = "gr öße (1) it's $HOME & co"
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    "A model trained for one epoch, in a folder with a name that a shell would take apart"
    from grocery_nb.cli import main
    folder = tmp_path_factory.mktemp("trained") / NASTY
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROCERY_CACHE_DIR", str(folder.parent / "caches"))
        assert main(["train", "--data", str(tiny), *QUICK, "--quiet", "--output", str(folder / "m.pth")]) == 0
    return folder / "m.pth"


@pytest.fixture
def model(trained, tmp_path) -> Path:
    "A copy of it beside which files may be written"
    folder = tmp_path / NASTY
    folder.mkdir()
    for path in (trained, Path(f"{trained}.json")): shutil.copy(path, folder)
    return folder / "m.pth"


def refused(done, *words):
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("grocery"), done.stderr
    for word in words: assert word in last, last


def test_printed_commands_can_be_pasted(here, tiny, caches, tmp_path):
    "Every command that a command prints goes through a real shell"
    pasted = 0
    done = here("train", "--data", tiny, *QUICK, "--output", f"{NASTY}/m.pth")
    while "Next: " in done.stdout:
        command = done.stdout.split("Next: ")[1].splitlines()[0].strip()
        if " serve " in command: command += " --port 70000"  # refused at once, by a command that has found its model's name
        shell = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})
        pasted += 1
        if " serve " in command:
            assert shell.returncode == 2 and "70000" in shell.stderr, shell.stderr
            break
        assert shell.returncode == 0 and f"Report: {NASTY}/m.pth" in shell.stdout, shell.stderr
        done = here("export", f"{NASTY}/m.pth")
    assert pasted == 2


def test_quiet_is_one_line_and_verbose_the_traceback(here, model, tiny, caches):
    "Quiet has one meaning: errors alone, and one line of result on standard output"
    asked = [("train", "--data", tiny, *QUICK, "--output", "q.pth"), ("evaluate", model), ("compare", model, model), ("report", model), ("export", model),
             ("data", "mini", "--output", "mini", "--train", 1, "--val", 1, "--test", 1, "--size", 32), ("data", "validate", tiny), ("data", "sheet")]
    for command in asked:
        done = here(*command, "--quiet")
        assert done.returncode == 0 and not done.stderr.strip() and len(done.stdout.splitlines()) == 1, (command, done)
    assert "Traceback" not in here("evaluate", "no-such.pth").stderr and "Traceback" in here("evaluate", "no-such.pth", "--verbose").stderr


def test_every_command_knows_quiet_and_verbose():
    from grocery_nb.cli import build_parser
    def leaves(parser):
        below = [choice for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict) for choice in action.choices.values()]
        return [leaf for choice in below for leaf in leaves(choice)] if below else [parser]
    assert len(leaves(build_parser())) >= 12
    for parser in leaves(build_parser()):
        assert {"-q", "--quiet", "-v", "--verbose"} <= set(parser._option_string_actions), parser.prog


VALUES = {"--epochs": ["0", "-1", "2.5", "nan", "", "ten"], "--batch-size": ["0", "-1", "1.5"], "--learning-rate": ["0", "-1", "nan", "inf", "1e400", ""],
          "--mix": ["-0.1", "1.1", "nan"], "--weight-decay": ["-1", "inf"], "--ema": ["1", "-0.5"], "--clip": ["-1", "nan"], "--accumulate": ["0", "1.5"],
          "--patience": ["-1", "1.5"], "--probe-epochs": ["-1"], "--keep-probe": ["2"], "--label-smoothing": ["1"], "--warmup": ["1", "-0.1"], "--body-lr": ["0", "2"],
          "--train-size": ["0", "8", "100000"], "--min-area": ["0", "2"], "--light": ["1", "nan"], "--workers": ["-1", "1e3", "100000"], "--seed": ["-1", "1e3", "9" * 30],
          "--checkpoint-every": ["-1"], "--precision": ["float8"], "--label": ["medium"], "--weights": ["no-such.pth", ""], "--output": [""], "--log": [""],
          "--recipe": ["magic"]}


@pytest.mark.parametrize("flag", VALUES)
def test_values_are_refused_before_anything_is_read(flag, here, tmp_path):
    for value in VALUES[flag]:
        done = here("train", "--data", "no/such/folder", f"{flag}={value}")
        refused(done, flag)
    assert not list(tmp_path.iterdir())


def test_python_and_command_line_refuse_the_same(tiny, tmp_path):
    import argparse
    from grocery_nb.core import GroceryError
    from grocery_nb.run_training import add_arguments, train
    for name, value in dict(epochs=2.5, batch_size=0, mix=-1, workers=-1, seed="x", light=1, train_size=1, learning_rate=float("nan"), weights="no-such.pth").items():
        options = add_arguments(argparse.ArgumentParser()).parse_args(["--data", str(tiny), "--output", str(tmp_path / "m.pth")])
        setattr(options, name, value)
        with pytest.raises(GroceryError): train(options)
    assert not list(tmp_path.iterdir())


def test_the_ends_of_a_range_are_taken():
    import argparse
    from grocery_nb.run_training import add_arguments, check_options
    options = add_arguments(argparse.ArgumentParser()).parse_args("--data mini --recipe finetune --mix 1 --weight-decay 1 --warmup 0 --ema 0 --clip 0 --patience 0".split())
    checked = check_options(options)
    assert (checked.mix, checked.weight_decay, checked.warmup, checked.ema, checked.clip) == (1, 1, 0, 0, 0), "an explicit zero is not unset"


PLACES = {
    "a card": (["--output", "model.json"], "model.json"),
    "checkpoints": (["--output", "x.checkpoints"], "x.checkpoints"),
    "an exported model": (["--output", "x.onnx"], "x.onnx"),
    "a folder": (["--output", "folder"], "folder"),
    "below a file": (["--output", "notes.txt/m.pth"], "--output"),
    "somebody's text": (["--output", "notes.txt"], "notes.txt"),
    "somebody's package.json": (["--output", "package"], "package.json"),
    "the log is the weights": (["--log", "m.pth", "--output", "m.pth"], "m.pth"),
    "the log is the card": (["--log", "m.pth.json", "--output", "m.pth"], "m.pth.json"),
    "the log is the card, spelt otherwise": (["--log", "folder/../M.PTH.json", "--output", "m.pth"], "folder/../M.PTH.json"),
    "the log is the card through a link": (["--log", "link/m.pth.json", "--output", "m.pth"], "link/m.pth.json"),
    "the log lies among the checkpoints": (["--log", "m.pth.checkpoints/log", "--output", "m.pth"], "m.pth.checkpoints"),
    "the log is somebody's text": (["--log", "notes.txt", "--output", "m.pth"], "notes.txt"),
    "a file where the checkpoints would stand": (["--output", "taken.pth"], "taken.pth.checkpoints"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_are_checked_before_the_first_step(case, here, tiny, tmp_path):
    flags, word = PLACES[case]
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("notes.txt", "package.json", "package", "taken.pth.checkpoints"): (tmp_path / name).write_text('{\n "name": "mine"\n}')
    if case == "somebody's package.json": (tmp_path / "package").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused(here("train", "--data", tiny, *QUICK, *flags), word)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_pages_never_take_the_place_of_other_files(here, model, tiny, tmp_path):
    (tmp_path / "notes.html").write_text("mine")
    kept = {path: path.read_bytes() for path in (model, Path(f"{model}.json"), tmp_path / "notes.html")}
    for place in (model, f"{model}.json", tmp_path / "notes.html", tmp_path, tmp_path / "notes.html" / "x.html"):
        refused(here("evaluate", model, "--report", place))
        refused(here("report", model, "--output", place))
        refused(here("compare", model, model, "--output", place))
        if place != model or not place: refused(here("export", model, "--output", place))
    refused(here("data", "sheet", "--output", "notes.html"), "notes.html")
    refused(here("data", "mini", "--output", tmp_path), "not Mini Grocery")
    refused(here("demo", "--output", tmp_path / "notes.html"), "notes.html")
    assert {path: path.read_bytes() for path in kept} == kept


def test_names_are_made_by_adding(here, tiny, caches, tmp_path):
    for name in ("m.v1", "m.v2"): assert here("train", "--data", tiny, *QUICK, "--quiet", "--output", name, "--seed", name[-1]).returncode == 0
    for name in ("m.v1", "m.v2"): assert here("evaluate", name, "--quiet").returncode == 0
    assert {"m.v1", "m.v1.json", "m.v1.checkpoints", "m.v1.val.html", "m.v2.json"} <= {path.name for path in tmp_path.iterdir()}


IDLE = [("probe", "--light", "0.5"), ("probe", "--train-size", "64"), ("probe", "--body-lr", "0.5"), ("probe", "--keep-probe", "0.1"), ("probe", "--no-freeze-norm"),
        ("scratch", "--probe-epochs", "3"), ("scratch", "--keep-probe", "0.1"), ("finetune", "--probe-epochs", "0", "--keep-probe", "0.1")]


@pytest.mark.parametrize("recipe, flag, more", [(case[0], case[1], case[2:]) for case in IDLE])
def test_flags_without_effect_are_refused(recipe, flag, more, here, tiny):
    refused(here("train", "--data", tiny, "--recipe", recipe, flag, *more), "has no effect")


def test_a_probe_honours_what_it_takes(here, tiny, caches, tmp_path):
    "Each of these changes the weights of a probe: none is ignored"
    def digest(*flags):
        done = here("train", "--data", tiny, "--probe", "--epochs", 3, "--quiet", "--output", "p.pth", *flags)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "p.pth.json").read_text())["sha256"]
    plain = digest()
    changed = {flags: digest(*flags) for flags in ((("--class-weights", "balanced")), ("--label-smoothing", "0.2"), ("--ema", "0.9"), ("--schedule", "cosine"),
                                                   ("--warmup", "0.5"), ("--clip", "0.01"), ("--accumulate", "2"), ("--weight-decay", "0.5"))}
    same = [flags for flags, found in changed.items() if found == plain]
    assert same in ([], [("--class-weights", "balanced")]), "the tiny set is balanced, but for a class or two"
    assert digest("--log", "log.jsonl") == plain and (tmp_path / "log.jsonl").read_text().count("\n") > 3
    assert (tmp_path / "p.pth.checkpoints").is_dir()


def test_a_folder_of_photos_is_fine_tuned_where_weights_are_at_hand(here, tiny, tmp_path, monkeypatch):
    from grocery_nb.training import options as module
    photos = Path(shutil.copytree(tiny, tmp_path / "photos"))
    (photos / "manifest.json").unlink()
    def chosen(*flags):
        import argparse
        return module.choose_recipe(module.add_arguments(argparse.ArgumentParser()).parse_args(["--data", str(photos), *flags]))
    for at_hand, recipe in ((True, "finetune"), (False, "scratch")):
        monkeypatch.setattr(module, "weights_at_hand", lambda backbone: at_hand)
        assert chosen()[0] == recipe and chosen()[1]
    assert chosen("--recipe", "probe") == ("probe", None) and chosen("--weights", "none")[0] == "scratch"
    done = here("train", "--data", photos, *QUICK)
    assert done.returncode == 0 and done.stderr.splitlines()[0].startswith("Recipe: scratch, since no ImageNet weights"), done.stderr
    monkeypatch.setattr(module, "weights_at_hand", lambda backbone: True)
    done = here("train", "--data", tiny, *QUICK, "--output", "m.pth")
    assert done.stderr.splitlines()[0].startswith("Recipe: scratch, since drawn pictures"), "Mini Grocery is drawn, wherever it lies"


def test_what_was_trained_is_saved_before_it_is_measured(here, tiny, caches, tmp_path, monkeypatch):
    from grocery_nb import run_training
    from grocery_nb.core import GroceryError
    def broken(*_): raise GroceryError("the figures cannot be had")
    monkeypatch.setattr(run_training, "judge", broken)
    refused(here("train", "--data", tiny, *QUICK), "the figures cannot be had")
    from grocery_nb.model_utils import load_model
    assert load_model(None, tmp_path / "model.pth").card.classes


def test_a_validation_split_of_one_photo(here, tiny, caches, tmp_path):
    data = Path(shutil.copytree(tiny, tmp_path / "data"))
    (data / "val.txt").write_text((data / "val.txt").read_text().splitlines()[0] + "\n")
    done = here("train", "--data", data, *QUICK, "--quiet")
    assert done.returncode == 0 and "1 photo" in done.stdout, done.stderr
    assert here("evaluate", "model.pth", "--quiet").returncode == 0


def test_from_a_model_of_ones_own(here, model, tiny, caches, tmp_path):
    done = here("train", "--data", tiny, *QUICK, "--weights", model, "--recipe", "scratch", "--label", "fine", "--output", "own.pth", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "own.pth.json").read_text())["num_classes"] == 36
    refused(here("train", "--data", tiny, *QUICK, "--weights", model, "--output", model), "m.pth")


def test_a_finished_training_is_prolonged(here, tiny, caches, tmp_path):
    def train(output, *flags): return here("train", "--data", tiny, "--batch-size", 16, "--quiet", "--output", output, *flags)
    assert train("long.pth", "--epochs", 2).returncode == 0 and train("m.pth", "--epochs", 1).returncode == 0
    done = train("m.pth", "--epochs", 2, "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.pth").read_bytes() == (tmp_path / "long.pth").read_bytes()


def test_home_folders_and_other_folders(here, tiny, caches, tmp_path, monkeypatch):
    "~ is resolved in every spelling, and a card names its data so that it is found from anywhere"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copytree(tiny, tmp_path / "data")
    assert here("train", "--data", "data", *QUICK, "--quiet", "--output=~/x.pth", "--log=~/log.jsonl").returncode == 0
    assert not (tmp_path / "~").exists() and (tmp_path / "home" / "log.jsonl").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = here("evaluate", "~/x.pth", "--quiet", "--report=~/page.html")
    assert done.returncode == 0 and (tmp_path / "home" / "page.html").exists(), done.stderr


def test_no_traceback_from_odd_arguments(here, model, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "noise.pth").write_bytes(os.urandom(3000))
    (tmp_path / "card.pth").touch()
    (tmp_path / "card.pth.json").write_text('{"format": []}')
    odd = [tmp_path, tmp_path / "empty", tmp_path / "noise.pth", tmp_path / "card.pth", tmp_path / "no-such", "", "~nobody-here/x", os.fsdecode(b"\xff.pth"), "a" * 300, "/dev/null"]
    for value in odd:
        for command in (("evaluate", value), ("report", value), ("compare", model, value), ("compare", value, model), ("export", value), ("serve", "--model", value, "--port", 0),
                        ("evaluate", model, "--data", value), ("data", "validate", value), ("train", "--weights", value), ("train", "--data", value), ("demo", "--data", value)):
            done = here(*command, "--quiet")
            assert done.returncode in (1, 2) and "Traceback" not in done.stderr, (command, done.stderr)
    for command in (("serve", "--port", "-1"), ("serve", "--port", "x"), ("ui", "--port", "70000"), ("ui", "--api-url", "nonsense"), ("serve", "--host", "no host", "--port", 0, "--model", model),
                    ("data", "mini", "--train", "-1", "--output", "x"), ("data", "mini", "--size", "1", "--output", "x"), ("data", "mini", "--label-noise", "nan", "--output", "x"),
                    ("data", "mini", "--seed", "9" * 40, "--output", "x", "--train", "-1"), ("data", "mini", "--corrupt-files", "-1", "--output", "x"),
                    ("data", "sheet", "--output", tmp_path), ("demo", "--seed", "-1"), ("demo", "--seed", "x")):
        done = here(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (command, done.stderr)


def test_a_reader_that_goes_away(tiny, tmp_path):
    "`grocery data validate | head -0` is no error of anybody"
    process = subprocess.Popen([str(BIN / "grocery"), "data", "validate", str(tiny)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=60) in (0, 141) and "Traceback" not in said and "Exception" not in said, said
