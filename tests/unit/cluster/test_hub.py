"""Models of a hub, played by a local HTTP server that speaks the parts of its API that a download uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from shoal.cluster import hub
from shoal.cluster.config import load_config, locate_model, model_name, parse_config
from shoal.engine.config import ConfigError

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "README.md": b"# tiny",
    "model.safetensors": b"\0" * 5000,
    "onnx/config.json": b"{}",
    "tiny.Q4_1.gguf": b"GGUF" + b"\0" * 300,
    "tiny.Q8_0.gguf": b"GGUF" + b"\0" * 600,
}


class PlayedHub(BaseHTTPRequestHandler):
    """Has org/tiny, a repository that is gated, and one whose first two answers are 503."""

    asked: Counter[str]
    tokens: set[str | None]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked[path] += 1
        self.tokens.add(self.headers["authorization"])
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo == "org/gated":
            self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif repo == "org/weak" and sum(self.asked.values()) <= 2:
            self._send(503, b"")
        elif repo not in ("org/tiny", "org/weak"):
            self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/") and "/revision/" in path:
            if path.rpartition("/")[2] in ("main", "v1", COMMIT):
                siblings = [{"rfilename": name} for name in FILES]
                self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
            else:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in FILES.items()
            ]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in FILES]
            self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            data = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
            self._send(200, data, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What the hub was asked for, by path."""
    PlayedHub.asked, PlayedHub.tokens = Counter(), set()
    with ThreadingHTTPServer(("127.0.0.1", 0), PlayedHub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        # HF_ENDPOINT and HF_HOME, as they were when huggingface_hub was imported.
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(hub, "FIRST_PAUSE_S", 0.01)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield PlayedHub.asked
        server.shutdown()
        thread.join()


def fetched(asked: Counter[str]) -> set[str]:
    return {path.partition("/resolve/")[2].partition("/")[2] for path in asked if "/resolve/" in path}


def test_only_what_a_replica_needs_is_fetched_and_only_once(asked: Counter[str]) -> None:
    told: list[tuple[str, int, int]] = []
    path = locate_model("hf://org/tiny", on_progress=lambda *progress: told.append(progress))
    assert {file.name for file in Path(path).iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (Path(path) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert fetched(asked) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert told[-1][0] == "downloading"
    assert told[-1][1] == told[-1][2] == sum(len(FILES[name]) for name in fetched(asked))
    assert "Bearer hf_secret" in PlayedHub.tokens
    before = asked.total()
    assert locate_model(hub.pinned("hf://org/tiny", path)) == path
    assert asked.total() == before


def test_a_gateway_fetches_the_tokenizer_only(asked: Counter[str]) -> None:
    path = locate_model("hf://org/tiny@v1", has_weights=False)
    assert {file.name for file in Path(path).iterdir()} == {"config.json", "tokenizer.json"}


def test_a_gguf_file_is_fetched_alone(asked: Counter[str]) -> None:
    path = locate_model("hf://org/tiny/tiny.Q4_1.gguf", has_weights=False)
    assert Path(path).read_bytes() == FILES["tiny.Q4_1.gguf"]
    assert fetched(asked) == {"tiny.Q4_1.gguf"}
    assert hub.pinned("hf://org/tiny/tiny.Q4_1.gguf", path) == f"hf://org/tiny@{COMMIT}/tiny.Q4_1.gguf"


def test_a_hub_that_fails_for_a_moment_is_asked_again(asked: Counter[str]) -> None:
    assert Path(locate_model("hf://org/weak")).is_dir()


def test_the_cache_serves_when_the_hub_is_gone(asked: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = locate_model("hf://org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate_model("hf://org/tiny") == path
    with pytest.raises(ConfigError, match=r"cannot get hf://org/weak, and it is not in the cache.*offline"):
        locate_model("hf://org/weak")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf://org/none", "the hub has no model org/none"),
        ("hf://org/gated", "gated: accept its terms on its page, and set HF_TOKEN"),
        ("hf://org/tiny@v9", "org/tiny has no revision v9"),
        ("hf://org/tiny/none.gguf", "hf://org/tiny/none.gguf is not there; there are tiny.Q4_1.gguf, tiny.Q8_0.gguf"),
        ("hf://tiny", "names no model of a hub: write hf://organization/name"),
    ],
)
def test_what_cannot_be_had_says_why_before_anything_is_deployed(
    asked: Counter[str], reference: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        hub.check(reference)


def test_a_check_fetches_no_weights(asked: Counter[str]) -> None:
    hub.check("hf://org/tiny")
    hub.check("hf://org/tiny/tiny.Q4_1.gguf")
    assert fetched(asked) == {"config.json", "tokenizer.json"}


def test_a_reference_stays_one_in_a_configuration(tmp_path: Path) -> None:
    (model,) = parse_config({"models": [{"model": "hf://org/Tiny@v1"}]}, folder=tmp_path).models
    assert (model.name, model.model) == ("tiny", "hf://org/Tiny@v1")
    assert load_config("hf://org/Tiny").models[0].model == "hf://org/Tiny"
    assert model_name("hf://org/Tiny/tiny.Q4_1.gguf") == "tiny.q4_1"
    with pytest.raises(ConfigError, match="a model of Hugging Face as hf://organization/name"):
        locate_model("org/tiny")
