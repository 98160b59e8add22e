"The page in a real browser: every feature, every message, keyboard only, phone width, and accessibility in light and dark."
import json
import os
import re
import threading
import time
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from fake_backend import VERSION, FakeBackend, pictures
from servers import running

from grocery_nb import frontend
from grocery_nb.frontend import ASSETS, ServeError, make_ui_server
from grocery_nb.serving import page as parts
from grocery_nb.serving.page import BROWSER_PROBLEMS

CHROMIUM = Path("/usr/bin/chromium")
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
pytestmark = pytest.mark.browser
LIMIT = frontend.picture_limit()


@pytest.fixture(scope="module")
def browser():
    "One Chromium for all tests here, with a camera that films a test picture"
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'grocery-nb[dev]' to enable the browser tests")
    if not CHROMIUM.exists(): pytest.skip("no /usr/bin/chromium: apt-get install chromium to enable the browser tests")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", *CAMERA])
        yield browser
        browser.close()


@contextmanager
def served(api_url: str):
    "The page's address, with its server in a thread"
    with make_ui_server(port=0, api_url=api_url) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.port}"
        server.shutdown()


@pytest.fixture(scope="module")
def fake():
    backend = FakeBackend().start()
    yield backend
    backend.stop()


@pytest.fixture(autouse=True)
def good_mood(request):
    "A backend that is well, whatever the test before did to it"
    if "page" not in request.fixturenames: return
    backend = request.getfixturevalue("fake")
    backend.mode, backend.unsure, backend.seconds, backend.ready = None, False, 0, "ready"
    backend.flags.clear()
    backend.asked.clear()


@pytest.fixture(scope="module")
def url(fake):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SECONDS_BETWEEN_CHECKS", 0.3)  # five seconds are long for a test
        with served(fake.url) as address: yield address


@pytest.fixture
def page(browser, url):
    "The page, loaded, in a fresh context that allows camera and clipboard; no request may leave this machine"
    context = browser.new_context(viewport={"width": 1280, "height": 900}, permissions=["camera", "clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(20_000)
    strangers, errors = [], []
    page.on("request", lambda request: re.match(r"http://127\.0\.0\.1:|data:|blob:", request.url) or strangers.append(request.url))
    page.on("filechooser", lambda chooser: None)  # from now on dialogs are intercepted, not only once a click waits for one
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_selector(".gallery img")
    yield page
    context.close()
    assert not strangers and not errors


@pytest.fixture
def oversized(tmp_path) -> Path:
    "A file with one byte more than may be sent"
    path = tmp_path / "market.jpg"
    path.write_bytes(b"")
    os.truncate(path, LIMIT + 1)
    return path


def upload(page, data: "bytes|Path", name: str = "mine.jpg", mime: str = "image/jpeg", press=None):
    with page.expect_file_chooser() as chooser: press() if press else page.click("#choose")
    chooser.value.set_files(data if isinstance(data, Path) else {"name": name, "mimeType": mime, "buffer": data})


def answer(page) -> str:
    page.wait_for_selector(".result .name")
    return page.inner_text(".result .name")


def notice(page) -> str:
    page.wait_for_selector(".notice.bad")
    return page.inner_text(".notice.bad")


DROP = """([name, type, bytes, text]) => {
  const data = new DataTransfer();
  if (bytes) data.items.add(new File([new Uint8Array(bytes)], name, {type})); else data.setData("text/plain", text);
  for (const kind of ["dragover", "drop"])
    document.querySelector("#choose").dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
PASTE = """([type, bytes]) => {
  const data = new DataTransfer();
  if (bytes) data.items.add(new File([new Uint8Array(bytes)], "image.jpg", {type}));
  document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
}"""


# --- without a browser ---------------------------------------------------------------------------------------------
def test_every_code_of_the_script_has_words():
    script = (ASSETS / "intake.js").read_text(encoding="utf-8")
    sent = set(re.findall(r'refuse\("(\w+)"', script)) | set(re.findall(r'"(camera_\w+|no_camera)"', script))
    assert len(sent) > 6 and sent == set(BROWSER_PROBLEMS)


def test_styles_and_script_are_self_contained():
    for path in ASSETS.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")  # a name, which nobody fetches
        assert not re.search(r"https?://|@import|//[\w.]+\.\w{2,}/", text), path


def test_address_comes_from_the_environment(monkeypatch):
    import subprocess
    import sys
    done = subprocess.run([sys.executable, "-c", "from grocery_nb.frontend import API_URL; print(API_URL)"], capture_output=True, text=True,
                          env={"API_URL": "http://shop.example:81", "PATH": ""}, cwd=Path(frontend.__file__).parent.parent)
    assert done.stdout.strip() == "http://shop.example:81", done.stderr


def test_a_taken_port_is_one_sentence(url):
    with pytest.raises(ServeError, match=r"port \d+ \(.*in use.*\); choose another port") as caught: make_ui_server(port=int(url.rsplit(":", 1)[1]))
    assert "\n" not in str(caught.value)


# --- the ways in ---------------------------------------------------------------------------------------------------
def test_random_picture_and_whole_answer(page):
    page.click("#random")
    name = answer(page)
    assert page.locator("#preview").is_visible() and page.get_attribute("#preview", "src").startswith("data:image/jpeg")
    assert page.locator(".bars li").count() == 5
    assert re.fullmatch(re.escape(name) + r"\s+83%", page.inner_text(".bars li:first-child"))
    assert re.search(rf"Answered in \d+ ms \(decode 2 ms, queue 1 ms, model 12 ms\) by model {VERSION}", page.inner_text(".facts"))
    assert name in page.inner_text("#announcement")
    assert page.get_attribute("#answer", "aria-busy") == "false"


def test_file_dialog_and_coarse_class(page):
    upload(page, pictures()[2])
    assert answer(page) == "Watermelon" and page.inner_text(".chip") == "Melon 91%"
    assert page.inner_text("#announcement") == "Watermelon, a kind of Melon, 83%."
    assert page.get_attribute("#preview", "alt") == "mine.jpg"


def test_drop(page):
    page.evaluate(DROP, ["dropped.jpg", "image/jpeg", list(pictures()[1]), ""])
    assert answer(page) == "Banana" and page.get_attribute("#preview", "alt") == "dropped.jpg"
    page.evaluate(DROP, ["", "", None, "some words"])
    assert "No picture was dropped" in notice(page)


def test_paste_by_keyboard_and_by_button(page):
    page.evaluate(PASTE, ["image/jpeg", list(pictures()[4])])
    assert answer(page) == "Arla Medium Fat Milk"
    page.evaluate(PASTE, ["", None])
    assert "no picture to paste" in notice(page)
    page.evaluate("""async () => { const c = Object.assign(document.createElement("canvas"), {width: 40, height: 40});
        c.getContext("2d").fillRect(0, 0, 40, 40);
        const blob = await new Promise(done => c.toBlob(done));
        await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]); }""")
    page.click("#paste")
    assert answer(page)
    assert page.get_attribute("#preview", "alt") == "Pasted picture"


def test_camera(page):
    page.click("#camera")
    page.wait_for_selector("#snap:not([disabled])")
    page.keyboard.press("Escape")
    assert not page.locator("#camera-dialog").is_visible() and page.evaluate("document.activeElement.id") == "camera"
    page.wait_for_function("document.getElementById('camera-video').srcObject === null")  # the event comes after the dialog has closed
    page.click("#camera")
    page.click("#snap")
    assert answer(page) and page.get_attribute("#preview", "src").startswith("data:image/jpeg")
    page.wait_for_function("document.getElementById('camera-video').srcObject === null")  # the event comes after the dialog has closed


def test_camera_that_fails(page):
    for error, words in (("NotAllowedError", "The camera is blocked"), ("NotFoundError", "There is no camera"),
                         ("NotReadableError", "The camera does not start")):
        page.evaluate("name => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', name)); }", error)
        page.click("#camera")
        page.wait_for_selector(f".notice.bad:has-text('{words}')")
        assert not page.locator("#camera-dialog").is_visible()


def test_gallery(page, fake):
    assert page.locator(".gallery img").count() == 6
    shown = page.get_attribute(".gallery li:nth-child(4) img", "src")
    page.click(".gallery li:nth-child(4) button")
    assert answer(page) and page.get_attribute("#preview", "src") == shown
    before, fake.served = fake.served, cycle(pictures()[:1])
    try:
        page.click("#more")
        page.wait_for_function("document.querySelectorAll('.gallery img').length === 1")  # of six equal pictures one is shown
    finally: fake.served = before


# --- what is said --------------------------------------------------------------------------------------------------
def test_unsure_is_said_plainly(page, fake):
    fake.unsure = True
    upload(page, pictures()[0])
    answer(page)
    assert "Not sure about this one" in page.inner_text(".result .notice")
    assert page.inner_text("#announcement").startswith("Not sure about this one. Best guess: Granny Smith")


def test_flag_stores_picture_and_label(page, fake):
    assert not page.locator("#flag").is_visible()
    upload(page, pictures()[2])
    answer(page)
    options = page.eval_on_selector_all("#class-names option", "all => all.map(option => option.value)")
    assert page.get_attribute("#label", "list") == "class-names" and len(options) == 36 and "Granny Smith" in options
    page.click("#send")
    page.wait_for_selector(".note.bad")
    page.fill("#label", "lemmon")
    page.click("#send")
    page.wait_for_selector("text=did you mean Lemon")
    page.fill("#label", "honeydew melon")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note.good")
    assert fake.flags == [(len(pictures()[2]), "Honeydew-Melon", "Watermelon")]
    upload(page, pictures()[0])
    page.wait_for_selector("text=Granny Smith, a kind of Apple", state="attached")
    assert page.input_value("#label") == "" and page.inner_text("#note") == ""


def test_health_and_model(page, fake):
    assert page.inner_text("#state").split() == ["Ready", "model", VERSION[:7]]
    facts = page.inner_text("#model")
    assert all(words in facts for words in (fake.url, VERSION, "onnx", "mobilenet_v3_small", "36", "Mini Grocery", "91%", "50%"))
    fake.ready = "loading"
    page.wait_for_selector("#state.wait")
    assert page.inner_text("#state") == "The backend is starting"
    fake.ready = "ready"
    page.wait_for_selector("#state.ready")


# --- what goes wrong -----------------------------------------------------------------------------------------------
def test_oversized_file_is_refused_before_it_is_sent(page, fake, oversized):
    upload(page, pictures()[0])
    answer(page)
    posted = []
    page.on("request", lambda request: posted.append(len(request.post_data or "")))
    upload(page, oversized)
    words = notice(page)
    assert "too large" in words and "market.jpg has 10 MB" in words and "at most 10 MB" in words
    assert len(fake.asked) == 1 and max(posted) < 100_000
    assert not page.locator("#retry").is_visible() and not page.locator("#preview").is_visible() and not page.locator("#flag").is_visible()


def test_not_an_image(page, fake):
    upload(page, b"hello", "notes.txt", "text/plain")
    assert "This is not a picture" in notice(page) and len(fake.asked) == 1
    assert page.locator("#unseen").is_visible() and not page.locator("#retry").is_visible()
    assert "not a picture" in page.inner_text("#announcement")


def test_busy_backend_and_try_again(page, fake):
    fake.mode = "overloaded"
    upload(page, pictures()[2])
    words = notice(page)
    assert "The backend is busy" in words and "Try again in 3 seconds." in words
    fake.mode = None
    page.click("#retry")
    assert answer(page) == "Watermelon" and not page.locator("#retry").is_visible()
    assert page.evaluate("document.activeElement.id") == "answer"


def test_other_refusals(page, fake):
    for code, title in (("loading", "The backend is starting"), ("deadline", "That took too long"), ("internal", "That did not work"),
                        ("too_large", "This picture is too large")):
        fake.mode = code
        upload(page, pictures()[0])
        page.wait_for_selector(f".notice.bad:has-text('{title}')")


def test_stopped_backend_comes_back(page, fake):
    fake.stop()
    try:
        page.click("#random")
        words = notice(page)
        assert "The backend does not answer" in words and fake.url in words and "grocery serve" in words
        page.wait_for_selector("#state.bad")
    finally: fake.start()
    page.click("#retry")  # no picture came, so this fetches one
    assert answer(page)
    page.wait_for_selector("#state.ready")


def test_backend_that_stops_before_the_answer_keeps_the_picture(page, fake):
    fake.stop()
    try:
        upload(page, pictures()[2])
        assert "The backend does not answer" in notice(page) and page.locator("#preview").is_visible()
    finally: fake.start()
    page.click("#retry")
    assert answer(page) == "Watermelon"


def test_the_last_picture_wins(page, fake):
    fake.seconds = 3
    upload(page, pictures()[1])
    page.wait_for_selector("#answer[aria-busy=true]")
    fake.seconds = 0
    upload(page, pictures()[2])
    page.wait_for_selector("#result .name:has-text('Watermelon')")
    time.sleep(3.5)  # the first answer has come by now, and was dropped
    assert answer(page) == "Watermelon" and page.get_attribute("#answer", "aria-busy") == "false"


def test_lost_server_of_the_page_itself(browser, fake):
    page = browser.new_page()
    with served(fake.url) as address:
        page.goto(address)
        page.wait_for_selector(".gallery img")
        assert not page.locator(".lost").is_visible()
    page.click("#random")
    page.wait_for_selector(".lost", state="visible")
    page.close()


# --- for everybody -------------------------------------------------------------------------------------------------
def test_keyboard_only(page):
    order = []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", order
    assert order[:5] == ["choose", "camera", "paste", "random", "more"] and order[5:11] == ["BUTTON"] * 6 and order[11] == "SUMMARY"
    page.focus("#choose")
    upload(page, pictures()[2], press=lambda: page.keyboard.press("Enter"))
    assert answer(page) == "Watermelon"
    upload(page, pictures()[1], press=lambda: page.keyboard.press("Space"))
    page.wait_for_selector("text=Banana, 83%", state="attached")
    page.focus("#random")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "label"
    page.keyboard.type("Lemon")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".note.good")


@pytest.mark.parametrize("width", [320, 390])
def test_phone_width_has_no_sideways_scrolling(page, fake, oversized, width):
    page.set_viewport_size({"width": width, "height": 844})
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(sideways) == 0
    fake.unsure = True
    long_name = "a-very-long-name-without-any-space-" * 4 + ".jpg"
    upload(page, pictures()[4], long_name)
    answer(page)
    assert page.evaluate(sideways) == 0
    top = page.locator(".result .name").bounding_box()["y"]
    assert top < 844  # the answer is in sight without scrolling
    upload(page, oversized.rename(oversized.with_name(long_name)))
    notice(page)
    assert page.evaluate(sideways) == 0


def violations(page) -> list:
    "What axe finds that is serious or critical; transitions are over by then"
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install 'grocery-nb[dev]' to enable this test").Axe()
    page.wait_for_timeout(300)
    found = axe.run(page).response["violations"]
    return [(v["id"], [node["html"] for node in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe(page, fake, theme):
    page.emulate_media(color_scheme=theme)
    fake.unsure = True
    upload(page, pictures()[0])
    answer(page)
    page.click("#send")
    page.wait_for_selector(".note.bad")
    assert violations(page) == []
    fake.ready, fake.mode = "draining", "overloaded"
    page.click("#random")
    notice(page)
    page.wait_for_selector("#state.wait")
    page.click("#camera")
    page.wait_for_selector("#snap:not([disabled])")
    assert violations(page) == []


def test_why_dash_components_were_not_used(browser):
    "The two observations of the chapter: Upload drops large files in silence, and axe objects to Upload and Dropdown"
    from dash import Dash, Input, Output, dcc, html
    from werkzeug.serving import make_server
    app = Dash("naive_upload")
    app.layout = html.Main([html.H1("x"), dcc.Upload("Drop", id="upload", max_size=10), dcc.Dropdown(["a"], id="dropdown"), html.P(id="out")])
    app.callback(Output("out", "children"), Input("upload", "filename"), prevent_initial_call=True)(lambda name: f"got {name}")
    server = make_server("127.0.0.1", 0, app.server, threaded=True, request_handler=frontend.Quiet)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}")
    field = page.locator("#upload input[type=file]")
    field.set_input_files({"name": "large.jpg", "mimeType": "image/jpeg", "buffer": bytes(11)})
    page.wait_for_timeout(300)
    assert page.inner_text("#out") == ""
    field.set_input_files({"name": "small.jpg", "mimeType": "image/jpeg", "buffer": bytes(10)})
    page.wait_for_selector("text=got small.jpg")
    assert {name for name, _ in violations(page)} >= {"label", "aria-hidden-focus"}
    page.close()
    server.shutdown()
    server.server_close()


def test_with_the_real_backend(browser, models, tiny, tmp_path):
    "The page and `grocery_nb.backend` over HTTP: a random picture, an answer, a flag, a refusal"
    with running(tmp_path, MODEL_PATH=models / "model.onnx", DATA=tiny, FLAG_DIR=tmp_path / "flags") as backend, served(backend.url) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector(".gallery img")
        page.click("#random")
        name = answer(page)
        assert page.locator(".bars li").count() == 5 and "decode" in page.inner_text(".facts")
        page.fill("#label", name.lower())
        page.click("#send")
        page.wait_for_selector(".note.good")
        assert len(list((tmp_path / "flags").rglob("*.jpg"))) == 1
        upload(page, b"hello", "notes.txt", "text/plain")
        assert "This is not a picture" in notice(page)
        page.close()


def test_words_of_every_problem_are_whole():
    for code, (title, sentence) in BROWSER_PROBLEMS.items():
        words = frontend.problem_text({"name": "a.jpg", "size": 1, "problem": json.loads(json.dumps({"code": code}))}, LIMIT)
        assert words[0] == title and "{" not in words[1] and sentence.endswith(".")
