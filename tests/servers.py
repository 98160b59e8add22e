"""What the tests of serving share: a model, a real uvicorn in a process of its own, and clients that come all at once."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import httpx

CLASSES = ["Apple", "Banana", "Kiwi", "Leek", "Milk"]
SERVE = """
import os, sys, threading, time
def orphan(parent):
    while os.getppid() == parent: time.sleep(1)
    os._exit(9)  # the tests were killed: nobody else would stop this server
threading.Thread(target=orphan, args=[os.getppid()], daemon=True).start()
if {block!r}: sys.modules[{block!r}] = None  # an import of it fails
from grocery_nb.backend import serve
from grocery_nb.core import GroceryError
try: serve()
except GroceryError as e: sys.exit(f"grocery: {{e}}")
"""


def make_models(folder: Path, names=CLASSES) -> Path:
    "model.pth and model.onnx, with random weights; the folder"
    import torch

    from grocery_nb.edge import export_onnx
    from grocery_nb.model_utils import create_model, load_model, save_model
    torch.manual_seed(len(names))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two threads wait for each other much longer than they compute
    try:
        save_model(create_model(len(names), weights=None), folder / "model.pth", classes=list(names), label="coarse")
        export_onnx(load_model(None, folder / "model.pth"), folder / "model.onnx")
    finally: torch.set_num_threads(threads)
    return folder


def renamed(source: Path, target: Path, names: list) -> Path:
    "The same network in a file of its own, with other class names: another version, without a second export"
    from dataclasses import replace

    import onnx

    from grocery_nb.edge import OnnxPredictor
    from grocery_nb.serving.sealed import seal
    model = onnx.load(source)
    del model.metadata_props[:]
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(seal(model.SerializeToString(), replace(OnnxPredictor(source).card, classes=names)))
    return target


def photo(seed: int = 0, kind: str = "JPEG", size: tuple = (120, 90)) -> bytes:
    "A small picture, another one for each seed"
    import numpy as np
    from PIL import Image
    buffer = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(buffer, kind)
    return buffer.getvalue()


class Server:
    "A backend in a process of its own, on a free port; its log is a file"

    def __init__(self, folder: Path, block: str = "", **environment):
        self.log = Path(folder) / f"log-{time.monotonic_ns()}.jsonl"
        kept = {name: value for name, value in os.environ.items() if name not in ("HOST", "DATA", "MODEL_PATH", "PREDICTOR")}
        chosen = {"PORT": "0", "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", SERVE.format(block=block)], stderr=log, cwd=folder, env={**kept, **chosen})

    def lines(self) -> list:
        "The log so far: a dictionary a line; what is no JSON as text"
        found = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try: found.append(json.loads(line))
            except ValueError: found.append(line)
        return found

    def client(self, **options) -> httpx.Client:
        "A client whose addresses begin at the server; waits until it listens"
        return httpx.Client(base_url=self.url, timeout=60, **options)

    @property
    def url(self) -> str:
        return self.wait(lambda: next((line["url"] for line in self.lines() if isinstance(line, dict) and line["event"] == "listening"), None))

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait(self, ask, seconds: float = 120):
        "Ask until the answer is true"
        limit = time.monotonic() + seconds
        while not (answer := ask()):
            assert self.process.poll() is None and time.monotonic() < limit, f"the server did not come up:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        return answer

    def ready(self) -> "Server":
        "Wait for /readyz"
        def asked():
            try: return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            except httpx.TransportError: return False
        self.wait(asked)
        return self

    def stop(self, sig: int = signal.SIGTERM) -> int:
        "Send a signal unless it has ended, and wait; the exit code"
        if self.process.poll() is None: self.process.send_signal(sig)
        try: return self.process.wait(timeout=60)
        finally: self.process.kill()


@contextmanager
def running(folder: Path, **environment):
    "A server that is ready, for the length of a block"
    server = Server(folder, **environment)
    try: yield server.ready()
    finally: server.stop()


def at_once(count: int, work) -> list:
    "Call work(0), work(1), ... in threads that start together; their results, exceptions included"
    results, gate = [None] * count, threading.Barrier(count)

    def one(number):
        gate.wait()
        try: results[number] = work(number)
        except Exception as e: results[number] = e
    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return results
