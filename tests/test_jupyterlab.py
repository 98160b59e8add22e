"""The notebooks as a student sees them: in a real JupyterLab, started as `make lab` starts it, in Chromium.

All that JupyterLab has to draw or fold in any notebook (diagrams, `<details>`, pages in frames) is gathered in one notebook, so that one visit looks at all of it.
"""
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
CHAPTER = "90_core"  # a short one, with a diagram, a summary and folded solutions; it runs in seconds
TOKEN = "test"
FRAME = "<iframe srcdoc='<p>A page</p>'></iframe>"


def markdown(text: str, number: int) -> dict:
    return {"cell_type": "markdown", "id": f"text-{number}", "metadata": {}, "source": text}


def code(text: str, number: int, outputs: list=[], count: int=None) -> dict:
    return {"cell_type": "code", "id": f"code-{number}", "metadata": {}, "source": text, "outputs": outputs, "execution_count": count}


def html(text: str) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {"text/html": text}}


def write(path: Path, cells: list):
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(nbformat.from_dict({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}), path)


def is_page(output: dict) -> bool:
    return "<iframe" in "".join(output.get("data", {}).get("text/html", ""))


def gathered() -> list:
    "The cells of all notebooks that hold a diagram, something folded, or a page in a frame"
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    pages = [output for cell in cells for output in cell.get("outputs", []) if is_page(output)]
    drawn = [markdown(text, i) for i, text in enumerate(texts) if "```mermaid" in text or "<details" in text]
    return [*drawn, *(code("show()", i, [page]) for i, page in enumerate(pages))]


PLANTED = [
    markdown("::: {.callout-tip}\nA solution that lies open\n:::", 1),
    markdown("```{mermaid}\nflowchart LR\n  a --> b\n```", 2),
    markdown("```mermaid\nflowchart LR\n  a --> graph[\"a reserved word\"]\n```", 3),
    markdown("<details open><summary>Solution</summary>\n\nOpen\n\n</details>", 4),
    code("x = '" + "long " * 60 + "'", 5, count=3),
    code("1/0", 6),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    "A clean checkout of what JupyterLab sees, with the gathered and the planted notebook in it"
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("nbs", ".jupyter"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__"))
    for name in ("settings.ini", ".gitignore"): shutil.copy(ROOT / name, folder)
    write(folder / "nbs" / "gathered.ipynb", gathered())
    write(folder / "nbs" / "planted.ipynb", PLANTED)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "-qm", "All"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def changed(checkout: Path) -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True).stdout


def command() -> list:
    "What `make lab` runs, with this environment's commands"
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # inside `make test` it would say which folder it enters
    line = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env=alone, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    program, *arguments = shlex.split(line)
    return [str(Path(sys.executable).with_name(Path(program).name)), *arguments]


@pytest.fixture(scope="module")
def lab(checkout, tmp_path_factory) -> str:
    "The address of a JupyterLab that has the settings of the workbook and none of anybody's home"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | {"HOME": str(home)}
    root = ["--allow-root"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    only_here = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True"]
    log = home / "log"
    with open(log, "w") as out, subprocess.Popen([*command(), *only_here, *root], cwd=checkout, env=environment, stdout=out, stderr=out) as server:
        try:
            for _ in range(300):
                try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=5)
                except (urllib.error.URLError, OSError): time.sleep(0.2)
                else: break
                assert server.poll() is None, log.read_text()
            else: pytest.fail(log.read_text())
            yield f"http://127.0.0.1:{port}"
        finally: server.terminate()
    assert "Error" not in log.read_text().replace("KeyError: 'ihdr'", ""), log.read_text()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'grocery-nb[dev]' to enable the browser tests")
    if not CHROMIUM.exists(): pytest.skip("no /usr/bin/chromium: apt-get install chromium to enable the browser tests")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, lab, checkout):
    "Open a notebook in a window of 1280 pixels and wait until all of it is there; nothing may be asked of the network"
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    strangers = []

    def opened(name: str):
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: re.match(r"http://127\.0\.0\.1:|data:|blob:|about:", request.url) or strangers.append(request.url))
        page.goto(f"{lab}/lab/workspaces/test/tree/{name}.ipynb?token={TOKEN}&reset")
        number = len(json.loads((checkout / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"])
        page.wait_for_function(f"document.querySelectorAll('.jp-Notebook .jp-Cell').length === {number}")
        page.wait_for_function("[...document.querySelectorAll('.jp-MarkdownCell')].every(cell => cell.querySelector('.jp-MarkdownOutput')?.childElementCount)")
        page.wait_for_function("window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'")
        page.wait_for_timeout(500)  # diagrams are drawn, and what would pop up has popped up
        return page
    yield opened
    context.close()
    assert strangers == []


LOOK = r"""() => {
  const found = [], all = (selector) => [...document.querySelectorAll(selector)];
  const text = (element) => element.textContent.trim().slice(0, 60);
  for (const dialog of all('.jp-Dialog, .Toastify__toast')) found.push('dialog: ' + text(dialog));
  for (const output of all('.jp-MarkdownOutput')) {
    const words = output.cloneNode(true);
    words.querySelectorAll('.jp-RenderedMermaid:not(.jp-mod-warning)').forEach(drawn => drawn.remove());
    if (/^:::|\{mermaid\}/m.test(words.textContent)) found.push('raw text: ' + text(output));
    if (/^(flowchart|graph|sequenceDiagram|stateDiagram)/m.test(words.textContent)) found.push('no diagram: ' + text(output));
  }
  for (const open of all('.jp-MarkdownOutput details[open]')) found.push('lies open: ' + text(open));
  for (const code of all('.jp-CodeCell .cm-scroller')) if (code.scrollWidth > code.clientWidth + 1) found.push('runs out of sight: ' + text(code));
  const model = window.jupyterapp.shell.currentWidget.model.toJSON();
  for (const cell of model.cells) for (const output of cell.outputs ?? []) if (output.output_type === 'error') found.push('error: ' + output.ename);
  return found;
}"""


def saved(page):
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")


def run_all(page):
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function("![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(prompt => prompt.textContent.includes('*'))")


def test_the_door_opens_without_a_question(visit):
    page = visit("index")
    assert page.locator(".jp-RenderedMermaid img[src^='data:image/svg']").count() == page.locator(".jp-RenderedMermaid").count() > 0
    assert page.evaluate(LOOK) == []


def test_all_that_is_drawn_or_folded(visit):
    page, cells = visit("gathered"), gathered()
    text = "\n".join(cell["source"] for cell in cells)
    assert page.evaluate(LOOK) == []
    assert page.locator(".jp-RenderedMermaid img[src^='data:image/svg']").count() == len(re.findall(r"^```mermaid", text, re.MULTILINE)) > 0
    assert page.locator("details:not([open])").count() == len(re.findall("<details>", text)) > 0
    assert page.locator(".jp-OutputArea iframe").count() == sum(is_page(output) for cell in cells for output in cell.get("outputs", []))
    summary = page.locator("details").first
    summary.locator("summary").click()
    assert summary.get_attribute("open") is not None


def test_a_chapter_that_was_looked_at_is_clean(visit, checkout):
    page = visit(CHAPTER)
    assert page.evaluate(LOOK) == []
    saved(page)
    page.evaluate("window.jupyterapp.commands.execute('application:close')")
    page.wait_for_function("!document.querySelector('.jp-Notebook')")
    assert page.locator(".jp-Dialog").count() == 0
    assert changed(checkout) == ""


def test_a_chapter_runs_to_its_end(visit, checkout):
    shutil.copy(checkout / "nbs" / f"{CHAPTER}.ipynb", checkout / "nbs" / "run.ipynb")
    page = visit("run")
    run_all(page)
    prompts = page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
    assert [prompt for prompt in prompts if not re.search(r"\d", prompt)] == [] and page.evaluate(LOOK) == []
    saved(page)  # so that nobody asks
    (checkout / "nbs" / "run.ipynb").unlink()


def test_what_looks_bad_is_seen(visit, checkout):
    page = visit("planted")
    page.add_style_tag(content=".cm-lineWrapping { white-space: pre !important; }")
    run_all(page)
    found = page.evaluate(LOOK)
    assert [fault.split(":")[0] for fault in found] == ["raw text", "no diagram", "no diagram", "lies open", "runs out of sight", "error"]
    saved(page)
    assert "planted.ipynb" in changed(checkout)
    subprocess.run(["git", "checkout", "-q", "nbs"], cwd=checkout, check=True)


def test_pages_of_a_stranger_are_not_shown(visit, checkout):
    "JupyterLab drops frames from notebooks that it does not trust: the check above would see it"
    write(checkout / "nbs" / "stranger.ipynb", [code("show()", 1, [html(FRAME)])])
    page = visit("stranger")
    assert page.locator(".jp-OutputArea-output").count() == 1 and page.locator(".jp-OutputArea iframe").count() == 0
    saved(page)
    (checkout / "nbs" / "stranger.ipynb").unlink()
