"Networks of torchvision and timm: their weights, their pictures, their heads; and what is said where one cannot be had"
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from grocery_nb.core import MissingExtra
from grocery_nb.edge import OnnxPredictor, check_parity, export_onnx
from grocery_nb.model_utils import ModelConfig, ModelError, build_model, create_model, load_model, save_model
from grocery_nb.training import backbones
from grocery_nb.training.backbones import (
    BACKBONES, assemble, backbone_for, find_head, hub_weights, preprocessing_for, split_head, timm_backbone)

SMALL = "timm:test_resnet", "timm:test_efficientnet", "timm:test_vit"  # timm's own for tests: 160 pixels, bilinear or bicubic
NAMES = [f"class {i}" for i in range(5)]


def images(size: int) -> torch.Tensor:
    return torch.sin(40 * torch.linspace(-1, 1, 3 * size * size, dtype=torch.float64).reshape(1, 3, size, size)).float()


def test_lite0_answers_as_the_network_that_was_written_by_hand_did(one_thread):
    "Its logits were stored before timm's network took its place; they were equal to the last bit"
    net = BACKBONES["efficientnet_lite0"].build(dropout=0.2).eval()
    net.load_state_dict(BACKBONES["efficientnet_lite0"].imagenet(net))
    with torch.inference_mode(): logits = net(images(224))[0]
    assert np.allclose(logits[:8], [-0.5639, 0.2111, 0.3755, -0.6654, -0.8742, 1.59, 0.0372, 0.4945], atol=2e-3)
    assert logits.argmax() == 767 and abs(logits.max() - 9.2609) < 2e-3


@pytest.mark.parametrize("number", range(3))
def test_what_is_written_here_of_lite_is_what_timm_says(number):
    here, there = BACKBONES[f"efficientnet_lite{number}"], timm_backbone(f"tf_efficientnet_lite{number}")
    assert all(getattr(here, name) == getattr(there, name) for name in ("size", "resize", "mean", "std", "interpolation"))


@pytest.mark.parametrize("number", range(3))
def test_lite_knows_granny_smith(number, photos, one_thread):
    "ImageNet has a class for this apple (948): the weights are in the right places, and the pictures are prepared as they want them"
    from grocery_nb.data_utils import Preprocessing, make_transform, open_image
    name = f"efficientnet_lite{number}"
    net = BACKBONES[name].build(dropout=0.2).eval()
    net.load_state_dict(BACKBONES[name].imagenet(net))
    files = sorted((photos / "train" / "Fruit" / "Apple" / "Granny-Smith").glob("*.jpg"))[:10]
    prepare = make_transform(Preprocessing(**preprocessing_for(name)))
    with torch.inference_mode(): guesses = net(torch.stack([prepare(open_image(path)) for path in files])).argmax(1)
    assert (guesses == 948).float().mean() >= 0.8


@pytest.mark.parametrize("name", [*SMALL, "efficientnet_lite1", "mobilenet_v3_small"])
def test_a_body_and_a_head_that_are_the_model_s_own(name, one_thread):
    model = create_model(5, name, weights=None).eval()
    body, head = split_head(model)
    pictures = torch.randn(2, 3, preprocessing_for(name)["size"], preprocessing_for(name)["size"])
    with torch.inference_mode(): assert torch.equal(head(body(pictures)), model(pictures))
    assert head is find_head(model)[1] and head.out_features == 5
    mine, parts = {id(p) for p in model.parameters()}, [*body.parameters(), *head.parameters()]
    assert len(parts) == len(mine) and all(id(p) in mine for p in parts)
    assert find_head(model)[1] is head, "the model still has its head"


@pytest.mark.parametrize("name", SMALL)
def test_a_network_of_timm_is_saved_loaded_exported_and_served(name, tmp_path, one_thread):
    torch.manual_seed(0)
    model = create_model(5, name, weights=None)
    side = preprocessing_for(name)["size"]
    model.train()(torch.randn(4, 3, side, side))
    card = save_model(model, tmp_path / "m.pth", classes=NAMES)
    interpolation = "bilinear" if name == "timm:test_resnet" else "bicubic"
    assert {key: card.preprocessing[key] for key in ("size", "resize", "interpolation")} == {"size": 160, "resize": 168, "interpolation": interpolation}
    loaded = load_model(5, tmp_path / "m.pth")
    assert loaded.config == model.config
    served = OnnxPredictor(export_onnx(loaded, tmp_path / "m.onnx"))
    assert check_parity(loaded, tmp_path / "m.onnx") < 1e-3
    assert served.preprocessing.interpolation == interpolation and served.preprocessing.size == 160
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    from grocery_nb.data_utils import make_transform
    with torch.inference_mode(): expected = loaded.cpu()(make_transform(served.preprocessing)(picture)[None]).numpy()
    assert np.allclose(served.logits(served.preprocess(picture)[None]), expected, atol=1e-3)


def test_cards_and_names_do_not_import_timm():
    code = ("import sys\nfrom grocery_nb.model_utils import ModelConfig, ModelCard, preprocessing_for\n"
            "ModelCard(5, backbone='timm:test_vit', sha256='0' * 64)\nModelConfig(5, 'timm:test_vit', None)\n"
            "preprocessing_for('efficientnet_lite2')\nassert 'timm' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"'timm' is not installed.*grocery-nb\[pretrained\]"): create_model(5, "efficientnet_lite0", None)
    assert create_model(5, weights=None).config.backbone == "mobilenet_v3_small"


@pytest.mark.parametrize("name, words", [
    ("timm:mobilenetv4_conv_smal", "did you mean mobilenetv4_conv_small"), ("timm:", "timm:NAME"), ("timm:a b", "timm:NAME"), ("resnet18", "timm:NAME"),
    ("timm:visformer_nano", "has no network")])
def test_a_name_that_is_none(name, words):
    with pytest.raises(ModelError, match=words): create_model(5, name, weights=None)


def test_a_network_whose_pictures_we_cannot_make(monkeypatch):
    import timm
    config = dataclasses.replace(timm.get_pretrained_cfg("test_vit"), input_size=(3, 160, 128))
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: config)
    with pytest.raises(ModelError, match=r"\(3, 160, 128\)"): timm_backbone.__wrapped__("test_vit")


def test_a_network_that_does_not_end_in_one_layer():
    with pytest.raises(ModelError, match="does not end in one linear layer"): create_model(5, "timm:levit_128s", weights=None)


def test_no_hub(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(ModelError) as refused: create_model(5, "timm:test_resnet")
    for way in ("weights=None", "weights=FILE.pth", 'backbone="efficientnet_lite0"', "huggingface.co"): assert way in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_weights_anywhere():
    with pytest.raises(ModelError, match="timm has no pretrained weights for test_vit4; choose weights=None"): hub_weights("test_vit4")


def test_weights_in_the_hub_s_cache_need_no_network(tmp_path, monkeypatch):
    import huggingface_hub
    from safetensors.torch import save_file
    for name in ("HTTPS_PROXY", "https_proxy"): monkeypatch.setenv(name, "http://127.0.0.1:9")
    net = backbone_for("timm:test_resnet").build(dropout=0.2)
    nn.init.constant_(find_head(net)[1].bias, 0.125)
    first = next(net.parameters())
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: asked.append(names) or str(tmp_path / "model.safetensors"))
    model = create_model(5, "timm:test_resnet")
    assert torch.equal(next(model.parameters()).cpu(), first) and asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]


@pytest.fixture
def own(tmp_path):
    torch.manual_seed(0)
    model = create_model(5, "timm:test_vit", weights=None)
    save_model(model, tmp_path / "own.pth", classes=NAMES)
    return model.cpu(), tmp_path / "own.pth"


def test_an_own_model_is_gone_on_from(own):
    model, path = own
    def first(net): return next(net.parameters()).cpu()
    def head(net): return find_head(net)[1].weight.cpu()
    for same in (create_model(5, weights=path, classes=NAMES), create_model(5, weights=str(path)), create_model(5, "timm:test_vit", path, dict(enumerate(NAMES))),
                 build_model({"num_classes": 5, "weights": str(path)}), build_model(ModelConfig(5, weights=path))):
        assert torch.equal(first(same), first(model)) and torch.equal(head(same), head(model))
        assert same.config == ModelConfig(5, "timm:test_vit", str(path)) and same.training
    for other in (create_model(5, weights=path, classes=NAMES[::-1]), create_model(7, weights=path), create_model(7, weights=path, classes=[*NAMES, "a", "b"])):
        assert torch.equal(first(other), first(model)) and not torch.equal(head(other)[:5], head(model))
        assert head(other).shape[0] == other.config.num_classes


def test_what_started_from_an_own_model_can_be_saved_after_that_is_gone(own, tmp_path):
    _, path = own
    later = create_model(7, weights=path)
    path.unlink()
    save_model(later, tmp_path / "later.pth")
    assert load_model(7, tmp_path / "later.pth").card.weights == str(path)


def test_an_own_model_that_cannot_be_gone_on_from(own, tmp_path):
    model, path = own
    with pytest.raises(ModelError, match="is a timm:test_vit, and a mobilenet_v3_small was asked for"): create_model(5, "mobilenet_v3_small", path)
    with pytest.raises(ModelError, match="There is no file"): create_model(5, weights=tmp_path / "absent.pth")
    with pytest.raises(ModelError, match="2 class names were given for a model of 5 classes"): create_model(5, weights=path, classes=["a", "b"])
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ModelError, match="has no card"): create_model(5, weights=tmp_path / "bare.pth")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is not the file that own.pth.json describes"): create_model(5, weights=path)
    for weights in ("imagnet", "DEFAULT", 5, True):
        with pytest.raises(ModelError, match="FILE.pth"): create_model(5, weights=weights)


def test_a_start_at_random_is_the_same_for_the_same_seed():
    pair = []
    for _ in range(2):
        torch.manual_seed(3)
        pair.append(assemble(ModelConfig(5, "timm:test_efficientnet", None)))
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in pair)))
    assert {m.momentum for m in pair[0].modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_the_table_of_packages_is_complete():
    assert {f"tf_{name}" for name in BACKBONES if name != "mobilenet_v3_small"} == {*backbones.PACKAGES}
