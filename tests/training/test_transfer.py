"""Transfer across chapters: real loaders and models, cached features, interrupted fine-tuning."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import weights
from grocery_nb.core import GroceryError
from grocery_nb.data_utils import Preprocessing, get_loaders
from grocery_nb.model_utils import create_model, load_model, save_model, split_head
from grocery_nb.train_utils import Callback, TrainError, evaluate_model, predict, train_model
from grocery_nb.training import transfer
from grocery_nb.training.states import CheckpointError
from grocery_nb.training.transfer import extract_features, feature_key, finetune, folded, read_features, train_probe
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

pytestmark = pytest.mark.usefixtures("one_thread")


def test_probe_is_the_plain_network(loaders, classes, tmp_path):
    torch.manual_seed(0)
    model, (train, val) = create_model(classes, weights=None), loaders(augment=False)
    body, head = split_head(model)
    frozen, old_head, ran = weights(body), weights(head), []
    class AfterEpoch(Callback):
        def on_epoch(self, training, record): ran.append(evaluate_model(model, val) == record["val_accuracy"])
    history = train_probe(model, train, val, epochs=5, cache=tmp_path, key="tiny coarse", progress=False, callbacks=[AfterEpoch()])
    assert ran == [True]*5 and weights(body) == frozen and weights(head) != old_head and not model.training
    assert [r["epoch"] for r in history] == [1, 2, 3, 4, 5]
    features, labels = extract_features(body, val)
    with torch.inference_mode(): on_features = head(features).numpy()
    whole, whole_labels = predict(model, val)
    assert np.abs(on_features - whole).max() < 1e-4 and np.array_equal(labels.numpy(), whole_labels)
    save_model(model, tmp_path/"model.pth")
    assert np.abs(predict(load_model(classes, tmp_path/"model.pth"), val)[0] - whole).max() < 1e-4


def test_probe_does_not_depend_on_the_cache(loaders, classes, tmp_path):
    def probe(**cached):
        torch.manual_seed(0)
        model = create_model(classes, weights=None)
        train_probe(model, *loaders(augment=False, seed=cached.pop("order", 0)), epochs=2, progress=False, **cached)
        return weights(model)
    plain = probe()
    assert plain == probe(cache=tmp_path, key="tiny") == probe(cache=tmp_path, key="tiny")
    assert plain == probe(cache=tmp_path, key="tiny", order=7)  # the loader's own shuffling plays no part
    assert len(list(tmp_path.glob("*.npz"))) == 2 and not list(tmp_path.glob(".*"))


def test_stale_features_are_refused(loaders, classes, tmp_path):
    body, _ = split_head(create_model(classes, weights=None))
    val, cache = loaders()[1], tmp_path/"features.npz"
    old, _ = extract_features(body, val, cache, key="tiny")
    with torch.no_grad(): next(body.parameters()).mul_(1.01)
    new, _ = extract_features(body, val, cache, key="tiny")
    assert not torch.equal(old, new) and torch.equal(new, extract_features(body, val)[0])


def test_a_forgotten_key_does_not_give_the_wrong_labels(loaders, classes, tmp_path):
    body, _ = split_head(create_model(classes, weights=None))
    coarse, fine = loaders()[1], loaders(label="fine")[1]
    extract_features(body, coarse, tmp_path/"features.npz", key="the same")
    labels = extract_features(body, fine, tmp_path/"features.npz", key="the same")[1]
    assert np.array_equal(labels.numpy(), fine.dataset.labels)


def test_a_damaged_cache_is_computed_again(tmp_path):
    torch.manual_seed(0)
    body, loader = nn.Linear(4, 3), DataLoader(TensorDataset(torch.randn(9, 4), torch.arange(9)), 4)
    cache, digest = tmp_path/"features.npz", feature_key(body, "few")
    features, labels = extract_features(body, loader, cache, key="few")
    whole, random = cache.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        cache.write_bytes(damaged)
        read = read_features(cache, digest)
        assert read is None or torch.equal(read[0], features) and torch.equal(read[1], labels)
    for content in b"", whole[:100], whole[:-30], b"\x80\x04not an archive":
        cache.write_bytes(content)
        assert read_features(cache, digest) is None
        assert torch.equal(extract_features(body, loader, cache, key="few")[0], features)
        assert cache.read_bytes() == whole


def vectors(n=24, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=random) + labels[:, None, None, None], labels)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x): return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def settled(model):
    "Statistics, scales and shifts that are not those of a new BatchNorm"
    random = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for name, low in dict(running_mean=-1.0, running_var=0.5, weight=0.5, bias=-0.5).items():
                getattr(m, name).data.copy_(low + torch.rand(m.num_features, generator=random))
    return model


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "efficientnet_lite0"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_folding_keeps_the_answers(backbone, layout):
    torch.manual_seed(0)
    model = settled(create_model(7, backbone, weights=None)).cpu().to(memory_format=layout)
    before, images = weights(model), torch.randn(3, 3, 64, 64)
    quick = folded(model.train())
    assert model.training and weights(model) == before and not any(m.training for m in quick.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick.modules())
    with torch.inference_mode(): expected, got = model.eval()(images), quick(images)
    assert (got - expected).abs().max() < 1e-4*expected.abs().max()
    assert quick.config == model.config


def test_folding_leaves_alone_what_it_does_not_know():
    class Backwards(nn.Sequential):
        def forward(self, x): return self[0](self[1](x))
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(Backwards(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), conv, nn.ReLU(), nn.BatchNorm2d(4), conv,
                          nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False),
                          nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4))
    x = torch.randn(5, 4, 3, 3)
    with torch.no_grad(): model(x)
    quick = folded(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in quick.modules()) == 4  # one of five: the second use of the shared convolution
    with torch.inference_mode(): assert torch.allclose(quick(x), model.eval()(x), atol=1e-5)


def test_features_are_those_of_the_plain_body(loaders, classes):
    body, _ = split_head(settled(create_model(classes, weights=None)))
    val = loaders()[1]
    features, plain = extract_features(body, val)[0].numpy(), predict(body, val)[0]
    assert np.abs(features - plain).max() < 1e-4*max(1, np.abs(plain).max())


@pytest.mark.parametrize("recipe", [
    dict(ema=0.9), dict(patience=2), dict(label_smoothing=0.2), dict(class_weights=(1, 2, 1), schedule="cosine")])
def test_probe_with_a_recipe(recipe):
    torch.manual_seed(0)
    model, val = Small(), DataLoader(vectors(30, seed=1), 10)
    history = train_probe(model, DataLoader(vectors(), 8), val, epochs=12, lr=0.05, progress=False, **recipe)
    best = max(history, key=lambda r: (r["val_accuracy"], -r["val_loss"])) if "patience" in recipe else history[-1]
    logits, labels = map(torch.from_numpy, predict(model, val))
    assert nn.functional.cross_entropy(logits, labels).item() == pytest.approx(best["val_loss"], abs=1e-4)


@pytest.mark.parametrize("wrong, says", [
    (dict(epochs=0), "epochs is 0"), (dict(lr=math.nan), "lr is nan"), (dict(weight_decay=-1.0), "weight_decay is -1"),
    (dict(label_smoothing=1.0), "label_smoothing is 1.0"), (dict(ema=2), "ema is 2")])
def test_wrong_settings_are_refused_before_a_photo_is_read(wrong, says):
    class Untouched(DataLoader):
        def __iter__(self): raise AssertionError("a photo was read")
    photos = Untouched(vectors(), 8)
    for call in train_probe, lambda model, loader, **options: finetune(model, loader, probe_loader=loader, **options):
        with pytest.raises(TrainError, match=says) as error: call(Small(), photos, **wrong)
        assert isinstance(error.value, GroceryError) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [dict(body_lr=0.5), dict(freeze_norm=True), dict(channels_last=False)])
def test_a_probe_refuses_what_it_cannot_honour(wrong):
    with pytest.raises(TrainError, match="a probe trains the last layer alone"): train_probe(Small(), DataLoader(vectors(), 8), progress=False, **wrong)


def probed(seed=0, body=0, **options):
    torch.manual_seed(body)
    model = Small()
    torch.manual_seed(seed)
    settings = dict(epochs=3, lr=1e-2, batch_size=8, progress=False, label_smoothing=0.1, ema=0.9, schedule="cosine", warmup=0.1, patience=3, clip=1.0,
                    class_weights=(1, 2, 3), mix=0.5, accumulate=2)
    return model, train_probe(model, DataLoader(vectors(), 8, shuffle=True), DataLoader(vectors(12, seed=1), 12), **{**settings, **options})


def test_what_a_probe_honours_changes_its_weights():
    usual = weights(probed()[0])
    for other in (dict(label_smoothing=0.0), dict(ema=0.0), dict(schedule="onecycle"), dict(warmup=0.0), dict(clip=0.0), dict(class_weights=None),
                  dict(mix=0.0), dict(accumulate=1), dict(weight_decay=0.5)):
        assert weights(probed(**other)[0]) != usual, other


def test_a_probe_goes_on_where_it_was_stopped(tmp_path):
    model, history = probed()
    with pytest.raises(KeyboardInterrupt): probed(checkpoints=tmp_path, every=1, callbacks=[Kill(3)])
    again, resumed = probed(seed=7, checkpoints=tmp_path, every=1, resume=True)
    assert weights(again) == weights(model) and told(resumed) == told(history)
    with pytest.raises(CheckpointError, match="batch size was 8"): probed(checkpoints=tmp_path, resume=True, batch_size=6)
    with pytest.raises(CheckpointError, match="body was"): probed(body=1, checkpoints=tmp_path, resume=True)


def test_no_probe_epochs_make_no_probe():
    history = tuned(probe_epochs=0)[1]
    assert [r["phase"] for r in history] == ["finetune"]*3
    with pytest.raises(TrainError, match="there is no probe"): tuned(probe_epochs=0, keep_probe=0.5)
    for wrong in dict(probe_epochs=1.5), dict(momentum=2), dict(every=-1), dict(keep_probe="0.1"):
        with pytest.raises(TrainError, match=f"{next(iter(wrong))} is"): tuned(**wrong)


class Kill(Callback):
    def __init__(self, at): self.at = at

    def on_step(self, training, record):
        if training.total_steps == self.at: raise KeyboardInterrupt


def tuned(seed=0, rank=None, **options):
    torch.manual_seed(seed)
    model, data = Small(), vectors()
    train = DataLoader(data if rank is None else Subset(data, range(rank, 24, 2)), 8 if rank is None else 4, shuffle=True)
    settings = dict(epochs=3, lr=1e-2, probe_loader=train if rank is None else DataLoader(data, 8), probe_epochs=4, progress=False, every=1,
                    body_lr=0.3, ema=0.9, label_smoothing=0.1)
    return model, finetune(model, train, DataLoader(vectors(12, seed=1), 12), **{**settings, **options})


def told(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def test_history_of_both_phases():
    model, history = tuned()
    assert [(r["phase"], r["epoch"]) for r in history] == [("probe", 1), ("probe", 2), ("probe", 3), ("probe", 4),
                                                          ("finetune", 5), ("finetune", 6), ("finetune", 7)]
    assert not model.training and history[-1]["val_accuracy"] == evaluate_model(model, DataLoader(vectors(12, seed=1), 12))
    assert json.loads(json.dumps(history)) == history
    assert [r["epoch"] for r in tuned(probe_loader=None)[1]] == [1, 2, 3]


def test_probe_comes_first_and_fine_tuning_is_train_model():
    model, _ = tuned()
    torch.manual_seed(0)
    by_hand, train, val = Small(), DataLoader(vectors(), 8, shuffle=True), DataLoader(vectors(12, seed=1), 12)
    train_probe(by_hand, train, val, 4, batch_size=8, progress=False, label_smoothing=0.1)
    train_model(by_hand, train, 3, 1e-2, val, progress=False, body_lr=0.3, ema=0.9, label_smoothing=0.1)
    assert weights(by_hand) == weights(model)


@pytest.mark.parametrize("at", range(1, 10))
def test_resumed_is_as_if_never_stopped(at, tmp_path):
    model, history = tuned(checkpoints=tmp_path/"whole")
    assert weights(model) == weights(tuned()[0])
    with pytest.raises(KeyboardInterrupt): tuned(checkpoints=tmp_path/"run", callbacks=[Kill(at)])
    again, resumed = tuned(seed=7, checkpoints=tmp_path/"run", resume=True)
    assert weights(again) == weights(model) and told(resumed) == told(history)
    twice, finished = tuned(seed=8, checkpoints=tmp_path/"run", resume=True)
    assert weights(twice) == weights(model) and finished == resumed


@pytest.mark.parametrize("at", [2, 5, 9])
def test_resumed_with_norms_at_rest_and_a_part_of_the_probe(at, tmp_path):
    options = dict(freeze_norm=True, keep_probe=0.3)
    model, _ = tuned(checkpoints=tmp_path/"whole", **options)
    with pytest.raises(KeyboardInterrupt): tuned(checkpoints=tmp_path/"run", callbacks=[Kill(at)], **options)
    for seed in 7, 8:
        again, _ = tuned(seed=seed, checkpoints=tmp_path/"run", resume=True, **options)
        assert weights(again) == weights(model)
    for key, other in ("freeze_norm", dict(freeze_norm=False)), ("keep probe", dict(keep_probe=0.2)):
        with pytest.raises(CheckpointError, match=key): tuned(checkpoints=tmp_path/"run", resume=True, **{**options, **other})


def test_weights_between_probe_and_end():
    def flat(model): return torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.manual_seed(0)
    probed = Small()
    train_probe(probed, DataLoader(vectors(), 8, shuffle=True), None, 4, batch_size=8, progress=False, label_smoothing=0.1)
    end, between, start = (flat(tuned(keep_probe=share)[0]) for share in (0.0, 0.25, 1.0))
    assert torch.equal(start, flat(probed)) and torch.allclose(between, 0.75*end + 0.25*start, atol=1e-6) and not torch.equal(end, start)
    for wrong in dict(keep_probe=0.2, probe_loader=None), dict(keep_probe=1.5), dict(keep_probe=-0.1):
        with pytest.raises(TrainError, match="keep_probe"): tuned(**wrong)


def test_norms_at_rest_keep_their_statistics():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = DataLoader(TensorDataset(torch.randn(24, 5) + 2, torch.arange(24) % 3), 8)
    before = net[1].running_mean.clone(), net[1].weight.detach().clone()
    train_model(net, data, 2, 1e-2, data, progress=False, freeze_norm=True)
    assert torch.equal(net[1].running_mean, before[0]) and not torch.equal(net[1].weight, before[1])
    train_model(net, data, 1, 1e-2, progress=False)
    assert not torch.equal(net[1].running_mean, before[0])


def killed_inside(monkeypatch, name, folder, **options):
    def kill(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transfer, name, kill)
        tuned(checkpoints=folder, **options)


@pytest.mark.parametrize("where", ["train_probe", "write_state", "fit"])
def test_killed_between_the_phases(where, tmp_path, monkeypatch):
    model, history = tuned()
    killed_inside(monkeypatch, where, tmp_path)
    stored = (tmp_path/"probe.pt").exists()
    again, resumed = tuned(seed=0 if not stored else 7, checkpoints=tmp_path, resume=True)
    assert weights(again) == weights(model) and told(resumed) == told(history)


def test_the_probe_of_an_earlier_training_is_not_taken(tmp_path, monkeypatch):
    tuned(checkpoints=tmp_path)
    killed_inside(monkeypatch, "train_probe", tmp_path, seed=1)
    assert not (tmp_path/"probe.pt").exists()
    assert weights(tuned(seed=1, checkpoints=tmp_path, resume=True)[0]) == weights(tuned(seed=1)[0])


def test_other_settings_or_data_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt): tuned(checkpoints=tmp_path, callbacks=[Kill(4)], identity={"data": "a"})
    before = (tmp_path/"probe.pt").read_bytes()
    changes = {"data": dict(identity={"data": "b"}), "probe epochs": dict(probe_epochs=5), "label_smoothing": dict(label_smoothing=0.0),
               "learning rate": dict(lr=0.1), "probe epochs was 4": dict(probe_loader=None)}
    for key, options in changes.items():
        with pytest.raises(CheckpointError, match=key): tuned(checkpoints=tmp_path, resume=True, **{"identity": {"data": "a"}, **options})
    with pytest.raises(TrainError, match="not finished"): tuned(checkpoints=tmp_path, identity={"data": "a"})
    assert (tmp_path/"probe.pt").read_bytes() == before
    assert weights(tuned(seed=3, checkpoints=tmp_path, resume=True, identity={"data": "a"})[0]) == weights(tuned()[0])


def test_a_damaged_probe_is_named(tmp_path):
    with pytest.raises(KeyboardInterrupt): tuned(checkpoints=tmp_path, callbacks=[Kill(4)])
    path = tmp_path/"probe.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="probe.pt"): tuned(checkpoints=tmp_path, resume=True)


def test_finetune_on_real_loaders(loaders, classes, tmp_path):
    def run(seed=0, **options):
        torch.manual_seed(seed)
        (train, val), plain = loaders(), loaders(augment=False)[0]
        model = create_model(classes, weights=None)
        return model, finetune(model, train, val, 1, 1e-3, probe_loader=plain, probe_epochs=2, cache=tmp_path/"features", key="tiny",
                               progress=False, schedule="onecycle", body_lr=0.1, ema=0.9, **options)
    model, history = run()
    assert [r["phase"] for r in history] == ["probe"]*2 + ["finetune"]
    with pytest.raises(KeyboardInterrupt): run(checkpoints=tmp_path/"run", every=1, callbacks=[Kill(2)])
    again, resumed = run(seed=5, checkpoints=tmp_path/"run", every=1, resume=True)
    assert weights(model) == weights(again) and told(history) == told(resumed)


TWO_PROCESSES = """
import sys
import torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from test_transfer import Kill, told, tuned
rank, folder = int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
def run(seed=0, **options):
    model, history = tuned(seed, rank=rank, epochs=2, probe_epochs=2, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), told(history)  # BatchNorm's notes are each process's own
whole, history = run(checkpoints=f"{folder}/whole")
try: run(checkpoints=f"{folder}/run", callbacks=[Kill(2)])
except KeyboardInterrupt: pass
again, resumed = run(seed=7 + rank, checkpoints=f"{folder}/run", resume=True)
assert torch.equal(whole, again) and history == resumed
torch.save(whole, f"{folder}/weights-{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo")
def test_two_processes_probe_and_fine_tune_as_one(tmp_path):
    started = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(Path(__file__).parent), str(rank), str(tmp_path)],
                                stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try: errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started: process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    assert torch.equal(*(torch.load(tmp_path/f"weights-{rank}.pt") for rank in range(2)))


@pytest.mark.slow
def test_probe_on_the_real_photos(photos):
    from grocery_nb.model_utils import preprocessing_for
    torch.manual_seed(0)
    loaders = get_loaders(root=photos, preprocessing=Preprocessing(**preprocessing_for("efficientnet_lite0")), augment=False)
    model = create_model(43, "efficientnet_lite0", weights="imagenet")
    history = train_probe(model, *loaders, progress=False)
    assert history[-1]["val_accuracy"] >= 0.81
    assert evaluate_model(model, loaders[1]) == pytest.approx(history[-1]["val_accuracy"], abs=0.004)
