"""Training across chapters: the real loaders and the real models under `train_utils`."""
import contextlib
import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from conftest import weights
from grocery_nb.core import GroceryError
from grocery_nb.model_utils import create_model, load_model, save_model
from grocery_nb.train_utils import (
    Callback, JsonLog, Recipe, TrainError, evaluate_model, fastest_precision, predict, train_model, validate)
from grocery_nb.training.checkpoints import CheckpointFolder
from grocery_nb.training.loop import Training, train_epoch
from grocery_nb.training.optimization import mix_batch
from grocery_nb.training.states import CheckpointError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(loaders, classes, seed=0, watch=False, epochs=2, **options):
    torch.manual_seed(seed)
    model = create_model(classes, weights=None)
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


class StopAfterEpoch(Callback):
    def on_epoch(self, training, record): raise KeyboardInterrupt


class Recorder(Callback):
    "Keeps all that it is told, and stops like Ctrl-C after so many steps"
    def __init__(self, interrupt_at=0): self.interrupt_at, self.moments, self.steps, self.epochs = interrupt_at, [], [], []
    def on_start(self, training): self.moments.append("start")
    def on_end(self, training): self.moments.append("end")
    def on_epoch(self, training, record): self.epochs.append(record)
    def on_step(self, training, record):
        self.steps.append(record)
        if training.total_steps == self.interrupt_at: raise KeyboardInterrupt


def test_history_and_callbacks(loaders, classes):
    seen = Recorder()
    model, (train, val) = create_model(classes, weights=None), loaders()
    history = train_model(model, train, 2, 1e-3, val_loader=val, progress=False, callbacks=[seen])
    assert seen.epochs == history and [r["epoch"] for r in history] == [1, 2] and seen.moments == ["start", "end"]
    assert all(list(r) == ["epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "seconds"] for r in history)
    assert all(math.isfinite(r["loss"]) and 0 <= r["accuracy"] <= 1 and r["seconds"] > 0 for r in history)
    assert [(r["epoch"], r["step"]) for r in seen.steps] == [(e, s + 1) for e in (1, 2) for s in range(len(train))]
    assert all(list(r) == ["epoch", "step", "loss", "accuracy", "lr", "gradient_norm"] for r in seen.steps)
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


def test_the_calls_of_notes_and_labs():
    def go(*arguments, **settings):
        torch.manual_seed(0)
        model = nn.Linear(5, 2)
        return model, train_model(model, [(torch.eye(2, 5), torch.tensor([0, 1]))], *arguments, progress=False, **settings)
    (first, history), (second, _) = go(), go(5, 1e-3)
    assert len(history) == 5 and history[0]["lr"] == 1e-3 and weights(first) == weights(second)
    assert weights(go(learning_rate=1e-2, epochs=2)[0]) == weights(go(2, 1e-2)[0]) == weights(go(2, 1e-2, learning_rate=0.01)[0])
    for wrong in dict(lr=0.001, learning_rate=0.01), dict(lr=0.1, learning_rate=0.01):
        with pytest.raises(TrainError, match="two names of one setting"): go(**wrong)
    with pytest.raises(TrainError, match="lr is 'fast'"): go(learning_rate="fast")
    from grocery_nb import train_utils
    assert train_utils.save_checkpoint and {"save_checkpoint", "load_checkpoint", "train_model", "evaluate_model"} <= set(train_utils.__all__)


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
    model = create_model(classes, weights=None)
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
    model, (_, val) = create_model(classes, weights=None), loaders()
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


@pytest.mark.parametrize("change, says", [
    (dict(epochs=0), "epochs is 0"), (dict(lr=0.0), "lr is 0.0"), (dict(lr=math.nan), "lr is nan"), (dict(lr=-1.0), "lr is -1.0"),
    (dict(weight_decay=-0.1), "weight_decay is -0.1"), (dict(dataloader=[]), "no batch in epoch 1"),
    (dict(schedule="linear"), "schedule is 'linear'"), (dict(precision="int8"), "precision is 'int8'"), (dict(body_lr=0), "body_lr is 0"),
    (dict(warmup=1.0), "warmup is 1.0"), (dict(accumulate=0), "accumulate is 0"), (dict(clip=math.inf), "clip is inf"),
    (dict(label_smoothing=1), "label_smoothing is 1"), (dict(ema=math.nan), "ema is nan"), (dict(patience=-1), "patience is -1"),
    (dict(patience=2), "patience is 2 without a val_loader"), (dict(class_weights=(1, 0)), r"class_weights is \(1, 0\)"),
    (dict(class_weights=(1, 2, 3)), "has 3 numbers and the model 2 outputs"), (dict(class_weights=(1,)), "Label 1 has no weight"),
    (dict(dataloader=(b for b in ()), warmup=0.1), "does not know its length"),
    (dict(dataloader=[(torch.zeros(2, 5), torch.tensor([0, 2]))]), "Label 2 has no output: the model has 2"),
    (dict(dataloader=[(torch.zeros(2, 5), torch.tensor([0, -100]))]), "Label -100 has no output"),
    (dict(dataloader=[(torch.full((2, 5), math.nan), torch.tensor([0, 1]))]), "epoch 1, step 1 because the batch itself"),
    (dict(model=nn.Linear(5, 2).requires_grad_(False)), "is frozen"),
    (dict(epochs=2.5), "epochs is 2.5; it is a whole number"), (dict(epochs=True), "epochs is True"), (dict(epochs="3"), "epochs is '3'"),
    (dict(lr="0.1"), "lr is '0.1'"), (dict(lr=None), "lr is None"), (dict(accumulate=1.5), "accumulate is 1.5"), (dict(clip="1"), "clip is '1'"),
    (dict(class_weights=5), "class_weights is 5; give a list"), (dict(class_weights="balanced"), "class_weights is 'balanced'"),
    (dict(class_weights=()), r"class_weights is \(\)"), (dict(mix=1.5), "mix is 1.5"), (dict(ema=True), "ema is True"), (dict(patience=2.0), "patience is 2.0"),
    (dict(freeze_norm=1), "freeze_norm is 1; it is True or False"), (dict(schedule=None), "schedule is None"), (dict(lr=10**400), "lr is 1000"),
])
def test_errors_are_one_sentence(change, says):
    good = dict(model=nn.Linear(5, 2), dataloader=[(torch.zeros(2, 5), torch.tensor([0, 1]))], epochs=1, lr=0.1)
    with pytest.raises(TrainError, match=says) as error: train_model(**{**good, **change}, progress=False)
    assert isinstance(error.value, GroceryError) and "\n" not in str(error.value)


@pytest.mark.parametrize("labels, says", [
    (torch.tensor([0., 1.]), r"float32 of shape \(2,\); give one class number each, such as labels.flatten\(\).long"),
    (torch.tensor([[0], [1]]), r"int64 of shape \(2, 1\)"), (torch.eye(2), r"shape \(2, 2\); .* such as labels.argmax"),
    (torch.tensor([[1, 0], [0, 1]]), "labels.argmax"), (torch.tensor([True, False]), "are bool"), (torch.tensor([0]), r"of 2 are int64 of shape \(1,\)"),
    ([0, 1], "must give pairs of tensors"), (np.array([0, 1]), "must give pairs of tensors")])
def test_labels_that_are_no_class_numbers(labels, says):
    wrong = [(torch.ones(2, 5), labels)]
    for call in (lambda: train_model(nn.Linear(5, 2), wrong, 1, progress=False), lambda: evaluate_model(nn.Linear(5, 2), wrong),
                 lambda: validate(nn.Linear(5, 2), wrong), lambda: train_model(nn.Linear(5, 2), wrong, 1, progress=False, class_weights=(1, 2))):
        with pytest.raises(TrainError, match=says) as error: call()
        assert "\n" not in str(error.value)


def test_whole_numbers_of_any_width_are_labels():
    def go(kind):
        torch.manual_seed(0)
        model, data = nn.Linear(5, 2), [(torch.eye(2, 5), torch.tensor([0, 1], dtype=kind))]
        train_model(model, data, 1, 0.1, progress=False, class_weights=(1, 2))
        return weights(model), evaluate_model(model, data), validate(model, data)
    assert go(torch.int64) == go(torch.int32) == go(torch.uint8)


def test_a_model_that_says_no_number_has_no_accuracy():
    data = DataLoader(TensorDataset(torch.randn(8, 5), torch.zeros(8, dtype=torch.int64)), 4)
    for value in math.nan, math.inf:
        model = nn.Linear(5, 2).requires_grad_(False)
        model.bias[1] = value
        for judge in evaluate_model, validate, predict:
            with pytest.raises(TrainError, match="no numbers for 4 of 4 inputs.*lower learning rate"): judge(model, data)
    masked = nn.Linear(5, 2).requires_grad_(False)
    masked.bias[1] = -math.inf  # a class that is never answered
    assert evaluate_model(masked, data) == 1
    with pytest.raises(TrainError, match="the batch itself"): evaluate_model(nn.Linear(5, 2), [(torch.full((2, 5), math.nan), torch.tensor([0, 1]))])


def test_a_generator_is_used_up_after_an_epoch():
    def batches(): yield torch.zeros(2, 5), torch.tensor([0, 1])
    with pytest.raises(TrainError, match="no batch in epoch 2; .* a generator is used up"): train_model(nn.Linear(5, 2), batches(), 3, progress=False)
    with pytest.raises(TrainError, match="no batch to predict; .* a generator is used up"):
        train_model(nn.Linear(5, 2), [*batches()], 3, val_loader=batches(), progress=False)
    with pytest.raises(TrainError, match="has no batch in epoch 1.*drop_last"):
        train_model(nn.Linear(5, 2), DataLoader(TensorDataset(torch.zeros(3, 5), torch.zeros(3).long()), 4, drop_last=True), 3, schedule="cosine")


def test_numbers_of_numpy_are_numbers():
    def go(**settings):
        torch.manual_seed(0)
        model = nn.Linear(5, 2)
        train_model(model, [(torch.ones(2, 5), torch.tensor([0, 1]))], progress=False, **settings)
        return weights(model)
    plain = go(epochs=2, lr=0.1, accumulate=1, ema=0.5, class_weights=(1, 2), mix=0, weight_decay=1)
    assert plain == go(epochs=np.int64(2), lr=np.float64(0.1), accumulate=np.int8(1), ema=np.float64(0.5), class_weights=np.array([1, 2]), mix=np.float32(0),
                       weight_decay=np.int32(1))


@pytest.mark.parametrize("warmup, first", [(None, 0.04), (0, 0.99), (0.1, 0.04), (1/22, 0.04)])
def test_a_warm_up_of_zero_is_not_the_usual_one(warmup, first):
    "21 steps; a rise of one step out of 22 is one that torch's OneCycleLR cannot divide"
    seen, given = Recorder(), {} if warmup is None else dict(warmup=warmup)
    train_model(no_batchnorm(), DataLoader(coloured(), 8), 3, 1e-2, progress=False, schedule="onecycle", callbacks=[seen], **given)
    rates = [r["lr"]/1e-2 for r in seen.steps]
    assert rates[0] == pytest.approx(first, abs=0.01)
    assert rates.index(max(rates)) == {None: 6, 0: 0, 0.1: 2}.get(warmup, 1)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched():
    torch.manual_seed(0)
    model, x = nn.Linear(5, 2), torch.randn(8, 5)
    good, bad = (x, torch.zeros(8, dtype=torch.int64)), (x*torch.inf, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(TrainError, match="epoch 1, step 2"): train_model(model, [good, bad], 1, 1e-2, progress=False)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(TrainError, match="with lr=1e.30; start again with a lower learning rate, such as 1e.29"):
        train_model(nn.Linear(5, 2), [good, (x*1e20, 1 - good[1])] * 4, 1, 1e30, progress=False)


def test_interrupt_keeps_the_weights():
    class Interrupted(list):
        def __iter__(self):
            yield self[0]
            raise KeyboardInterrupt
    model = nn.Sequential(nn.Linear(5, 2), nn.Dropout())
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        train_model(model, Interrupted([(torch.randn(4, 5), torch.tensor([0, 1, 0, 1]))]*2), 3, 0.1, progress=False)
    assert weights(model) != before and not model.training


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_touched():
    class Root(nn.Module):  # the root has an endless slope at 0, and a finite value
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
        def forward(self, x): return x[:, :2] + self.weight.sqrt()
    model = Root()
    with pytest.raises(TrainError, match="gradient's norm is .* in epoch 1, step 1"):
        train_model(model, [(torch.zeros(2, 2), torch.tensor([0, 1]))], 1, 0.1, progress=False)
    assert (model.weight == 0).all()


def no_batchnorm(classes=4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def coloured(n=50, seed=0) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=random), torch.randint(0, 4, (n,), generator=random))


@pytest.mark.parametrize("recipe", [{}, dict(class_weights=(1, 2, 3, 4), label_smoothing=0.1), dict(clip=0.1, ema=0.9, weight_decay=0.1)])
def test_accumulation_is_the_large_batch(recipe):
    "Also at the end of an epoch, where 50 = 6*8 + 2 leaves a short batch in a short group"
    def run(batch, accumulate):
        model = no_batchnorm()
        history = train_model(model, DataLoader(coloured(), batch), 3, 1e-2, progress=False, accumulate=accumulate, **recipe)
        return model, history
    (large, large_history), (small, small_history) = run(32, 1), run(8, 4)
    for name, tensor in large.state_dict().items(): assert torch.allclose(tensor, small.state_dict()[name], atol=2e-5), name
    for one, other in zip(large_history, small_history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["accuracy"] == other["accuracy"]


def test_the_defaults_are_the_nine_lines():
    train, model = DataLoader(coloured(), 8, shuffle=True), no_batchnorm()
    torch.manual_seed(1)
    train_model(model, train, 2, 1e-2, progress=False, channels_last=False)
    naive = no_batchnorm()
    optimizer, criterion = torch.optim.Adam(naive.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    torch.manual_seed(1)
    for _ in range(2):
        for images, labels in train:
            optimizer.zero_grad()
            criterion(naive(images), labels).backward()
            optimizer.step()
    for one, other in zip(model.parameters(), naive.parameters(), strict=True): assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("schedule, ends", [("constant", (1, 1)), ("cosine", (1, 0.02)), ("onecycle", (0.04, 0.05))])
def test_schedules_move_once_a_step_and_reach_their_end(schedule, ends):
    seen = Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model(no_batchnorm(), DataLoader(coloured(), 8), 3, 1e-2, progress=False, schedule=schedule, callbacks=[seen])
    rates = [r["lr"]/1e-2 for r in seen.steps]
    assert len(rates) == 21 and rates[0] == pytest.approx(ends[0], abs=0.01) and rates[-1] <= ends[1] + 1e-9 and max(rates) <= 1 + 1e-9


def test_a_float16_overflow_makes_no_step_and_is_logged_as_null(tmp_path):
    class Explodes(nn.Linear):
        def forward(self, x): return super().forward(x)*1e4
    torch.manual_seed(0)
    model, log, seen = Explodes(5, 2), JsonLog(tmp_path/"log.jsonl"), Recorder()
    loader = DataLoader(TensorDataset(torch.randn(128, 5), torch.randint(0, 2, (128,))), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_model(model, loader, 1, 1e-3, progress=False, precision="float16", schedule="cosine", callbacks=[log, seen])
    bad = [r for r in seen.steps if not math.isfinite(r["gradient_norm"])]
    assert bad and all(torch.isfinite(p).all() for p in model.parameters())
    after = next(r for r in seen.steps if r["step"] == bad[0]["step"] + 1)
    assert after["lr"] == bad[0]["lr"]  # the schedule waited
    assert "NaN" not in log.path.read_text() and "Infinity" not in log.path.read_text()
    assert [line["gradient_norm"] is None for line in log.lines() if "step" in line] == [r in bad for r in seen.steps]


def shrinking():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4))


def test_a_last_batch_of_one_is_seen_before_the_first_step():
    class Untouched(Callback):
        def on_start(self, training): raise AssertionError("the training began")
    for n, size, says in (33, 32, "33 pictures in batches of 32.*a batch size of 31"), (7, 1, "a batch size of 4"), (1, 32, "choose more pictures"):
        with pytest.raises(TrainError, match=says) as error:
            train_model(shrinking(), DataLoader(coloured(n), size, shuffle=True), 1, progress=False, callbacks=[Untouched()])
        assert "\n" not in str(error.value)
    with pytest.raises(TrainError, match="A batch in epoch 1, step 2 leaves BatchNorm 1 value a channel"):
        train_model(shrinking(), [coloured(4)[:2], coloured(4)[:1]], 1, progress=False)


def test_looking_at_the_last_batch_changes_nothing():
    def go(size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 4))
        drawn = Recorder()
        train_model(model, DataLoader(Noisy(torch_dice()), size, shuffle=True, generator=torch_dice(4)), 2, 1e-2, progress=False, callbacks=[drawn])
        return weights(model), [r["loss"] for r in drawn.steps]
    with pytest.MonkeyPatch.context() as patch:
        from grocery_nb.training import running
        looked = go(7)  # 50 = 7*7 + 1
        patch.setattr(running, "check_last_batch", lambda training: None)
        assert go(7) == looked
    assert train_model(shrinking(), DataLoader(coloured(33), 32), 1, progress=False, freeze_norm=True)
    assert train_model(shrinking(), DataLoader(coloured(33), 32, drop_last=True), 1, progress=False)


class Endless(nn.Linear):
    "Finite outputs, and gradients without end"
    def forward(self, x): return super().forward(x) + (self.weight[0, 0]*0).sqrt().nan_to_num(posinf=0)


@pytest.mark.parametrize("steps, epochs, says", [(8, 3, "up to the end of the training"), (8, 9, "up to epoch 4, step 3"), (40, 1, "up to epoch 1, step 27")])
def test_float16_that_never_makes_a_step_is_no_training(steps, epochs, says):
    torch.manual_seed(0)
    model, data = Endless(5, 2), [(torch.randn(4, 5), torch.randint(0, 2, (4,)))]*steps
    before = weights(model)
    with pytest.raises(TrainError, match=f"no finite gradient in step after step, {says}; no weight has moved; use bfloat16"):
        train_model(model, data, epochs, 1e-3, progress=False, precision="float16")
    assert weights(model) == before


def test_early_stopping_gives_back_the_best_weights():
    class Scripted(Callback):  # weights that tell their epoch
        def on_step(self, training, record): nn.init.constant_(training.model.bias, float(training.epoch))
    model, x = nn.Linear(1, 2), torch.zeros(4, 1)
    nn.init.zeros_(model.weight)
    val = DataLoader(TensorDataset(x, torch.tensor([0, 0, 0, 1])), 4)
    history = train_model(model, [(x, torch.tensor([0, 1, 0, 1]))], 20, 1e-12, val, progress=False, patience=3, callbacks=[Scripted()])
    assert len(history) == 4 and (model.bias == 0).all()  # equal outputs in each epoch: the first was the best


def test_early_stopping_with_an_average_keeps_the_averaged_weights():
    class Last(Callback):
        def on_epoch(self, training, record): self.averaged = {k: v.clone() for k, v in training.averaged.state_dict().items()}
    seen, model, val = Last(), no_batchnorm(), DataLoader(coloured(20, seed=1), 8)
    history = train_model(model, DataLoader(coloured(), 8), 1, 1e-2, val, progress=False, patience=1, ema=0.9, callbacks=[seen])
    assert all(torch.equal(tensor, seen.averaged[name]) for name, tensor in model.state_dict().items())
    assert history[-1]["val_accuracy"] == evaluate_model(model, val)


def test_fastest_precision_changes_nothing(loaders, classes):
    model, (images, labels) = create_model(classes, weights=None).eval(), next(iter(loaders()[0]))
    before, state = weights(model), torch.get_rng_state()
    seconds = fastest_precision(model, images[:4], labels[:4], repeats=1)
    assert set(seconds) == {"float32", "bfloat16", "float16"} and list(seconds.values()) == sorted(seconds.values())
    assert weights(model) == before and torch.equal(torch.get_rng_state(), state) and not model.training


def test_unknown_lengths():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self): return iter(coloured(20))
    assert len(train_model(no_batchnorm(), DataLoader(Stream(), 8), 2, 1e-2, progress=False, accumulate=2)) == 2


# Stopped and resumed: the same weights, history and log as if nothing had happened

EVERYTHING = dict(schedule="onecycle", warmup=0.2, accumulate=2, clip=1.0, label_smoothing=0.1, ema=0.9, weight_decay=0.05, body_lr=0.3)


def with_state() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 4))


def plain(): return DataLoader(coloured(), 8, shuffle=True)
def own_generator(): return DataLoader(coloured(), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
def weighted():
    sampler = torch.utils.data.WeightedRandomSampler(torch.arange(1., 51), 50, generator=torch.Generator().manual_seed(4))
    return DataLoader(coloured(), 8, sampler=sampler)
def skipping():
    from grocery_nb.data_utils import create_dataloader
    return create_dataloader(coloured(), 8, shuffle=True, seed=5)
def endless():  # of unknown length
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            data = coloured()
            return (data[i] for i in torch.randperm(50).tolist())
    return DataLoader(Stream(), 8)


class Noisy(torch.utils.data.Dataset):
    "Throws dice for each picture: from a generator of its own, or a global one"
    def __init__(self, dice=None): self.data, self.dice = coloured(), dice
    def __len__(self): return 50
    def __getitem__(self, i):
        image, label = self.data[i]
        if isinstance(self.dice, (torch.Generator, type(None))): return image + torch.randn(image.shape, generator=self.dice), label
        return image + float(self.dice.gauss(0, 1) if hasattr(self.dice, "gauss") else self.dice.normal()), label


def torch_dice(seed=3): return torch.Generator().manual_seed(seed)
def batch_sampled():
    sampler = torch.utils.data.RandomSampler(coloured(), generator=torch_dice())
    return DataLoader(coloured(), batch_sampler=torch.utils.data.BatchSampler(sampler, 8, drop_last=False))
def noisy(): return DataLoader(Noisy(torch_dice()), 8, shuffle=True, generator=torch_dice(4))
def noisy_numpy(): return DataLoader(torch.utils.data.Subset(Noisy(np.random.default_rng(3)), range(50)), 8, shuffle=True)
def noisy_old_numpy(): return DataLoader(Noisy(np.random.RandomState(3)), 8)
def noisy_python(): return DataLoader(Noisy(random.Random(3)), 8)
def noisy_global(): return DataLoader(Noisy(), 8, shuffle=True, generator=torch_dice())
def noisy_skipping():
    from grocery_nb.data_utils import create_dataloader
    return create_dataloader(Noisy(torch_dice()), 8, shuffle=True, seed=5)
def skipping_by_hand():  # a loader that draws from the global generator whenever it begins
    from grocery_nb.data_utils import EpochSampler
    return DataLoader(coloured(), 8, sampler=EpochSampler(50, pairs=False))
class Handmade:  # no DataLoader at all
    def __init__(self): self.dice, self.data = torch_dice(), coloured()
    def __len__(self): return 7
    def __iter__(self): return (self.data[torch.randint(50, (8,), generator=self.dice)] for _ in range(7))


def without_seconds(records): return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def interrupted_everywhere(folder, loader, interrupts, val=True, **options):
    "Train once in one go, and once interrupted at each of some steps; everything must be equal"
    def go(at=0, **more):
        model = with_state()
        torch.manual_seed(5)
        val_loader = DataLoader(coloured(20, seed=1), 8) if val else None
        with contextlib.suppress(KeyboardInterrupt):
            history = train_model(model, loader(), 3, 1e-2, val_loader, progress=False, callbacks=[log, Recorder(at)], **options, **more)
            return model, history
    log = JsonLog(folder/"whole.jsonl")
    model, history = go()
    whole_log = without_seconds(log.lines())
    log = JsonLog(folder/"log.jsonl")
    for at in interrupts:
        assert go(at, checkpoints=folder/"run", resume=True) is None, at
        torch.rand(3), np.random.rand(), torch.manual_seed(99)  # whatever the next process does first
    again, again_history = go(checkpoints=folder/"run", resume=True)
    assert weights(again) == weights(model)
    assert without_seconds(again_history) == without_seconds(history)
    assert without_seconds(log.lines()) == whole_log


@pytest.mark.parametrize("patience", [0, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_resume_is_exact(tmp_path, precision, patience):
    "Every step of two epochs and a bit, with a checkpoint a step, and each a new process as far as generators go"
    interrupted_everywhere(tmp_path, plain, range(1, 11), every=1, precision=precision, patience=patience, **EVERYTHING)


@pytest.mark.parametrize("loader", [own_generator, weighted, skipping])
@pytest.mark.parametrize("every", [0, 1, 3])
def test_resume_is_exact_with_every_loader(tmp_path, loader, every):
    interrupts = range(1, 11) if every == 1 else (7, 12) if every == 3 else (6, 11)
    interrupted_everywhere(tmp_path, loader, interrupts, every=every, val=False, **EVERYTHING)


@pytest.mark.parametrize("loader", [batch_sampled, noisy, noisy_numpy, noisy_old_numpy, noisy_python, noisy_global, noisy_skipping, skipping_by_hand, Handmade])
def test_resume_is_exact_whoever_throws_the_dice(tmp_path, loader):
    interrupted_everywhere(tmp_path, loader, (1, 4, 9, 12), every=1, val=False)


@pytest.mark.parametrize("dice", [None, torch_dice])
def test_resume_is_exact_with_dice_in_a_worker(tmp_path, dice):
    from grocery_nb.data_utils import create_dataloader
    def loader(): return create_dataloader(Noisy(dice and dice()), 8, shuffle=True, seed=5, num_workers=1)
    interrupted_everywhere(tmp_path, loader, (3, 9), every=1, val=False)


def test_dice_that_no_checkpoint_can_hold_are_refused(tmp_path):
    loader = DataLoader(Noisy(torch_dice()), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(TrainError, match=r"generator of its own \(dataset.dice\).*persistent_workers=False"):
        train_model(with_state(), loader, 1, progress=False, checkpoints=tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_resume_is_exact_without_a_length(tmp_path):
    interrupted_everywhere(tmp_path, endless, range(2, 12, 3), every=1, ema=0.9, clip=1.0, accumulate=2)


def test_resume_with_another_number_of_workers(loaders, classes, tmp_path):
    def go(at=0, workers=0, **more):
        torch.manual_seed(0)
        model, (train, val) = create_model(classes, weights=None), loaders(num_workers=workers)
        try: train_model(model, train, 2, 1e-3, val, progress=False, checkpoints=tmp_path/"run", every=1, callbacks=[Recorder(at)], **more)
        except KeyboardInterrupt: return None
        return weights(model)
    expected = go()
    assert go(at=2) is None
    assert go(workers=2, resume=True) == expected


def test_a_finished_training_is_read_and_not_repeated(tmp_path):
    options = dict(progress=False, checkpoints=tmp_path, ema=0.9)
    first, second = with_state(), no_batchnorm()
    history, seen = train_model(first, plain(), 2, 1e-2, **options), Recorder()
    second = with_state()
    assert train_model(second, plain(), 2, 1e-2, resume=True, callbacks=[seen], **options) == history
    assert weights(first) == weights(second) and not seen.steps
    train_model(second, plain(), 1, 1e-2, **options)  # a finished one may be written over
    assert CheckpointFolder(tmp_path).newest()[1]["epoch"] == 1


@pytest.mark.parametrize("change, says", [
    (dict(lr=2e-2), "learning rate was 0.01"), (dict(schedule="cosine"), "schedule was 'constant'"), (dict(ema=0.5), "ema was 0.9"),
    (dict(identity={"data": "b"}), "data was 'a'"), (dict(dataloader=DataLoader(coloured(), 16)), "steps an epoch was 7"),
    (dict(dataloader=DataLoader(coloured(), 8)), "sampler was 'RandomSampler'"),
    (dict(model=nn.Sequential(nn.Flatten(), nn.Linear(192, 4))), "parameters was"),
])
def test_resume_refuses_what_is_not_the_same(tmp_path, change, says):
    good = dict(dataloader=plain(), epochs=3, lr=1e-2, progress=False, checkpoints=tmp_path, ema=0.9, identity={"data": "a"}, every=1)
    with pytest.raises(KeyboardInterrupt): train_model(with_state(), **good, callbacks=[Recorder(2)])
    changed = {"model": with_state(), **good, **change}
    before = weights(changed["model"])
    with pytest.raises(CheckpointError, match=says) as error: train_model(**changed, resume=True)
    assert isinstance(error.value, GroceryError) and "\n" not in str(error.value) and weights(changed["model"]) == before


def fresh(epochs, loader=plain, **options):
    model = with_state()
    torch.manual_seed(5)
    val_loader = DataLoader(coloured(20, seed=1), 8)
    return model, train_model(model, loader(), epochs, 1e-2, val_loader, progress=False, **options)


@pytest.mark.parametrize("loader", [plain, own_generator, skipping, endless])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_finished_training_goes_on_as_the_longer_one(tmp_path, loader, precision):
    options = dict(loader=loader, ema=0.9, clip=1.0, label_smoothing=0.1, weight_decay=0.05, precision=precision, mix=0.5)
    longer, history = fresh(4, **options)
    fresh(2, checkpoints=tmp_path, **options)
    torch.manual_seed(99)
    prolonged, told = fresh(4, checkpoints=tmp_path, resume=True, **options)
    assert weights(prolonged) == weights(longer) and without_seconds(told) == without_seconds(history)


def test_an_interrupted_training_may_become_longer_or_shorter(tmp_path):
    for epochs in 2, 5:
        with pytest.raises(KeyboardInterrupt): fresh(3, checkpoints=tmp_path/f"{epochs}", every=1, callbacks=[Recorder(10)])
        assert weights(fresh(epochs, checkpoints=tmp_path/f"{epochs}", resume=True)[0]) == weights(fresh(epochs)[0])


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_is_the_same_in_two_goes(tmp_path, patience):
    "Also where the first one was stopped early: more epochs change nothing then"
    longer, history = fresh(9, patience=patience)
    for epochs in 2, 5, 9: prolonged, told = fresh(epochs, checkpoints=tmp_path, resume=True, patience=patience)
    assert weights(prolonged) == weights(longer) and without_seconds(told) == without_seconds(history)
    assert len(history) < 9


@pytest.mark.parametrize("plan, says", [
    (dict(schedule="cosine"), "cosine"), (dict(schedule="onecycle"), "onecycle"), (dict(warmup=0.1), "warm-up")])
def test_a_plan_over_all_epochs_cannot_be_prolonged(tmp_path, plan, says):
    fresh(2, checkpoints=tmp_path, **plan)
    with pytest.raises(CheckpointError, match=f"epochs .the {says} is laid out over all of them. was 2, is now 4") as error:
        fresh(4, checkpoints=tmp_path, resume=True, **plan)
    assert "\n" not in str(error.value)


def test_no_epoch_is_undone(tmp_path):
    fresh(3, checkpoints=tmp_path)
    with pytest.raises(CheckpointError, match="is in epoch 3 already, and epochs is 2"): fresh(2, checkpoints=tmp_path, resume=True)


def test_an_unfinished_training_is_not_written_over(tmp_path):
    options = dict(epochs=2, lr=1e-2, progress=False, checkpoints=tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt): train_model(with_state(), plain(), callbacks=[Recorder(3)], **options)
    files = sorted(path.name for path in tmp_path.glob("*.pt"))
    with pytest.raises(TrainError, match=r"not finished \(epoch 1, step 2\); go on with it by resume=True"):
        train_model(with_state(), plain(), **options)
    assert files == sorted(path.name for path in tmp_path.glob("*.pt"))


def test_without_validation_no_checkpoint_is_called_the_best(tmp_path):
    train_model(with_state(), plain(), 2, 1e-2, progress=False, checkpoints=tmp_path)
    assert not list(tmp_path.glob("best*")) and list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("loader", [plain, skipping, endless])
def test_an_epoch_is_kept_when_its_evaluation_or_a_callback_fails(tmp_path, loader):
    class Full(Callback):
        def on_epoch(self, training, record):
            if training.epoch == 2: raise OSError(28, "No space left on device")
    whole, history = fresh(3, loader, patience=3, ema=0.9)
    bad = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 9]))]
    torch.manual_seed(5)
    model = with_state()
    torch.manual_seed(5)
    options = dict(lr=1e-2, epochs=3, progress=False, patience=3, ema=0.9, checkpoints=tmp_path, every=0)
    with pytest.raises(TrainError, match="Label 9"): train_model(model, loader(), val_loader=bad, **options)
    assert CheckpointFolder(tmp_path).newest()[1]["step"] == 7 and CheckpointFolder(tmp_path).newest()[1]["epoch"] == 0
    seen = Recorder()
    with pytest.raises(OSError): fresh(3, loader, patience=3, ema=0.9, checkpoints=tmp_path, every=0, resume=True, callbacks=[seen, Full()])
    assert [r["epoch"] for r in seen.steps] == [2]*7, "the first epoch was not trained again"
    seen = Recorder()
    again, told = fresh(3, loader, patience=3, ema=0.9, checkpoints=tmp_path, every=0, resume=True, callbacks=[seen])
    assert [r["epoch"] for r in seen.steps] == [3]*7
    assert weights(again) == weights(whole) and without_seconds(told) == without_seconds(history)


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path):
    log, options = JsonLog(tmp_path/"log.jsonl"), dict(epochs=2, lr=1e-2, progress=False, checkpoints=tmp_path/"run", every=1)
    with pytest.raises(KeyboardInterrupt): train_model(with_state(), plain(), callbacks=[log, Recorder(3)], **options)
    with open(log.path, "a") as file: file.write('{"epoch": 1, "st')
    train_model(with_state(), plain(), callbacks=[log], resume=True, **options)
    assert [line["step"] for line in log.lines() if "step" in line] == [1, 2, 3, 4, 5, 6, 7]*2


def test_a_resume_at_the_end_of_an_epoch_needs_no_bar(tmp_path, capfd):
    "Only a loader without a length has a checkpoint after the last step of an epoch and before its evaluation"
    options = dict(epochs=2, lr=1e-2, checkpoints=tmp_path, every=1)
    with pytest.raises(KeyboardInterrupt): train_model(with_state(), endless(), callbacks=[StopAfterEpoch()], **options)
    capfd.readouterr()
    assert len(train_model(with_state(), endless(), resume=True, **options)) == 2
    assert "epoch 2/2" in capfd.readouterr().err


def test_an_epoch_by_hand():
    training = Training(no_batchnorm(), DataLoader(coloured(), 8), 1, 1e-2, recipe=Recipe(accumulate=3))
    train_epoch(training)
    assert training.step == training.steps == training.total_steps == 3 and training.totals[3] == 50


def test_mixed_training_resumes_to_the_same_weights(tmp_path):
    def mixed(seed=0, **options):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        data = TensorDataset(torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3)
        return model, train_model(model, DataLoader(data, 4, shuffle=True), 3, 1e-2, progress=False, **options)
    for share in 0.5, 1.0:
        whole, history = mixed(mix=share)
        assert weights(whole) != weights(mixed()[0])
        with pytest.raises(KeyboardInterrupt): mixed(mix=share, checkpoints=tmp_path/f"{share}", every=1, callbacks=[Recorder(interrupt_at=8)])
        again, resumed = mixed(seed=5, mix=share, checkpoints=tmp_path/f"{share}", every=1, resume=True)
        assert weights(again) == weights(whole) and [r["accuracy"] for r in resumed] == [r["accuracy"] for r in history]


def test_mixing_draws_nothing_unless_it_is_asked_for():
    inputs, labels, before = torch.randn(4, 3, 8, 8), torch.arange(4), torch.get_rng_state()
    same, targets = mix_batch(inputs, labels, 0.0)
    assert same is inputs and targets == [(labels, 1.0)] and torch.equal(before, torch.get_rng_state())
    for wrong in -0.1, 1.1, math.nan:
        with pytest.raises(TrainError, match="mix is"): Recipe(mix=wrong)


def test_mixing_keeps_inputs_and_the_sum_of_the_weights():
    torch.manual_seed(0)
    for shape in (6, 3, 9, 7), (6, 5):
        inputs, labels = torch.randn(shape), torch.arange(6)
        kept = inputs.clone()
        for _ in range(200):
            mixed, targets = mix_batch(inputs, labels, 1.0)
            assert mixed.shape == inputs.shape and torch.isfinite(mixed).all() and torch.equal(inputs, kept)
            assert sum(weight for _, weight in targets) == pytest.approx(1) and all(0 <= weight <= 1 for _, weight in targets)
