"""``s3://`` and ``hf://`` through s3fs and huggingface_hub, against a server on the loopback that answers alike."""

import json
import re
import threading

import pytest
import torch
from test_remote import PNGS, Handler, Server
from test_sources import tar

from mim.data import remote
from mim.data.files import NothingReadableError
from mim.data.sources import TarSource
from mim.errors import UserError

fsspec_config = pytest.importorskip("fsspec.config")
pytest.importorskip("s3fs")
pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.middle

URLS = {"s3": "s3://bucket/{}", "hf": "hf://datasets/user/bucket/{}"}


class ServiceHandler(Handler):
    """S3 by its own paths, and of the hub what names the files of a data set."""

    def do_GET(self, body=True):  # noqa: N802 - the name http.server calls
        path, server = self.path.partition("?")[0], self.server
        if not path.startswith("/api/"):
            self.path = path.replace("/datasets/user/bucket/resolve/main/", "/bucket/")
            super().do_GET(body)
            return
        files = sorted((server.folder / "bucket").iterdir())
        rows = [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": str(f.stat().st_mtime)} for f in files
        ]
        answer = json.dumps(rows if "/tree/" in path else {"id": "user/bucket", "sha": "0" * 40, "siblings": []})
        fault = server.fault(0)
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())


@pytest.fixture(params=URLS)
def shards(request, tmp_path, monkeypatch):
    """A server, and the pattern of its three shards."""
    bucket = tmp_path / "served" / "bucket"
    bucket.mkdir(parents=True)
    for shard in range(3):
        members = [(f"{n:02}.png", PNGS[n]) for n in range(4 * shard, 4 * shard + 4)]
        labels = [(f"{n:02}.cls", b"ab"[n % 2 : n % 2 + 1]) for n in range(4 * shard, 4 * shard + 4)]
        tar(bucket / f"x-{shard}.tar", [m for pair in zip(members, labels, strict=True) for m in pair])
    monkeypatch.setenv("MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MIM_CACHE_GB", "0")
    monkeypatch.setattr(remote, "PAUSE", 0.02)
    with Server(bucket.parent) as server:
        server.RequestHandlerClass = ServiceHandler
        # As FSSPEC_S3_ENDPOINT_URL and FSSPEC_S3_ANON would, which are read once for each process.
        monkeypatch.setitem(fsspec_config.conf, "s3", {"anon": True, "endpoint_url": server.url})
        monkeypatch.setitem(fsspec_config.conf, "hf", {"endpoint": server.url})
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server, URLS[request.param].format("x-{0..2}.tar")
        server.shutdown()


def test_shards_of_a_service_are_the_same_images_and_labels_as_on_a_disk(shards):
    server, pattern = shards
    there, here = TarSource(pattern), TarSource(f"{server.folder}/bucket/x-{{0..2}}.tar")
    assert (there.labels, there.classes, there.name) == (here.labels, here.classes, here.name)
    assert all(torch.equal(there.read(i), here.read(i)) for i in range(12))
    assert all(fact.tag for fact in remote._facts(pattern, remote.check_shards(pattern)))


def test_an_image_of_a_service_is_one_request_for_its_own_bytes(shards):
    server, pattern = shards
    source = TarSource(pattern)
    source.read(0)
    server.asked.clear()
    source.read(1)
    start = 512 + 2048  # the first image and its label take two blocks each
    assert [(path, span) for _, path, span in server.asked] == [
        ("/bucket/x-0.tar", f"bytes={start}-{start + len(PNGS[1]) - 1}")
    ]


def test_a_service_that_fails_now_and_then_loses_no_image_and_gives_none_twice(shards):
    server, pattern = shards
    here = TarSource(f"{server.folder}/bucket/x-{{0..2}}.tar")
    server.fault = lambda number: 503 if number % 3 == 1 else None
    there = TarSource(pattern)
    assert (there.labels, there.damaged) == (here.labels, [])
    assert all(torch.equal(there.read(i), here.read(i)) for i in range(0, 12, 3))


@pytest.mark.parametrize(("fault", "told"), [(403, "Forbidden"), ("whole", "with more than that")])
def test_a_service_that_refuses_is_asked_once_and_ends_the_run(shards, fault, told):
    server, pattern = shards
    source = TarSource(pattern)
    source.read(0)
    server.asked.clear()
    server.fault = lambda number: fault
    with pytest.raises(NothingReadableError, match=told):
        source.read(1)
    assert len(server.asked) == 1


def test_what_a_service_does_not_have_or_does_not_give_is_told_in_three_lines(shards):
    server, pattern = shards
    with pytest.raises(UserError, match=r"2 of 2 tar files are missing, first .*y-0.tar"):
        TarSource(pattern.replace("x-{0..2}", "y-{0..1}"))
    server.fault = lambda number: 403
    for files in ("s3fs.S3FileSystem", "huggingface_hub.HfFileSystem"):
        module, name = files.split(".")
        getattr(__import__(module), name).clear_instance_cache()  # the hub's listing of a moment ago
    with pytest.raises(UserError, match=r"cannot be read\nwhy: .*Forbidden.*\ntry: .*(AWS|HF_TOKEN)") as mistake:
        TarSource(pattern)
    assert not re.search(r"\n.*\n.*\n", str(mistake.value))
