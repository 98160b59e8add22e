"Exported files: the answers of the trained model, from another program, without torch; damage found before anything is served."
import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from PIL import Image

from grocery_nb import edge
from grocery_nb.core import GroceryError
from grocery_nb.edge import OnnxPredictor, Predictor, answer, check_parity, export_file, export_onnx, probabilities
from grocery_nb.data.pictures import Preprocessing
from grocery_nb.serving import sealed
from grocery_nb.serving.sealed import EdgeError, edge_card, edge_card_to_json, seal

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["Apple", "Banana", "Kiwi", "Milk", "Juice"]
COARSE = {"classes": ["Fruit", "Packages"], "of": [0, 0, 0, 1, 1]}


@pytest.fixture(scope="session")
def pictures() -> list:
    "Mini Grocery pictures of several shapes"
    from grocery_nb.synthetic import draw_image
    drawn = [Image.fromarray(draw_image(i, 3, 96)) for i in (0, 9, 18, 27)]
    return [drawn[0], drawn[1].crop((0, 10, 96, 70)), drawn[2].crop((20, 0, 61, 96)), drawn[3].resize((400, 300))]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    "Save and export a model of a backbone, once; with statistics and a head that make lively logits"
    @cache
    def make(backbone):
        import torch

        from grocery_nb.model_utils import create_model, save_model
        from grocery_nb.training.backbones import set_momentum
        torch.manual_seed(0)
        model = set_momentum(create_model(5, backbone, weights=None), 1.0).train()
        with torch.no_grad():
            model(torch.randn(8, 3, 96, 96))
            model.classifier[-1].weight *= 2
        path = tmp_path_factory.mktemp("exported") / "model.pth"
        save_model(model, path, classes=NAMES, label="fine", coarse=COARSE, temperature=1.5, threshold=0.5,
                   data="nothing", metrics={"top1": 0.2})
        return export_file(path)
    return make


@pytest.fixture
def onnx_file(exported):
    return exported("mobilenet_v3_small")


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", pytest.param("efficientnet_lite0", marks=pytest.mark.slow)])
def test_answers_as_the_trained_model_does(exported, pictures, backbone):
    import torch

    from grocery_nb.data_utils import make_transform
    from grocery_nb.model_utils import load_model
    path = exported(backbone)
    predictor, model = OnnxPredictor(path), load_model(None, path.with_suffix("")).cpu()
    transform = make_transform(Preprocessing(**model.card.preprocessing))
    tensors = torch.stack([transform(picture) for picture in pictures])
    arrays = np.stack([predictor.preprocess(picture) for picture in pictures])
    assert np.array_equal(tensors.numpy(), arrays)
    with torch.inference_mode(): expected = model(tensors)
    found = predictor.logits(arrays)
    assert expected.std() > 0.5 and np.abs(expected.numpy() - found).max() < 1e-5 * max(10, np.abs(found).max())
    for logits, row in zip(expected, found):
        told, chances = answer(row, predictor.card, 5), torch.softmax(logits.double() / 1.5, 0)
        best = chances.argsort(descending=True).tolist()
        assert [entry["class"] for entry in told["top_k"]] == [NAMES[i] for i in best] and told["prediction"] == NAMES[best[0]]
        assert np.allclose([entry["probability"] for entry in told["top_k"]], chances[best], atol=1e-4)
        assert told["unsure"] == bool(chances.max() < 0.5)
        fruit = chances[:3].sum().item()
        assert told["coarse"]["prediction"] == ("Fruit" if fruit > 0.5 else "Packages")
        assert told["coarse"]["probability"] == pytest.approx(max(fruit, 1 - fruit), abs=1e-4)
    assert isinstance(predictor, Predictor) and predictor.card.backbone == backbone and predictor.card.metrics == {"top1": 0.2}
    assert predictor.version == hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def test_file_is_one_and_tells_nothing_of_this_machine(onnx_file):
    import onnx
    data = onnx_file.read_bytes()
    model = onnx.load_model_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert b"site-packages" not in data and b".py" not in data and str(onnx_file.parent).encode() not in data
    assert {node.op_type for node in model.graph.node} & {"BatchNormalization", "Dropout", "Transpose"} == set()
    assert [entry.version for entry in model.opset_import] == [edge.OPSET]


def test_silent_and_without_touching_the_model(capfd):
    import torch
    from torch import nn
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model.eval()
    plain = edge.graph_bytes(model, 16)
    model.to(memory_format=torch.channels_last).train()
    before = [tensor.clone() for tensor in model.state_dict().values()]
    assert edge.graph_bytes(model, 16) == plain and model.training and model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_same_weights_same_file(onnx_file, tmp_path, capfd):
    import torch

    from grocery_nb.model_utils import load_model
    model = load_model(None, onnx_file.with_suffix("")).to(memory_format=torch.channels_last).train()
    again = export_onnx(model, tmp_path / "again.onnx")
    assert again.read_bytes() == onnx_file.read_bytes()
    assert model.training and model.features[3].block[0][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert capfd.readouterr() == ("", "")


def test_another_model_is_found_out(onnx_file):
    import torch

    from grocery_nb.model_utils import create_model, load_model
    model = load_model(None, onnx_file.with_suffix(""))
    assert check_parity(model, onnx_file) < 1e-3
    with torch.no_grad(): model.features[0][0].weight[0] += 0.01
    with pytest.raises(EdgeError, match="a logit differs by"): check_parity(model, onnx_file)
    with pytest.raises(EdgeError, match="changed after they were loaded"): export_onnx(model, onnx_file)
    with pytest.raises(EdgeError, match="5 logits and the model 7"): check_parity(create_model(7, weights=None), onnx_file)


def test_models_without_card_or_names(onnx_file, tmp_path):
    from grocery_nb.model_utils import ModelError, create_model, save_model
    model = create_model(5, weights=None)
    with pytest.raises(EdgeError, match="no card"): export_onnx(model, tmp_path / "model.onnx")
    save_model(model, tmp_path / "model.pth")
    with pytest.raises(EdgeError, match="names no classes"): export_file(tmp_path / "model.pth")
    with pytest.raises(ModelError, match="no file"): export_file(tmp_path / "absent.pth")
    with pytest.raises(EdgeError, match="ends in .onnx"): export_file(onnx_file.with_suffix(""), tmp_path / "model.pb")
    assert [path.name for path in tmp_path.glob("*.onnx")] == []


def test_a_failing_export_leaves_the_old_file(onnx_file, tmp_path, monkeypatch):
    path, weights = tmp_path / "model.onnx", onnx_file.with_suffix("")
    old = sealed.SEAL + b"the old one"
    path.write_bytes(old)
    wrong = sealed.seal(b"\x08\x0a", OnnxPredictor(onnx_file).card)
    good = onnx_file.read_bytes()
    graph = good[:good.index(b"r", good.rindex(sealed.CARD_KEY.encode()) - 16)]

    def changed(model, size):
        "An export that went wrong in a single weight"
        import onnx
        proto = onnx.load_model_from_string(graph)
        bias = next(tensor for tensor in proto.graph.initializer if tensor.name == "classifier.3.bias")
        bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(0.1)).tobytes()
        del proto.metadata_props[:]
        return proto.SerializeToString()

    def full(path, data): raise OSError(28, "No space left on device")

    for name, replacement, message in (("graph_bytes", changed, "a logit differs by 0.1"), ("graph_bytes", lambda *_: wrong, "model.onnx"),
                                       ("atomic_write", full, "No space left")):
        with monkeypatch.context() as patch:
            patch.setattr(edge, name, replacement)
            if name == "atomic_write": patch.setattr(edge, "graph_bytes", lambda *_: graph)
            with pytest.raises(EdgeError, match=message): export_file(weights, path)
        assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_an_export_is_named_by_adding_and_replaces_only_exports(onnx_file, tmp_path, monkeypatch):
    weights = onnx_file.with_suffix("")
    assert onnx_file.name == "model.pth.onnx" and weights.name == "model.pth"
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"\x08\x07somebody else's network")
    with monkeypatch.context() as patch:
        patch.setattr(edge, "graph_bytes", lambda *_: pytest.fail("it was exported before it was refused"))
        with pytest.raises(GroceryError, match="exists and is no ONNX model of this program"): export_file(weights, foreign)
        with pytest.raises(GroceryError, match="is a folder"): export_file(weights, tmp_path)
        (tmp_path / "w.onnx").write_bytes(weights.read_bytes())
        with pytest.raises(GroceryError, match="meets the weights"): export_file(tmp_path / "w.onnx", tmp_path / "w.onnx")
    assert foreign.read_bytes() == b"\x08\x07somebody else's network"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert edge.export_place("~/made/new.onnx") == tmp_path / "made" / "new.onnx"


def test_every_damage_is_found(onnx_file, tmp_path):
    good, path = onnx_file.read_bytes(), tmp_path / "model.onnx"
    bad = [b"", b"\0", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", good + b"\0", good + good, good[::-1],
           onnx_file.with_suffix("").read_bytes(), bytes(len(good)), good[1:], good[len(sealed.SEAL) + 64:]]
    bad += [good[:n] for n in (1, 63, 64, 90, 1000, len(good) // 2, len(good) - 65, len(good) - 64, len(good) - 1)]
    for place in [*np.random.default_rng(0).integers(0, len(good), 40), 0, len(good) - 1, len(good) - 64, len(good) - 70]:
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        bad.append(bytes(flipped))
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(EdgeError) as refused: OnnxPredictor(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 300
    for where in (tmp_path, tmp_path / "absent.onnx"):
        with pytest.raises(EdgeError, match=where.name): OnnxPredictor(where)


@pytest.fixture
def forge(onnx_file, tmp_path):
    "Write a file whose seal is right, and whose card, graph or metadata are changed"
    import onnx

    def make(change=lambda proto: None, **card):
        proto = onnx.load_model_from_string(onnx_file.read_bytes())
        values = {**json.loads(proto.metadata_props[0].value), **card}
        del proto.metadata_props[:]
        proto.metadata_props.append(onnx.StringStringEntryProto(key=sealed.CARD_KEY, value=json.dumps(values)))
        change(proto)
        body = proto.SerializeToString()
        path = tmp_path / "model.onnx"
        path.write_bytes(body + sealed.SEAL + hashlib.sha256(body).hexdigest().encode())
        return path
    return make


def no_metadata(proto): del proto.metadata_props[:]
def newer_ir(proto): proto.ir_version = 999
def newer_opset(proto): proto.opset_import[0].version = 999
def fixed_batch(proto): proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
def foreign_operator(proto): proto.graph.node[0].op_type = "Fly"


def double_input(proto):
    proto.graph.input.append(proto.graph.input[0])
    proto.graph.input[1].name = "more"


def renamed_output(proto):
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "answers"


def test_a_forged_file_without_fault_is_served(forge):
    assert OnnxPredictor(forge()).card.classes == NAMES


@pytest.mark.parametrize("change, card, message", [
    (no_metadata, {}, "no card"), (newer_ir, {}, "IR version"), (newer_opset, {}, "Opset 999|opset"), (foreign_operator, {}, "Fly"),
    (fixed_batch, {}, "card wants images"), (double_input, {}, "card wants images"), (renamed_output, {}, "card wants logits"),
    (None, {"format": 2}, "upgrade grocery-nb"), (None, {"format": "1"}, "without a format"), (None, {"more": 1}, "unknown fields"),
    (None, {"classes": NAMES[:4], "coarse": None}, "card wants logits"),
    (None, {"classes": "Apple"}, "classes"), (None, {"classes": []}, "classes"),
    (None, {"temperature": 0}, "temperature"), (None, {"temperature": float("nan")}, "temperature"),
    (None, {"threshold": "0.5"}, "threshold"),
    (None, {"label": "round"}, "label"), (None, {"coarse": {"classes": ["Fruit"], "of": [0, 0, 0, 1, 1]}}, "coarse"),
    (None, {"preprocessing": {"size": 224}}, "lacks interpolation, mean"), (None, {"preprocessing": None}, "preprocessing"),
    (None, {"preprocessing": {"size": 200, "resize": 224, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}}, "card wants images"),
    (None, {"weights_sha256": "abc"}, "weights_sha256")])
def test_sealed_files_that_cannot_be_served(forge, change, card, message):
    path = forge(change, **card) if change else forge(**card)
    with pytest.raises(EdgeError, match=message) as refused: OnnxPredictor(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_foreign_onnx(onnx_file, tmp_path):
    import onnx
    proto = onnx.load(onnx_file)
    onnx.save(proto, tmp_path / "saved_again.onnx")
    assert OnnxPredictor(tmp_path / "saved_again.onnx").card == OnnxPredictor(onnx_file).card  # onnx keeps the order of fields
    proto.producer_name = "somebody else"
    onnx.save(proto, tmp_path / "changed.onnx")
    with pytest.raises(EdgeError, match="changed after its export"): OnnxPredictor(tmp_path / "changed.onnx")
    no_metadata(proto)
    onnx.save(proto, tmp_path / "foreign.onnx")
    with pytest.raises(EdgeError, match="no model file that `grocery export` wrote"): OnnxPredictor(tmp_path / "foreign.onnx")


@pytest.mark.parametrize("threads", [1, 2])
def test_one_session_for_many_threads(onnx_file, threads):
    predictor, rng = OnnxPredictor(onnx_file, threads), np.random.default_rng(0)
    batches = [rng.normal(size=(n, 3, 224, 224)).astype(np.float32) for n in (1, 3, 2, 1, 4, 1, 2, 5)]
    alone = [predictor.logits(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool: together = list(pool.map(predictor.logits, batches * 3))
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(alone * 3, together))


def test_batches_that_are_none(onnx_file):
    predictor = OnnxPredictor(onnx_file)
    for batch in (np.zeros((0, 3, 224, 224), np.float32), np.zeros((3, 224, 224), np.float32), np.zeros((1, 3, 224, 224)), [[0]], None,
                  np.zeros((1, 224, 224, 3), np.float32), np.zeros((1, 3, 224, 224), np.uint8)):
        with pytest.raises(EdgeError, match="logits was given"): predictor.logits(batch)
    turned = np.ones((2, 224, 224, 3), np.float32).transpose(0, 3, 1, 2)
    assert np.array_equal(predictor.logits(turned), predictor.logits(np.ascontiguousarray(turned)))
    for threads in (0, -1, 1.5, True, None):
        with pytest.raises(EdgeError, match="threads"): OnnxPredictor(onnx_file, threads)


def test_answers_at_the_edges(onnx_file):
    from dataclasses import replace
    card = OnnxPredictor(onnx_file).card
    for logits in ([1e30, 0, 0, 0, -1e30], [0, 0, 0, 0, 0], [-1e4, -1e4, -1e4, -1e4, 0]):
        told = answer(np.float32(logits), card)
        assert json.loads(json.dumps(told, allow_nan=False)) == told
        assert sum(entry["probability"] for entry in told["top_k"]) == pytest.approx(1)
    few = replace(card, classes=["Apple", "Milk"], coarse=None, threshold=None)
    told = answer(np.float32([0, 0]), few)
    assert len(told["top_k"]) == 2 and told["coarse"] is None and told["unsure"] is False
    for top_k in (0, 6, -1, 2.0, True, None):
        with pytest.raises(EdgeError, match="top_k"): answer(np.zeros(5), card, top_k)
    for logits in (np.zeros(4), np.zeros((1, 5)), np.full(5, np.nan), [np.inf, 0, 0, 0, 0]):
        with pytest.raises(EdgeError, match="logits"): answer(logits, card)
    assert np.array_equal(probabilities(np.float32([1, 2, 3]), 1e-3), [0, 0, 1])


def test_cards_travel_whole(onnx_file):
    from grocery_nb.model_utils import read_card
    card = edge_card(read_card(onnx_file.with_suffix("")))
    assert card == OnnxPredictor(onnx_file).card and sealed.edge_card_from_json(edge_card_to_json(card)) == card
    assert seal(b"", card).startswith(b"r") and card.created.endswith("+00:00")
    assert card.weights_sha256 == hashlib.sha256(onnx_file.with_suffix("").read_bytes()).hexdigest()


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "onnx", "onnxscript"): raise ModuleNotFoundError(f"{name} is refused", name=name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from PIL import Image
from grocery_nb.edge import EdgeError, OnnxPredictor, answer, export_file
predictor = OnnxPredictor(sys.argv[1])
print(answer(predictor.logits(predictor.preprocess(Image.open(sys.argv[2]))[None])[0], predictor.card, 1)["prediction"])
try: export_file("model.pth")
except ImportError as e: print(e)
"""


def test_serves_without_torch(onnx_file, pictures, tmp_path):
    pictures[0].save(tmp_path / "picture.png")
    predictor = OnnxPredictor(onnx_file)
    expected = answer(predictor.logits(predictor.preprocess(pictures[0])[None])[0], predictor.card)["prediction"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, onnx_file, tmp_path / "picture.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answered, refused = done.stdout.splitlines()
    assert answered == expected and "pip install 'grocery-nb[train]'" in refused
