"The download against a real HTTP server that breaks off, forgets, lies and hangs: whole and verified, or not there at all."
import errno
import hashlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest
import requests
from PIL import Image

from grocery_nb.data import download as downloading
from grocery_nb.catalog import DataError, data_dir, download, load_split, split_digest, validate_dataset, verify_digests
from grocery_nb.data.download import fetch

TOP = "GroceryStoreDataset-fc80ba90f803d79d0383df52c5a4ac5de99ff6fc"
BLOCK = 1 << 16  # what may be asked for twice after a break: the block that was in hand
SPLITS = ("train", "val", "test")


class Store(ThreadingHTTPServer):
    "Serves `payload`; `breaks` lists after how many bytes each of the first answers hangs up (None: not at all)"

    def __init__(self, payload: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.payload, self.etag, self.breaks, self.log = payload, '"one"', [], []
        self.ranges, self.if_range, self.length, self.status, self.pause = True, True, True, [], 0.0
        self.between, self.hang = (lambda: None), threading.Event()
        self.hang.set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/archive.zip"

    @property
    def sent(self): return sum(sent for _, _, sent in self.log)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        store = self.server
        if store.status: return self.refuse(store.status.pop(0))
        asked, payload = self.headers.get("Range"), store.payload
        same = not store.if_range or self.headers.get("If-Range") == store.etag
        start = int(asked[6:-1]) if asked and store.ranges and same else 0
        if start >= len(payload): return self.refuse(416)
        self.send_response(206 if start else 200)
        if store.etag: self.send_header("ETag", store.etag)
        if store.length: self.send_header("Content-Length", str(len(payload) - start))
        if start: self.send_header("Content-Range", f"bytes {start}-{len(payload) - 1}/{len(payload)}")
        self.end_headers()
        time.sleep(store.pause)
        stop = store.breaks.pop(0) if store.breaks else None
        body = payload[start:] if stop is None else payload[start:start + stop]
        store.log.append((206 if start else 200, start, len(body)))
        self.wfile.write(body)
        self.wfile.flush()
        store.hang.wait(20)
        store.between()

    def refuse(self, status):
        self.server.log.append((status, 0, 0))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_): pass


def make_tree(root: Path) -> Path:
    "A small data set of 3 classes in the real layout"
    root.mkdir()
    (root / "classes.csv").write_text("Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int)\r\n"
                                      "Golden-Delicious,0,Apple,0\r\nGranny-Smith,1,Apple,0\r\nKiwi,2,Kiwi,1\r\n", newline="")
    generator, rows = random.Random(0), {split: [] for split in SPLITS}
    for split in SPLITS:
        for fine, name in enumerate(("Apple/Golden-Delicious", "Apple/Granny-Smith", "Kiwi")):
            for n in range(4):
                path = f"{split}/Fruit/{name}/{name.split('/')[-1]}_{n:03}.jpg"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.frombytes("RGB", (96, 96), generator.randbytes(3 * 96 * 96)).save(root / path, quality=95)
                rows[split].append(f"{path}, {fine}, {int(fine == 2)}\n")
        (root / f"{split}.txt").write_text("".join(rows[split]), newline="")
    return root


def make_archive(tree: Path, extra=()) -> bytes:
    "Pack a data set as the host does, with what else is in the repository, and members of `extra`: (ZipInfo or name, data)"
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(f"{TOP}/", "")
        for name in ("README.md", "LICENSE", "dataset/iconic-images-and-descriptions/Fruit/Kiwi/Kiwi_Iconic.jpg", "paper/paper.pdf"):
            z.writestr(f"{TOP}/{name}", random.Random(name).randbytes(30_000))
        for path in sorted(tree.rglob("*")):
            if path.is_file(): z.write(path, f"{TOP}/dataset/{path.relative_to(tree).as_posix()}")
        for member, data in extra: z.writestr(member, data)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "dataset")


@pytest.fixture(scope="module")
def digests(tree) -> dict:
    return {name: split_digest(tree, name) for name in ("classes.csv", *SPLITS)}


@pytest.fixture(scope="module")
def archive(tree) -> bytes:
    return make_archive(tree)


@pytest.fixture
def store(archive, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(downloading, "RETRY_SECONDS", 0.001)
    store = Store(archive)
    yield store
    store.hang.set()
    store.shutdown()
    store.server_close()


@pytest.fixture
def get(store, digests, tmp_path):
    "Download from the store into an empty folder"
    def get(root=tmp_path / "home" / "photos", **options):
        return download(root, **{"url": store.url, "digests": digests, "progress": False, **options})
    return get


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "home" / "photos"


def sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and " object at 0x" not in text and 20 < len(text) < 500, text
    return text


def beside(target: Path) -> list:
    "What stands in the target's folder, the lock aside"
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


def test_digest_is_that_of_the_design(tree, digests):
    "Written again from architecture.md's words, one file after the other"
    names = sorted(["val.txt", *(p.relative_to(tree).as_posix() for p in (tree / "val").rglob("*.jpg"))])
    lines = [f"{hashlib.sha256((tree / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    assert digests["val"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_whole_and_verified(get, store, digests, target):
    assert get() == target and verify_digests(target, digests=digests)
    assert validate_dataset(target).ok and len(load_split(target, "test")) == 12
    assert sorted(p.name for p in target.iterdir()) == sorted(
        ["LICENSE", "README.md", "classes.csv", *SPLITS, *(f"{split}.txt" for split in SPLITS)]), "nothing else is unpacked"
    assert beside(target) == ["photos"] and len(store.log) == 1
    if os.name == "posix": assert stat.S_IMODE(target.stat().st_mode) & 0o055, "others in a classroom can read it"


def test_broken_line_is_resumed_and_not_begun_again(get, store, archive, target):
    store.breaks = [len(archive) // 2, len(archive) // 4]
    get()
    assert [status for status, _, _ in store.log] == [200, 206, 206]
    for (_, start, sent), (_, resumed, _) in zip(store.log, store.log[1:]): assert start + sent - BLOCK <= resumed <= start + sent
    assert len(archive) <= store.sent <= len(archive) + 2 * BLOCK and len(archive) > 3 * BLOCK


def test_resumed_by_another_process_later(get, store, archive, target):
    "The first call gives up for good; the second finds the part and its ETag on disk"
    store.breaks, store.between = [len(archive) // 2], lambda: store.status.append(404)
    with pytest.raises(DataError, match="the server answered 404"): get()
    store.between, before = (lambda: None), store.sent
    assert not target.exists() and any(name.endswith(".part") for name in beside(target))
    get()
    assert store.log[-1][0] == 206 and store.sent - before <= len(archive) // 2 + BLOCK + 1


def test_server_without_ranges(get, store, archive, digests, target):
    store.ranges, store.breaks = False, [len(archive) // 2]
    assert verify_digests(get(), digests=digests) and [status for status, _, _ in store.log] == [200, 200]


@pytest.mark.parametrize("if_range", [True, False], ids=["server honours If-Range", "server ignores If-Range"])
def test_file_that_changes_between(get, store, tree, archive, digests, if_range):
    "Two halves of two archives are never glued together"
    def change(): store.payload, store.etag = make_archive(tree, [(f"{TOP}/AAA.txt", "more")]), '"two"'
    store.breaks, store.between, store.if_range = [len(archive) // 2], change, if_range
    assert verify_digests(get(), digests=digests)
    assert [status for status, _, _ in store.log] == ([200, 200] if if_range else [200, 206, 200])


@pytest.mark.parametrize("etag", ["", 'W/"weak"'], ids=["no ETag", "weak ETag"])
def test_without_a_strong_etag_nothing_is_resumed(get, store, archive, digests, etag):
    store.etag, store.breaks = etag, [len(archive) // 2]
    assert verify_digests(get(), digests=digests) and [status for status, _, _ in store.log] == [200, 200]


def test_length_unknown(get, store, digests):
    store.length = False
    assert verify_digests(get(), digests=digests)


def test_part_that_is_too_long(get, store, archive, digests, target):
    target.parent.mkdir()
    name = f".photos-{hashlib.sha256(store.url.encode()).hexdigest()[:8]}.zip.part"
    (target.parent / name).write_bytes(bytes(2 * len(archive)))
    (target.parent / f"{name}.etag").write_text(store.etag)
    assert verify_digests(get(), digests=digests)
    assert [status for status, _, _ in store.log] == [416, 200] and beside(target) == ["photos"]


@pytest.mark.parametrize("ending", ["", ".part"])
def test_whole_archive_that_is_there_is_used(get, store, archive, digests, target, ending):
    target.parent.mkdir()
    (target.parent / f".photos-{hashlib.sha256(store.url.encode()).hexdigest()[:8]}.zip{ending}").write_bytes(archive)
    assert verify_digests(get(), digests=digests) and store.log == [] and beside(target) == ["photos"]


def test_installed_photos_need_no_network(get, store, target):
    get()
    (target / "train" / "Fruit" / "Kiwi").stat()
    store.log.clear()
    assert get() == target and get(splits=("val",)) == target and store.log == []


def test_one_split_now_and_the_others_later(get, store, digests, target):
    get(splits=("val",))
    assert sorted(p.name for p in target.iterdir() if not p.suffix and p.is_dir()) == ["val"]
    with pytest.raises(DataError, match="'test' is not in photos; there is val"): load_split(target, "test")
    get()
    assert verify_digests(target, digests=digests) and len(store.log) == 2 and beside(target) == ["photos"]


def test_unknown_split(get, store):
    with pytest.raises(DataError, match="no split 'tets' to download; choose from train, val, test") as error: get(splits=("tets",))
    assert sentence(error) and store.log == []


# Contents that are not what they should be

def tampered(tree: Path, tmp_path: Path, change) -> bytes:
    copy = shutil.copytree(tree, tmp_path / "copy")
    change(copy)
    return make_archive(copy)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def relabel(path: Path): path.write_text(path.read_text().replace(", 0, 0\n", ", 1, 0\n", 1), newline="")


@pytest.mark.parametrize("change, part", [
    (lambda copy: flip(copy / "val/Fruit/Kiwi/Kiwi_001.jpg"), "val"),
    (lambda copy: relabel(copy / "train.txt"), "train"),
    (lambda copy: (copy / "test/Fruit/Kiwi/Kiwi_001.jpg").unlink(), "test"),
    (lambda copy: (copy / "test/Fruit/Kiwi/extra.jpg").write_bytes(b"?"), "test"),
    (lambda copy: relabel(copy / "classes.csv") or flip(copy / "classes.csv"), "classes.csv"),
], ids=["one bit of an image", "one label", "an image less", "an image more", "classes"])
def test_tampered_contents_leave_nothing(get, store, tree, tmp_path, target, change, part):
    store.payload = tampered(tree, tmp_path, change)
    with pytest.raises(DataError, match=f"not the published data set and was deleted.*{part}") as error: get()
    sentence(error)
    assert beside(target) == []


def test_missing_split_in_the_archive(get, store, tree, tmp_path, target):
    store.payload = tampered(tree, tmp_path, lambda copy: (copy / "test.txt").unlink())
    with pytest.raises(DataError, match="the split 'test' is not in|The split 'test' is not in") as error: get()
    assert sentence(error) and beside(target) == []


def test_archive_damaged_on_its_way(get, store, archive, digests, target):
    "A flipped byte inside a compressed member, and in the middle of the list of members"
    for place in (archive.find(b"Kiwi_001.jpg") + 400, archive.rfind(b"PK\x01\x02") + 2):
        data = bytearray(archive)
        data[place] ^= 0xff
        store.payload = bytes(data)
        with pytest.raises(DataError, match="was deleted") as error: get()
        assert sentence(error) and beside(target) == []
    store.payload = archive
    assert verify_digests(get(), digests=digests), "after which another try succeeds"


def test_page_instead_of_an_archive(get, store, target):
    store.payload = b"<html>Please log in to the school network</html>"
    with pytest.raises(DataError, match="is no zip archive and was deleted.*login page") as error: get()
    assert sentence(error) and beside(target) == []


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


HOSTILE = {
    "parent": (f"{TOP}/dataset/train/../../../evil.txt", b"x", "leads out of the folder"),
    "parent elsewhere": ("../../evil.txt", b"x", "leads out of the folder"),
    "absolute": ("/tmp/evil.txt", b"x", "leads out of the folder"),
    "drive": ("C:/evil.txt", b"x", "leads out of the folder"),
    "backslashes": (f"{TOP}\\..\\..\\evil.txt", b"x", "backslashes"),
    "symbolic link": (link(f"{TOP}/dataset/train/Fruit/link"), b"/etc", "is a symbolic link"),
    "bomb": (f"{TOP}/dataset/train/Fruit/bomb.jpg", bytes((32 << 20) + 1), "unpacks to 32 MB"),
    "file for a folder": (f"{TOP}/dataset/train/Fruit/Kiwi/Kiwi_001.jpg/x.jpg", b"x", "."),
}


@pytest.mark.parametrize("member, data, words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_member_is_refused(get, store, tree, tmp_path, target, member, data, words):
    store.payload = make_archive(tree, [(member, data)])
    with pytest.raises(DataError, match=words) as error: get()
    sentence(error)
    assert not target.exists() and not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil.txt").exists()
    assert not list(target.parent.glob("*.tmp"))


def test_many_members_that_are_too_much_together(get, store, tree, target, monkeypatch):
    monkeypatch.setattr(downloading, "MAX_TOTAL_BYTES", 100_000)
    with pytest.raises(DataError, match="its files would unpack to"): get()
    assert beside(target) == []


# Networks and disks

def test_no_network_is_one_sentence(get, store, target):
    store.shutdown()
    store.server_close()
    with pytest.raises(DataError) as error: get()
    for words in ("no connection", "try again", "GROCERY_DATA_DIR", "--data mini"): assert words in sentence(error)
    assert not target.exists()


def test_grocery_without_a_network(store, caches, monkeypatch):
    "The source `grocery` asks for the official address; here no name is resolved"
    def offline(*_, **__): raise requests.ConnectionError("Failed to resolve 'github.com'")
    monkeypatch.setattr(downloading.requests, "get", offline)
    with pytest.raises(DataError, match="GROCERY_DATA_DIR to a copy of them, or use --data mini") as error: data_dir("grocery")
    assert sentence(error) and not (caches / "grocery-store").exists()


def test_final_answers_are_not_asked_again(get, store):
    store.status = [404, 404]
    with pytest.raises(DataError, match="the server answered 404") as error: get()
    assert sentence(error) and len(store.log) == 1
    with pytest.raises(DataError, match="the address is not valid"): get(url="nonsense")


def test_passing_trouble_is(get, store, digests):
    store.status = [503, 429]
    assert verify_digests(get(), digests=digests) and [status for status, _, _ in store.log] == [503, 429, 200]


def test_a_line_that_never_gets_further_is_given_up(get, store, archive, target):
    store.ranges, store.breaks = False, [len(archive) // 2] * 50
    with pytest.raises(DataError, match="broke off") as error: get()
    assert sentence(error) and len(store.log) == downloading.TRIES == 3


def test_full_disk_is_one_sentence_and_keeps_the_part(get, store, archive, target, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(downloading.shutil, "copyfileobj", full)
        with pytest.raises(DataError, match="No space left on device") as error: get()
    sentence(error)
    assert not target.exists() and [Path(name).suffix for name in beside(target)] == [".zip"]
    store.log.clear()
    assert get() == target and store.log == []


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes, as POSIX systems have it")
def test_disk_that_fills_up_while_receiving(get, store, digests, target):
    "The kernel refuses to let the part grow beyond 100 kB; with more room the next call goes on from there"
    process = start(target, store, digests, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))")
    out, err = process.communicate(timeout=60)
    assert "DataError: The photos cannot be written to" in err and "File too large" in err and "what has arrived is kept" in err
    assert not target.exists() and verify_digests(get(), digests=digests)
    assert store.log[-1][:2] == (206, 100_000)


def test_place_that_cannot_be_written(get, store, tmp_path):
    (tmp_path / "file").write_text("a file")
    for root, words in ((tmp_path / "file", "is a file; name a folder"), (tmp_path / "file" / "photos", "cannot be written to")):
        with pytest.raises(DataError, match=words) as error: get(root)
        assert sentence(error) and store.log == []


def test_what_a_user_has_is_never_overwritten(get, store, target):
    "Other photos under the same names, and a folder that is in the way"
    (target / "train").mkdir(parents=True)
    (target / "train" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="train is in the way of the photos") as error: get()
    assert sentence(error) and store.log == []
    (target / "train.txt").write_text("train/holiday.jpg, 0, 0\n")
    (target / "classes.csv").write_text("mine")
    with pytest.raises(DataError, match="is not the published one"): get()
    assert store.log == [] and (target / "train" / "holiday.jpg").read_bytes() == b"mine" and len(list(target.iterdir())) == 3


# Processes

PROCESS = """
import json, sys
from pathlib import Path
from grocery_nb.catalog import download
root, url, digests = sys.argv[1:]
print(download(Path(root), url=url, digests=json.loads(digests), progress=False))
"""


def start(target, store, digests, first=""):
    return subprocess.Popen([sys.executable, "-c", first + PROCESS, str(target), store.url, json.dumps(digests)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_download_once(store, digests, target, tmp_path):
    store.pause = 0.8
    processes = [start(target, store, digests) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert out.strip() == str(target), err
    assert len(store.log) == 1 and verify_digests(target, digests=digests) and beside(target) == ["photos"]


def test_killed_process_leaves_nothing_half(get, store, archive, digests, target):
    "kill -9 in the middle of the body; what had arrived is used by the next process"
    store.breaks, store.hang = [3 * BLOCK], threading.Event()
    process = start(target, store, digests)
    def arrived(): return sum(p.stat().st_size for p in target.parent.glob(".photos*.part")) if target.parent.exists() else 0
    deadline = time.time() + 30
    while arrived() < BLOCK and time.time() < deadline: time.sleep(0.02)
    process.kill()
    process.communicate()
    store.hang.set()
    have = arrived()
    assert have >= BLOCK and not target.exists()
    (target.parent / ".photos.0123abcd.tmp" / "train").mkdir(parents=True)
    assert verify_digests(get(), digests=digests) and store.log[-1][:2] == (206, have)
    assert beside(target) == ["photos"], "what the killed process left is swept up"


def test_progress_goes_to_standard_error(get, capfd):
    get(progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "grocery photos" in err


def test_fetch_alone(store, archive, tmp_path):
    assert fetch(store.url, tmp_path / "a.zip", progress=False).read_bytes() == archive
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]
