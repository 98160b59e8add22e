"""Run one loader or training epoch in this fresh process and print its peak of anonymous memory in MB; run.py starts it.

Anonymous memory is what the process itself holds. Pages of a memory-mapped file are left out: the system keeps
them while memory is free and takes them back when it is not.
"""
import sys
import threading
from pathlib import Path


def anonymous_mb():
    with open("/proc/self/smaps_rollup") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("Anonymous:")) / 1024


def peak_during(job):
    "Sample every 20 ms, so that a peak inside the building of a cache is seen too"
    peak, done = anonymous_mb(), threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_mb())

    sampler = threading.Thread(target=sample)
    sampler.start()
    job()
    done.set()
    sampler.join()
    return max(peak, anonymous_mb())


def course_epoch(root, size):
    sys.path.insert(0, str(Path(__file__).parent / "course_baseline"))
    import data_utils  # finds its folder through GROCERY_DATA_DIR, which run.py has set to root

    for _ in data_utils.get_loaders(batch_size=32)[0]: pass


def our_epoch(root, size):
    from grocery_nb.data_utils import Preprocessing, get_loaders

    preprocessing = Preprocessing(size=size, resize=size * 8 // 7)  # 224 of 256, as by default
    for _ in get_loaders(batch_size=32, root=root, preprocessing=preprocessing)[0]: pass


def our_training(root, size):
    from grocery_nb.data_utils import Preprocessing, get_loaders
    from grocery_nb.model_utils import create_model
    from grocery_nb.train_utils import train_model

    train_loader, val_loader = get_loaders(batch_size=32, root=root, preprocessing=Preprocessing(size=size, resize=size * 8 // 7))
    train_model(create_model(len(train_loader.dataset.classes), weights=None), train_loader, 1, 1e-3, val_loader, progress=False)


if __name__ == "__main__":
    side, root, size = sys.argv[1:]
    epoch = {"course": course_epoch, "ours": our_epoch, "train": our_training}[side]
    print(peak_during(lambda: epoch(Path(root), int(size))))
