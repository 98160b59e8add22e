"Checkpoints under everything that happens to files: crashes at every step, kill -9, full disks, flipped bits, hostile files, two writers."
import copy
import errno
import io
import os
import pickle
import random
import signal
import time
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from grocery_nb.training import checkpoints
from grocery_nb.training.checkpoints import (
    CheckpointFolder, check_same, load_checkpoint, restore_state, save_checkpoint, second_name, training_state)
from grocery_nb.training.states import (
    CHECKPOINT_FORMAT, STAMP, CheckpointError, content_digest, portable, random_state, read_state, set_random_state, write_state)

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which Windows has not")


def sentence(error) -> str:
    "The text of a refusal, which must be one readable line and free of PyTorch's own words"
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 900, text
    assert not any(word in text for word in ("Traceback", "magic number", "weights_only argument", "inline_container")), text
    return text


def refused(words: str, call, *args, **kwargs) -> str:
    "Call something that must be refused in one sentence that holds these words"
    with pytest.raises(CheckpointError) as error: call(*args, **kwargs)
    assert words in sentence(error), sentence(error)
    return sentence(error)


def torch_bytes(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def build(seed: int = 0, width: int = 8, scheduled: bool = True):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40) if scheduled else None


def train(parts, steps: int):
    model, optimizer, scheduler = parts
    for _ in range(steps):
        inputs = torch.randn(6, 4) * random.random() + np.random.randn()
        optimizer.zero_grad()
        model(inputs).pow(2).mean().backward()
        optimizer.step()
        if scheduler: scheduler.step()


def digest(parts) -> str:
    return content_digest([part.state_dict() for part in parts if part is not None])


@pytest.fixture
def path(tmp_path) -> Path:
    return write_state(tmp_path / "state.pt", {"weight": torch.arange(300.), "epoch": 3, "name": "old"})


# What may stand in a state

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int8, torch.uint8, torch.int64, torch.complex64)


def random_tensor(dice: random.Random) -> torch.Tensor:
    shape = [dice.choice((0, 1, 2, 3, 5)) for _ in range(dice.randrange(5))]
    tensor = (torch.randn(shape) * 50).to(dice.choice(DTYPES))
    if tensor.ndim == 4 and dice.random() < 0.5: return tensor.contiguous(memory_format=torch.channels_last)
    if tensor.ndim > 1 and dice.random() < 0.5: return tensor.transpose(0, -1)
    if tensor.ndim and dice.random() < 0.2: return nn.Parameter(tensor) if tensor.is_floating_point() else tensor[:1]
    return tensor


def random_value(dice: random.Random, depth: int = 0):
    if depth < 4 and dice.random() < 0.5:
        parts = [random_value(dice, depth + 1) for _ in range(dice.randrange(5))]
        kind = dice.choice((list, tuple, dict, OrderedDict))
        if kind in (list, tuple): return kind(parts)
        keys = dice.sample([0, 1, -7, "a", "b", "é", "", 2.5, None, b"k", "\n'\""], len(parts))
        return kind(zip(keys, parts))
    return dice.choice((lambda: random_tensor(dice), lambda: dice.choice((None, True, False, "", "Käse\x00", b"\xff", Counter({3: 2}))),
                        lambda: dice.randrange(-2**70, 2**70), lambda: dice.choice((0.1, -0.0, float("inf"), float("nan"), 1e-320))))()


def identical(a, b) -> bool:
    "Equal in kind, order of keys, type of numbers, shape, strides of dense tensors and bits"
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or type(b) is not torch.Tensor: return False
        if a.untyped_storage().nbytes() == a.nbytes and a.stride() != b.stride(): return False
        return a.detach().reshape(-1).contiguous().view(torch.uint8).equal(b.reshape(-1).contiguous().view(torch.uint8))
    if type(a) is not type(b): return False
    if isinstance(a, dict): return repr(list(a)) == repr(list(b)) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(identical, a, b))
    return repr(a) == repr(b)


@pytest.mark.parametrize("seed", range(40))
def test_a_random_state_comes_back(seed, tmp_path):
    torch.manual_seed(seed)
    dice = random.Random(seed)
    state = {"part": random_value(dice), "tensor": random_tensor(dice), "list": [random_value(dice) for _ in range(4)]}
    before = content_digest(state)
    back = read_state(write_state(tmp_path / "state.pt", state))
    assert identical(state, back) and content_digest(state) == before == content_digest(back) and STAMP not in state
    assert write_state(tmp_path / "again.pt", back) and content_digest(read_state(tmp_path / "again.pt")) == before


def test_the_round_trip_test_can_fail():
    tensor = torch.zeros(2, 3)
    for a, b in ((tensor, tensor.T), (tensor, tensor.double()), ([1], (1,)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (0.0, -0.0), (1, True),
                 (tensor, tensor + 1)): assert not identical(a, b)


def test_the_digest_is_of_the_contents():
    images = torch.randn(2, 3, 4, 5)
    turned = images.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    same = [images, images.to(memory_format=torch.channels_last), turned, nn.Parameter(images), torch.cat([images, images])[:2]]
    assert len({content_digest({"x": tensor}) for tensor in same}) == 1
    assert content_digest({"a": 1, 2: "b"}) == content_digest(OrderedDict([(2, "b"), ("a", 1)]))
    assert content_digest(np.float64(0.5)) == content_digest(0.5) and content_digest(torch.Size([2])) == content_digest((2,))
    different = [[["a"], "b"], [["a", "b"]], ["a", ["b"]], ["a", "b"], ["ab"], {"a": "b"}, {"b": "a"},
                 (("a", "b"),), [], {}, (), [[]], Counter(), 0.0, -0.0, 0, False, None, "", b"", "None", float("nan"), float("inf"), {1: 0}, {"1": 0}, {True: 0}, {1.0: 0},
                 torch.zeros(()), torch.zeros(1), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(1).int(),
                 images, images.half(), images.transpose(2, 3)]
    assert len({content_digest(value) for value in different}) == len(different)


def test_a_view_is_written_without_the_rest(tmp_path):
    large = torch.randn(1_000_000)
    write_state(tmp_path / "view.pt", {"a": large[:5], "b": torch.zeros(1).expand(1000), "c": large[::100_000]})
    assert (tmp_path / "view.pt").stat().st_size < 10_000
    assert torch.equal(read_state(tmp_path / "view.pt")["c"], large[::100_000])


def test_lazily_conjugated_numbers(tmp_path):
    tensor = torch.randn(4, dtype=torch.complex64)
    back = read_state(write_state(tmp_path / "c.pt", {"conj": tensor.conj(), "neg": tensor.conj().imag}))
    assert torch.equal(back["conj"], tensor.conj()) and torch.equal(back["neg"], -tensor.imag)


class Thing: pass


@pytest.mark.parametrize("value, words", [
    (torch.eye(3).to_sparse(), "sparse"), (torch.empty(2, device="meta"), "meta"), (nn.LazyLinear(2).weight, "Uninitialized"),
    *((value, f"of type {kind};") for value, kind in (
        (nn.Linear(2, 2), "Linear"), (np.zeros(3), "ndarray"), (Thing(), "Thing"), (Thing, "type"), (2**2000, "int"), (1j, "complex"),
        ({1}, "set"), (np.datetime64("2026-01-01"), "date"), (torch.float32, "dtype"), (torch.device("cpu"), "device"))), (Path("x"), "Path;")])
def test_what_cannot_be_held_is_refused_before_anything_is_written(value, words, path):
    before = path.read_bytes()
    text = refused(words, write_state, path, {"outer": [{"inner": value}]})
    assert "['outer'][0]['inner']" in text and path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_states_that_are_none(path):
    endless = {}
    endless["self"] = endless
    refused("contains itself", write_state, path, endless)
    refused("a state is a dict, not a list", write_state, path, [1])
    refused("is reserved", write_state, path, {STAMP: 1})
    refused("a key of state is of type tuple", write_state, path, {(1, 2): 3})
    assert read_state(path)["name"] == "old"


class Versioned(nn.Linear):
    "A layer that refuses a state_dict without its version, as torchvision's mnasnet does"
    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version") != 2: raise ValueError("no version")
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_a_state_dict_keeps_the_versions_of_its_layers(tmp_path):
    model = nn.Sequential(Versioned(2, 2))
    with pytest.raises(ValueError): model.load_state_dict(dict(model.state_dict()))
    model.load_state_dict(read_state(write_state(tmp_path / "m.pt", {"model": model.state_dict()}))["model"])
    model.load_state_dict(read_state(write_state(tmp_path / "m.pt", model.state_dict())))  # the state itself is such a dict


# Writing

DISK = ((Path, "write_bytes"), (os, "fsync"), (os, "replace"), (os, "link"), (Path, "mkdir"))


def steps(patch, stop_at: int, action, operations=(*DISK, (Path, "unlink")), lasting=False):
    "Count the operations that change the disk, and do `action` at one of them (or from there on): half a write, or before the others"
    count = iter(range(10_000))
    def wrap(owner, name):
        original = getattr(owner, name)
        def step(*args, **kwargs):
            number = next(count)
            if number == stop_at or lasting and number > stop_at:
                if name == "write_bytes": original(args[0], args[1][:len(args[1]) // 2])
                action()
            return original(*args, **kwargs)
        patch.setattr(owner, name, step)
    for owner, name in operations: wrap(owner, name)


def unknown(*args): raise OSError(errno.EPERM, "Operation not permitted")


def in_a_child(action) -> int:
    "Run something in a forked process and return its exit code"
    child = os.fork()
    if child == 0:
        try: action()
        except BaseException: os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@forks
def test_a_crash_at_every_step_of_a_write(path):
    seen = []
    for stop_at in range(50):
        write_state(path, {"name": "old"})
        def save():
            with pytest.MonkeyPatch.context() as patch:
                steps(patch, stop_at, lambda: os._exit(9))
                write_state(path, {"name": "new"})
        ended = in_a_child(save)
        seen.append(read_state(path)["name"])
        if ended == 0: break
        assert ended == 9
    assert ended == 0 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"} and len(seen) >= 6


@forks
@pytest.mark.parametrize("links", [True, False])
def test_a_crash_at_every_step_of_a_save(tmp_path, links):
    "At every moment there is a newest and a best one, and the next save leaves the folder as if nothing had happened"
    def state(step): return {"step": step, "weight": torch.full((50,), float(step))}
    newest, best = [], []
    for stop_at in range(100):
        store = CheckpointFolder(tmp_path / str(stop_at))
        for step in (1, 2, 3): store.save(state(step), step, best=step == 2)
        def save():
            with pytest.MonkeyPatch.context() as patch:
                if not links: patch.setattr(os, "link", unknown)
                steps(patch, stop_at, lambda: os._exit(9))
                store.save(state(4), 4, best=True)
        ended = in_a_child(save)
        for found, get in ((newest, store.newest), (best, store.best)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no damaged file, not even one that is passed over
                found.append(get()[1]["step"])
        if ended == 0: break
        assert ended == 9
        store.save(state(5), 5, best=True)
        expected = {"best-00000005.pt", "checkpoint-00000005.pt", "checkpoint-00000004.pt" if newest[-1] == 4 else "checkpoint-00000003.pt"}
        assert {file.name for file in store.folder.iterdir()} == expected
    assert ended == 0 and newest == sorted(newest) and best == sorted(best)
    assert (newest[0], newest[-1]) == (3, 4) and (best[0], best[-1]) == (2, 4)
    assert len(newest) >= 12, "a save has at least that many steps, or they were not counted"


def full(*args): raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_every_step(tmp_path):
    seen = []
    for stop_at in range(100):
        store = CheckpointFolder(tmp_path / str(stop_at))
        for step in (1, 2): store.save({"step": step}, step, best=True)
        with pytest.MonkeyPatch.context() as patch:
            reached = []
            steps(patch, stop_at, lambda: reached.append(1) or full(), DISK, lasting=True)
            try: store.save({"step": 3}, 3, best=True)
            except CheckpointError as e: assert "No space left on device" in sentence(pytest.ExceptionInfo.from_exception(e))
        assert not list(store.folder.glob(".*.tmp"))  # no half file stays on the full disk
        seen.append((store.newest()[1]["step"], store.best()[1]["step"]))
        if not reached: break
    assert not reached and seen == sorted(seen) and seen[0] == (2, 2) and seen[-1] == (3, 3) and len(seen) >= 10


@forks
def test_a_limit_that_the_system_itself_reports(path):
    def save():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        refused("could not be written (File too large)", write_state, path, {"weight": torch.zeros(100_000)})
    assert in_a_child(save) == 0
    assert read_state(path)["name"] == "old" and list(path.parent.iterdir()) == [path]


def test_places_where_no_file_can_stand(tmp_path):
    (tmp_path / "file").write_text("a file where a folder is meant")
    refused("could not be written", write_state, tmp_path / "file" / "a.pt", {})
    refused("could not be written", write_state, tmp_path, {})
    refused("cannot be locked", CheckpointFolder(tmp_path / "file" / "run").lock().__enter__)
    refused("could not be written", CheckpointFolder(tmp_path / "file" / "run").save, {}, 1)


@forks
def test_kill_9_never_leaves_a_torn_checkpoint(tmp_path):
    store, dice, last, leftover = CheckpointFolder(tmp_path / "run"), random.Random(0), 0, False
    store.save({"step": 0, "weight": torch.zeros(300_000)}, 0, best=True)
    for kill in range(60):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)  # the threads of the parent are not there after a fork
            with store.lock():
                for step in range(last + 1, 10_000):
                    store.save({"step": step, "weight": torch.full((300_000,), float(step))}, step, best=step % 2 == 0)
        time.sleep(dice.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        leftover |= bool(checkpoints.leftovers(store.folder))
        with store.lock(), warnings.catch_warnings():  # the lock of a killed process is free
            warnings.simplefilter("error")  # no file is damaged, so none is passed over
            for _, state in (store.newest(), store.best()): assert set(state["weight"].tolist()) == {state["step"]}, "a torn one"
            for file in store.folder.glob("*.pt"): read_state(file)
            assert store.newest()[1]["step"] >= last, "an older checkpoint came back"
            last = store.newest()[1]["step"]
        if kill >= 7 and last >= 5 and leftover: break
    assert last >= 5 and leftover, "too few saves, or no kill in the middle of one, for this to prove anything"
    store.save({"step": last + 1}, last + 1)
    assert checkpoints.leftovers(store.folder) == []


# Reading

class Attack:
    "A pickle of this object runs a shell command in whoever unpickles it"
    def __init__(self, marker): self.marker = marker
    def __reduce__(self): return os.system, (f"echo ran > '{self.marker}'",)


def without_a_tensor(good: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            if not name.endswith("data/0"): new.writestr(name, old.read(name))
    return buffer.getvalue()


def doubled() -> list:
    value = []
    for _ in range(60): value = [value, value]
    return value


def deep() -> list:
    value = []
    for _ in range(5000): value = [value]
    return value


def deep_pickle() -> bytes:
    "A file whose state is nested deeper than any function may call itself; torch.save cannot write it"
    stamp = b"X" + len(STAMP).to_bytes(4, "little") + STAMP.encode() + b"}X\x06\x00\x00\x00formatK" + bytes([CHECKPOINT_FORMAT]) + b"ss"
    body = b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 5000 + b"a" * 4999 + b"s" + stamp + b"."
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_bytes({}))) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist(): new.writestr(name, body if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


def stamped(state: dict, **stamp) -> bytes:
    return torch_bytes({**state, STAMP: {"format": CHECKPOINT_FORMAT, "sha256": content_digest(state), **stamp}})


BAD = {  # name: (contents made from a good file, words that the sentence must hold)
    "empty": (lambda good: b"", "is empty (0 bytes)"),
    "one byte": (lambda good: good[:1], "no file that torch.save wrote"),
    "half": (lambda good: good[:len(good) // 2], "is cut off or damaged"),
    "without its last byte": (lambda good: good[:-1], "is cut off or damaged"),
    "without a tensor": (without_a_tensor, "is cut off or damaged"),
    "zeros": (lambda good: bytes(5000), "no file that torch.save wrote"),
    "random": (lambda good: np.random.default_rng(0).bytes(5000), "no file that torch.save wrote"),
    "a web page": (lambda good: b"<!DOCTYPE html><html>404</html>", "no file that torch.save wrote"),
    "a flipped bit": (lambda good: good.replace(np.float32(7).tobytes(), np.float32(14).tobytes()), "is damaged: its contents"),
    "another letter": (lambda good: good.replace(b"old", b"odd"), "is damaged: its contents"),
    "an attack": (lambda good: torch_bytes({"weight": Attack("/dev/null")}), "was refused and none of it was run"),
    "an attack in the old format": (lambda good: torch_bytes(Attack("/dev/null"), _use_new_zipfile_serialization=False), "was refused"),
    "a bare attack": (lambda good: pickle.dumps({"a": Attack("/dev/null")}, protocol=2), ""),
    "a whole model": (lambda good: torch_bytes(nn.Linear(2, 2)), "wants torch.nn.modules.linear.Linear"),
    "the course's file": (lambda good: torch_bytes({"model": nn.Linear(2, 2).state_dict(), "epoch": 3}), "has no digest"),
    "a list": (lambda good: torch_bytes([1, 2]), "has no digest"),
    "a stamp of another kind": (lambda good: torch_bytes({STAMP: 3}), "has no digest"),
    "a stamp without a number": (lambda good: stamped({"a": 1}, format="1"), "has no digest"),
    "a newer format": (lambda good: stamped({"a": 1}, format=CHECKPOINT_FORMAT + 1), "upgrade grocery-nb"),
    "an older format": (lambda good: stamped({"a": 1}, format=1), "older than this grocery-nb reads"),
    "another digest": (lambda good: stamped({"a": 1}, sha256="0" * 64), "is damaged: its contents"),
    "no digest in the stamp": (lambda good: torch_bytes({"a": 1, STAMP: {"format": CHECKPOINT_FORMAT}}), "is damaged: its contents"),
    "a stride of 0": (lambda good: torch_bytes({"a": torch.zeros(1).expand(10**12), STAMP: {"format": CHECKPOINT_FORMAT}}), "is damaged: its contents"),
    "a list that doubles": (lambda good: torch_bytes({"a": doubled(), STAMP: {"format": CHECKPOINT_FORMAT}}), "is damaged: its contents"),
    "a sparse tensor": (lambda good: torch_bytes({"a": torch.eye(2).to_sparse(), STAMP: {"format": CHECKPOINT_FORMAT}}), "is damaged: its contents"),
    "too deep": (lambda good: deep_pickle(), "is damaged: its contents"),
}


@pytest.mark.filterwarnings("ignore")  # torch has its own to say about some of these files
@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, path):
    make, words = BAD[name]
    good = path.read_bytes()
    data = make(good)
    assert data != good
    path.write_bytes(data)
    assert str(path) in refused(words, read_state, path)
    assert path.read_bytes() == data  # a refusal changes nothing


def test_good_bytes_are_good(path):
    (path.parent / "hand.pt").write_bytes(stamped({"a": 1}))  # so the faults above are faults of what was changed
    assert read_state(path.parent / "hand.pt") == {"a": 1} and read_state(path)["epoch"] == 3
    refused("There is no checkpoint", read_state, path.parent / "absent.pt")
    refused("cannot be read", read_state, path.parent)
    refused("nested too deeply", write_state, path, {"a": deep()})


def test_no_flipped_bit_is_believed(path):
    good, dice, naive = path.read_bytes(), random.Random(1), 0
    wanted = read_state(path)
    for place in dice.sample(range(len(good)), 400):
        path.write_bytes(good[:place] + bytes([good[place] ^ (1 << dice.randrange(8))]) + good[place+1:])
        try: naive += not torch.equal(torch.load(path)["weight"], wanted["weight"])
        except Exception: pass
        try: assert identical(read_state(path), wanted)
        except CheckpointError: pass
    assert naive > 50, "torch.load noticed them by itself: the chapter says otherwise"


def test_an_attack_does_not_run(tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "evil.pt"
    file.write_bytes(torch_bytes({"a": Attack(marker)}))
    refused("was refused and none of it was run", read_state, file)
    assert not marker.exists()
    torch.load(file, weights_only=False)  # the control: the very same file does run without the guard
    assert marker.exists()


def test_a_checkpoint_from_a_gpu(tmp_path):
    parts = build()
    train(parts, 2)
    file = save_checkpoint(tmp_path / "cpu.pt", *parts[:2])
    old, new = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7"
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as changed:
        for name in archive.namelist():
            part = archive.read(name)
            changed.writestr(zipfile.ZipInfo(name), part.replace(old, new) if name.endswith("data.pkl") else part)
    if torch.cuda.device_count() < 8:
        with pytest.raises(RuntimeError): torch.load(tmp_path / "gpu.pt")
    other = build(1)
    load_checkpoint(tmp_path / "gpu.pt", *other[:2])
    assert digest(other[:2]) == digest(parts[:2])


# Generators

def draw() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist(), torch.randn(1).item()


def test_generators(tmp_path):
    draw()
    random.gauss(0, 1), np.random.randn()  # both keep a second number for the next call
    state = read_state(write_state(tmp_path / "r.pt", {"random": random_state()}))["random"]
    drawn = draw()
    assert draw() != drawn
    set_random_state(state)
    assert draw() == drawn


def test_another_number_of_gpus(monkeypatch):
    was_set = {}
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: was_set.update({device: state.item()}))
    state = {**random_state(), "cuda": [torch.tensor(n) for n in range(4)]}
    for here in (0, 2, 4, 6):
        was_set.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
        set_random_state(state)
        assert was_set == {n: n for n in range(min(here, 4))}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_generators_and_weights_on_a_gpu(tmp_path):
    model = nn.Linear(3, 3).cuda()
    file = save_checkpoint(tmp_path / "gpu.pt", model)
    assert not any(tensor.is_cuda for tensor in read_state(file)["model"].values())
    drawn, other = torch.rand(5, device="cuda").tolist(), nn.Linear(3, 3).cuda()
    load_checkpoint(file, other)
    assert other.weight.is_cuda and torch.equal(other.weight, model.weight) and torch.rand(5, device="cuda").tolist() == drawn


# A model, an optimizer, and the rest

def test_resume_is_exact(tmp_path):
    parts = build()
    ema = torch.optim.swa_utils.AveragedModel(parts[0], use_buffers=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.)
    train(parts, 10)
    ema.update_parameters(parts[0])
    model, optimizer, scheduler = parts
    file = save_checkpoint(tmp_path / "last.pt", model, optimizer, 3, scheduler, scaler, ema, best=np.float32(0.5), sizes=(1, 2))
    train(parts, 10)
    after = digest([*parts, ema, scaler]), draw()
    other = build(1)
    average, scale = torch.optim.swa_utils.AveragedModel(other[0], use_buffers=True), torch.amp.GradScaler("cpu")
    random.seed(9), np.random.seed(9)
    assert load_checkpoint(file, *other, scale, average) == {"epoch": 3, "best": 0.5, "sizes": (1, 2)}
    train(other, 10)
    assert (digest([*other, average, scale]), draw()) == after and scale.get_scale() == 128
    third = build(2)
    load_checkpoint(file, *third, random=False)
    train(third, 10)
    assert digest(third) != digest(parts)  # the control: without the generators it is another training


def test_channels_last_weights_stay(tmp_path):
    model = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    other = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    resumed = torch.optim.Adam(other.parameters())
    load_checkpoint(save_checkpoint(tmp_path / "c.pt", model, optimizer), other, resumed)
    for tensor in (other.weight, resumed.state[other.weight]["exp_avg"]): assert tensor.is_contiguous(memory_format=torch.channels_last)


class Moody(torch.optim.lr_scheduler.OneCycleLR):
    "A scheduler that takes its state, and complains"
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if state_dict["last_epoch"]: raise ValueError("not in the mood\nand not on the second line either")


def wider(): return build(1, width=9)
def other_optimizer(): return (model := build(1)[0], torch.optim.SGD(model.parameters(), momentum=0.9), None)
def two_groups(): return (model := build(1)[0], torch.optim.AdamW([{"params": part.parameters()} for part in (model[:2], model[2:])]), None)
def doubles(): return (build(1)[0].double(), None, None)
def renamed(): return (nn.ModuleDict({"net": build(1)[0]}), None, None)
def mixed(): return (build(1)[0], torch.optim.AdamW(reversed(list(build(1)[0].parameters()))), None)
def other_scheduler(): return (*(parts := build(1, scheduled=False))[:2], torch.optim.lr_scheduler.StepLR(parts[1], 3))
def moody(): return (*(parts := build(1, scheduled=False))[:2], Moody(parts[1], 1e-2, total_steps=40))


@pytest.mark.parametrize("make, words", [
    (wider, "model['0.weight'] is float32 (8, 4) in the file and float32 (9, 4) here"),
    (other_optimizer, "AdamW as optimizer, and here it is SGD"), (two_groups, "groups of [6] parameters in the file and of [4, 2] here"),
    (doubles, "float32 (8, 4) in the file and float64 (8, 4) here"),
    (renamed, "model['0.weight'] is in the file and not here"), (mixed, "exp_avg of parameter"),
    (other_scheduler, "OneCycleLR as scheduler, and here it is StepLR"), (moody, "not in the mood; nothing was changed")])
def test_what_does_not_fit_changes_nothing(make, words, tmp_path):
    parts = build()
    train(parts, 3)
    state = training_state(parts[0], parts[1], 1, parts[2])
    if make is moody: state["kinds"]["scheduler"] = "Moody"
    file = write_state(tmp_path / "last.pt", state)
    other = make()
    before, drawn = digest(other), random_state()
    refused(words, load_checkpoint, file, *other)
    assert digest(other) == before and content_digest(random_state()) == content_digest(drawn)


def test_parts_that_the_file_lacks(tmp_path):
    parts = build(scheduled=False)
    file = save_checkpoint(tmp_path / "weights.pt", parts[0])
    before = digest(parts)
    for name, part in (("optimizer", parts[1]), ("scheduler", Thing()), ("scaler", Thing()), ("ema", Thing())):
        refused(f"has no {name}", load_checkpoint, file, parts[0], **{name: part})
    bare = write_state(tmp_path / "bare.pt", {"model": parts[0].state_dict()})
    refused("random=False", load_checkpoint, bare, parts[0])
    refused("has no model", load_checkpoint, write_state(tmp_path / "none.pt", {"epoch": 1}), parts[0])
    odd = write_state(tmp_path / "odd.pt", {"model": 3, "optimizer": 3, "random": {}})
    refused("model is a dict on one side only", load_checkpoint, odd, parts[0])
    write_state(odd, {"model": parts[0].state_dict(), "optimizer": 3})
    refused("no optimizer's state", load_checkpoint, odd, *parts[:2], random=False)
    refused("nothing was changed", load_checkpoint, write_state(odd, {"model": build(5)[0].state_dict(), "random": {}}), parts[0])
    assert digest(parts) == before and load_checkpoint(bare, build(1)[0], random=False) == {"epoch": 0}


def test_a_disabled_scaler_is_no_scaler(tmp_path):
    model, on, off = nn.Linear(2, 2), torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)
    refused("is in the file and not here", load_checkpoint, save_checkpoint(tmp_path / "on.pt", model, scaler=on), model, scaler=off)
    refused("is here and not in the file", load_checkpoint, save_checkpoint(tmp_path / "off.pt", model, scaler=off), model, scaler=on)


def test_a_restored_training_leaves_the_state_alone():
    parts, other = build(), build(1)
    train(parts, 3)
    state = portable(copy.deepcopy(training_state(*parts[:2], 1, parts[2])))
    before = content_digest(state)
    restore_state(state, *other)
    train(other, 3)
    assert content_digest(state) == before


# The same training?

def test_check_same_names_every_difference():
    settings = {"lr": 0.001, "epochs": 5, "size": (224, 224), "data": {"digest": "ab", "classes": ["Apple", "Pear"]}, "noise": float("nan"),
                "w": torch.ones(2)}
    check_same(settings, copy.deepcopy(settings), "last.pt")
    check_same(settings, {**settings, "size": [224, 224], "epochs": np.int64(5), "lr": np.float64(0.001)}, "last.pt")
    now = {**settings, "lr": 0.01, "data": {"digest": "cd", "classes": ["Apple"]}, "w": torch.zeros(2), "ema": 0.9}
    del now["epochs"]
    text = refused("last.pt", check_same, settings, now, "last.pt")
    for part in ("lr was 0.001, is now 0.01", "epochs was 5, is now absent", "data.digest was 'ab', is now 'cd'",
                 "ema was absent, is now 0.9", "data.classes[1] was 'Pear', is now absent", "w was tensor"): assert part in text, part
    assert "size" not in text and "noise" not in text
    zeros, ones = ({f"k{n}": value for n in range(100)} for value in (0, 1))
    assert "and 92 more" in refused("k0 was 0, is now 1", check_same, zeros, ones, "x")
    refused("now['out'] is of type", check_same, {}, {"out": Path("x")}, "last.pt")


# The folder

def names(store) -> list: return sorted(file.name for file in store.folder.iterdir())


def test_newest_and_best_are_kept(tmp_path):
    store = CheckpointFolder(tmp_path / "run", keep=3)
    assert store.files() == [] and store.newest() is None and store.best() is None
    for step in range(7): assert store.save({"step": step}, step, best=step in (1, 4)).name == f"checkpoint-{step:08d}.pt"
    assert names(store) == ["best-00000004.pt", "checkpoint-00000004.pt", "checkpoint-00000005.pt", "checkpoint-00000006.pt"]
    assert [file.name[-6:-3] for file in store.files()] == ["006", "005", "004"]
    assert store.newest()[1] == {"step": 6} and store.best()[1] == {"step": 4} and store.best()[0].name == "best-00000004.pt"
    assert os.path.samefile(store.best()[0], store.files()[2])
    store.save({"step": 6, "again": True}, 6, best=True)
    assert store.newest()[1]["again"] and store.best()[1]["again"] and len(names(store)) == 4


def test_a_step_of_many_digits(tmp_path):
    store = CheckpointFolder(tmp_path)
    for step in (99_999_999, np.int64(100_000_000)): store.save({"step": int(step)}, step)
    assert store.newest()[1]["step"] == 100_000_000
    for wrong in (-1, 1.5, "3", None): refused("a whole number", store.save, {}, wrong)
    for wrong in (0, -1, 1.5, None): refused("keep is", CheckpointFolder, tmp_path, wrong)


def test_where_hard_links_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", unknown)
    store = CheckpointFolder(tmp_path)
    store.save({"step": 1}, 1, best=True)
    assert store.best()[1] == store.newest()[1] == {"step": 1} and not os.path.samefile(store.best()[0], store.newest()[0])
    second_name(store.newest()[0], tmp_path / "copy.pt")
    assert read_state(tmp_path / "copy.pt") == {"step": 1}


def test_damaged_ones_are_named_and_passed_over(tmp_path):
    store = CheckpointFolder(tmp_path, keep=3)
    for step in (1, 2, 3): store.save({"step": step}, step)
    files = store.files()
    files[0].write_bytes(files[0].read_bytes()[:-20])
    files[1].write_bytes(b"")
    with pytest.warns(UserWarning) as warned: assert store.newest()[0] == files[2]
    assert [files[n].name in str(w.message) and files[2].name in str(w.message) for n, w in enumerate(warned)] == [True, True]
    assert warned[0].filename == __file__, "the warning points at the caller"
    files[2].write_bytes(b"x")
    refused("None of 3 checkpoints", store.newest)
    assert len(store.files()) == 3  # looking removes nothing


def test_training_back_leaves_no_future(tmp_path):
    store = CheckpointFolder(tmp_path, keep=1)
    store.save({"step": 10}, 10)
    store.files()[0].write_bytes(b"")
    store.save({"step": 9}, 9)
    assert store.newest()[1] == {"step": 9} and len(store.files()) == 1


def test_clear_removes_checkpoints_and_nothing_else(tmp_path):
    store = CheckpointFolder(tmp_path / "run")
    store.clear()  # nothing there yet
    store.save({}, 1, best=True)
    foreign = ["notes.txt", "model.pth", "checkpoint-1.pt", "checkpoint-00000001.pt.bak", "best.pt", ".other.tmp",
               ".checkpoint-00000001.pt.tmp"]
    for name in foreign: (store.folder / name).write_text("mine")
    (store.folder / ".best-00000001.pt.0123abcd.tmp").write_text("of a killed writer")
    with store.lock(): store.clear()
    assert names(store) == sorted([*foreign, ".lock"])


@forks
def test_two_writers(tmp_path):
    store = CheckpointFolder(tmp_path / "run")
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with CheckpointFolder(store.folder).lock():
            os.write(writes, b"locked")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reads, 6) == b"locked"
        assert str(store.folder) in refused("Another training writes to", store.lock().__enter__)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for end in (reads, writes): os.close(end)
    with store.lock() as held:  # the system took the lock back
        assert held is store
        assert in_a_child(lambda: refused("Another training writes to", CheckpointFolder(store.folder).lock().__enter__)) == 0


def test_the_lock_ends_with_its_block(tmp_path):
    store = CheckpointFolder(tmp_path)
    with pytest.raises(RuntimeError, match="mine"), store.lock(): raise RuntimeError("mine")
    with store.lock(): refused("Another training writes to", CheckpointFolder(tmp_path).lock().__enter__)
