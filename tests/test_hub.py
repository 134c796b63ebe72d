"""The Hugging Face Hub, played by a server on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm

from mim.hub import upload
from mim.interop import ModelCard, export_backbone


class Hub(BaseHTTPRequestHandler):
    """Takes a repository and a commit, and keeps what it is sent."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, body))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/someone/model"}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {**each, "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/someone/model/commit/1", "commitOid": "1"}
        else:
            answer = {}
        self._answer(answer)

    def do_GET(self):
        self._answer({"siblings": [], "id": "someone/model", "sha": "0"})

    def _answer(self, content):
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.address = [], f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def folder(tmp_path):
    vit = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0)
    export_backbone(vit, tmp_path / "x", mean=[0.5] * 3, std=[0.5] * 3, card=ModelCard("MAE", "photos"))
    return tmp_path / "x"


def test_a_folder_is_pushed_whole_into_a_private_repository(hub, folder):
    assert upload(folder, "someone/model").endswith("/someone/model")
    asked = dict(hub.asked)
    created = json.loads(asked["/api/repos/create"])
    assert created["name"] == "model"
    assert created.get("private") or created["visibility"] == "private"  # by version of huggingface_hub
    (commit,) = (body for path, body in hub.asked if "/commit/" in path)
    files = [json.loads(line)["value"] for line in commit.splitlines() if json.loads(line)["key"] == "file"]
    sent = {each["path"]: base64.b64decode(each["content"]) for each in files}
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_hub_that_cannot_be_reached_is_one_kind_of_error(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError):
        upload(folder, "someone/model")
