"""Load for a prediction server: multipart pictures over HTTP/1.1, keep-alive, from this one process.

    load.py URL PHOTO... --clients 32 --seconds 10            a closed loop: each client waits for its answer and asks again
    load.py URL PHOTO... --rate 800 --seconds 10              an open loop: requests come when they come (Poisson), whatever became of others
    load.py URL PHOTO... --rate 800 --even --seconds 10      the same with equal times between the requests, as wrk2 and k6 send them
    load.py URL PHOTO... --clients 32 --seconds 10 --wrk      a closed loop by wrk, which costs less of the machine under test

It prints one line of JSON: throughput, and for each status its count and the milliseconds of its answers. In the open loop the time of
a request starts when it is due, not when a connection is there to send it, so a server that stops for a second cannot hide it
("coordinated omission"). `late` says in milliseconds how far behind this program itself was (p99): if that is not small beside the
other figures, the machine had no time for the load generator, and they say nothing about the server.
"""
import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

BOUNDARY = "grocery-load-boundary"


class LoadError(ValueError):
    "The load cannot be made; the text says why in one sentence"


def multipart(photo: Path, field="file") -> bytes:
    head = (f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{photo.name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n")
    return head.encode() + photo.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()


def http_request(url: str, body: bytes) -> bytes:
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return (f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode() + body


class Connection(asyncio.Protocol):
    "One keep-alive connection with one request at a time; just enough of HTTP/1.1 for answers with a Content-Length"

    def __init__(self):
        self.transport, self.buffer, self.answer, self.closed = None, b"", None, False

    def connection_made(self, transport): self.transport = transport

    def data_received(self, data):
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found: return
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if len(body) < int(headers.get("content-length", 0)): return
        self.buffer = b""
        if headers.get("connection", "").lower() == "close": self.transport.close()
        if self.answer and not self.answer.done(): self.answer.set_result((int(lines[0].split()[1]), headers, body))

    def connection_lost(self, error):
        self.closed = True
        if self.answer and not self.answer.done(): self.answer.set_exception(error or ConnectionError("the server hung up"))

    async def ask(self, request: bytes):
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


class Load:
    "Sends pictures in turn, and notes (status, seconds, when it ended) of each; status 0 is a broken connection"

    def __init__(self, url: str, photos: list, seed=0):
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self.requests = [http_request(url, multipart(photo)) for photo in photos]
        self.random, self.idle, self.notes, self.late, self.retry_after = random.Random(seed), [], [], [], 0

    async def connect(self):
        while self.idle:
            if not (connection := self.idle.pop()).closed: return connection
        return (await asyncio.get_running_loop().create_connection(Connection, self.host, self.port))[1]

    async def one(self, due: float):
        self.late.append(1e3 * (time.perf_counter() - due))
        try:
            connection = await self.connect()
            status, headers, _ = await connection.ask(self.random.choice(self.requests))
            self.idle.append(connection)
            self.retry_after += "retry-after" in headers
        except OSError: status = 0
        now = time.perf_counter()
        self.notes.append((status, now - due, now))

    async def closed(self, clients: int, seconds: float):
        end = time.perf_counter() + seconds
        async def client():
            while (now := time.perf_counter()) < end: await self.one(now)
        await asyncio.gather(*[client() for _ in range(clients)])

    async def open(self, rate: float, seconds: float, even=False):
        start = due = time.perf_counter()
        tasks = set()
        while (due := due + (1 / rate if even else self.random.expovariate(rate))) < start + seconds:
            if (wait := due - time.perf_counter()) > 0: await asyncio.sleep(wait)
            task = asyncio.create_task(self.one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks: await asyncio.wait(tasks, timeout=30)

    def close(self):
        for connection in self.idle: connection.transport.close()


def quantile(values: list, share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(notes: list, seconds: float, retry_after: int, late: list) -> dict:
    "Throughput counts the good answers that ended within the time; late ones count for the latencies only"
    statuses = {}
    for status, took, _ in notes: statuses.setdefault(str(status), []).append(1e3 * took)
    return {"per_second": sum(status == 200 for status, _, _ in notes) / seconds, "seconds": seconds, "sent": len(notes),
            "retry_after": retry_after, "late": quantile(late, 0.99) if late else 0.0,
            "status": {status: {"count": len(ms), "p50": quantile(ms, 0.5), "p99": quantile(ms, 0.99), "max": max(ms)}
                       for status, ms in sorted(statuses.items())}}


async def measure(url, photos, seconds, clients=None, rate=None, even=False, seed=0) -> dict:
    load, start = Load(url, photos, seed), time.perf_counter()
    await (load.open(rate, seconds, even) if rate else load.closed(clients, seconds))
    load.close()
    return summary(load.notes, max(note[2] for note in load.notes) - start if load.notes else seconds, load.retry_after, load.late)


LUA = """
local requests, turn = {}, 0
function init(arguments)
  for _, name in ipairs(arguments) do
    local file = assert(io.open(name, "rb")); local body = file:read("*all"); file:close()
    requests[#requests + 1] = wrk.format("POST", nil, {["Content-Type"] = "multipart/form-data; boundary=%s"}, body)
  end
end
function request() turn = turn %% #requests + 1; return requests[turn] end
function done(summary, latency)
  io.write(string.format('JSON{"per_second": %%f, "seconds": %%f, "sent": %%d, "errors": %%d, "p50": %%f, "p99": %%f, "max": %%f}\\n',
    (summary.requests - summary.errors.status) / summary.duration * 1e6, summary.duration / 1e6, summary.requests,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
""" % BOUNDARY


def measure_wrk(url, photos, seconds, clients) -> dict:
    "wrk mixes the latencies of all statuses, so it is for loads that the server can bear; its `errors` must be 0"
    if not shutil.which("wrk"): raise LoadError("wrk is not installed; install Debian's package wrk, or leave out --wrk")
    with tempfile.TemporaryDirectory(prefix="grocery-load-") as folder:
        bodies = []
        for number, photo in enumerate(photos):
            bodies.append(Path(folder, f"{number}.body"))
            bodies[-1].write_bytes(multipart(photo))
        script = Path(folder, "post.lua")
        script.write_text(LUA)
        done = subprocess.run(["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", script, url, "--",
                               *map(str, bodies)], capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("JSON")), None)
    if line is None: raise LoadError(f"wrk gave no figures: {(done.stderr or done.stdout).strip()}")
    found = json.loads(line[4:])
    return found | {"status": {"200": {"count": found["sent"] - found["errors"], **{k: found[k] for k in ("p50", "p99", "max")}}}}


def main():
    parser = argparse.ArgumentParser(description="Load for a prediction server.")
    parser.add_argument("url")
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rate", type=float, help="requests a second, in an open loop")
    parser.add_argument("--even", action="store_true", help="with --rate: equal times between the requests instead of random ones")
    parser.add_argument("--wrk", action="store_true", help="let wrk make the closed loop")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.clients is None) == (args.rate is None): raise LoadError("Give either --clients or --rate")
    if args.even and not args.rate: raise LoadError("--even goes with --rate")
    if args.wrk and args.rate: raise LoadError("wrk knows no open loop: leave out --wrk or --rate")
    if args.wrk: found = measure_wrk(args.url, args.photos, args.seconds, args.clients)
    else: found = asyncio.run(measure(args.url, args.photos, args.seconds, args.clients, args.rate, args.even, args.seed))
    print(json.dumps(found))


if __name__ == "__main__":
    try: main()
    except LoadError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
