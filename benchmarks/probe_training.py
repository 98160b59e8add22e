"""Train in this fresh process and print one figure; run.py starts it, alone or under torchrun.

Each side has a process of its own, because ours changes how the C library keeps memory, which would help the other side too.

    probe_training.py epoch course|ours DATA    images a second over one epoch, loader included, after a warm-up epoch
    probe_training.py reach course|ours DATA    seconds from the open data set to 75% coarse validation accuracy
"""
import contextlib
import io
import sys
import time
from pathlib import Path

BATCH, WANTED, LONGEST = 32, 0.75, 8


class Reached(Exception):
    "The wanted accuracy was measured"


def course():
    "The course's modules; its data folder is GROCERY_DATA_DIR, which run.py has set"
    sys.path.insert(0, str(Path(__file__).parent / "course_baseline"))
    import data_utils
    import model_utils
    import train_utils
    return data_utils, model_utils, train_utils


def timed(job, photos):
    start = time.perf_counter()
    job()
    return photos / (time.perf_counter() - start)


def epoch_course(data):
    data_utils, model_utils, train_utils = course()
    loader = data_utils.get_loaders(BATCH)[0]
    model = model_utils.create_model(len(data_utils.get_classes()))
    def job():
        with contextlib.redirect_stdout(io.StringIO()): train_utils.train_model(model, loader, epochs=1, lr=1e-3)
    job()
    return timed(job, len(loader.dataset))


def epoch_ours(data):
    from grocery_nb.data_utils import get_loaders
    from grocery_nb.model_utils import create_model
    from grocery_nb.run_training import processes
    from grocery_nb.train_utils import train_model

    with processes() as shard:
        loader = get_loaders(batch_size=BATCH, root=data, shard=shard)[0]
        model = create_model(len(loader.dataset.classes), weights=None)
        def job(): train_model(model, loader, epochs=1, lr=1e-3, progress=False)
        job()
        figure = timed(job, len(loader.dataset))
    return figure if shard[0] == 0 else None


class Watched:
    "A loader after whose every epoch the model is evaluated, outside the time that is counted"

    def __init__(self, loader, evaluate):
        self.loader, self.evaluate, self.evaluating, self.epochs = loader, evaluate, 0.0, 0

    def __len__(self): return len(self.loader)

    def __iter__(self):
        yield from self.loader
        self.epochs += 1
        start = time.perf_counter()
        accuracy = self.evaluate()
        self.evaluating += time.perf_counter() - start
        print(f"epoch {self.epochs}: {accuracy:.3f}", file=sys.stderr)
        if accuracy >= WANTED: raise Reached


def reach_course(data):
    "The course's loop, from EfficientNet-Lite0's ImageNet weights; its evaluations are not counted"
    from grocery_nb.model_utils import create_model

    data_utils, _, train_utils = course()
    start = time.perf_counter()
    train_loader, val_loader = data_utils.get_loaders(BATCH)
    model = create_model(len(data_utils.get_classes()), "efficientnet_lite0", "imagenet")
    def evaluate():
        try: return train_utils.evaluate_model(model, val_loader)
        finally: model.train()
    watched = Watched(train_loader, evaluate)
    try:
        with contextlib.redirect_stdout(io.StringIO()): train_utils.train_model(model, watched, epochs=LONGEST, lr=1e-3)
    except Reached: return time.perf_counter() - start - watched.evaluating
    raise SystemExit(f"the course's loop did not reach {WANTED:.0%} in {LONGEST} epochs")


def reach_ours(data):
    "The probe, from empty caches; its evaluations are counted"
    from grocery_nb.data_utils import Preprocessing, get_loaders
    from grocery_nb.model_utils import create_model, preprocessing_for
    from grocery_nb.train_utils import Callback
    from grocery_nb.training.transfer import train_probe

    class Stop(Callback):
        def on_epoch(self, training, record):
            if record["val_accuracy"] >= WANTED: raise Reached

    start = time.perf_counter()
    preprocessing = Preprocessing(**preprocessing_for("efficientnet_lite0"))
    loaders = get_loaders(batch_size=BATCH, root=data, preprocessing=preprocessing, augment=False)
    model = create_model(len(loaders[0].dataset.classes), "efficientnet_lite0", "imagenet")
    try: train_probe(model, *loaders, progress=False, callbacks=[Stop()])
    except Reached: return time.perf_counter() - start
    raise SystemExit(f"the probe did not reach {WANTED:.0%}")


if __name__ == "__main__":
    job, side, data = sys.argv[1:]
    figure = globals()[f"{job}_{side}"](Path(data))
    if figure is not None: print(figure)
