"""Shards behind URLs, served on the loopback by a server that also fails, stalls and cuts connections."""

import json
import re
import shutil
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hostile import colour, encode
from PIL import Image
from strikes import checkpoints
from test_sources import tar

from mim.cli import main
from mim.data import remote
from mim.data.files import NothingReadableError
from mim.data.places import check_place
from mim.data.sources import TarSource, open_source
from mim.errors import UserError

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
TINY = Path(__file__).parents[1] / "tiny.yaml"
PNGS = [encode(Image.fromarray(colour() ^ number), "PNG") for number in range(12)]


class Server(ThreadingHTTPServer):
    """Files of a folder, by range; ``fault`` may spoil an answer: its number in, a fault or None out."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.asked = folder, lambda number: None, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Clients that left are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        server, file = self.server, self.server.folder / self.path.partition("?")[0].lstrip("/")
        server.asked.append((self.command, self.path, self.headers.get("Range")))
        fault = server.fault(len(server.asked))
        if fault == "stall":
            time.sleep(3)
            self.close_connection = True
            return
        if isinstance(fault, int) or not file.is_file():
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(span[1]) : int(span[2]) + 1] if span and fault != "whole" else content
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
        self.close_connection = fault == "cut"


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "bucket"
    folder.mkdir()
    for shard in range(3):
        members = [(f"{n:02}.png", PNGS[n]) for n in range(4 * shard, 4 * shard + 4)]
        labels = [(f"{n:02}.cls", b"ab"[n % 2 : n % 2 + 1]) for n in range(4 * shard, 4 * shard + 4)]
        tar(folder / f"x-{shard}.tar", [m for pair in zip(members, labels, strict=True) for m in pair])
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIM_CACHE_GB", "0")
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def pattern(server):
    return f"{server.url}/x-{{0..2}}.tar"


def test_shards_behind_a_url_are_the_same_images_and_labels_as_on_a_disk(server):
    there, here = TarSource(pattern(server)), TarSource(f"{server.folder}/x-{{0..2}}.tar")
    assert [there.describe(i).rpartition("/")[2] for i in range(12)] == [f"{n:02}.png" for n in range(12)]
    assert (there.labels, there.classes, there.name) == (here.labels, here.classes, here.name)
    assert all(torch.equal(there.read(i), here.read(i)) for i in range(12))


def test_the_index_is_built_once_and_then_an_image_is_one_request_for_its_own_bytes(server):
    TarSource(pattern(server))
    server.asked.clear()
    source = TarSource(pattern(server))
    assert {method for method, *_ in server.asked} == {"HEAD"}
    server.asked.clear()
    source.read(0)
    assert [(path, span) for _, path, span in server.asked] == [("/x-0.tar", f"bytes=512-{512 + len(PNGS[0]) - 1}")]


@pytest.mark.parametrize("fault", [503, 500, 429, "cut", "stall"])
def test_a_server_that_fails_now_and_then_loses_no_image_and_gives_none_twice(server, fault):
    server.fault = lambda number: fault if number % (7 if fault == "stall" else 2) == 0 else None
    there, here = TarSource(pattern(server)), TarSource(f"{server.folder}/x-{{0..2}}.tar")
    assert (len(there), there.labels, there.damaged) == (12, here.labels, [])
    assert all(torch.equal(there.read(i), here.read(i)) for i in range(12))


@pytest.mark.parametrize("fault", [503, "cut", "stall"])
def test_a_server_that_stays_away_ends_a_read_in_bounded_time_and_is_no_bad_image(server, fault, monkeypatch):
    source = TarSource(pattern(server))
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    server.fault = lambda number: fault
    began = time.monotonic()
    with pytest.raises(NothingReadableError, match=rf"{server.url}/x-0.tar: .*tr(y|ies)"):
        source.read(0)
    assert time.monotonic() - began < 5


def test_a_refusal_is_not_asked_again(server):
    source = TarSource(pattern(server))
    server.asked.clear()
    server.fault = lambda number: 403
    with pytest.raises(NothingReadableError, match="403"):
        source.read(0)
    assert len(server.asked) == 1


def test_a_server_without_ranges_is_told_by_name(server):
    source = TarSource(pattern(server))
    server.fault = lambda number: "whole"
    with pytest.raises(NothingReadableError, match="answers a request for a range with more"):
        source.read(0)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("{}/y-{{0..1}}.tar", r"2 of 2 tar files are missing, first http.*\ntry:   curl -I http.*/y-0.tar"),
        ("{}/x-{{2..4}}.tar", r"2 of 3 tar files are missing, first http://.*/x-3.tar\ntry:   --data http.*/x-2.tar"),
        ("{}/x-{{1..4}}.tar", r"2 of 4 tar files are missing, .*\ntry:   --data 'http.*/x-\{1..2\}.tar'"),
        ("{}/photos", "of URLs, only those of .tar files are read"),
        ("nosuch://bucket/x.tar", "Protocol not known: nosuch"),
        (
            "http://127.0.0.1:9/x.tar",
            r"cannot be read\nwhy: .*Cannot connect.*\ntry:   curl -I http://127.0.0.1:9/x.tar",
        ),
        ("http://host.invalid/x.tar", r"cannot be read\nwhy:   http://host.invalid/x.tar: "),
    ],
)
def test_a_wrong_url_ends_in_three_lines(server, url, told, monkeypatch):
    monkeypatch.setattr(remote, "OPENING", 1.0)
    with pytest.raises(UserError) as mistake:
        open_source(url.format(server.url))
    assert re.search(told, str(mistake.value)), str(mistake.value)
    assert str(mistake.value).count("\n") <= 2


def test_a_url_that_is_not_for_us_is_told_before_anything_is_imported(server):
    server.fault = lambda number: 401
    with pytest.raises(UserError, match=r"cannot be read\nwhy:   .*401.*\ntry:   curl -I http"):
        check_place(pattern(server))


def test_the_images_of_a_batch_are_asked_for_at_the_same_time(server):
    source = TarSource(pattern(server))
    asked, all_asked, met = [], threading.Event(), []

    def until_all_have_asked(number):
        asked.append(number)
        if len(asked) == 12:
            all_asked.set()
        met.append(all_asked.wait(5))

    server.fault = until_all_have_asked
    source.fetch(range(12))
    images = [source.read(i) for i in range(12)]
    assert met == [True] * 12
    server.fault = lambda number: None
    assert all(torch.equal(source.read(i), image) for i, image in enumerate(images))


def test_bytes_are_kept_up_to_the_limit_and_then_read_without_the_server(server, monkeypatch):
    size = (server.folder / "x-0.tar").stat().st_size
    monkeypatch.setenv("MIM_CACHE_GB", str(1.5 * size / 1e9))  # all of the first shard, some of the second
    source = TarSource(pattern(server))
    first = [source.read(i) for i in range(12)]
    server.asked.clear()
    assert all(torch.equal(source.read(i), image) for i, image in enumerate(first))
    again = Counter(path for _, path, _ in server.asked)
    assert again["/x-0.tar"] == 0
    assert 0 < again["/x-1.tar"] < 4
    assert again["/x-2.tar"] == 4


def test_a_shard_that_changed_gets_an_index_of_its_own(server):
    TarSource(pattern(server))
    tar(server.folder / "x-1.tar", [("new.png", PNGS[0]), ("new.cls", b"a")])
    assert len(TarSource(pattern(server))) == 9


def test_a_damaged_shard_is_as_damaged_as_on_a_disk(server):
    for file in server.folder.glob("x-1.tar"):
        file.write_bytes(file.read_bytes()[:700])
    there, here = TarSource(pattern(server)), TarSource(f"{server.folder}/x-{{0..2}}.tar")
    assert [error.reason for error in there.damaged] == [error.reason for error in here.damaged]
    assert len(there.damaged) > 0


def test_a_resumed_run_refuses_shards_that_changed(server, tmp_path):
    TarSource(pattern(server))
    remote.keep_index(pattern(server), tmp_path)
    remote.restore_index(pattern(server), tmp_path)
    tar(server.folder / "x-1.tar", [("new.png", PNGS[0])])
    with pytest.raises(UserError, match=r"x-1.tar has changed since the run began"):
        remote.restore_index(pattern(server), tmp_path)


@pytest.mark.middle
def test_a_run_on_a_failing_server_is_the_run_on_a_disk_and_resumes_to_the_same_bits(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--batch_size", "4", "--epochs", "3", "--eval_every", "9", "--save_every", "1", "--num_workers", "2"]

    def train(data, out):
        assert main("pretrain", ["--config", str(TINY), "--data", data, "--out", str(out), *size]) == 0
        return out

    here = train(f"{server.folder}/x-{{0..2}}.tar", tmp_path / "here")
    server.fault = lambda number: (None, 503, None, "cut", None)[number % 5]
    there = train(pattern(server), tmp_path / "there")
    assert (there / "metrics.csv").read_bytes() == (here / "metrics.csv").read_bytes()
    assert not (there / "bad_files.txt").exists()
    assert (there / "shards.json.gz").exists()
    for checkpoint in checkpoints(there)[1:]:
        checkpoint.unlink()
    shutil.rmtree(tmp_path / "cache")
    assert main("pretrain", ["--resume", str(there), "--num_workers", "0"]) == 0
    assert (there / "metrics.csv").read_bytes() == (here / "metrics.csv").read_bytes()


@pytest.mark.middle
def test_a_server_that_goes_away_in_a_run_ends_it_in_three_lines_that_say_resume(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "PATIENCE", 1.0)
    gone = threading.Event()
    server.fault = lambda number: 503 if gone.is_set() else None
    given = [
        "--config",
        str(TINY),
        "--data",
        pattern(server),
        "--out",
        "run",
        "--batch_size",
        "4",
        "--num_workers",
        "1",
    ]
    monkeypatch.setattr("mim.commands.pretrain.keep_index", lambda *args: gone.set())
    assert main("pretrain", [*given, "--epochs", "3"]) == 4
    error = capsys.readouterr().err
    assert f"{server.url}/x-" in error
    assert "503" in error
    assert "--resume run" in error
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"
    gone.clear()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main("pretrain", ["--resume", "run"]) == 0
