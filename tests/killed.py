"""A training that is killed: a process of its own, `kill -9` at random moments, and what must be true afterwards.

Used by tests/training/test_resume.py (a few kills) and by benchmarks/run.py (a hundred). The processes come from a fork server that has
imported torch already, so that a start takes milliseconds and the kills fall into the training and not into its imports.
"""
import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path


def small_net(classes: int):
    "A network with everything that has a state of its own: BatchNorm's statistics and dropout's dice"
    from torch import nn
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, classes))


def digest(model) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values())).hexdigest()


def train(data: Path, checkpoints: "Path|None", answer: Path, workers: int = 0, every: int = 1, epochs: int = 3):
    "Train with every part that has a state, resumed if there is a checkpoint; the digest of the final weights goes to `answer`"
    import torch
    from grocery_nb.data_utils import Preprocessing, get_loaders
    from grocery_nb.train_utils import train_model
    multiprocessing.set_start_method("fork", force=True)  # a forked worker notices that its parent was killed, and ends
    torch.set_num_threads(1)
    torch.manual_seed(7)
    train_loader, val_loader = get_loaders(16, root=data, preprocessing=Preprocessing(size=48, resize=56), seed=3, num_workers=workers)
    model = small_net(len(train_loader.dataset.classes))
    keep = {} if checkpoints is None else dict(checkpoints=checkpoints, every=every, resume=True, identity={"data": str(data)})
    history = train_model(model, train_loader, epochs, 1e-2, val_loader, progress=False, schedule="onecycle", warmup=0.2, accumulate=2, clip=1.0,
                          label_smoothing=0.1, ema=0.9, weight_decay=0.05, patience=epochs, precision="float16" if epochs > 3 else "float32", **keep)
    answer.write_text(digest(model) + "\n" + repr([(row["loss"], row["val_accuracy"]) for row in history]))


def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grocery_nb.data_utils", "grocery_nb.train_utils", "killed"])
    return context


def check_whole(checkpoints: Path) -> int:
    "Every file that bears a checkpoint's name can be read; returns how many there were"
    from grocery_nb.training.states import read_state
    files = sorted(checkpoints.glob("*.pt"))
    for file in files: read_state(file)
    return len(files)


def torture(data: Path, folder: Path, kills: int, seed: int = 0, epochs: int = 3) -> dict:
    "Kill trainings until there were `kills` of them and one has ended; says what happened"
    context, dice, checkpoints = server(), random.Random(seed), folder / "checkpoints"
    def start(name, *arguments, **more):
        process = context.Process(target=train, args=(data, *arguments, folder / name), kwargs={"epochs": epochs, **more})
        process.start()
        return process

    whole = start("whole", None)
    whole.join(120)
    began = time.perf_counter()
    start("timed", folder / "timed checkpoints").join(120)
    usual = time.perf_counter() - began
    expected, done, runs, read = (folder / "whole").read_text(), 0, 0, 0
    same = (folder / "timed").read_text() == expected
    while done < kills or runs == 0:
        process = start("answer", checkpoints, workers=dice.choice((0, 0, 0, 1)))
        process.join(dice.uniform(0, usual if done < kills else 120))
        if process.exitcode is None and done < kills:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            done += 1
        else:
            process.join(120)
            if process.exitcode != 0: raise RuntimeError(f"a resumed training ended with exit code {process.exitcode}")
            runs += 1
            same &= (folder / "answer").read_text() == expected
            for file in checkpoints.glob("*.pt"): file.unlink()
        read += check_whole(checkpoints)
    return {"kills": done, "finished": runs, "checkpoints read": read, "identical": same}
