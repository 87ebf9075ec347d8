"""Pushing by huggingface_hub's own client to a server on this machine that answers as the hub does."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from decm_lightning import cli
from decm_lightning.networks import DiT, save

REFUSED = {"error": "You don't have the rights to create a model under the namespace someone"}


class Hub(ThreadingHTTPServer):
    """Remembers the repository and the files that it receives; `status` is its answer to a new repository."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.created, self.files, self.tokens = 200, [], {}, set()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The hub's interface for a new repository and a commit."""

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["content-length"] or 0))
        hub.tokens.add(self.headers["authorization"])
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            answer = {"url": f"{hub.url}/someone/student"} if hub.status == 200 else REFUSED
            return self.send(hub.status, answer)
        if self.path == "/api/models/someone/student/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.send(200, {"files": [{"path": path, **plain} for path in files]})
        if self.path == "/api/models/someone/student/commit/main":
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            hub.files |= {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
            commit = {"commitUrl": f"{hub.url}/someone/student/commit/1", "commitOid": "1"}
            return self.send(200, commit)
        return self.send(200, {})

    def do_GET(self):
        self.send(404, {})

    def send(self, status, answer):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """A function that exports a network: (exit code, out, err)."""
    torch.manual_seed(0)
    save(DiT(8, 1, patch_size=4, width=16, depth=1, heads=2, num_classes=3), tmp_path / "trained")
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["decm", "export", "trained", *argv])
        code = cli.main()
        return code, *capsys.readouterr()

    return run


def written(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_the_written_files_are_pushed_and_no_others(export, hub):
    Path("student").mkdir()
    Path("student/secret.txt").write_text("mine")
    code, out, _ = export("student", "--push", "someone/student")
    assert code == 0
    assert f"{hub.url}/someone/student" in out
    assert hub.files == {name: content for name, content in written("student").items() if name != "secret.txt"}
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md", "samples.png"}
    assert 'load("someone/student")' in hub.files["README.md"].decode()
    assert hub.tokens == {"Bearer hf_mine"}


@pytest.mark.parametrize(("argv", "visibility"), [([], "private"), (["--public", "true"], "public")])
def test_a_new_repository_is_private_unless_asked(argv, visibility, export, hub):
    assert export("student", "--push", "someone/student", "--samples", "false", *argv)[0] == 0
    # Older versions of huggingface_hub send a flag.
    told = {"visibility": visibility} if "visibility" in hub.created[0] else {"private": visibility == "private"}
    assert hub.created == [{"name": "student", "organization": "someone", **told}]


def test_the_card_of_a_single_file_becomes_the_readme(export, hub):
    assert export("a.safetensors", "--to", "safetensors", "--push", "someone/student")[0] == 0
    assert set(hub.files) == {"a.safetensors", "README.md", "a.png"}
    assert "(a.png)" in hub.files["README.md"].decode()


def test_an_edited_card_is_pushed_as_it_is(export, hub, caplog):
    Path("student").mkdir()
    Path("student/README.md").write_text("mine")
    assert export("student", "--push", "someone/student")[0] == 0
    assert hub.files["README.md"] == b"mine"
    assert "student has a model card" in caplog.text


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(export, hub):
    hub.status = 403
    code, _, err = export("student", "--push", "someone/student")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert "student is written, but cannot be pushed to someone/student: " in line
    assert REFUSED["error"] in line
    assert set(written("student")) == {"config.json", "model.safetensors", "README.md", "samples.png"}


@pytest.mark.parametrize(
    ("changed", "cause"), [("token", "no token"), ("offline", "offline"), ("refused connection", "refused")]
)
def test_without_network_or_token_the_folder_stays(changed, cause, export, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    if changed == "token":
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
    if changed == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        from huggingface_hub import close_session

        # The client reads the mode when it opens.
        close_session()
    code, out, err = export("student", "--push", "someone/student", "--samples", "false")
    assert code == 2
    (line,) = err.strip().splitlines()
    assert "cannot be pushed to someone/student" in line
    assert cause in line
    assert "student/model.safetensors" in out
    assert set(written("student")) == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("name", ["student", "a/b/c", "/a", "a b/c"])
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_written(name, export):
    code, _, err = export("student", "--push", name)
    assert code == 2
    assert name in err
    assert not Path("student").exists()
