"""`make bench`: the course's own scripts and grocery_nb, side by side in one run on this machine.

A row is a function below that is marked with `@row(name)` and returns a list of `Result`. The sides of a comparison take
turns (A, B, A, B, ...), so that a machine that is slow for a minute is slow for both. Nothing here can fail a test.
"""
import argparse
import contextlib
import datetime
import importlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BATCH = 32
ROWS = {}


class BadInput(ValueError):
    "What the user gave cannot be measured; the text says why in one sentence"


@dataclass
class Result:
    what: str
    unit: str
    course: list  # one figure a repetition; empty where the course has no counterpart
    ours: list
    target: str = ""
    met: "bool | None" = None  # None: no target in this row
    ratio: "float | None" = None

    @property
    def verdict(self):
        return {True: "met", False: "missed", None: "-"}[self.met]


def row(name):
    def register(function):
        ROWS[name] = function
        return function
    return register


def take_turns(repetitions, *sides):
    "Call each side once a round, and return one list of figures a side"
    rounds = [[side() for side in sides] for _ in range(repetitions)]
    return [list(figures) for figures in zip(*rounds)]


def paired_ratio(over, under):
    "The median of the rounds' own ratios: what slowed a whole round cancels"
    return median(a / b for a, b in zip(over, under))


# --- both sides -------------------------------------------------------------------------------------------------------

def course(module):
    "A script of the course; scripts import each other by bare name, so their folder must be on the path"
    if str(HERE / "course_baseline") not in sys.path:
        sys.path.insert(0, str(HERE / "course_baseline"))
    return importlib.import_module(module)


def images_per_second(loader, batches=None):
    "One epoch, or its first batches; the loader's own start is part of it"
    images, start = 0, time.perf_counter()
    for i, (x, _) in enumerate(loader):
        images += len(x)
        if i + 1 == batches: break
    return images / (time.perf_counter() - start)


@contextlib.contextmanager
def fresh_cache():
    "An empty GROCERY_CACHE_DIR, removed afterwards"
    before = os.environ.get("GROCERY_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="grocery-bench-") as folder:
        os.environ["GROCERY_CACHE_DIR"] = folder
        try: yield folder
        finally:
            if before is None: del os.environ["GROCERY_CACHE_DIR"]
            else: os.environ["GROCERY_CACHE_DIR"] = before


def count_rows(data, split):
    return len((data / f"{split}.txt").read_text().splitlines())


def copy_part(data, folder, every=1, times=1):
    "A data set with every n-th photo of `data`, whose train index is repeated `times` times"
    for split, repeat in (("train", times), ("val", 1)):
        rows = (data / f"{split}.txt").read_text().splitlines()[::every]
        for path in {line.split(",")[0].strip() for line in rows}:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / path, folder / path)
        (folder / f"{split}.txt").write_text("\n".join(rows * repeat) + "\n")
    shutil.copyfile(data / "classes.csv", folder / "classes.csv")
    return folder


def python(*arguments, **environment):
    "Run this Python in a fresh process that finds this checkout's grocery_nb, and return what it printed"
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=HERE,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    if done.returncode:
        raise BadInput(f"`python {' '.join(arguments)}` failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


# --- the rows ---------------------------------------------------------------------------------------------------------

@row("loader")
def loader(data, quick):
    """Warm epochs of the train split, without augmentation on either side (the course has none), and ours with it.

    Each side runs at the number of torch threads that suits it best. The course's `Normalize` gains nothing from threads, and
    their waiting is a busy loop: beside another busy process it falls from 500 images a second to 20, and a ratio to that
    would flatter us.
    """
    import torch
    from grocery_nb.data_utils import get_loaders
    from torch.utils.data import DataLoader

    naive = course("data_utils").get_loaders(BATCH)[0]
    naive2 = DataLoader(naive.dataset, batch_size=BATCH, shuffle=True, num_workers=2)
    default, batches = torch.get_num_threads(), 10 if quick else None
    counts = sorted({1, default})

    def with_threads(count, part, batches=None):
        torch.set_num_threads(count)
        try: return images_per_second(part, batches)
        finally: torch.set_num_threads(default)

    with fresh_cache():
        plain, augmented = (get_loaders(batch_size=BATCH, root=data, augment=augment)[0] for augment in (False, True))
        parts = {"course": (naive, batches), "plain": (plain, None), "augmented": (augmented, None)}
        for part, _ in parts.values():
            batch = next(iter(part))[0]
            if (tuple(batch.shape), str(batch.dtype)) != ((BATCH, 3, 224, 224), "torch.float32"):
                raise BadInput(f"The loaders do not do the same work: a batch is {batch.dtype} {tuple(batch.shape)}")
            with_threads(1, part)  # warm-up: all photos, and the whole cache, in memory
        jobs = [(name, count) for count in counts for name in parts]
        sides = [lambda name=name, count=count: with_threads(count, *parts[name]) for name, count in jobs]
        figures = take_turns(2 if quick else 5, lambda: images_per_second(naive2, batches), *sides)
    workers, figures = figures[0], dict(zip(jobs, figures[1:]))

    def best(name):
        return max((figures[name, count] for count in counts), key=median)

    def result(what, course_side, our_side, target=None):
        ratio = paired_ratio(our_side, course_side)
        return Result(what, "images/s", course_side, our_side, f">= {target}x" if target else "",
                      target and ratio >= target, ratio)

    return [result("loader, warm epoch, the same work", best("course"), best("plain"), 12),
            result("loader, warm epoch, ours with augmentation", best("course"), best("augmented"), 12),
            *[result(f"the same work, both with {n} threads", figures["course", n], figures["plain", n]) for n in counts],
            result("the same work, course with 2 workers, ours with none", workers, best("plain"))]


@row("cold")
def cold(data, quick):
    "From nothing to the first batch of both splits: reading the indexes, checking, building the cache"
    from grocery_nb.data_utils import get_loaders

    def seconds():
        with fresh_cache():
            start = time.perf_counter()
            for part in get_loaders(batch_size=BATCH, root=data): next(iter(part))
            return time.perf_counter() - start

    (figures,) = take_turns(1 if quick else 3, seconds)
    photos = count_rows(data, "train") + count_rows(data, "val")
    return [Result(f"cold build of the cache, {photos:,} photos", "s", [], figures, "<= 30 s", median(figures) <= 30)]


@row("memory")
def memory(data, quick):
    "How much higher the peak of anonymous memory is with 10 times the data, each figure from a fresh process"
    if not Path("/proc/self/smaps_rollup").exists():
        raise BadInput("The row 'memory' reads /proc/self/smaps_rollup, which only Linux has: choose other --rows")

    def peak(side, root, cache, size):
        "One torch thread: several threads have several heaps, whose fill differs from run to run"
        return float(python("probe_memory.py", side, str(root), str(size), GROCERY_DATA_DIR=str(root),
                            GROCERY_CACHE_DIR=cache, OMP_NUM_THREADS="1"))

    def growth(side, small, large, size=224):
        "The first two processes build their cache and run an epoch, the next two find it there"
        with fresh_cache() as cache:
            return [peak(side, large, cache, size) - peak(side, small, cache, size) for _ in ("cold", "warm")]

    def naive_growth(small, large):
        with fresh_cache() as cache: return peak("course", large, cache, 224) - peak("course", small, cache, 224)

    def results(step, figures, naive=(), job="loader"):
        return [Result(f"memory growth, {job}, {step}, {state}", "MB", list(course_side), list(mb), "< 50 MB", median(mb) < 50)
                for state, mb, course_side in zip(("building the cache", "cache there"), zip(*figures), ((), naive))]

    with tempfile.TemporaryDirectory(prefix="grocery-bench-") as folder:
        tenth, whole, repeated = [Path(folder, name) for name in ("tenth", "whole", "repeated")]
        copy_part(data, tenth, every=10)
        copy_part(data, whole)
        small, large, many = count_rows(tenth, "train"), count_rows(whole, "train"), 10 * count_rows(whole, "train")
        ours, naive = take_turns(1 if quick else 3, lambda: growth("ours", tenth, whole), lambda: naive_growth(tenth, whole))
        found = results(f"{small:,} -> {large:,} photos", ours, naive)
        if not quick:  # decodes every photo ten times over
            copy_part(data, repeated, times=10)
            found += results(f"{large:,} -> {many:,} rows at 32 px", [growth("ours", whole, repeated, 32)])
            found += results(f"{large:,} -> {many:,} rows at 32 px", [growth("train", whole, repeated, 32)], job="training")
    return found


@row("import")
def imports(data, quick):
    "Whole processes, the interpreter's own start included; the help is asked for as the console script does it"
    jobs = {"python -c pass": ("-c", "pass"),
            "import grocery_nb": ("-c", "import grocery_nb"),
            "grocery --help": ("-c", "import sys; from grocery_nb.cli import main; sys.exit(main())", "--help"),
            "import data_utils": ("-c", "import sys; sys.path.insert(0, 'course_baseline'); import data_utils"),
            "run_training.py --help": ("course_baseline/run_training.py", "--help")}
    asks_torch = "import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); "
    with tempfile.TemporaryDirectory() as bytecode:  # compiled once, as in an installed package, and left nowhere
        environment = {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}

        def seconds(job):
            start = time.perf_counter()
            python(*jobs[job], **environment)
            return time.perf_counter() - start

        for job in jobs: seconds(job)  # warm-up, and the bytecode
        figures = dict(zip(jobs, take_turns(3 if quick else 9, *[lambda job=job: seconds(job) for job in jobs])))
        no_torch = {job: python("-c", asks_torch + jobs[job][1], *jobs[job][2:], **environment).split()[-1] == "False"
                    for job in ("import grocery_nb", "grocery --help")}

    def result(ours, naive):
        f = figures[ours]
        return Result(f"{ours} (course: {naive})", "s", figures[naive], f, "< 0.3 s, no torch",
                      median(f) < 0.3 and no_torch[ours], paired_ratio(figures[naive], f))

    return [result("import grocery_nb", "import data_utils"), result("grocery --help", "run_training.py --help"),
            Result("of which the interpreter (python -c pass)", "s", [], figures["python -c pass"])]


@row("epoch")
def epoch(data, quick):
    "A training epoch on a tenth of the photos, loader included; every figure from a fresh process, after a warm-up epoch"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    with tempfile.TemporaryDirectory(prefix="grocery-bench-") as folder, fresh_cache():
        part = copy_part(data, Path(folder), every=10)

        def images_per_second(side, *launcher, **environment):
            return float(python(*launcher, "probe_training.py", "epoch", side, str(part), GROCERY_DATA_DIR=str(part), **environment))

        images_per_second("ours")  # the pixel cache
        one, ours, two = take_turns(1 if quick else 5, lambda: images_per_second("course"), lambda: images_per_second("ours"),
                                    lambda: images_per_second("ours", *torchrun, OMP_NUM_THREADS="1"))

    def result(what, figures):
        ratio = paired_ratio(figures, one)
        return Result(f"training epoch, mobilenet_v3_small, 224 px, {what}", "images/s", one, figures, ">= 2.5x", ratio >= 2.5, ratio)

    return [result("one process", ours), result("torchrun with two processes of one thread", two)]


@row("reach")
def reach(data, quick):
    "From the open data set, with empty caches, to 75% coarse validation accuracy; EfficientNet-Lite0's ImageNet weights on both sides"
    def seconds(side):
        with fresh_cache(): return float(python("probe_training.py", "reach", side, str(data), GROCERY_DATA_DIR=str(data)))

    one, ours = take_turns(1 if quick else 2, lambda: seconds("course"), lambda: seconds("ours"))
    ratio = paired_ratio(one, ours)
    return [Result("time to 75% coarse accuracy, pretrained weights", "s", one, ours, ">= 5x", ratio >= 5, ratio)]


@row("kill")
def kill(data, quick):
    "`kill -9` of a small training at random moments, resumed with 0 or 1 workers; on a very small Mini Grocery"
    sys.path.insert(0, str(ROOT / "tests"))
    from grocery_nb.synthetic import make_dataset
    from killed import torture

    with tempfile.TemporaryDirectory(prefix="grocery-bench-") as folder, fresh_cache():
        found = torture(make_dataset(Path(folder) / "mini", train=3, val=2, test=1, size=64), Path(folder), kills=10 if quick else 100)
    print(f"kill: {found}", file=sys.stderr)
    return [Result(f"kill -9 at {found['kills']} moments: other weights or a torn checkpoint", "times", [], [0.0 if found["identical"] else 1.0],
                   "0", found["identical"])]


@row("serve")
def serve(data, quick):
    """`POST /predict` of both servers, 32 clients, the same weights; and beside it the tight loop, which no server can beat.

    Everything shares this machine: the load comes from wrk where it is installed, which takes less of the cores than Python. Servers
    are started once and take turns; an idle one costs nothing. The course's runs twice, with torch's own number of threads and with one,
    and the better counts: beside other busy processes torch's threads wait for each other in a busy loop.
    """
    import serving

    photos, seconds, wrk = serving.some_photos(data), 3 if quick else 10, ["--wrk"] if shutil.which("wrk") else []
    with tempfile.TemporaryDirectory(prefix="grocery-bench-") as folder:
        model = serving.make_models(data, Path(folder))
        with (serving.course_server(data, folder) as (theirs, _), serving.course_server(data, folder, OMP_NUM_THREADS="1") as (theirs1, _),
              serving.our_server(data, model) as (ours, _)):
            def saturated(url):
                return serving.only_good(serving.load(url, photos, "--clients", 32, "--seconds", seconds, *wrk), url)["per_second"]
            for url in (theirs, theirs1, ours): serving.load(url, photos, "--clients", 8, "--seconds", 2)  # warm-up
            *both, bare, good = take_turns(1 if quick else 5, lambda: saturated(theirs), lambda: saturated(theirs1),
                                           lambda: serving.tight_processes(model, photos, seconds), lambda: saturated(ours))
            rate = 0.8 * median(good)
            def spread_at_80(*how):
                found = serving.load(ours, photos, "--rate", rate, "--seconds", 2 * seconds, *how)["status"]["200"]
                return found["p99"] / found["p50"]
            tail, even = take_turns(1 if quick else 3, spread_at_80, lambda: spread_at_80("--even"))
    naive = max(both, key=median)
    ratio, of_bare = paired_ratio(good, naive), paired_ratio(good, bare)
    return [Result("POST /predict, 32 clients, fp32 ONNX", "requests/s", naive, good, ">= 4x", ratio >= 4, ratio),
            Result("the same, beside Pillow + bare ONNX Runtime in a process a core", "pictures/s", bare, good, ">= 0.85x", of_bare >= 0.85, of_bare),
            Result(f"p99 over p50 at 80% load ({rate:.0f} requests/s, at random times)", "times", [], tail, "<= 2", median(tail) <= 2),
            Result(f"p99 over p50 at 80% load ({rate:.0f} requests/s, at equal times)", "times", [], even, "<= 2", median(even) <= 2)]


@row("overload")
def overload(data, quick):
    "Four times what our server can do, in an open loop; the load generator shares the machine, and a refusal costs something too"
    import serving

    photos, seconds = serving.some_photos(data), 3 if quick else 10
    with tempfile.TemporaryDirectory(prefix="grocery-bench-") as folder:
        model = serving.make_models(data, Path(folder))
        with serving.our_server(data, model) as (url, pid):
            def figures():
                calm = serving.only_good(serving.load(url, photos, "--clients", 32, "--seconds", seconds), url)
                before = serving.anonymous_mb(pid)
                wild = serving.load(url, photos, "--rate", 4 * calm["per_second"], "--seconds", seconds)
                return calm, wild, serving.anonymous_mb(pid) - before
            serving.load(url, photos, "--rate", 500, "--seconds", 3)  # warm-up: memory rises to what an overload needs
            (found,) = take_turns(1 if quick else 3, figures)
    at_saturation, accepted = [[run["status"]["200"]["p99"] for run in runs] for runs in (list(zip(*found))[0], list(zip(*found))[1])]
    refused = [wild["status"].get("429", {"count": 0, "p99": 0.0}) for _, wild, _ in found]
    other = sum(s["count"] for _, wild, _ in found for status, s in wild["status"].items() if status not in ("200", "429"))
    honest = all(wild["retry_after"] == r["count"] > 0 for (_, wild, _), r in zip(found, refused))
    ratio = paired_ratio(accepted, at_saturation)
    print(f"overload: answers a second {[round(wild['per_second']) for _, wild, _ in found]}, at saturation "
          f"{[round(calm['per_second']) for calm, _, _ in found]}; other statuses than 200 and 429: {other}", file=sys.stderr)
    growth = [mb for _, _, mb in found]
    return [Result("p99 of accepted at 4x saturation (left: at saturation, 32 clients)", "ms", at_saturation, accepted, "<= 2x", ratio <= 2, ratio),
            Result("p99 of the 429s, each with Retry-After", "ms", [], [r["p99"] for r in refused], "< 50 ms",
                   honest and not other and max(r["p99"] for r in refused) < 50),
            Result("growth of anonymous memory during the overload", "MB", [], growth, "flat: < 10 MB", median(growth) < 10)]


# --- the machine, the data, the report --------------------------------------------------------------------------------

def machine():
    import PIL
    import torch
    import torchvision

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    described = {"cpu": model, "system": platform.platform(),
                 "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                 "torch_threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(),
                 "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
                 "pillow": PIL.__version__}
    if hasattr(os, "sysconf"):
        described["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        described["load_before"] = round(os.getloadavg()[0], 2)
    return described


def commit():
    "The checkout that was measured; '+changes' when files other than the report differ from it"
    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
    if not shutil.which("git"): return "unknown"
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results.json", ":!benchmarks/README.md")
    return (git("rev-parse", "--short=12", "--verify", "--quiet", "HEAD") or "none") + ("+changes" if changed else "")


def find_data(folder):
    "The folder given, else GROCERY_DATA_DIR, else the real photos beside this checkout, else Mini Grocery"
    beside = ROOT.parent / "shared" / "data" / "grocery-store"
    folder = folder or os.environ.get("GROCERY_DATA_DIR") or (beside if beside.exists() else None)
    if folder is None:
        from grocery_nb.synthetic import mini_dir
        return mini_dir(), "Mini Grocery (drawn)"
    data = Path(folder).expanduser().resolve()
    for name in ("train.txt", "val.txt", "classes.csv"):
        if not (data / name).is_file():
            raise BadInput(f"The data folder {data} has no {name}; give one with the layout of the Grocery Store data set")
    drawn = (data / "manifest.json").exists()  # Mini Grocery says in it what was drawn; the real photos have none
    return data, "Mini Grocery (drawn)" if drawn else "photos"


def spread(figures, digits=3):
    "The median, and the lowest and highest repetition"
    if not figures: return "-"
    show = [f"{f:.{digits}g}" if abs(f) < 1000 else f"{f:,.0f}" for f in (median(figures), min(figures), max(figures))]
    return show[0] if len(figures) == 1 else f"{show[0]} ({show[1]} to {show[2]})"


def table(results):
    lines = [[r.what, r.unit, spread(r.course), spread(r.ours), f"{r.ratio:.1f}x" if r.ratio else "-", r.target or "-", r.verdict]
             for r in results]
    return tabulate(lines, ["what", "unit", "course", "ours", "ratio", "target", "verdict"], disable_numparse=True)


def report(results, about):
    "JSON with a line a row, so that a new run shows as changed lines; four digits are more than the spread allows"
    def short(value):
        if isinstance(value, list): return [short(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value
    rows = [{k: short(v) for k, v in (asdict(r) | {"verdict": r.verdict}).items() if k != "met"} for r in results]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    lines.append(' "rows": [\n' + ",\n".join("  " + json.dumps(r) for r in rows) + "\n ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main():
    parser = argparse.ArgumentParser(description="The course's scripts and grocery_nb, side by side.")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, with commas between (default: %(default)s)")
    parser.add_argument("--data", help="data folder (default: GROCERY_DATA_DIR, else ../shared/data/grocery-store, "
                                       "else Mini Grocery)")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: to see that it runs, not to quote")
    parser.add_argument("--out", type=Path, help="where to write the report (default: benchmarks/results.json, "
                                                 "only when all rows are run in full)")
    args = parser.parse_args()
    names = args.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown: raise BadInput(f"There is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    data, kind = find_data(args.data)
    os.environ["GROCERY_DATA_DIR"] = str(data)  # where the course's scripts look
    about = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit(),
             "data": f"{kind}: {data.name}, {count_rows(data, 'train')} train and {count_rows(data, 'val')} val",
             "quick": args.quick, "machine": machine()}
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    if about["machine"].get("load_before", 0) > 0.5:
        print("Other programs are at work on this machine: do not quote these figures", file=sys.stderr)
    results = []
    for name in names:
        print(f"measuring: {name} ...", file=sys.stderr)
        results += ROWS[name](data, args.quick)
    print("\n" + table(results))
    out = args.out or (HERE / "results.json" if set(names) == set(ROWS) and not args.quick else None)
    if out:
        out.write_text(report(results, about))
        print(f"\nwritten: {out}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # measure the checkout that this file lies in, installed or not
    from grocery_nb.core import GroceryError

    from serving import ServingError

    try: main()
    except (BadInput, GroceryError, ServingError) as e:
        print(e, file=sys.stderr)
        sys.exit(2)
