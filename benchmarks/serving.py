"""Servers under load, and what they are compared with. run.py's rows `serve` and `overload` use this module.

Some of it needs a fresh process, which run.py starts as a command:

    serving.py models DATA FOLDER             FOLDER/model.pth and FOLDER/model.pth.onnx: one mobilenet_v3_small of the coarse classes
    serving.py tight MODEL SECONDS PHOTO...   pictures a second of one tight loop: Pillow, NumPy, bare ONNX Runtime with one thread
"""
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = "from grocery_nb.backend import serve; serve()"


class ServingError(ValueError):
    "A server cannot be measured; the text says why in one sentence"


# --- in processes of their own ----------------------------------------------------------------------------------------

def models(data, folder):
    "Weights for both sides: the course reads model.pth, ours reads model.pth.onnx. They are random, which changes no time"
    sys.path.insert(0, str(HERE / "course_baseline"))
    import torch
    from data_utils import get_classes
    from grocery_nb.edge import export_file
    from grocery_nb.model_utils import create_model, save_model

    classes = [name for _, name in sorted(get_classes().items())]
    torch.manual_seed(0)
    save_model(create_model(len(classes), weights=None), folder / "model.pth", classes=classes, label="coarse")
    export_file(folder / "model.pth")


def tight(model, seconds, photos):
    "Nothing but what must be done for a picture; the course's and our server do this, and HTTP besides"
    import io

    from grocery_nb.edge import OnnxPredictor
    from PIL import Image

    predictor, uploads = OnnxPredictor(model, threads=1), [photo.read_bytes() for photo in photos]
    session, count, start = predictor.session, 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        image = Image.open(io.BytesIO(uploads[count % len(uploads)])).convert("RGB")
        session.run(["logits"], {"images": predictor.preprocess(image)[None]})[0].argmax()
        count += 1
    return count / (time.perf_counter() - start)


# --- what run.py calls --------------------------------------------------------------------------------------------------

def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def python(*arguments, **more):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=HERE, env=environment(**more))
    if done.returncode: raise ServingError(f"`python {' '.join(map(str, arguments[:3]))} ...` failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def make_models(data, folder):
    python("serving.py", "models", data, folder, GROCERY_DATA_DIR=str(data))
    return folder / "model.pth.onnx"


def some_photos(data, count=16):
    "Photos all over the validation split"
    rows = [line.split(",")[0].strip() for line in (data / "val.txt").read_text().splitlines()]
    return [data / row for row in rows[::max(1, len(rows) // count)][:count]]


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def tight_processes(model, photos, seconds):
    "The sum over one process a core, all at once"
    command = [sys.executable, HERE / "serving.py", "tight", model, str(seconds), *photos]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(OMP_NUM_THREADS="1")) for _ in range(cores())]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes): raise ServingError("`serving.py tight` failed; run it by hand to see why")
    return sum(map(float, outputs))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=1) as response: return response.status == 200
    except OSError: return False


@contextlib.contextmanager
def server(ready, *command, cwd=HERE, seconds=120, **more):
    "Start a server, whose command or environment has `{port}` in it; yields (url, process id) when `ready` answers, and ends it afterwards"
    port = str(free_port())
    command, more = [part.replace("{port}", port) for part in command], {k: v.replace("{port}", port) for k, v in more.items()}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment(**more), stdout=log, stderr=log)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
            while not answers(url + ready):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    last = (log.read().decode(errors="replace").strip().splitlines() or ["no word"])[-1]
                    raise ServingError(f"The server `{' '.join(command)[:80]}` does not answer: {last}")
                time.sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            try: process.wait(30)
            except subprocess.TimeoutExpired: process.kill()


def course_server(data, folder, **more):
    return server("/class-names", "-m", "uvicorn", "--app-dir", str(HERE / "course_baseline"), "backend:app", "--port", "{port}",
                  "--log-level", "warning", cwd=folder, GROCERY_DATA_DIR=str(data), **more)


def our_server(data, model, **settings):
    "With the settings it is shipped with"
    return server("/readyz", "-c", OURS, MODEL_PATH=str(model), DATA=str(data), HOST="127.0.0.1", PORT="{port}", **settings)


def load(url, photos, *options):
    "One run of load.py, in a process of its own"
    return json.loads(python("load.py", url + "/predict", *photos, *map(str, options)))


def only_good(found, what):
    "A throughput of refusals would be no throughput"
    bad = found["sent"] - found["status"].get("200", {"count": 0})["count"]
    if bad: raise ServingError(f"{what}: {bad} of {found['sent']} requests were not answered with 200: {found['status']}")
    if not found["sent"]: raise ServingError(f"{what} answered nothing in {found['seconds']:.0f} s; is the machine busy with something else?")
    return found


def anonymous_mb(pid):
    "What a process holds itself, without pages of mapped files (Linux)"
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "models": models(Path(sys.argv[2]), Path(sys.argv[3]))
    else: print(tight(Path(sys.argv[2]), float(sys.argv[3]), list(map(Path, sys.argv[4:]))))
