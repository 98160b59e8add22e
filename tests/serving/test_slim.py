"The serving image's contents: `pip install 'grocery-nb[serve]'` answers over HTTP, and neither has torch nor asks for it."
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from grocery_nb.edge import OnnxPredictor, answer
from grocery_nb.data.pictures import Preprocessing
from grocery_nb.serving.sealed import SEAL, EdgeCard, seal

HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "matplotlib", "scipy", "pandas", "dash", "nbdev", "fastcore")
REFUSE = """
import sys
class Refuse:
    "Nothing of the training extra can be imported, as where it is not installed"
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
from grocery_nb.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    "A sealed model that looks at nothing but the mean colour: made without torch, in milliseconds"
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["images", "axes"], ["colour"], keepdims=0),
         helper.make_node("MatMul", ["colour", "weights"], ["logits"])],
        "colours", [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 224, 224])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(weights, "weights")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(proto)
    card = EdgeCard(["Apple", "Banana", "Kiwi", "Milk"], "coarse", None, 1.0, None, Preprocessing().asdict(), "colours", None, None, {},
                    "2026-11-21T00:00:00+00:00", hashlib.sha256(b"").hexdigest())
    path = tmp_path_factory.mktemp("slim") / "model.onnx"
    path.write_bytes(seal(proto.SerializeToString(), card))
    assert SEAL in path.read_bytes()
    return path


def answers(command: list, model: Path, folder: Path) -> dict:
    "Start a server, ask it about a picture, and stop it; its answer must be the predictor's own"
    log = folder / "log.jsonl"
    kept = {name: value for name, value in os.environ.items() if name not in ("HOST", "DATA", "PREDICTOR", "PYTHONPATH", "GROCERY_DATA_DIR")}
    with open(log, "wb") as f:
        server = subprocess.Popen([*map(str, command)], stderr=f, cwd=folder, env={**kept, "MODEL_PATH": str(model), "PORT": "0"})
    try:
        with httpx.Client(base_url=listening(server, log), timeout=60) as client:
            while client.get("/readyz").status_code != 200: time.sleep(0.05)
            buffer, picture = BytesIO(), Image.new("RGB", (40, 30), (200, 30, 90))
            picture.save(buffer, "PNG")
            told = client.post("/predict?top_k=2", files={"file": ("picture.png", buffer.getvalue(), "image/png")})
            assert told.status_code == 200, told.text
            assert client.get("/model").json()["engine"] == "onnx" and client.get("/metrics").status_code == 200
            assert client.post("/predict", files={"file": ("notes.txt", b"no picture", "text/plain")}).status_code in (400, 415)
        server.terminate()
        assert server.wait(30) == 0, log.read_text()
    finally: server.kill()
    predictor = OnnxPredictor(model)
    expected = answer(predictor.logits(predictor.preprocess(picture)[None])[0], predictor.card, 2)
    assert {**told.json(), "model": None} == {**expected, "model": None} and told.json()["model"] == predictor.version


def listening(server: subprocess.Popen, log: Path) -> str:
    "The address in the log, as soon as it stands there"
    limit = time.monotonic() + 90
    while server.poll() is None and time.monotonic() < limit:
        for line in log.read_text().splitlines():
            if '"listening"' in line: return json.loads(line)["url"]
        time.sleep(0.05)
    raise AssertionError(f"the server does not listen:\n{log.read_text()}")


def test_serves_where_torch_cannot_be_imported(model, tmp_path):
    answers([sys.executable, "-c", REFUSE.format(heavy=HEAVY), "serve"], model, tmp_path)


@pytest.fixture(scope="module")
def slim(tmp_path_factory) -> Path:
    "The folder with the commands of a clean environment that holds the package with its extra `serve`"
    folder = tmp_path_factory.mktemp("environment")
    source, uv = folder / "source", Path(sys.executable).with_name("uv")
    if not uv.exists(): pytest.skip("uv is not in this environment: pip install uv to enable this test")
    shutil.copytree(ROOT / "grocery_nb", source / "grocery_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / "env"], check=True)
    done = subprocess.run([uv, "pip", "install", "--python", folder / "env" / "bin" / "python", f"{source}[serve]"],
                          capture_output=True, text=True)
    if done.returncode and any(word in done.stderr.lower() for word in ("connect", "dns", "network", "failed to fetch")):
        pytest.skip("no package index can be reached: connect to a network to enable this test")
    assert done.returncode == 0, done.stderr
    return folder / "env" / "bin"


def test_clean_environment_serves_without_torch(slim, model, tmp_path):
    listed = subprocess.run([slim / "python", "-c", "import importlib.metadata as m; print(*(d.name.lower() for d in m.distributions()))"],
                            capture_output=True, text=True, cwd=tmp_path).stdout.split()
    assert {"grocery-nb", "onnxruntime", "fastapi"} <= set(listed) and not set(HEAVY) & set(listed)
    answers([slim / "grocery", "serve"], model, tmp_path)


@pytest.mark.parametrize("arguments", [
    ["export", "model.pth"], ["train"],
    ["serve", "--model", "model.pth", "--port", "0"]])
def test_what_it_lacks_it_says(slim, tmp_path, arguments):
    (tmp_path / "model.pth").write_bytes(b"PK")
    done = subprocess.run([slim / "grocery", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and "pip install 'grocery-nb[train]'" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
