"""The backend over real HTTP, with both engines: its interface, its errors, and what it does when it is overrun, replaced or stopped"""
import csv
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import hostile
import httpx
import psutil
import pytest
from PIL import Image
from servers import CLASSES, Server, at_once, photo, renamed, running

TOKEN = "a token for tests"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="session")
def servers(models, tiny, tmp_path_factory):
    "Both engines, started side by side; torch cannot be imported where ONNX Runtime serves"
    home, started = tmp_path_factory.mktemp("servers"), {}
    for engine, suffix in (("onnx", ".onnx"), ("torch", ".pth")):
        started[engine] = Server(home, block="torch" if engine == "onnx" else "", MODEL_PATH=models / f"model{suffix}", DATA=tiny,
                                 FLAG_DIR=home / f"flags-{engine}", ADMIN_TOKEN=TOKEN)
    try: yield {engine: server.ready() for engine, server in started.items()}
    finally:
        for server in started.values(): server.stop()


@pytest.fixture(params=["onnx", "torch"])
def server(request, servers) -> Server:
    return servers[request.param]


@pytest.fixture
def client(server):
    with server.client() as client: yield client


def error(reply: httpx.Response, status: int, code: str) -> dict:
    "Check that an answer is an error in the one shape"
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json" and set(reply.json()) == {"error"}
    found = reply.json()["error"]
    assert set(found) == {"code", "message", "request_id"} and found["code"] == code
    assert found["message"] and "Traceback" not in found["message"] and found["request_id"] == reply.headers["x-request-id"]
    return found


def test_predict(client, server):
    reply = client.post("/predict", files={"file": photo()}, params={"top_k": 3}, headers={"X-Request-ID": "till-7"})
    assert reply.status_code == 200
    found = reply.json()
    assert set(found) == {"prediction", "probability", "unsure", "top_k", "coarse", "model"}
    assert [entry["class"] for entry in found["top_k"]][0] == found["prediction"] and len(found["top_k"]) == 3
    assert found["top_k"][0]["probability"] == found["probability"] and found["unsure"] in (True, False)
    assert reply.headers["x-request-id"] == "till-7" and reply.headers["x-model-version"] == found["model"]
    assert re.fullmatch(r"decode;dur=[\d.]+, queue;dur=[\d.]+, model;dur=[\d.]+", reply.headers["server-timing"])
    line = server.wait(lambda: next((line for line in server.lines() if line.get("request_id") == "till-7"), None))
    assert line["status"] == 200 and line["route"] == "/predict"


def test_engines_agree(servers):
    answers = [httpx.post(f"{server.url}/predict", files={"file": photo(3)}).json() for server in servers.values()]
    assert answers[0]["prediction"] == answers[1]["prediction"] and answers[0]["model"] != answers[1]["model"]
    assert answers[0]["probability"] == pytest.approx(answers[1]["probability"], abs=1e-4)


def test_top_k_is_cut_to_the_classes(client):
    assert len(client.post("/predict", files={"file": photo()}, params={"top_k": 100}).json()["top_k"]) == len(CLASSES)


def test_batch(client):
    files = [("files", ("a.jpg", photo(1))), ("files", ("b.txt", b"hello")), ("files", ("c.png", photo(2, "PNG")))]
    reply = client.post("/predict-batch", files=files, params={"top_k": 1})
    assert reply.status_code == 200
    entries = reply.json()["predictions"]
    assert [entry["filename"] for entry in entries] == ["a.jpg", "b.txt", "c.png"]
    assert [entry["result"] is None for entry in entries] == [False, True, False] and entries[1]["error"]["code"] == "not_an_image"
    assert entries[0]["result"] == client.post("/predict", files={"file": photo(1)}, params={"top_k": 1}).json() | {
        "probability": pytest.approx(entries[0]["result"]["probability"], abs=1e-5), "top_k": entries[0]["result"]["top_k"]}


def test_batch_size(client):
    assert client.post("/predict-batch", files=[("files", photo())] * 16).status_code == 200
    error(client.post("/predict-batch", files=[("files", photo())] * 17), 422, "invalid_request")
    error(client.post("/predict-batch"), 422, "invalid_request")


def test_class_names_and_model(client, server):
    assert client.get("/class-names").json() == {"classes": CLASSES}
    found = client.get("/model").json()
    assert set(found) == {"version", "engine", "file", "card"} and found["card"]["classes"] == CLASSES
    assert re.fullmatch("[0-9a-f]{12}", found["version"]) and found["file"].startswith("model.")


def test_random_image(client, tiny):
    reply = client.get("/random-image")
    assert reply.status_code == 200 and reply.headers["content-type"] == "image/jpeg"
    assert Image.open(BytesIO(reply.content)).size == (64, 64)
    assert reply.content in {path.read_bytes() for path in (tiny / "val").rglob("*.jpg")}


def test_health_and_metrics(client):
    assert client.get("/livez").json() == {"status": "alive"} and client.get("/readyz").json() == {"status": "ready"}
    before = client.get("/metrics").text
    client.post("/predict", files={"file": photo()})
    after = client.get("/metrics").text
    counted = [float(re.search(r'grocery_requests_total\{route="/predict",status="200"\} ([\d.]+)', text + 'grocery_requests_total{route="/predict",status="200"} 0')[1])
               for text in (before, after)]
    assert counted[1] == counted[0] + 1
    for name in ("grocery_request_seconds_bucket", "grocery_queue_depth 0.0", "grocery_in_flight 0.0", "grocery_batch_size_sum", "grocery_model_info"):
        assert name in after


def test_flag(client, server):
    picture, folder = photo(9), Path(server.log).parent / ("flags-onnx" if client.get("/model").json()["engine"] == "onnx" else "flags-torch")
    reply = client.post("/flag", files={"file": ("../../../etc/kiwi.jpg", picture)}, data={"label": "Kiwi", "prediction": "Leek"})
    assert reply.status_code == 201 and set(reply.json()) == {"stored", "label"}
    assert (folder / reply.json()["stored"]).read_bytes() == picture
    with open(folder / "flags.csv", newline="") as file: row = list(csv.DictReader(file))[-1]
    assert (row["label"], row["prediction"], row["file"]) == ("Kiwi", "Leek", reply.json()["stored"])
    error(client.post("/flag", files={"file": picture}, data={"label": "=cmd|' /C calc'!A0"}), 422, "unknown_label")
    error(client.post("/flag", files={"file": picture}, data={"label": "Kiwi", "prediction": "+1"}), 422, "unknown_label")
    error(client.post("/flag", files={"file": b"hello"}, data={"label": "Kiwi"}), 400, "not_an_image")
    error(client.post("/flag", files={"file": picture}), 422, "invalid_request")


def test_framework_errors(client):
    error(client.get("/nowhere"), 404, "not_found")
    error(client.get("/predict/"), 404, "not_found")
    assert error(client.put("/predict"), 405, "method_not_allowed") and client.put("/predict").headers["allow"] == "POST"
    assert client.delete("/model").headers["allow"] == "GET, POST"
    error(client.post("/predict"), 422, "invalid_request")
    error(client.post("/predict", data={"file": "a text"}), 422, "invalid_request")
    error(client.post("/predict", files={"file": photo()}, params={"top_k": 0}), 422, "invalid_request")
    error(client.post("/predict", content=b"--x", headers={"Content-Type": "multipart/form-data"}), 422, "invalid_request")
    error(client.post("/predict", files={"file": photo()}, headers={"X-Deadline-Ms": "soon"}), 422, "invalid_request")


def test_request_id_is_not_taken_at_any_price(client):
    for bad in ("a b", "x" * 65, "a;b", "{}", "é"):
        assert re.fullmatch("[0-9a-f]{16}", client.get("/livez", headers={"X-Request-ID": bad.encode()}).headers["x-request-id"])


def test_too_large(client):
    error(client.post("/predict", files={"file": bytes(11 << 20)}), 413, "too_large")
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'

    def chunks():
        yield head
        for _ in range(14): yield bytes(1 << 20)
    reply = client.post("/predict", content=chunks(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    error(reply, 413, "too_large")
    error(client.request("GET", "/livez", content=bytes(11 << 20)), 413, "too_large")
    assert client.post("/predict", files={"file": photo()}).status_code == 200


def test_logs_hold_no_contents(client, server):
    client.post("/predict", files={"file": ("diagnosis_of_jan.jpg", photo())})
    client.post("/predict", files={"file": ("diagnosis_of_jan.jpg", b"secret words")})
    time.sleep(0.1)
    text = server.log.read_text()
    assert "diagnosis" not in text and "secret words" not in text and TOKEN not in text
    assert all(isinstance(line, dict) for line in server.lines())


@pytest.fixture(scope="module")
def uploads() -> dict:
    return hostile.kinds()


class memory_watched:
    "Looks at a server's memory for the length of a `with` block; calling it gives the highest rise in bytes, `now()` the present one"
    def __init__(self, server):
        self.process, self.stop, self.highest = psutil.Process(server.process.pid), threading.Event(), 0
        self.before, self.thread = self.process.memory_info().rss, threading.Thread(target=self.watch)

    def now(self): return self.process.memory_info().rss - self.before

    def watch(self):
        while not self.stop.wait(0.005): self.highest = max(self.highest, self.now())

    def __call__(self): return self.highest

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


def test_hostile_uploads(server, client, uploads):
    assert len(uploads) >= 40
    client.post("/predict", files={"file": photo()})
    with memory_watched(server) as rise:
        replies = {name: client.post("/predict", files={"file": data}) for name, data in uploads.items()}
    assert {name: reply.status_code for name, reply in replies.items() if not 400 <= reply.status_code < 500} == {}
    for reply in replies.values(): error(reply, reply.status_code, reply.json()["error"]["code"])
    assert rise() <= 100 << 20, f"memory rose by {rise() >> 20} MB"


def test_odd_but_good_uploads(client):
    refused = {}
    for name, good in hostile.odd_but_good().items():
        reply = client.post("/predict", files={"file": good[0] if isinstance(good, tuple) else good})
        if reply.status_code != 200: refused[name] = reply.text
    assert refused == {}


def test_the_fast_lane_says_what_the_framework_says(servers, uploads):
    "A parameter, even the default, makes a request take the long way through FastAPI: nobody may notice a difference"
    def told(reply): return reply.status_code, {**reply.json(), "error": {**reply.json().get("error", {}), "request_id": ""}}
    odd = {name: good[0] if isinstance(good, tuple) else good for name, good in hostile.odd_but_good().items()}
    with servers["onnx"].client() as client:
        for name, data in (uploads | odd | {"photo": photo()}).items():
            ways = [told(client.post("/predict", files={"file": (name, data)}, params=params)) for params in ({}, {"top_k": 5})]
            if ways[0] != ways[1]: raise AssertionError((name, *ways))


def part(name="file", filename='; filename="a.jpg"', more="", boundary="X", contents="PHOTO") -> bytes:
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n{more}\r\n{contents}\r\n'.encode()


MULTIPART, END = "multipart/form-data; boundary=X", b"--X--\r\n"
FORMS = {  # name: (Content-Type, body)
    "curl": (MULTIPART, part(more="Content-Type: image/jpeg\r\n") + END),
    "type first": (MULTIPART, b"--X\r\nContent-Type: image/jpeg" + part()[3:] + END),
    "preamble": (MULTIPART, b"hello\r\n" + part() + END),
    "quoted boundary": ('multipart/form-data; boundary="X"', part() + b"--X--"),
    "two files": (MULTIPART, part(contents="hello") + part() + END),
    "boundary as a beginning": (MULTIPART, part() + b"--XY\r\n" + END),
    "a text": (MULTIPART, part(filename="") + END),
    "other name": (MULTIPART, part("photo") + END),
    "no end": (MULTIPART, part()[:-2]),
    "more behind": (MULTIPART, part() + END + b"more"),
    "other boundary": ("multipart/form-data; boundary=Y", part() + END),
    "no boundary": ("multipart/form-data", part() + END),
    "bare lines": (MULTIPART, (part() + END).replace(b"\r\n", b"\n")),
    "no form": ("image/jpeg", b"PHOTO"), "urlencoded": ("application/x-www-form-urlencoded", b"file=PHOTO"), "nothing": ("", b""),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_in_every_style(servers, name):
    "The lane takes the plain ones only, and what it does not take must arrive behind it whole"
    kind, body = FORMS[name]
    with servers["onnx"].client() as client:
        ways = [client.post("/predict", content=body.replace(b"PHOTO", photo()), headers={"Content-Type": kind}, params=params) for params in ({}, {"top_k": 5})]
    short, long = [(way.status_code, way.json().get("top_k"), way.json().get("error", {}).get("message")) for way in ways]
    assert short == long and short[0] < 500
    if name in ("curl", "quoted boundary", "type first"): assert short[0] == 200
    if name in ("a text", "other name", "no end", "other boundary", "no boundary", "no form", "urlencoded", "nothing"): assert short[0] == 422


def test_heavy_pictures_one_at_a_time(models, tmp_path):
    "Seventy kilobytes that unpack to 100 MB, a dozen at once: no more are in memory than may be, light ones pass, and the memory comes back"
    bomb = BytesIO()
    Image.new("RGB", (5000, 4990)).save(bomb, "PNG")
    with running(tmp_path, MODEL_PATH=models / "model.onnx", DECODERS=1, DEADLINE_MS=50_000, block="torch") as server, server.client() as client:
        assert client.post("/predict", files={"file": bomb.getvalue()}).status_code == 200
        ends = {}

        def send(number):
            reply = client.post("/predict", files={"file": bomb.getvalue() if number else photo()})
            ends[number] = time.monotonic()
            return reply.status_code
        with memory_watched(server) as rise: assert set(at_once(12, send)) == {200}
        assert ends[0] < sorted(ends.values())[6], "the light picture waited for most of the heavy ones"
        assert rise() <= 150 << 20, f"memory rose by {rise() >> 20} MB"
        server.wait(lambda: rise.now() <= 50 << 20)


def test_model_needs_the_token(client):
    error(client.post("/model", json={"path": "model.onnx"}), 401, "unauthorized")
    error(client.post("/model", json={"path": "model.onnx"}, headers={"Authorization": "Bearer wrong"}), 401, "unauthorized")
    for path in ("../secret.onnx", "/etc/passwd", "a\0b"):
        error(client.post("/model", json={"path": path}, headers=ADMIN), 403, "forbidden")
    error(client.post("/model", json={"path": ""}, headers=ADMIN), 422, "invalid_request")
    error(client.post("/model", content=b"{", headers=ADMIN | {"Content-Type": "application/json"}), 422, "invalid_request")


def test_broken_model_leaves_the_old_one(models, client):
    before = client.get("/model").json()
    (models / "broken.onnx").write_bytes((models / "model.onnx").read_bytes()[:-1])
    (models / "words.onnx").write_bytes(b"not a model")
    for name in ("broken.onnx", "words.onnx", "absent.onnx"):
        assert name in error(client.post("/model", json={"path": name}, headers=ADMIN), 422, "invalid_request")["message"]
    assert client.get("/model").json() == before and client.post("/predict", files={"file": photo()}).status_code == 200


def test_swap_under_load(servers, models, tmp_path):
    server = servers["onnx"]
    renamed(models / "model.onnx", models / "other" / "model.onnx", [name.upper() for name in CLASSES])
    with server.client() as client:
        wanted = {client.get("/model").json()["version"]}
        statuses, versions, stop = [], set(), threading.Event()

        def load(number):
            while not stop.is_set():
                reply = client.post("/predict", files={"file": photo(number)}, params={"top_k": 100})
                statuses.append(reply.status_code)
                versions.add((reply.json().get("model"), all(entry["class"].isupper() for entry in reply.json().get("top_k", []))))

        def swap(number):
            try: return [client.post("/model", json={"path": name}, headers=ADMIN).status_code
                         for name in ("other/model.onnx", "broken.onnx", "model.onnx") * 3]
            finally:
                if number == 1: stop.set()
        results = at_once(8, lambda number: swap(number) if number < 2 else load(number))
        assert set(results[0]) == {200, 422} and set(statuses) == {200}, (results, set(statuses))
        client.post("/model", json={"path": "model.onnx"}, headers=ADMIN)
        assert len(versions) == 2 and wanted < {version for version, _ in versions}  # names never from one model and version from the other
        assert client.get("/model").json()["version"] in wanted


@pytest.fixture
def small(models, tmp_path):
    "A server that is soon full, and whose deadline is near"
    with running(tmp_path, MODEL_PATH=models / "model.onnx", QUEUE_LIMIT=4, DEADLINE_MS=1500, DECODERS=1, THREADS=1, DATA=tmp_path / "nowhere",
                 FLAG_DIR=tmp_path / "flags", FLAG_MAX_BYTES=10, block="torch") as server: yield server


def raw(server: Server, *parts: bytes, pause: float = 0) -> bytes:
    "Send bytes, and return what comes back until the server closes or is silent"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
                if b"\r\n\r\n" in received: break
        except (ConnectionError, TimeoutError): pass
        return received


def test_overrun_slow_and_stopped(small):
    big = photo(1, size=(2500, 2500))
    with small.client(limits=httpx.Limits(max_connections=100)) as client:
        replies = at_once(40, lambda number: client.post("/predict", files={"file": big}))
        assert {reply.status_code for reply in replies} <= {200, 429, 504} and sum(reply.status_code == 429 for reply in replies) > 5
        refused = next(reply for reply in replies if reply.status_code == 429)
        error(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        error(client.post("/predict", files={"file": big}, headers={"X-Deadline-Ms": "10"}), 504, "deadline")
        error(client.get("/random-image"), 404, "no_data")
        error(client.post("/flag", files={"file": photo()}, data={"label": "Kiwi"}), 507, "storage_full")
        error(client.post("/model", json={"path": "model.onnx"}, headers=ADMIN), 403, "forbidden")

    half = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000\r\n\r\n--x\r\n"
    assert raw(small, half).startswith(b"HTTP/1.1 408")
    assert raw(small, b"GET / HTTP/1.1\r\n" + b"X-Filler: 12345678\r\n" * 5000).startswith((b"HTTP/1.1 431", b""))
    assert b"431" in raw(small, b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\n")[:20]
    assert raw(small, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")

    with socket.create_connection(("127.0.0.1", small.port)) as gone:  # a client that hangs up
        body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + big + b"\r\n--x--\r\n"
        gone.sendall(half.split(b"Content-Length")[0] + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    with small.client() as client:
        small.wait(lambda: "grocery_in_flight 0.0" in client.get("/metrics").text)
        assert client.post("/predict", files={"file": photo()}).status_code == 200


def test_sigterm_loses_no_accepted_request(models, tmp_path):
    server = Server(tmp_path, MODEL_PATH=models / "model.onnx", FLAG_DIR=tmp_path / "flags").ready()
    sent, answers, lost = threading.Event(), [], []
    stopped = [float("inf")]

    def load(number):
        with server.client() as client:
            while True:
                began = time.monotonic()
                try: reply = client.post("/predict", files={"file": photo(number)})
                except httpx.TransportError as e: return lost.append((began, e))
                answers.append((began, reply.status_code, reply.headers.get("connection")))
                if reply.status_code == 503: error(reply, 503, "draining")
                if len(answers) > 100: sent.set()

    def stop():
        sent.wait(60)
        stopped[0] = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
    at_once(13, lambda number: stop() if number == 12 else load(number))
    assert server.process.wait(30) == 0
    before = [status for began, status, _ in answers if began < stopped[0]]
    after = [(status, connection) for began, status, connection in answers if began >= stopped[0]]
    assert set(before) <= {200, 503} and all(began > stopped[0] for began, _ in lost)
    assert (503, "close") in after and {status for status, _ in after} <= {200, 503}
    # whoever the server began to work for got its answer: as many lines in the log as answers that arrived
    logged = [line for line in server.lines() if isinstance(line, dict) and line.get("route") == "/predict" and line["status"] == 200]
    assert len(logged) == sum(status == 200 for _, status, _ in answers)


@pytest.mark.parametrize("environment, sentence", [
    ({"MODEL_PATH": "nowhere.onnx"}, "There is no model file nowhere.onnx"),
    ({"PORT": "99999"}, "PORT is '99999', but must be a whole number from 0 to 65535"),
    ({"HOST": "300.1.1.1"}, "cannot listen on 300.1.1.1"),
])
def test_what_cannot_start_says_so(environment, sentence, tmp_path):
    server = Server(tmp_path, block="torch", **environment)
    assert server.process.wait(120) == 1  # sys.exit with a sentence
    assert sentence in server.log.read_text() and "Traceback" not in server.log.read_text()


def test_import_reads_no_model_and_never_fails(tmp_path):
    code = "import sys; sys.modules['torch'] = None; import grocery_nb.backend as b; assert b.app.openapi()['paths'].keys() >= {'/predict', '/flag'}"
    environment = {"PORT": "eighty", "PREDICTOR": "abacus", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


FUZZING = """
[checks]
positive_data_acceptance.enabled = false  # random bytes fit the schema of a file, and are no picture
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]  # a deadline of some milliseconds may well pass
[[operations]]  # in a form everything is text: a number among the files is a file of a few digits
include-name = "POST /predict-batch"
checks.negative_data_rejection.enabled = false
"""


def fuzz(server: Server, cases: int, folder: Path) -> None:
    "Let schemathesis generate requests from the OpenAPI document; what it finds is the test's message"
    (folder / "schemathesis.toml").write_text(FUZZING)
    tool = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run([str(tool), "run", f"{server.url}/openapi.json", "--max-examples", str(cases), "--seed", "1", "--no-color", "-H", "Authorization: Bearer " + TOKEN,
                           "--suppress-health-check", "all"], cwd=folder, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_fuzzed(servers, tmp_path):
    fuzz(servers["onnx"], 12, tmp_path)
    assert servers["onnx"].process.poll() is None


@pytest.mark.slow
def test_fuzzed_ten_thousand_times(server, tmp_path):
    fuzz(server, 3000, tmp_path)
    with server.client() as client: figures = client.get("/metrics").text
    assert sum(float(n) for n in re.findall(r"grocery_requests_total\{.*?\} ([\d.]+)", figures)) >= 10_000
    mistakes = set(re.findall(r'grocery_requests_total\{route="(.*)",status="(5\d\d)"\}', figures))
    assert {status for route, status in mistakes if route != "/readyz"} <= {"504"}  # /readyz was asked while the model was being loaded


@pytest.mark.parametrize("command", [["fastapi", "run", "backend.py"], ["uvicorn", "grocery_nb.backend:app"]], ids=["fastapi run", "uvicorn"])
def test_the_labs_commands_start_it(models, tmp_path, command):
    "`fastapi run backend.py` where backend.py is one line, and uvicorn by the module's name"
    (tmp_path / "backend.py").write_text("from grocery_nb.backend import app\n")
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    environment = {**os.environ, "MODEL_PATH": str(models / "model.onnx"), "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([str(Path(sys.executable).with_name(command[0])), *command[1:], "--host", "127.0.0.1", "--port", str(port)],
                                   cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200: break
            except httpx.TransportError: pass
            time.sleep(0.1)
        assert httpx.get(f"http://127.0.0.1:{port}/class-names").json() == {"classes": CLASSES}
    finally:
        process.terminate()
        process.wait(30)
