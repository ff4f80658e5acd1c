"""Datasets on the Hub: a server that fails for a while costs time and nothing else."""

import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.preparations import contents, pieces_of_the_standard_library, prepare, sentence, write_lines, write_parquet

# Short waits, and none of the Hub client's own retries, which come first and take half a minute.
IMPATIENT = """
import functools, sys
from huggingface_hub import hf_file_system
from train.preprocess_data import retry
from train.utils.command import run_command
from train.preprocess_data.__main__ import main
hf_file_system.http_backoff = functools.partial(hf_file_system.http_backoff, max_retries=0)
retry.RETRY_SECONDS, retry.RETRIES = 0.01, {retries}
run_command(lambda: main(sys.argv[1:]))
"""
REPOSITORY = "owner/name"
API, RESOLVE = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
RETRIES = 4
FAULTS = ("503", "429", "reset", "truncated", "stall")

# (file, how many bodies of it were asked for before this one) → what goes wrong with it
Plan = Callable[[str, int], str | None]
WELL: Plan = lambda file, number: None  # noqa: E731


class FaultyHub(ThreadingHTTPServer):
    """Serves a folder's files as a dataset on the Hub, and fails as planned."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.plan = WELL
        self.bodies: Counter[str] = Counter()
        self.failed = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.seen: Callable[[str], None] = lambda path: None

    @property
    def environment(self) -> dict[str, str]:
        """What a process must be started with to take this for the Hub."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
                "HF_HUB_DOWNLOAD_TIMEOUT": "3"}  # fmt: skip

    def commit(self) -> str:
        names = sorted((path.name, hashlib.sha1(path.read_bytes()).hexdigest()) for path in self.folder.iterdir())
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    def fault(self, file: str) -> str | None:
        with self.lock:
            fault = self.plan(file, self.bodies[file])
            self.bodies[file] += 1
            self.failed += fault is not None
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyHub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen(path)
        if match := re.fullmatch(rf"{API}(?:/revision/([^/]+))?", path):
            files = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            self.answer({"id": REPOSITORY, "sha": match[1] or self.server.commit(), "siblings": files})
        elif re.fullmatch(rf"{API}/tree/[^/]+", path):
            self.answer([
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in sorted(self.server.folder.iterdir())
            ])  # fmt: skip
        elif path.startswith(RESOLVE) and (self.server.folder / Path(path).name).is_file():
            self.send_file(self.server.folder / Path(path).name)
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, file: Path) -> None:
        fault = self.server.fault(file.name)
        if fault in ("503", "429"):
            self.send_error(int(fault))
            return
        body = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), len(body) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            body = body[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True
        if fault == "stall":
            self.server.closing.wait(60)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """The tests check what the client prints."""


@contextmanager
def serving(folder: Path) -> Iterator[FaultyHub]:
    server = FaultyHub(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of each kind, 11 MB of text: more than a reader takes at once."""
    folder = tmp_path_factory.mktemp("served")
    texts = pieces_of_the_standard_library()
    for number, part in enumerate((texts[:3000], texts[3000:])):
        write_parquet(folder / f"{number}.parquet", part, row_group_size=200, compression="none")
        write_lines(folder / f"{number}.jsonl.gz", part)
    return folder


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the same files give when they are local."""
    out = tmp_path_factory.mktemp("local")
    done = {}
    for kind in KINDS:
        words = [f"--dataset={kind.split('.')[0].removesuffix('l')}", f"--data_files={folder}/*.{kind}", *FLAGS]
        prepare(*words, f"--out_dir={out / kind}", cwd=out)
        done[kind] = contents(out / kind)
    return done


FLAGS = ("--val_fraction=0.05", "--num_proc=1")
KINDS = ("parquet", "jsonl.gz")


def fetch(
    server: FaultyHub, kind: str, out: Path, retries: int = RETRIES, revision: str | None = None
) -> subprocess.CompletedProcess[str]:
    words = [f"--dataset={REPOSITORY}", f"--data_files=*.{kind}", f"--out_dir={out}", *FLAGS]
    words += [f"--revision={revision}"] if revision else []
    script = IMPATIENT.format(retries=retries)
    environment = {**os.environ, **server.environment, "HF_HOME": str(out.parent / "cache")}
    return subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=600)  # fmt: skip


def check_same(out: Path, local: dict[str, Any]) -> None:
    """Everything but the sidecars' fields about the source and the command."""
    elsewhere = {"source": None, "request": None}
    found = contents(out)
    assert set(found) == set(local)
    for name in found:
        if name.endswith(".json"):
            assert found[name] | elsewhere == local[name] | elsewhere
        else:
            assert found[name] == local[name]


def rows_of_retries(stderr: str) -> list[int]:
    return [int(row.replace(",", "")) for row in re.findall(r"row ([\d,]+)", stderr)]


QUICK = {("parquet", "503"), ("parquet", "reset"), ("jsonl.gz", "429"), ("jsonl.gz", "truncated")}


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(KINDS, FAULTS)
    ],
)
def test_a_passing_failure_costs_nothing(
    folder: Path, local: dict[str, Any], tmp_path: Path, kind: str, fault: str
) -> None:
    with serving(folder) as server:
        # The second file is opened in the middle of reading.
        server.plan = lambda file, number: fault if file == f"1.{kind}" and number in (0, 1) else None
        done = fetch(server, kind, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert server.failed == 2
    check_same(tmp_path / "out", local[kind])
    rows = rows_of_retries(done.stderr)
    assert len(rows) == 2, done.stderr
    assert 0 < rows[0] <= rows[1]


@pytest.mark.parametrize("fault", ["503", "429"])
def test_a_server_that_is_busy_at_first(folder: Path, local: dict[str, Any], tmp_path: Path, fault: str) -> None:
    with serving(folder) as server:
        server.plan = lambda file, number: fault if number == 0 else None
        done = fetch(server, "parquet", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert server.failed == 2
    check_same(tmp_path / "out", local["parquet"])


def test_a_server_that_stays_broken_is_a_sentence_and_the_same_command_resumes_later(
    folder: Path, local: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with serving(folder) as server:
        server.plan = lambda file, number: "503" if file == "1.parquet" else None
        message = sentence(broken := fetch(server, "parquet", out))
        assert "503" in message
        assert f"--dataset {REPOSITORY} at revision {server.commit()}" in message
        assert server.failed >= RETRIES
        rows = rows_of_retries(broken.stderr)
        kept = contents(out / ".preparing")["journal.json"]["rows"]
        assert kept > 0
        assert set(rows) == {kept}
        server.plan = WELL
        done = fetch(server, "parquet", out)
        assert done.returncode == 0, done.stderr
        assert kept in rows_of_retries(done.stderr)
    check_same(out, local["parquet"])


def test_what_is_not_there_is_a_sentence_at_once(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        done = fetch(server, "csv", tmp_path / "out", retries=1_000_000)
        assert "check --revision, --subset and --data_files" in sentence(done)
        assert not rows_of_retries(done.stderr)
        assert not list((tmp_path / "out").glob("*"))


def test_nobody_listens(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        pass
    assert "cannot reach the Hub" in sentence(fetch(server, "parquet", tmp_path / "out"))


def test_a_dataset_that_changed_on_the_hub_is_not_mixed_with_what_is_kept(folder: Path, tmp_path: Path) -> None:
    """A preparation that resumes asks for the commit that it began with, which the Hub keeps."""
    served = Path(shutil.copytree(folder, tmp_path / "served"))
    out = tmp_path / "out"
    with serving(served) as server:
        begun = server.commit()
        server.plan = lambda file, number: "503" if file == "1.parquet" else None
        sentence(fetch(server, "parquet", out))
        write_parquet(served / "1.parquet", ["another text"] * 50)
        asked: list[str] = []
        server.seen = asked.append
        fetch(server, "parquet", out)
    assert asked
    assert all(begun in path for path in asked if "/resolve/" in path or "/tree/" in path)
