"The catalog against bad input: every fault is one sentence with its place, and no label is ever wrong in silence."
import json
import os
import random
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from grocery_nb.data import rows as reading
from grocery_nb.catalog import (
    DIGESTS, DataError, data_digest, data_dir, download, get_classes, load_split, read_classes, read_index, split_digest,
    validate_dataset, verify_digests,
)

CLASSES = """Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str)
Golden-Delicious,0,Apple,0,/a
Granny-Smith,1,Apple,0,/b
Kiwi,2,Kiwi,1,/c
Lemon,3,Lemon,2,/d
"""
NAMES = ["Golden-Delicious", "Granny-Smith", "Kiwi", "Lemon"]


def jpeg(seed: int, size: int = 64) -> bytes:
    "A photo-like picture whose bytes depend on the seed"
    buffer = BytesIO()
    Image.frombytes("RGB", (size, size), random.Random(seed).randbytes(3 * size * size)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def shop(tmp_path) -> Path:
    "A whole data set of 4 classes: 3 pictures a class in train, 2 in val"
    root, seed = tmp_path / "shop", 0
    root.mkdir()
    (root / "classes.csv").write_text(CLASSES, encoding="utf-8", newline="")
    for split, count in (("train", 3), ("val", 2)):
        rows = []
        for fine, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                path, seed = f"{split}/{name}/{name}_{n}.jpg", seed + 1
                (root / path).write_bytes(jpeg(seed))
                rows.append(f"{path}, {fine}, {max(0, fine - 1)}\n")
        (root / f"{split}.txt").write_text("".join(rows), encoding="utf-8")
    return root


def sentence(error) -> str:
    "The text of an error, after a look that a person can read it as one sentence"
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and " object at 0x" not in text and 20 < len(text) < 420, text
    return text


# Index files

GOOD_INDEXES = {
    "spaces": b"train/Kiwi/Kiwi_0.jpg, 2, 1\n",
    "no spaces": b"train/Kiwi/Kiwi_0.jpg,2,1\n",
    "many spaces": b"  train/Kiwi/Kiwi_0.jpg  ,  2 ,1  \n",
    "no last newline": b"train/Kiwi/Kiwi_0.jpg, 2, 1",
    "quotes": b'"train/Kiwi/Kiwi_0.jpg","2","1"\n',
    "quotes and spaces": b'"train/Kiwi/Kiwi_0.jpg" , "2", "1"\n',
    "byte order mark": b"\xef\xbb\xbftrain/Kiwi/Kiwi_0.jpg, 2, 1\n",
    "windows": b"train/Kiwi/Kiwi_0.jpg, 2, 1\r\n\r\n",
    "old mac": b"train/Kiwi/Kiwi_0.jpg, 2, 1\r",
    "header": b"path,fine,coarse\ntrain/Kiwi/Kiwi_0.jpg,2,1\n",
    "quoted header": b'\xef\xbb\xbf"Image Path","Fine label (int)","Coarse label (int)"\r\n"train/Kiwi/Kiwi_0.jpg",2,1\r\n',
    "blank lines": b"\n\n  \ntrain/Kiwi/Kiwi_0.jpg, 2, 1\n\n",
}


@pytest.mark.parametrize("text", GOOD_INDEXES.values(), ids=GOOD_INDEXES)
def test_index_as_people_write_it(shop, text):
    (shop / "mine.csv").write_bytes(text)
    [item] = read_index(shop / "mine.csv")
    assert item[:3] == ("train/Kiwi/Kiwi_0.jpg", 2, 1)
    shown = text.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert "Kiwi_0" in shown[item.row - 1], "the row number is the one that an editor shows"


def test_path_with_a_comma_and_other_letters(shop):
    (shop / "mine.csv").write_text('"train/Crème, fraîche.jpg", 3, 2\n', encoding="utf-8")
    assert read_index(shop / "mine.csv")[0][:3] == ("train/Crème, fraîche.jpg", 3, 2)


BAD_ROWS = {
    "one column": ("train/a.jpg", "1 column where 3 are needed"),
    "two columns": ("train/a.jpg, 2", "2 columns where 3 are needed"),
    "four columns": ("train/a.jpg, 2, 1, 0", "4 columns where 3 are needed"),
    "unquoted comma": ("train/a, b.jpg, 2, 1", "4 columns where 3 are needed.*quotation marks"),
    "semicolons": ("train/a.jpg;2;1", "1 column where 3 are needed"),
    "open quote": ('"train/a.jpg, 2, 1', "1 column where 3 are needed"),
    "a name for a label": ("train/a.jpg, Kiwi, 1", "the fine label 'Kiwi' is not a whole number"),
    "a float from pandas": ("train/a.jpg, 2, 1.0", "the coarse label '1.0' is not a whole number"),
    "negative": ("train/a.jpg, -1, 0", "the fine label '-1' is not a whole number"),
    "underscore": ("train/a.jpg, 0_2, 1", "the fine label '0_2' is not a whole number"),
    "other digits": ("train/a.jpg, ٢, 1", "is not a whole number"),
    "too many digits": (f"train/a.jpg, {'9' * 5000}, 1", "is not a whole number"),
    "empty label": ("train/a.jpg, , 1", "the fine label '' is not a whole number"),
    "outside classes.csv": ("train/a.jpg, 4, 2", "the fine label 4 is not in classes.csv, which has 0 to 3"),
    "swapped labels": ("train/a.jpg, 1, 2", r"coarse label 2 \(Lemon\) does not belong to the fine label 1 \(Granny-Smith\)"),
    "unknown coarse": ("train/a.jpg, 1, 9", r"coarse label 9 \(no class\) does not belong"),
    "empty path": (", 2, 1", "the path is empty"),
    "parent": ("train/../../secret, 2, 1", "leads out of the folder"),
    "absolute": ("/etc/passwd, 2, 1", "leads out of the folder"),
    "drive": ("C:/secret.jpg, 2, 1", "leads out of the folder"),
    "backslashes": ("train\\a.jpg, 2, 1", "has backslashes; write '/'"),
    "nul": ("train/a\0.jpg, 2, 1", "."),
}


@pytest.mark.parametrize("row, words", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_is_refused_with_its_place(shop, row, words):
    (shop / "mine.csv").write_text(f"train/Kiwi/Kiwi_0.jpg, 2, 1\n\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"(?s)^shop/mine.csv, row 3: .*{words}") as error: read_index(shop / "mine.csv")
    if len(row) < 100: sentence(error)
    report = validate_dataset_of(shop, "mine.csv")
    assert [(p.row, p.split) for p in report.problems if p.kind == "unreadable row"] == [(3, "train")]


def validate_dataset_of(shop: Path, name: str):
    "Validate with another index as the train split"
    os.replace(shop / name, shop / "train.txt")
    return validate_dataset(shop, ["train"])


def test_bad_first_row_is_no_header(shop):
    for row in ("train/a.jpg, x, y\n", "path, label, class\n", "path,coarse,fine\n"):
        (shop / "mine.csv").write_text(row + "train/Kiwi/Kiwi_0.jpg, 2, 1\n")
        with pytest.raises(DataError, match="row 1: the fine label"): read_index(shop / "mine.csv")


@pytest.mark.parametrize("make, words", [
    (lambda root: (root / "train.txt").write_bytes(b""), "shop/train.txt lists no images"),
    (lambda root: (root / "train.txt").write_bytes(b"path,fine,coarse\n"), "shop/train.txt lists no images"),
    (lambda root: (root / "train.txt").write_bytes("Crème.jpg, 2, 1".encode("latin-1")), r"not UTF-8 text \(byte 3 is 0xe8\)"),
    (lambda root: (root / "train.txt").write_bytes("a.jpg, 2, 1".encode("utf-16")), r"not UTF-8 text \(byte 1 is 0xff\)"),
    (lambda root: (root / "train.txt").unlink(), "train.txt does not exist"),
    (lambda root: shutil.rmtree(root), "shop does not exist.*GROCERY_DATA_DIR"),
    (lambda root: (root / "classes.csv").unlink(), "no classes.csv beside shop/train.txt"),
], ids=["empty", "header only", "latin-1", "utf-16", "no index", "no folder", "no classes"])
def test_bad_file_is_one_sentence(shop, make, words):
    make(shop)
    with pytest.raises(DataError, match=words) as error: read_index(shop / "train.txt")
    sentence(error)


def test_index_that_is_a_folder(shop):
    with pytest.raises(DataError, match="cannot be read as a text file") as error: read_index(shop / "train")
    sentence(error)


def test_damaged_index_never_gives_a_wrong_label(shop):
    "500 indexes with a few bytes changed: each is refused with one sentence, or gives rows whose labels belong together"
    good, generator = (shop / "train.txt").read_bytes(), random.Random(0)
    classes, refused = read_classes(shop / "classes.csv"), 0
    for _ in range(500):
        text = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(text))
            text[place:place + generator.choice((0, 1, 1, 5))] = generator.choice((b"", b",", b'"', b"\n", b"\0", b"\xff", b"3", b"../"))
        (shop / "fuzz.csv").write_bytes(bytes(text))
        try: items = read_index(shop / "fuzz.csv")
        except DataError as error:
            refused += 1
            assert "fuzz.csv" in str(error)
        else: assert all(classes.coarse_of[item.fine] == item.coarse and ".." not in item.path.split("/") for item in items)
    assert 100 < refused < 500


# classes.csv

BAD_CLASSES = {
    "no such column": (CLASSES.replace("Coarse Class ID (int)", "Coarse"), "row 1: the column 'coarse class id' is missing"),
    "semicolons": (CLASSES.replace(",", ";"), "row 1: the column 'class id' is missing"),
    "short row": (CLASSES.replace("Kiwi,2,Kiwi,1,/c", "Kiwi,2"), "row 4: 2 columns where the header has more"),
    "not a number": (CLASSES.replace("Kiwi,2,", "Kiwi,two,"), "row 4: the fine label 'two' is not a whole number"),
    "one id, two classes": (CLASSES.replace("Kiwi,2,", "Kiwi,1,"), "row 4: class id 1 is 'Kiwi' here and 'Granny-Smith' in an earlier"),
    "one id, two kinds": (CLASSES.replace("Lemon,3,Lemon,2", "Lemon,3,Lemon,1"), "row 5: coarse class id 1 is 'Lemon' here and 'Kiwi'"),
    "a hole": (CLASSES.replace("Lemon,3,", "Lemon,5,"), "no fine class 3 though there is one 5"),
    "a coarse hole": (CLASSES.replace("Lemon,3,Lemon,2", "Lemon,3,Lemon,3"), "no coarse class 2 though there is one 3"),
    "from 1": (CLASSES.splitlines()[0] + "\nKiwi,1,Kiwi,1,/c\n", "no fine class 0 though there is one 1"),
    "no name": (CLASSES.replace("Kiwi,2,Kiwi,1", "Kiwi,2,,1"), "row 4: a class has no name"),
    "header only": (CLASSES.splitlines()[0], "no classes are listed"),
    "empty": ("", "no classes are listed"),
}


@pytest.mark.parametrize("text, words", BAD_CLASSES.values(), ids=BAD_CLASSES)
def test_bad_classes_are_refused(shop, text, words):
    (shop / "classes.csv").write_text(text)
    with pytest.raises(DataError, match=f"^shop/classes.csv, .*{words}") as error: get_classes(shop / "classes.csv")
    sentence(error)
    report = validate_dataset(shop)
    assert not report.ok and report.problems[0].kind == "unreadable classes", "the report says so, and goes on"
    assert report.counts["train"]["images"] == 12


def test_class_names_do_not_depend_on_the_order_of_rows(shop):
    head, *rows = CLASSES.splitlines()
    expected = {label: list(get_classes(shop / "classes.csv", label).items()) for label in ("fine", "coarse")}
    assert expected["coarse"] == [(0, "Apple"), (1, "Kiwi"), (2, "Lemon")]
    for seed in range(10):
        random.Random(seed).shuffle(rows)
        (shop / "classes.csv").write_text("\r\n".join([head, *rows]), encoding="utf-8-sig", newline="")
        for label in expected: assert list(get_classes(shop / "classes.csv", label).items()) == expected[label]


# Splits and sources

def test_missing_split_names_those_that_are_there(shop):
    assert len(load_split(shop, "val")) == 8
    for ask in (lambda: load_split(shop, "test"), lambda: validate_dataset(shop, ["train", "test"]), lambda: split_digest(shop, "test")):
        with pytest.raises(DataError, match="'test' is not in shop; there are train and val") as error: ask()
        sentence(error)


def test_folder_without_a_data_set(tmp_path):
    for folder, words in ((tmp_path, "has no train.txt"), (tmp_path / "none", "does not exist")):
        for ask in (lambda: load_split(folder, "train"), lambda: validate_dataset(folder), lambda: verify_digests(folder)):
            with pytest.raises(DataError, match=words): ask()


def test_no_split_is_not_all_of_them(shop, tmp_path):
    ours = {name: split_digest(shop, name) for name in ("classes.csv", "train", "val")}
    assert verify_digests(shop, [], ours) == {"classes.csv": ours["classes.csv"]}
    with pytest.raises(DataError, match="No split is named"): validate_dataset(shop, [])
    with pytest.raises(DataError, match="No split is named"): download(tmp_path / "none", splits=())


def test_a_folder_is_called_by_its_name_from_inside_too(shop, monkeypatch):
    monkeypatch.chdir(shop)
    with pytest.raises(DataError, match="'test' is not in shop; there are train and val"): load_split(".", "test")
    with pytest.raises(DataError, match="classes.csv in shop is not the published one"): verify_digests(".")


def test_sources(shop, monkeypatch):
    assert data_dir(shop) == shop and data_dir(str(shop)) == shop
    monkeypatch.setenv("GROCERY_DATA_DIR", str(shop / "gone"))
    with pytest.raises(DataError, match="GROCERY_DATA_DIR is .*gone', which is no folder") as error: data_dir("grocery")
    sentence(error)


def test_constants_follow_the_environment_and_import_draws_nothing(shop, caches):
    code = "from grocery_nb.catalog import *; print(DATA_DIR, VAL_CSV.name, sep='|')"
    def run(**extra): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                                            env={**os.environ, **extra}).stdout.strip().split("|")
    assert run(GROCERY_DATA_DIR=str(shop)) == [str(shop), "val.txt"]
    folder, name = run()
    assert Path(folder).parent == caches and not Path(folder).exists() and name == "val.txt"


def test_the_default_set_is_drawn_when_it_is_first_read(shop, tmp_path, monkeypatch):
    drawn = tmp_path / "default"
    monkeypatch.setattr(reading, "default_mini_dir", lambda: drawn)
    monkeypatch.setattr(reading, "mini_dir", lambda: shutil.copytree(shop, drawn))
    for use in (lambda: get_classes(drawn / "classes.csv"), lambda: read_index(drawn / "train.txt"),
                lambda: load_split(drawn, "train"), lambda: validate_dataset(drawn)):
        shutil.rmtree(drawn, ignore_errors=True)
        assert use() and drawn.is_dir()


# Validation

def kinds(report) -> list:
    return [(p.severity, p.kind, p.split, p.row) for p in report.problems]


def test_a_whole_set_has_no_problems(shop):
    report = validate_dataset(shop)
    assert report.ok and report.problems == [] and report.counts["val"] == {"rows": 8, "images": 8, "fine": 4, "coarse": 3}
    assert str(report) == report.summary


def bomb() -> bytes:
    buffer = BytesIO()
    Image.new("1", (12000, 10000)).save(buffer, "PNG")
    return buffer.getvalue()


CORRUPT = {
    "zero bytes": lambda good: b"",
    "one byte": lambda good: good[:1],
    "header only": lambda good: good[:200],
    "half": lambda good: good[:len(good) // 2],
    "two bytes short": lambda good: good[:-2],
    "html": lambda good: b"<html><body>404 Not Found</body></html>",
    "zeros": lambda good: bytes(len(good)),
    "bomb": lambda good: bomb(),
    "pickle": lambda good: b"\x80\x04\x95" + bytes(50),
}


@pytest.mark.parametrize("damage", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_file_is_found_with_its_row(shop, damage):
    path = shop / "train" / "Kiwi" / "Kiwi_1.jpg"
    path.write_bytes(damage(path.read_bytes()))
    report = validate_dataset(shop)
    assert kinds(report) == [("error", "corrupt file", "train", 8)]
    assert not report.ok and " object at 0x" not in str(report) and report.counts["train"]["images"] == 11


def test_missing_files_and_folders(shop):
    (shop / "train" / "Kiwi" / "Kiwi_1.jpg").unlink()
    (shop / "val" / "Lemon" / "Lemon_0.jpg").unlink()
    (shop / "val" / "Lemon" / "Lemon_0.jpg").mkdir()
    assert kinds(validate_dataset(shop)) == [("error", "missing file", "train", 8), ("error", "corrupt file", "val", 7)]


def test_empty_files_are_no_duplicates_of_each_other(shop):
    for n in range(3): (shop / "train" / "Kiwi" / f"Kiwi_{n}.jpg").write_bytes(b"")
    assert {p.kind for p in validate_dataset(shop).problems} == {"corrupt file"}


def test_copies_are_named_by_what_they_mean(shop):
    shutil.copy(shop / "train/Kiwi/Kiwi_0.jpg", shop / "train/Kiwi/copy.jpg")
    shutil.copy(shop / "train/Lemon/Lemon_0.jpg", shop / "val/Lemon/other-name.jpg")
    with open(shop / "train.txt", "a") as f: f.write("train/Kiwi/copy.jpg, 2, 1\ntrain/./Lemon/Lemon_1.jpg, 3, 2\ntrain/Lemon/Lemon_2.jpg, 2, 1\n")
    with open(shop / "val.txt", "a") as f: f.write("val/Lemon/other-name.jpg, 3, 2\n")
    report = validate_dataset(shop)
    assert sorted(kinds(report)) == sorted([
        ("warning", "duplicate", "train", 13), ("warning", "listed twice", "train", 14), ("warning", "listed twice", "train", 15),
        ("error", "label conflict", "train", 15), ("error", "leak", "val", 9), ("warning", "other folder", "train", 15)])
    [leak] = [p for p in report.problems if p.kind == "leak"]
    assert leak.path == "val/Lemon/other-name.jpg" and "train row 10" in leak.detail


def test_balance(shop):
    rows = [f"train/Lemon/Lemon_{n % 3}.jpg, 3, 2\n" for n in range(23)]
    (shop / "train.txt").write_text("".join(rows) + "train/Kiwi/Kiwi_0.jpg, 2, 1\ntrain/Kiwi/Kiwi_1.jpg, 2, 1\n")
    found = {(p.kind, p.detail) for p in validate_dataset(shop).problems if p.kind in ("absent class", "class imbalance")}
    assert found == {("absent class", "1 of 3 coarse classes: Apple"), ("absent class", "2 of 4 fine classes: Golden-Delicious, Granny-Smith"),
                     ("class imbalance", "coarse: Lemon has 23 images and Kiwi 2, a ratio of 11.5"),
                     ("class imbalance", "fine: Lemon has 23 images and Kiwi 2, a ratio of 11.5")}


def test_a_large_report_is_short_on_paper_and_whole_as_a_list(shop):
    with open(shop / "train.txt", "a") as f: f.writelines(f"train/gone/{n}.jpg, 3, 2\n" for n in range(3000))
    report = validate_dataset(shop)
    assert sum(p.kind == "missing file" for p in report.problems) == 3000
    text = str(report)
    assert len(text.splitlines()) < 40 and "... and 2995 more" in text and "3000 errors" in text


def test_report_shows_a_path_as_text_in_html(shop):
    (shop / "train.txt").write_text("train/<script>alert(1)</script>.jpg, 3, 2\n")
    html = validate_dataset(shop)._repr_html_()
    assert "<table" in html and "<script>" not in html


def test_what_was_planted_is_found(tmp_path):
    from grocery_nb.synthetic import make_dataset
    root = make_dataset(tmp_path / "ill", train=2, val=1, test=1, size=64, jobs=1, label_noise=0.1, corrupt_files=4)
    manifest = json.loads((root / "manifest.json").read_text())
    report = validate_dataset(root)
    def found(kind): return {problem.path for problem in report.problems if problem.kind == kind}
    assert {entry["path"] for entry in manifest["corrupt_files"]} == found("corrupt file") and len(found("corrupt file")) == 4
    assert {entry["path"] for entry in manifest["noisy_labels"]} == found("other folder") and len(found("other folder")) >= 5
    rows = {(problem.path, problem.row) for problem in report.problems if problem.kind == "other folder"}
    assert rows == {(entry["path"], entry["row"]) for entry in manifest["noisy_labels"]}, "both count lines from 1"


# Digests

def test_data_digest_follows_contents_and_nothing_else(shop, tmp_path):
    before = data_digest(shop / "train.txt")
    moved = shutil.copytree(shop, tmp_path / "elsewhere")
    assert data_digest(moved / "train.txt") == before
    (moved / "train.txt").write_bytes((shop / "train.txt").read_bytes().replace(b"\n", b"\r\n"))
    (moved / "val.txt").unlink()
    assert data_digest(moved / "train.txt") == before, "line ends and other splits are not this index's contents"
    (moved / "train" / "Kiwi" / "Kiwi_0.jpg").write_bytes(jpeg(999))
    assert data_digest(moved / "train.txt") != before
    (shop / "train" / "Kiwi" / "Kiwi_0.jpg").unlink()
    with pytest.raises(DataError, match="shop/train.txt lists Kiwi/Kiwi_0.jpg, which cannot be read") as error: data_digest(shop / "train.txt")
    sentence(error)


def test_digests_refuse_one_changed_bit(shop):
    ours = {name: split_digest(shop, name) for name in ("classes.csv", "train", "val")}
    assert verify_digests(shop, digests=ours) == ours
    path = shop / "val" / "Kiwi" / "Kiwi_0.jpg"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert verify_digests(shop, ["train"], ours)
    with pytest.raises(DataError, match="val in shop is not the published one") as error: verify_digests(shop, digests=ours)
    sentence(error)


# The real photos

def test_real_photos_are_the_published_ones(photos):
    verified = verify_digests(photos, ["train", "val"])
    assert verified == {name: DIGESTS[name] for name in ("classes.csv", "train", "val")}


def test_real_photos_have_43_coarse_classes(photos):
    names = get_classes(photos / "classes.csv")
    assert list(names) == list(range(43)) and names[0] == "Apple" and names[42] == "Zucchini"
    assert len(get_classes(photos / "classes.csv", "fine")) == 81


def test_real_photos_are_valid(photos):
    report = validate_dataset(photos, ["train", "val"])
    assert report.ok, str(report)
    assert report.counts == {"train": {"rows": 2640, "images": 2640, "fine": 81, "coarse": 43},
                             "val": {"rows": 296, "images": 296, "fine": 60, "coarse": 37}}
    assert [p.detail.split(":")[0] for p in report.problems] == ["coarse", "6 of 43 coarse classes", "21 of 81 fine classes"]
