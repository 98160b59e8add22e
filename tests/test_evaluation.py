"The evaluation chapter against scikit-learn, the literature, and a real browser."
import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from grocery_nb import evaluation as ev
from grocery_nb.core import GroceryError

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SECTIONS = {"curves", "confusion", "classes", "errors", "next"}
HOSTILE = "<script>document.title='owned'</script>\"' onload=x {{ 7*7 }} <img src=http://example.org/x.png>"


def random_case(seed: int, classes: int = 12, photos: int = 200, absent: int = 3):
    "Logits of a middling model, with classes that do not occur and some that are never answered"
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - absent, size=photos)
    logits = rng.normal(size=(photos, classes)) + 1.5 * np.eye(classes)[labels]
    logits[:, 1] -= 100
    return logits, labels


def history(epochs: int) -> list:
    return [dict(epoch=i, loss=2 / i, accuracy=1 - 1 / (i + 1), val_loss=2.2 / i, val_accuracy=1 - 1.2 / (i + 1), seconds=1.0)
            for i in range(1, epochs + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed):
    logits, labels = random_case(seed)
    classes, answers = logits.shape[1], logits.argmax(axis=1)
    e = ev.evaluate_logits(logits, labels)
    every, present = np.arange(classes), np.unique(labels)
    assert abs(e.top1 - sk.accuracy_score(labels, answers)) < 1e-12
    for k in (1, 2, 5, classes - 1):
        expected = sk.top_k_accuracy_score(labels, logits, k=k, labels=every)
        assert abs(ev.topk_accuracy(logits, labels, k) - expected) < 1e-12
    np.testing.assert_array_equal(e.matrix, sk.confusion_matrix(labels, answers, labels=every))
    np.testing.assert_allclose(ev.confusion_rates(e.matrix).rate[present],
                               sk.confusion_matrix(labels, answers, labels=every, normalize="true")[present], atol=1e-12)
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, answers, labels=every, zero_division=np.nan)
    np.testing.assert_allclose([s.precision for s in e.per_class], precision, atol=1e-12)
    np.testing.assert_allclose([s.recall for s in e.per_class], recall, atol=1e-12)
    np.testing.assert_array_equal([s.support for s in e.per_class], support)
    np.testing.assert_allclose([e.per_class[i].f1 for i in present], f1[present], atol=1e-12)
    assert abs(e.macro_f1 - sk.f1_score(labels, answers, labels=present, average="macro")) < 1e-12
    assert abs(e.macro_recall - sk.recall_score(labels, answers, labels=present, average="macro")) < 1e-12
    assert e.absent == tuple(f"class {i}" for i in sorted(set(every) - set(present)))


def test_softmax_and_mistakes_by_another_road():
    logits, labels = random_case(9)
    np.testing.assert_allclose(ev.softmax(logits), np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-12)
    worst = ev.worst_mistakes(logits, labels, limit=10_000)
    assert len(worst) == round((1 - ev.accuracy(logits, labels)) * len(labels))
    assert [p for _, _, p in worst] == sorted((p for _, _, p in worst), reverse=True)
    assert all(labels[row] != answer == logits[row].argmax() for row, answer, _ in worst)


@pytest.mark.parametrize("hits, n, low, high", [
    # Newcombe, R. G. (1998), Statistics in Medicine 17, 857-872, Table I, method 3 (score interval, Wilson 1927), 95%
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_equals_the_literature(hits, n, low, high):
    assert [round(end, 4) for end in ev.wilson_interval(hits, n)] == [low, high]


def test_wilson_ends_solve_the_equation_they_come_from():
    z = 1.959963984540054
    for hits, n in [(0, 1), (1, 1), (3, 10), (10, 10), (7, 1_000_000)]:
        for p in ev.wilson_interval(hits, n):
            assert 0 <= p <= 1 and abs((hits / n - p) ** 2 - z * z * p * (1 - p) / n) < 1e-12
    wide, narrow = ev.wilson_interval(8, 10, 0.99), ev.wilson_interval(8, 10, 0.5)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


@pytest.mark.parametrize("call, words", [
    (lambda: ev.accuracy([[0., float("nan")]], [0]), "nan"),
    (lambda: ev.accuracy([[0., float("inf")]], [0]), "inf"),
    (lambda: ev.accuracy([[-np.inf, -np.inf]], [0]), "inf"),
    (lambda: ev.accuracy(np.zeros((0, 3)), []), "shape"),
    (lambda: ev.accuracy(np.zeros((2, 3, 1)), [0, 1]), "shape"),
    (lambda: ev.accuracy([["a", "b"]], [0]), "no array of numbers"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [0, 3]), "hold 3 at position 1"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [-1, 0]), "hold -1 at position 0"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [0., 1.]), "float64"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [[0], [1]]), "shape"),
    (lambda: ev.accuracy(np.zeros((2, 3)), [0]), "2 rows of logits for 1 labels"),
    (lambda: ev.topk_accuracy(np.zeros((2, 3)), [0, 1], 4), "k is 4"),
    (lambda: ev.topk_accuracy(np.zeros((2, 3)), [0, 1], 0), "k is 0"),
    (lambda: ev.confusion_matrix([0, 1], [0, 5], 3), "predictions hold 5"),
    (lambda: ev.evaluate_logits(np.zeros((2, 3)), [0, 1], ["a"]), "1 class names for 3 classes"),
    (lambda: ev.evaluate_logits(np.zeros((2, 3)), [0, 1], {1: "a", 2: "b", 3: "c"}), "ids 0 to 2"),
    (lambda: ev.confusion_rates(np.zeros((3, 3))), "type float64"),
    (lambda: ev.wilson_interval(3, 2), "more hits"),
    (lambda: ev.wilson_interval(1, 2, 0), "confidence"),
])
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(ev.EvaluationError, match=re.escape(words)) as caught: call()
    assert isinstance(caught.value, GroceryError) and isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


def test_metrics_are_json_and_the_text_has_everything():
    logits, labels = random_case(1)
    e = ev.evaluate_logits(logits, labels, {i: f"kind {i}" for i in range(12)})
    assert json.loads(json.dumps(e.metrics(), allow_nan=False)) == e.metrics()
    assert e.metrics()["classes_present"] == 9 and e.metrics()["top1_low"] < e.metrics()["top1"] < e.metrics()["top1_high"]
    assert all(f"kind {i}" in str(e) for i in range(12)) and "No photos of 3 classes" in str(e)
    assert re.search(r"kind 1 .*-", str(e)) and "nan" not in str(e)


def test_few_classes_and_few_photos():
    e = ev.evaluate_logits([[2., 1.]], [0])
    assert (e.top1, e.top5, e.macro_f1, e.absent) == (1, 1, 1, ("class 1",))
    assert e.confusions == () and json.dumps(e.metrics(), allow_nan=False)


def test_thumbnails_are_upright_small_and_anonymous():
    photo = Image.new("RGB", (800, 400), "red")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker of the phone"
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=exif)
    uri = ev.thumbnail(Image.open(buffer))
    again = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert again.size == (112, 224) and not again.getexif()
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"): assert ev.thumbnail(Image.new(mode, (10, 10))).startswith("data:image/jpeg")


def hostile_report(folder: Path) -> Path:
    logits, labels = random_case(2, classes=4, photos=60, absent=1)
    names = [HOSTILE, "plain", "</style></table>", "never seen"]
    errors = ev.gallery(logits, labels, names, lambda row: Image.new("RGB", (32, 32), "green"), [HOSTILE] * 60, limit=3)
    return ev.write_report(folder / "hostile.html", ev.evaluate_logits(logits, labels, names), history(3), errors,
                           title=HOSTILE, facts={HOSTILE: HOSTILE}, advice=[HOSTILE])


def test_hostile_names_are_text(tmp_path):
    page = hostile_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and not re.findall(r'<img (?!src="data:image/jpeg;base64,)', page)
    assert page.count("</style>") == page.count("<style>") == 1 and "{{ 7*7 }}" in page and " 49 " not in page


def test_old_report_stays_when_a_new_one_fails(tmp_path, monkeypatch):
    logits, labels = random_case(3)
    e = ev.evaluate_logits(logits, labels)
    path = ev.write_report(tmp_path / "report.html", e, title="The old one")
    before = path.read_bytes()
    with pytest.raises(TypeError): ev.write_report(path, e, errors=[ev.Mistake(object(), "a", "b", 0.5)])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="disk is full"): ev.write_report(path, e, title="The new one")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_curves_take_what_there_is():
    assert ev.learning_curves([]) == ev.learning_curves([{"epoch": 1}]) == []
    broken = [dict(epoch=1, loss=float("nan")), dict(epoch=2, loss=float("inf")), dict(epoch=3, loss=None)]
    assert ev.learning_curves(broken) == []
    for value in (0.0, 1.0, 1e-9, 5e6):
        for one in ev.learning_curves([dict(epoch=1, loss=value, val_accuracy=min(value, 1))]):
            places = [y for y, _ in one["y"]]
            assert min(places) <= one["lines"][0]["points"][0][1] <= max(places)
    long = ev.learning_curves(history(300))
    assert len(long) == 2 and all(2 <= len(one["x"]) <= 8 and 2 <= len(one["y"]) <= 8 for one in long)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "Open a page in headless Chromium: its document after loading, and everything the browser had to say"
    if not CHROMIUM: pytest.skip("no Chromium: apt-get install chromium to enable this test")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000"]

    def look(page: Path):
        profile = tmp_path_factory.mktemp("profile")
        log = profile / "net.json"
        done = subprocess.run([CHROMIUM, *quiet, f"--user-data-dir={profile}", f"--log-net-log={log}", "--dump-dom", page.as_uri()],
                              capture_output=True, text=True, encoding="utf-8", timeout=60)
        started = re.findall(r'"url":"((?:https?|wss?|ftp):[^"]+)"', log.read_text(encoding="utf-8"))
        urls = {url for url in started if not re.search(r"//[^/]*(google|gvt\d|chromium|gstatic)[^/]*/", url)}  # its own errands
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], urls
    return look


@pytest.mark.parametrize("classes, epochs, pictures", [(20, 40, 6), (43, 1, 0), (4, 0, 0)])
def test_report_in_a_browser(tmp_path, browser, classes, epochs, pictures):
    logits, labels = random_case(classes, classes=classes, photos=12 * classes, absent=1)
    names = [f"Kind {i}" for i in range(classes)]
    errors = ev.gallery(logits, labels, names, lambda row: np.full((40, 60, 3), row % 256, np.uint8), limit=pictures)
    path = ev.write_report(tmp_path / "report.html", ev.evaluate_logits(logits, labels, names), history(epochs), errors,
                           title="Seen by a browser", facts={"Model": "none"}, advice=["Eat the fruit"])
    document, console, urls = browser(path)
    assert console == [] and urls == set()
    assert set(re.findall(r'<section id="(\w+)"', document)) == (SECTIONS if epochs else SECTIONS - {"curves"})
    assert document.count("<img ") == pictures == len(re.findall(r'<img [^>]*alt="Kind \d+, taken for Kind \d+', document))
    assert len(re.findall(r'<th scope="row"', document)) >= 2 * (classes - 1) and "Eat the fruit" in document
    assert not re.findall(r'(?:src|href)="(?!data:)', document) and "@import" not in document and "url(" not in document


def test_the_browser_check_can_fail(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('oh')</script>", encoding="utf-8")
    _, console, urls = browser(page)
    assert any("oh" in line for line in console) and urls == {"http://127.0.0.1:9/x.png"}


def test_hostile_report_in_a_browser(tmp_path, browser):
    document, console, urls = browser(hostile_report(tmp_path))
    assert console == [] and urls == set()
    assert "<script" not in document and "<title>owned" not in document and set(re.findall(r'<section id="(\w+)"', document)) == SECTIONS
