"""Training across chapters: the real loaders and the real models under `train_utils`."""
import copy
import math

import numpy as np
import pytest
import torch
from grocery_nb.core import GroceryError
from grocery_nb.data_utils import Preprocessing, get_loaders
from grocery_nb.model_utils import create_model, load_model, save_model, split_head
from grocery_nb.train_utils import (TrainError, evaluate_model, extract_features, feature_key, predict, read_features, train_model,
                                    train_probe)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SMALL = Preprocessing(size=48, resize=56)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loaders(tiny, caches):
    def make(**options):
        return get_loaders(batch_size=32, root=tiny, preprocessing=SMALL, **options)
    return make


@pytest.fixture
def classes(loaders) -> int:
    return len(loaders()[0].dataset.classes)


def weights(model) -> bytes:
    return b"".join(t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values())


def trained(loaders, classes, seed=0, watch=False, epochs=2, **options):
    torch.manual_seed(seed)
    model = create_model(classes)
    train, val = loaders(seed=seed, **options)
    history = train_model(model, train, epochs, 1e-3, val_loader=val if watch else None, progress=False)
    return model, history


def test_same_seed_same_weights_whatever_the_workers(loaders, classes):
    first, history = trained(loaders, classes)
    assert weights(first) == weights(trained(loaders, classes)[0])
    assert weights(first) == weights(trained(loaders, classes, num_workers=2)[0])
    watched, watched_history = trained(loaders, classes, watch=True)
    assert weights(first) == weights(watched)  # being evaluated between epochs draws nothing from the generator of the dropout
    assert [r["loss"] for r in history] == [r["loss"] for r in watched_history]
    assert weights(first) != weights(trained(loaders, classes, seed=1)[0])


def test_history_and_hook(loaders, classes):
    seen = []
    model, (train, val) = create_model(classes), loaders()
    history = train_model(model, train, 2, 1e-3, val_loader=val, progress=False, on_epoch=seen.append)
    assert seen == history and [r["epoch"] for r in history] == [1, 2]
    assert all(list(r) == ["epoch", "loss", "accuracy", "val_accuracy", "seconds"] for r in history)
    assert all(math.isfinite(r["loss"]) and 0 <= r["accuracy"] <= 1 and r["seconds"] > 0 for r in history)
    assert history[-1]["val_accuracy"] == evaluate_model(model, val)
    assert not any(m.training for m in model.modules())
    assert "val_accuracy" not in train_model(model, train, 1, 1e-3, progress=False)[0]


def test_silent_without_progress_and_a_bar_with_it(capfd):
    loader = DataLoader(TensorDataset(torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)), 4)
    train_model(nn.Linear(5, 2), loader, 1, 1e-3, progress=False)
    assert capfd.readouterr() == ("", "")
    train_model(nn.Linear(5, 2), loader, 1, 1e-3, val_loader=loader)
    out, err = capfd.readouterr()
    assert out == "" and "epoch 1/1" in err and "loss=" in err and "val_accuracy=" in err


def test_epochs_are_told_to_the_sampler():
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch): told.append(epoch)
    told, data = [], TensorDataset(torch.randn(8, 5), torch.zeros(8, dtype=torch.int64))
    train_model(nn.Linear(5, 2), DataLoader(data, 4, sampler=Sampler(data)), 3, 1e-3, progress=False)
    assert told == [0, 1, 2]


def test_a_few_pictures_are_learnt_by_heart(loaders, classes):
    torch.manual_seed(0)
    images, labels = next(iter(loaders(augment=False)[0]))
    few = DataLoader(TensorDataset(images, labels), 32)
    model = create_model(classes)
    model.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout) else None)
    train_model(model, few, 30, 3e-3, progress=False)
    with torch.no_grad(): assert (model.train()(images).argmax(1) == labels).all()


def test_loss_is_the_mean_over_samples():
    torch.manual_seed(0)
    x, y = torch.randn(33, 5), torch.randint(2, (33,))
    model = nn.Linear(5, 2)
    expected = nn.functional.cross_entropy(copy.deepcopy(model)(x), y).item()
    history = train_model(model, DataLoader(TensorDataset(x, y), 32), 1, 1e-12, progress=False)
    assert history[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_evaluate_agrees_with_predict_and_changes_nothing(loaders, classes):
    model, (_, val) = create_model(classes), loaders()
    model.train()
    model.features[0].eval()
    modes, before, state = [m.training for m in model.modules()], weights(model), torch.get_rng_state()
    logits, labels = predict(model, val)
    assert evaluate_model(model, val) == (logits.argmax(1) == labels).mean()
    assert (logits.dtype, labels.dtype, logits.shape) == (np.float32, np.int64, (len(val.dataset), classes))
    assert np.array_equal(labels, val.dataset.labels)
    assert modes == [m.training for m in model.modules()] and weights(model) == before
    assert torch.equal(state, torch.get_rng_state())


def test_channels_last_changes_the_layout_and_not_the_model(loaders, classes, tmp_path):
    model, _ = trained(loaders, classes, epochs=1)
    val = loaders()[1]
    assert next(model.parameters()).is_contiguous(memory_format=torch.channels_last)
    save_model(model, tmp_path/"model.pth")
    again = load_model(classes, tmp_path/"model.pth")
    assert weights(model) == weights(again)
    assert np.allclose(predict(model, val)[0], predict(again, val)[0], atol=1e-4)


def test_probe_is_the_plain_network(loaders, classes, tmp_path):
    torch.manual_seed(0)
    model, (train, val) = create_model(classes), loaders(augment=False)
    body, head = split_head(model)
    frozen, old_head, ran = weights(body), weights(head), []
    def after_epoch(record): ran.append(evaluate_model(model, val) == record["val_accuracy"])
    history = train_probe(model, train, val, epochs=5, cache=tmp_path, key="tiny coarse", progress=False, on_epoch=after_epoch)
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
        model = create_model(classes)
        train_probe(model, *loaders(augment=False, seed=cached.pop("order", 0)), epochs=2, progress=False, **cached)
        return weights(model)
    plain = probe()
    assert plain == probe(cache=tmp_path, key="tiny") == probe(cache=tmp_path, key="tiny")
    assert plain == probe(cache=tmp_path, key="tiny", order=7)  # the loader's own shuffling plays no part
    assert len(list(tmp_path.glob("*.npz"))) == 2 and not list(tmp_path.glob(".*"))


def test_stale_features_are_refused(loaders, classes, tmp_path):
    body, _ = split_head(create_model(classes))
    val, cache = loaders()[1], tmp_path/"features.npz"
    old, _ = extract_features(body, val, cache, key="tiny")
    with torch.no_grad(): next(body.parameters()).mul_(1.01)
    new, _ = extract_features(body, val, cache, key="tiny")
    assert not torch.equal(old, new) and torch.equal(new, extract_features(body, val)[0])


def test_a_forgotten_key_does_not_give_the_wrong_labels(loaders, classes, tmp_path):
    body, _ = split_head(create_model(classes))
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


@pytest.mark.parametrize("change, says", [
    (dict(epochs=0), "epochs is 0"), (dict(lr=0.0), "lr is 0.0"), (dict(lr=math.nan), "lr is nan"), (dict(lr=-1.0), "lr is -1.0"),
    (dict(weight_decay=-0.1), "weight_decay is -0.1"), (dict(dataloader=[]), "no batch in epoch 1"),
    (dict(dataloader=[(torch.zeros(2, 5), torch.tensor([0, 2]))]), "Label 2 has no output: the model has 2"),
    (dict(dataloader=[(torch.zeros(2, 5), torch.tensor([0, -100]))]), "Label -100 has no output"),
    (dict(dataloader=[(torch.full((2, 5), math.nan), torch.tensor([0, 1]))]), "epoch 1, batch 1 because the batch itself"),
    (dict(model=nn.Linear(5, 2).requires_grad_(False)), "is frozen"),
])
def test_errors_are_one_sentence(change, says):
    good = dict(model=nn.Linear(5, 2), dataloader=[(torch.zeros(2, 5), torch.tensor([0, 1]))], epochs=1, lr=0.1)
    with pytest.raises(TrainError, match=says) as error: train_model(**{**good, **change}, progress=False)
    assert isinstance(error.value, GroceryError) and "\n" not in str(error.value)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2), torch.randn(8, 5)
    good, bad = (x, torch.zeros(8, dtype=torch.int64)), (x*torch.inf, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(TrainError, match="epoch 1, batch 2"): train_model(model, [good, bad], 1, 1e-2, progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(TrainError, match="with lr=1e.30; start again with a lower learning rate, such as 1e.29"):
        train_model(nn.Linear(5, 2), [good, (x*1e20, 1 - good[1])] * 4, 1, 1e30, progress=False)


def test_interrupt_keeps_the_weights():
    class Interrupted(list):
        def __iter__(self):
            yield from list.__iter__(self)
            raise KeyboardInterrupt
    model = nn.Sequential(nn.Linear(5, 2), nn.Dropout())
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        train_model(model, Interrupted([(torch.randn(4, 5), torch.tensor([0, 1, 0, 1]))]), 3, 0.1, progress=False)
    assert weights(model) != before and not model.training


@pytest.mark.slow
def test_probe_on_the_real_photos(photos):
    from grocery_nb.model_utils import preprocessing_for
    torch.manual_seed(0)
    loaders = get_loaders(root=photos, preprocessing=Preprocessing(**preprocessing_for("efficientnet_lite0")), augment=False)
    model = create_model(43, "efficientnet_lite0", weights="imagenet")
    history = train_probe(model, *loaders, progress=False)
    assert history[-1]["val_accuracy"] >= 0.81
    assert evaluate_model(model, loaders[1]) == pytest.approx(history[-1]["val_accuracy"], abs=0.004)
