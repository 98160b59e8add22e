"The report chapter, read by Python and by a real browser."
import base64
import html
import io
import json
import re
import shutil
import subprocess
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import random_case
from grocery_nb import evaluation as ev
from grocery_nb.analysis import charts, comparison_page, report
from grocery_nb.core import GroceryError

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
SECTIONS = {"curves", "confusion", "classes", "errors", "next"}
EXTRA = {"fine", "trust", "unsure", "conditions"}
COMPARED = {"pairs", "classes", "trust", "disagreements"}
VOID = {"meta", "link", "img", "wbr", "br", "line", "path", "circle", "rect"}
HOSTILE = "<script>document.title='owned'</script>\"' onload=x {{ 7*7 }} <img src=http://example.org/x.png>"


def realistic(seed: int, strength: float = 2.3, photos: int = 296):
    "Logits of 81 fine classes, wrong mostly within their coarse class, with 60 classes present; overconfident"
    rng = np.random.default_rng(7)
    labels = np.sort(rng.choice(60, photos))
    coarse_of = np.sort(np.concatenate([np.arange(43), rng.integers(0, 43, 38)]))
    logits = np.random.default_rng(seed).normal(size=(photos, 81)) + strength * np.eye(81)[labels]
    return 4.5 * (logits + 1.4 * (coarse_of[:, None] == coarse_of)[labels]), labels, coarse_of.tolist()


@lru_cache
def everything(seed: int = 1) -> dict:
    "All that write_report takes, on 296 simulated photos of 81 classes with long names"
    logits, labels, coarse_of = realistic(seed)
    names = [f"Brand-{i % 7}-Natural-Product-{i}" if i % 5 else f"Fruit-{i}" for i in range(81)]
    coverage = ev.coverage_curve(logits, labels, 1.5)
    e = ev.evaluate_logits(logits, labels, names)
    worse = {name: ev.evaluate_logits(realistic(seed, strength)[0], labels)
             for name, strength in (("light", 1.9), ("background", 2.2), ("camera", 1.3))}
    return dict(evaluation=e, hierarchy=ev.evaluate_hierarchy(logits, labels, coarse_of, names), coverage=coverage, threshold=0.62,
                calibration=ev.evaluate_calibration(logits, labels, None), robustness=ev.robustness_table({"as trained": e, **worse}),
                history=[{**row, "phase": "head" if row["epoch"] < 4 else "whole network", "lr": 1e-3 / row["epoch"]} for row in history(40)],
                errors=ev.gallery(logits, labels, names, lambda row: np.full((40, 60, 3), row % 256, np.uint8), limit=5))


def two_models(strength_a: float = 2.3, strength_b: float = 2.6, names=None, pictures: int = 8) -> dict:
    "All that write_comparison takes"
    (a, labels, _), (b, _, _) = realistic(1, strength_a), realistic(2, strength_b)
    shown = comparison_page.disagreement_gallery(a, b, labels, names, lambda row: np.full((40, 60, 3), row % 256, np.uint8), limit=pictures)
    return dict(a=ev.evaluate_logits(a, labels, names), b=ev.evaluate_logits(b, labels, names), disagreements=shown,
                mcnemar=ev.mcnemar(ev.topk_hits(a, labels), ev.topk_hits(b, labels)),
                calibrations=[ev.evaluate_calibration(one, labels) for one in (a, b)])


class Structure(HTMLParser):
    "Headings in their order, and every tag that is not closed, closed twice, or closed in the wrong order"
    def __init__(self, page: str):
        super().__init__()
        self.headings, self.open, self.faults = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if re.fullmatch("h[1-6]", tag): self.headings.append(int(tag[1]))
        if tag == "svg" and not dict(attributes).get("aria-label"): self.faults.append("an svg without aria-label")
        if tag == "th" and "scope" not in dict(attributes): self.faults.append("a th without scope")
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attributes): pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag: self.faults.append(f"{tag} closed out of order")


def history(epochs: int) -> list:
    return [dict(epoch=i, loss=2 / i, accuracy=1 - 1 / (i + 1), val_loss=2.2 / i, val_accuracy=1 - 1.2 / (i + 1), seconds=1.0)
            for i in range(1, epochs + 1)]


def test_thumbnails_are_upright_small_and_anonymous():
    photo = Image.new("RGB", (800, 400), "red")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker of the phone"
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=exif)
    uri = charts.thumbnail(Image.open(buffer))
    again = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert again.size == (112, 224) and not again.getexif()
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"): assert charts.thumbnail(Image.new(mode, (10, 10))).startswith("data:image/jpeg")


def hostile_report(folder: Path) -> Path:
    logits, labels = random_case(2, classes=4, photos=60, absent=1)
    names = [HOSTILE, "plain", "</style></table>", "never seen"]
    errors = ev.gallery(logits, labels, names, lambda row: Image.new("RGB", (32, 32), "green"), [HOSTILE] * 60, limit=3)
    e = ev.evaluate_logits(logits, labels, names)
    return report.write_report(
        folder / "hostile.html", e, [{**row, "phase": HOSTILE * row["epoch"]} for row in history(3)], errors, title=HOSTILE,
        facts={HOSTILE: HOSTILE}, advice=[HOSTILE], hierarchy=ev.evaluate_hierarchy(logits, labels, [0, 1, 1, 0], names, names[:2]),
        robustness=ev.robustness_table({HOSTILE: e, HOSTILE + "2": e}))


def hostile_comparison(folder: Path) -> Path:
    logits, labels = random_case(2, classes=4, photos=60, absent=1)
    names, other = [HOSTILE, "plain", "</style></table>", "never seen"], logits[:, ::-1].copy()
    shown = comparison_page.disagreement_gallery(logits, other, labels, names, lambda row: Image.new("RGB", (32, 32)), [HOSTILE] * 60, limit=4)
    pairs = ev.mcnemar(ev.topk_hits(logits, labels), ev.topk_hits(other, labels))
    return comparison_page.write_comparison(folder / "hostile.html", *(ev.evaluate_logits(z, labels, names) for z in (logits, other)), pairs,
                                   (HOSTILE, HOSTILE + "2"), {HOSTILE: HOSTILE}, shown, HOSTILE)


@pytest.mark.parametrize("write", [hostile_report, hostile_comparison])
def test_hostile_names_are_text(tmp_path, write):
    page = write(tmp_path).read_text(encoding="utf-8")
    assert Structure(page).faults == []
    assert "<script" not in page and not re.findall(r'<img (?!src="data:image/jpeg;base64,)', page)
    assert page.count("</style>") == page.count("<style>") == 1 and "{{ 7*7 }}" in page and " 49 " not in page


def test_old_report_stays_when_a_new_one_fails(tmp_path, monkeypatch):
    logits, labels = random_case(3)
    e = ev.evaluate_logits(logits, labels)
    path = report.write_report(tmp_path / "report.html", e, title="The old one")
    before = path.read_bytes()
    with pytest.raises(TypeError): report.write_report(path, e, errors=[ev.Mistake(object(), "a", "b", 0.5)])
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="disk is full"): report.write_report(path, e, title="The new one")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_curves_take_what_there_is():
    assert charts.learning_curves([]) == charts.learning_curves([{"epoch": 1}]) == []
    broken = [dict(epoch=1, loss=float("nan")), dict(epoch=2, loss=float("inf")), dict(epoch=3, loss=None)]
    assert charts.learning_curves(broken) == []
    for value in (0.0, 1.0, 1e-9, 5e6):
        for one in charts.learning_curves([dict(epoch=1, loss=value, val_accuracy=min(value, 1))]):
            places = [y for y, _ in one["y"]]
            assert min(places) <= one["lines"][0]["points"][0][1] <= max(places)
    long = charts.learning_curves(history(300))
    assert len(long) == 2 and all(2 <= len(one["x"]) <= 8 and 2 <= len(one["y"]) <= 8 for one in long)
    odd = [dict(epoch=1, loss=1.0, lr=[1e-3, 1e-4], val_loss="-"), dict(epoch=1, loss=True, lr=None)]
    assert [one["title"] for one in charts.learning_curves(odd)] == ["Loss"]


def test_two_phases_that_both_count_from_one():
    rows = [dict(epoch=i, phase=phase, loss=1 / (i + later), lr=lr)
            for phase, later, lr in (("head", 0, 1e-2), ("body", 3, 1e-3)) for i in (1, 2, 3)]
    drawn = charts.learning_curves(rows)
    assert [one["title"] for one in drawn] == ["Loss", "Learning rate × 1,000"]
    across = [x for x, _ in drawn[0]["lines"][0]["points"]]
    assert across == sorted(set(across)) and [name for _, name in drawn[0]["marks"]] == ["body"]
    assert across[2] < drawn[0]["marks"][0][0] < across[3]


def test_every_combination_of_sections_is_a_page(tmp_path):
    whole = everything()
    for absent in (*sorted(set(whole) - {"evaluation"}), None):
        given = {name: value for name, value in whole.items() if name != absent}
        page = report.write_report(tmp_path / "r.html", **given).read_text(encoding="utf-8")
        found = Structure(page)
        assert found.faults == found.open == [] and all(b <= a + 1 for a, b in zip(found.headings, found.headings[1:])), absent
    assert set(re.findall(r'<section id="(\w+)"', page)) == SECTIONS | EXTRA
    assert "nan" not in re.sub(r"<style>.*?</style>|data:image[^\"]*", "", page, flags=re.DOTALL)


def test_the_sections_say_what_was_measured(tmp_path):
    given = everything()
    page = html.unescape(report.write_report(tmp_path / "r.html", **given).read_text(encoding="utf-8"))
    h, c, at = given["hierarchy"], given["calibration"], given["coverage"].at(0.62)
    for count, words in ((h.within, "wrong, within the right coarse class"), (h.across, "wrong, in another coarse class"),
                         (h.n - h.within - h.across, "right")):
        assert f"{count} {words} <span>{count / h.n:.1%}" in page
    assert sum(float(v) for v in re.findall(r'<i class="part \w+" style="--v:([\d.]+)"', page)) == pytest.approx(1, abs=1e-3)
    assert f"calibration error {c.ece_before:.1%}" in page and f"calibration error {c.ece_after:.1%}" in page
    assert f"Logits divided by {c.temperature:.2f}" in page and "cross-fitted" in page and "too sure of itself" in page
    said = f"Answers {100 * at.coverage:.0f}% of the photos, {100 * at.accuracy:.0f}% of those rightly"
    assert said in " ".join(page.split()) and "62% sure (chosen)" in " ".join(page.split())
    assert all(f"{abs(row.change):.1f} points" in page for row in given["robustness"][1:])


def test_places_in_the_drawings_are_the_values():
    given = everything()
    drawn = charts.reliability_chart("x", given["calibration"].bins_before, 0.1)
    filled = [one for one in given["calibration"].bins_before if one.count]
    for dot, one in zip(drawn["dots"], filled, strict=True):
        assert dot["x"] == pytest.approx(46 + 396 * one.confidence, abs=0.06) and dot["y"] == pytest.approx(250 - 228 * one.accuracy, abs=0.06)
        assert dot["off"] == (one.confidence < one.interval[0] or one.confidence > one.interval[1])
    heights = np.array([bar["height"] for bar in drawn["bars"]])
    np.testing.assert_allclose(heights / heights.max(), np.array([one.count for one in filled]) / max(one.count for one in filled), atol=0.01)
    curve = given["coverage"]
    ends = [tuple(map(float, point.split(","))) for point in charts.coverage_chart(curve, 0.62)["path"][1:].split(" L")]
    assert ends[0][0] == 442 and len(ends) <= 200 and ends[-1][0] < 50
    large = ev.coverage_curve(*realistic(3, photos=30_000)[:2])
    assert len(charts.coverage_chart(large, None)["path"]) < 4_000 < len(large.thresholds)


def test_degenerate_measurements_are_drawn():
    right = ev.evaluate_logits(np.eye(4) * 9, [0, 1, 2, 3])
    perfect = dict(calibration=ev.evaluate_calibration(np.eye(4) * 9, [0, 1, 2, 3]), coverage=ev.coverage_curve(np.eye(4), [0, 1, 2, 3]),
                   hierarchy=ev.evaluate_hierarchy(np.eye(4) * 9, [0, 1, 2, 3], [0, 0, 1, 1]), robustness=ev.robustness_table({"only": right}))
    assert [part["kind"] for part in charts.mistake_parts(perfect["hierarchy"])] == ["right"]
    assert len(charts.calibration_view(perfect["calibration"])["charts"]) == 1
    for threshold in (None, 0.0, 1.0, 2.0):
        view = charts.coverage_view(perfect["coverage"], threshold)
        assert view["chosen"] is None or (view["chart"]["mark"] is None) == (view["chosen"].count == 0)
    assert report.use_advice(perfect["calibration"], perfect["robustness"]) == []
    nothing = ev.evaluate_logits(np.eye(2)[::-1], [0, 1])
    assert "no better" in report.data_advice(nothing)[0]


@pytest.mark.parametrize("strengths, words", [((2.3, 3.2), "new is better than old, by more than luck."),
                                              ((3.2, 2.3), "old is better than new, by more than luck."),
                                              ((2.3, 2.31), "do not tell old and new apart")])
def test_comparison_says_which_is_better(tmp_path, strengths, words):
    given = two_models(*strengths)
    page = html.unescape(comparison_page.write_comparison(tmp_path / "c.html", names=("old", "new"), **given).read_text(encoding="utf-8"))
    m, found = given["mcnemar"], Structure(page)
    assert words in page and found.faults == found.open == [] and set(re.findall(r'<section id="(\w+)"', page)) == COMPARED
    assert comparison_page.short_verdict(m, "old", "new").split(":")[0].rstrip(".") in m.verdict("old", "new")
    assert all(f"<strong>{count}</strong>" in page for count in (m.both, m.only_a, m.only_b, m.neither))
    gain = 100 * (given["b"].top1 - given["a"].top1)
    axis = comparison_page.difference_axis(m)
    assert axis["value"] == pytest.approx(gain) and (axis["at"] - 0.5) * gain > 0 or gain == 0
    assert 0 <= axis["low"] <= axis["at"] <= axis["high"] <= 1
    rows = comparison_page.class_pairs(given["a"], given["b"])
    changes = [two.recall - one.recall for one, two in rows["differing"]]
    assert changes == sorted(changes, reverse=True) and 0 not in changes
    assert len(rows["differing"]) + len(rows["same"]) == 81 - len(given["a"].absent)


def test_disagreements_are_those_where_exactly_one_is_right():
    (a, labels, _), (b, _, _) = realistic(1), realistic(2)
    names = [str(i) for i in range(81)]
    pairs = ev.mcnemar(ev.topk_hits(a, labels), ev.topk_hits(b, labels))
    for limit in (0, 1, 6, 10_000):
        seen = []
        shown = comparison_page.disagreement_gallery(a, b, labels, names, lambda row: seen.append(row) or row, limit=limit)
        assert len(shown) == len(set(seen)) == min(limit, pairs.only_a + pairs.only_b)
        for one in shown:
            assert names[labels[one.image]] == one.true and (one.said_a == one.true) != (one.said_b == one.true)
            assert one.right == ("a" if a[one.image].argmax() == labels[one.image] else "b")


def test_only_the_same_photos_are_compared(tmp_path):
    given = two_models()
    a, b, m = given["a"], given["b"], given["mcnemar"]
    other = ev.evaluate_logits(*realistic(1)[:2], [f"other {i}" for i in range(81)])
    for wrong in ((b, a, m), (a, other, m), (a, b, ev.mcnemar([True] * 296, [True] * 296))):
        with pytest.raises(comparison_page.ReportError) as refused: comparison_page.write_comparison(tmp_path / "c.html", *wrong)
        assert isinstance(refused.value, GroceryError) and "\n" not in str(refused.value) and not (tmp_path / "c.html").exists()
    hits = ev.topk_hits(*realistic(1)[:2])
    page = comparison_page.write_comparison(tmp_path / "same.html", a, a, ev.mcnemar(hits, hits)).read_text(encoding="utf-8")
    assert "do not tell A and B apart" in page and "Nowhere." in page


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
    path = report.write_report(tmp_path / "report.html", ev.evaluate_logits(logits, labels, names), history(epochs), errors,
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


@pytest.mark.parametrize("write, sections", [(hostile_report, SECTIONS | {"fine", "conditions"}), (hostile_comparison, COMPARED - {"trust"})])
def test_hostile_pages_in_a_browser(tmp_path, browser, write, sections):
    document, console, urls = browser(write(tmp_path))
    assert console == [] and urls == set()
    assert "<script" not in document and "<title>owned" not in document and set(re.findall(r'<section id="(\w+)"', document)) == sections


MEASURE = """<script>
function overlaps(frame) {
  const found = [];
  for (const svg of frame.contentDocument.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3) found.push(a + " / " + b); }));
  }
  return found;
}
onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(f =>
  ({width: f.clientWidth, needs: f.contentDocument.documentElement.scrollWidth, overlaps: overlaps(f)}))); };
</script>"""


def layout(folder: Path, browser, page: Path) -> list:
    "What the browser measures on a phone and on a screen: the width that a page needs, and texts in drawings that overlap"
    text = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(f'<iframe srcdoc="{text}" style="border:0;width:{width}px;height:800px"></iframe>' for width in (390, 1280))
    outer = folder / "outer.html"
    outer.write_text(f"<meta charset=utf-8>{MEASURE}{frames}", encoding="utf-8")
    document, _, _ = browser(outer)
    return json.loads(html.unescape(re.search("<title>(.*?)</title>", document).group(1)))


def test_no_text_overlaps_and_no_page_scrolls_sideways(tmp_path, browser):
    names = "efficientnet_lite0, 20 epochs", "efficientnet_lite0, 60 epochs"
    pages = [report.write_report(tmp_path / "report.html", **everything()),
             comparison_page.write_comparison(tmp_path / "comparison.html", names=names, **two_models())]
    for page in pages:
        for seen in layout(tmp_path, browser, page): assert seen["needs"] <= seen["width"] and seen["overlaps"] == [], (page.name, seen)


def test_the_layout_check_can_fail(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text("<svg><text x=9 y=20>one</text><text x=12 y=20>two</text></svg><p style='width:3000px'>wide", encoding="utf-8")
    for seen in layout(tmp_path, browser, page): assert seen["needs"] > seen["width"] and seen["overlaps"] == ["one / two"]


def test_report_with_everything_in_a_browser(tmp_path, browser):
    for page, sections in ((report.write_report(tmp_path / "r.html", **everything()), SECTIONS | EXTRA),
                           (comparison_page.write_comparison(tmp_path / "c.html", **two_models()), COMPARED)):
        document, console, urls = browser(page)
        assert console == [] and urls == set() and set(re.findall(r'<section id="(\w+)"', document)) == sections
