"""Every notebook runs top to bottom in a fresh Jupyter kernel, as in JupyterLab, without a network.

`make test` has run them all with nbdev_test already, in nbdev's own kernel and without a network; so here only some run always, and
the rest with `pytest -m slow`.
"""
import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from nbclient import NotebookClient

NOWHERE = "http://127.0.0.1:9"  # a proxy that nobody runs: what asks the network fails at once


ALWAYS = {"90_core", "03_model", "index"}
CASES = [pytest.param(path, id=path.stem, marks=() if path.stem in ALWAYS else pytest.mark.slow) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", CASES)
def test_runs_in_a_jupyter_kernel(path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"): monkeypatch.setenv(name, NOWHERE)
    for name in ("no_proxy", "NO_PROXY"): monkeypatch.setenv(name, "127.0.0.1,localhost")
    before = {item.name for item in (ROOT / "nbs").iterdir()}
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    assert {item.name for item in (ROOT / "nbs").iterdir()} == before, "a notebook leaves no files behind"
