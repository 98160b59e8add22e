"Measuring starts from the file: which photos, which temperature, and where the page may stand."
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from grocery_nb.analysis import measuring
from grocery_nb.core import GroceryError
from grocery_nb.synthetic import make_dataset


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    "A model trained for one epoch on a copy of the tiny set, which tests may change"
    from grocery_nb.cli import main
    folder = tmp_path_factory.mktemp("measuring")
    data = shutil.copytree(tiny, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROCERY_CACHE_DIR", str(folder / "caches"))
        assert main(["train", "--data", str(data), "--epochs", "1", "--quiet", "--batch-size", "16", "--output", str(folder / "model.pth")]) == 0
    return folder / "model.pth"


@pytest.fixture
def here(tmp_path, monkeypatch, capfd, caches):
    "The command in this process and in an empty folder; returns what a finished process would"
    from grocery_nb.cli import main
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capfd.readouterr())))
    return run


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    "The model with its card, and its data under data/, to be changed"
    card = next(path for path in (Path(f"{trained}.json"), trained.with_suffix(".json")) if path.exists())
    for path in (trained, card): shutil.copy(path, tmp_path / path.name)
    text = json.loads((tmp_path / card.name).read_text())
    text["data"] = str(shutil.copytree(trained.parent / "data", tmp_path / "data"))
    (tmp_path / card.name).write_text(json.dumps(text))
    return tmp_path / "model.pth"


def change_card(model: Path, change):
    "Rewrite the card of a model"
    card = next(path for path in (Path(f"{model}.json"), model.with_suffix(".json")) if path.exists())
    text = json.loads(card.read_text())
    change(text)
    card.write_text(json.dumps(text))


def shorter(index: Path, rows: int = 2):
    "Drop the last rows of an index"
    index.write_text("\n".join(index.read_text().splitlines()[:-rows]) + "\n")


# Which photos

def test_another_val_does_not_choose_the_temperature(copy, tmp_path, caches):
    own = measuring.measure(copy)
    assert measuring.probabilities(own)[0].cross_fitted and measuring.remark(own) is None
    other = measuring.measure(copy, str(make_dataset(tmp_path / "other", train=1, val=3, test=1, size=32, seed=9, jobs=1)))
    calibration = measuring.probabilities(other)[0]
    assert not calibration.cross_fitted and calibration.temperature == own.card.temperature
    assert "is not the split that the card of" in measuring.remark(other)


def test_the_same_photos_under_another_name_are_cross_fitted(copy, tmp_path, caches):
    (tmp_path / "data" / "test.txt").write_bytes((tmp_path / "data" / "val.txt").read_bytes())
    assert measuring.probabilities(measuring.measure(copy, split="test"))[0].cross_fitted


def test_a_val_split_that_changed_since_training_is_named(copy, here, tmp_path):
    assert here("evaluate", copy).stderr == ""
    shorter(tmp_path / "data" / "val.txt")
    done = here("evaluate", copy, "--report", "r.html")
    said = done.stderr.splitlines()
    assert done.returncode == 0 and len(said) == 1 and "not the split that the card of" in said[0], done.stderr
    assert "not the split that the card of" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "not the split" in json.loads(here("evaluate", copy, "--json").stdout)["remark"]
    assert "not the split" in here("report", copy, "--output", "s.html").stderr
    done = here("compare", copy, copy, "--output", "c.html")
    assert "not the split" in done.stderr and "not the split" in (tmp_path / "c.html").read_text(encoding="utf-8")


def test_a_photo_that_changed_is_another_split(copy, tmp_path, caches):
    from PIL import Image
    first = (tmp_path / "data" / "val.txt").read_text().split(",")[0]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data" / first)
    assert "not the split" in measuring.remark(measuring.measure(copy))
    assert measuring.remark(measuring.measure(copy, split="train")) is None


def test_a_card_without_a_digest_says_so(copy, caches):
    change_card(copy, lambda card: card["metrics"].pop("digest"))
    old = measuring.measure(copy)
    assert "keeps no digest of its val split" in measuring.remark(old)
    assert not measuring.probabilities(old)[0].cross_fitted
    change_card(copy, lambda card: card.update(metrics={}, data_digest=None))
    assert "keeps no digest of its train split" in measuring.remark(measuring.measure(copy, split="train"))


def test_data_that_has_gone_is_one_sentence(copy, here, tmp_path, monkeypatch):
    shutil.move(tmp_path / "data", tmp_path / "moved")
    for command in (("evaluate", copy), ("report", copy), ("compare", copy, copy)):
        done = here(*command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such folder now; say with --data" in done.stderr, done.stderr
    assert here("evaluate", copy, "--data", tmp_path / "moved").returncode == 0
    change_card(copy, lambda card: card.update(data=None))
    with pytest.raises(GroceryError, match="does not say what the model was trained on; name photos with --data"): measuring.measure(copy)
    change_card(copy, lambda card: card.update(label=None))
    with pytest.raises(GroceryError, match="does not say whether its classes are fine or coarse"): measuring.measure(copy, str(tmp_path / "moved"))


def test_a_val_split_of_one_photo_trains_and_is_measured(tiny, here, tmp_path):
    data = shutil.copytree(tiny, tmp_path / "data")
    (data / "val.txt").write_text((data / "val.txt").read_text().splitlines()[0] + "\n")
    done = here("train", "--data", data, "--epochs", "1", "--quiet", "--batch-size", "16", "--output", "m.pth")
    assert done.returncode == 0, done.stderr
    assert measuring.measure(tmp_path / "m.pth").card.metrics["calibration"]["undetermined"] is True
    done = here("evaluate", "m.pth", "--report", "r.html")
    assert done.returncode == 0 and "1 photos" in done.stdout, done.stderr
    assert "These photos determine no temperature" in (tmp_path / "r.html").read_text(encoding="utf-8")


# Where the page stands

def test_two_data_sets_have_two_pages(copy, here, tmp_path):
    other = make_dataset(tmp_path / "other", train=1, val=1, test=1, size=32, seed=9, jobs=1)
    pages = [re.search("Report: (.*)", here("evaluate", "model.pth", *more).stdout)[1]
             for more in ((), ("--data", tmp_path / "data"), ("--data", other), ("--split", "test"), ("--split", "test", "--data", other))]
    assert pages[0] == pages[1] == "model.pth.val.html" and pages[3] == "model.pth.test.html" and len(set(pages)) == 4, pages
    assert all((tmp_path / page).exists() and page.startswith("model.pth.") for page in pages)
    shorter(tmp_path / "data" / "val.txt")
    assert re.search("Report: (.*)", here("evaluate", "model.pth").stdout)[1] not in pages, "changed photos do not take the page of the old ones"


def test_models_whose_names_differ_after_a_dot_have_two_pages(tmp_path, copy):
    for name in ("m.v1", "m.v2"):
        shutil.copy(copy, tmp_path / name)
        for card in (Path(f"{copy}.json"), copy.with_suffix(".json")):
            if card.exists(): shutil.copy(card, tmp_path / f"{name}.json")
            if card.exists(): shutil.copy(card, (tmp_path / name).with_suffix(".json"))
    assert measuring.page_for(tmp_path / "m.v1").name == "m.v1.val.html" and measuring.page_for(tmp_path / "m.v2").name == "m.v2.val.html"


@pytest.mark.parametrize("name", ["card", "weights", "notes.html", "folder", "notes.html/page.html", "a" * 300])
def test_what_is_no_page_of_ours_stays_and_nothing_is_measured(name, copy, here, tmp_path, monkeypatch):
    card = next(path for path in (Path(f"{copy}.json"), copy.with_suffix(".json")) if path.exists())
    (tmp_path / "notes.html").write_text("<!doctype html><p>Mine")
    (tmp_path / "folder").mkdir()
    target = {"card": card.name, "weights": copy.name}.get(name, name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr("grocery_nb.cli.measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("grocery_nb.cli.compare", lambda *_: pytest.fail("it was measured"))
    for command in (("evaluate", copy, "--report", target), ("evaluate", copy, "--json", "--report", target), ("report", copy, "--output", target),
                    ("compare", copy, copy, "--output", target)):
        done = here(*command)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and target.split("/")[0] in done.stderr, done.stderr
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_page_of_ours_is_replaced(copy, here, tmp_path):
    for _ in range(2): assert here("evaluate", copy, "--report", "r.html").returncode == 0
    assert here("compare", copy, copy, "--output", "r.html").returncode == 0


def test_demo_looks_at_the_place_of_its_report_first(here, tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("Mine")
    monkeypatch.setattr("grocery_nb.cli.train", lambda *_: pytest.fail("it was trained"))
    done = here("demo", "--output", ".", "--quiet")
    assert done.returncode == 2 and "report.html" in done.stderr and (tmp_path / "report.html").read_text() == "Mine"
