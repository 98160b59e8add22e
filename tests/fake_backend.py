"A backend that speaks the HTTP interface of `grocery_nb.backend` without a model, and fails on demand: every state of the page at will."
import threading
import time
from functools import lru_cache
from itertools import cycle

import uvicorn
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, Response

from grocery_nb.synthetic import COARSE_OF, FINE_ID, MINI_CLASSES, jpeg

CLASSES = [kind.name for kind in MINI_CLASSES]
VERSION = "1a2b3c4d5e6f"
MESSAGES = {"overloaded": (429, "64 pictures are waiting already, which is all that this backend keeps."),
            "loading": (503, "The model is being loaded."), "draining": (503, "This backend is stopping and takes no more pictures."),
            "deadline": (504, "The picture was not looked at within 2000 ms."), "internal": (500, "Something went wrong in the backend."),
            "too_large": (413, "The upload is larger than 10,485,760 bytes, the most that is taken.")}
CARD = {"classes": CLASSES, "label": "fine", "coarse": None, "temperature": 1.3, "threshold": 0.5, "backbone": "mobilenet_v3_small",
        "preprocessing": {}, "data": "Mini Grocery", "data_digest": "0" * 64, "metrics": {"accuracy": 0.912}, "created": "2026-11-21T09:00:00Z",
        "weights_sha256": "0" * 64, "format": 1}


# What the pictures show, and what it would be taken for otherwise
SHOWN = (("Granny-Smith", "Lime", "Anjou", "Green-Bell-Pepper", "Avocado"), ("Banana", "Lemon", "Golden-Delicious", "Sweet-Potato", "Kiwi"),
         ("Watermelon", "Cucumber", "Zucchini", "Honeydew-Melon", "Avocado"), ("Orange", "Satsumas", "Cantaloupe", "Yellow-Onion", "Lemon"),
         ("Arla-Medium-Fat-Milk", "Arla-Standard-Milk", "Arla-Natural-Yoghurt", "Bravo-Apple-Juice", "Aubergine"),
         ("Orange-Bell-Pepper", "Yellow-Bell-Pepper", "Red-Bell-Pepper", "Carrots", "Orange"))


@lru_cache
def pictures(size: int = 160) -> tuple:
    "Six different pictures of Mini Grocery, as SHOWN says"
    return tuple(jpeg(FINE_ID[names[0]], 11, size) for names in SHOWN)


def is_picture(data: bytes) -> bool:
    return data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n" or data[8:12] == b"WEBP" or data[:2] in (b"BM", b"II", b"MM")


class FakeBackend:
    "Runs in a thread on a free port; `mode` is None or a key of MESSAGES, `unsure`, `seconds` and `ready` change its mood"
    def __init__(self):
        self.mode, self.unsure, self.seconds, self.ready, self.flags, self.asked, self.port = None, False, 0, "ready", [], [], 0
        self.served = cycle(pictures())
        self.app = FastAPI()
        for method, path, function in (("GET", "/class-names", self.class_names), ("GET", "/random-image", self.random_image),
                                       ("GET", "/readyz", self.readyz), ("GET", "/model", self.model),
                                       ("POST", "/predict", self.predict), ("POST", "/flag", self.flag)):
            self.app.add_api_route(path, function, methods=[method], response_model=None)

    @property
    def url(self) -> str: return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started: time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def stop(self):
        self.server.should_exit = True
        self.thread.join()

    def error(self, code: str, status: int = 0, message: str = "") -> JSONResponse:
        wait = {"Retry-After": "3"} if code in ("overloaded", "loading", "draining") else {}
        known_status, known_message = MESSAGES.get(code, (status, message))
        body = {"code": code, "message": message or known_message, "request_id": "test"}
        return JSONResponse({"error": body}, status or known_status, headers=wait)

    def class_names(self): return {"classes": CLASSES}

    def random_image(self):
        return Response(next(self.served), media_type="image/jpeg")

    def readyz(self): return {"status": "ready"} if self.ready == "ready" else self.error(self.ready)

    def model(self): return {"version": VERSION, "engine": "onnx", "file": "model.onnx", "card": CARD}

    def predict(self, request: Request, file: UploadFile = File(...), top_k: int = 5):
        data = file.file.read()
        self.asked.append(len(data))
        time.sleep(self.seconds)
        if self.mode: return self.error(self.mode)
        if not data: return self.error("empty", 400, "The upload is empty.")
        if not is_picture(data): return self.error("not_an_image", 400, "The upload is no picture that can be read.")
        best = 0.34 if self.unsure else 0.83
        names = SHOWN[pictures().index(data) if data in pictures() else 0]
        shares = [best, *((1 - best) * share for share in (0.5, 0.3, 0.15, 0.03))]
        answer = {"prediction": names[0], "probability": best, "unsure": self.unsure, "model": VERSION,
                  "top_k": [{"class": name, "probability": p} for name, p in zip(names[:top_k], shares, strict=False)],
                  "coarse": {"prediction": COARSE_OF.get(names[0], names[0]), "probability": min(0.99, best + 0.08)}}
        return JSONResponse(answer, headers={"Server-Timing": "decode;dur=2.2, queue;dur=0.6, model;dur=11.8", "X-Model-Version": VERSION})

    def flag(self, file: UploadFile = File(...), label: str = Form(), prediction: str = Form("")):
        if label not in CLASSES: return self.error("unknown_label", 422, f"The model knows no class {label!r}.")
        self.flags.append((len(file.file.read()), label, prediction))
        return JSONResponse({"stored": f"{len(self.flags):04d}.jpg", "label": label}, 201)
