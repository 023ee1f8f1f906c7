"""The `shoal` command: arguments, errors of one line before anything starts, and talking to a server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster import cli
from shoal.cluster.channel import GroupStatus, Progress
from shoal.cluster.commands.serve import announcement, check_port
from shoal.cluster.config import base_url
from shoal.cluster.gateway.responses import encode
from shoal.cluster.metrics import ReplicaMetrics, render
from shoal.cluster.progress import ProgressReceiver, ProgressSender
from shoal.engine.config import ConfigError, SpeculativeOptions
from shoal.engine.executor import RankInfo
from shoal.engine.request import DraftCounts, EngineStats

RANKS = (
    RankInfo(0, 0, "10.0.0.1", 11, "AMD EPYC", 0, 15, weight_bytes=2**20, kv_bytes=2**21),
    RankInfo(1, 0, "10.0.0.2", 12, "AMD EPYC", 15, 15, weight_bytes=2**22, kv_bytes=2**21),
)

DRAFTS = DraftCounts(1, 5, (1, 1, 1, 0, 0))


TIMELINE: dict[str, Any] = {
    "request_id": "mine", "model": "m", "outcome": "finished", "status": 200, "seconds": 4.0, "ttft_s": 3.0,
    "num_prompt_tokens": 3100, "num_cached_tokens": 0, "num_output_tokens": 9, "num_preemptions": 0,
    "explanation": ["2.0 s of 4.0 s: held in the gateway, 14 calls of 3 tenants were there already"],
    "spans": [
        {"name": "read", "start_s": 0.0, "end_s": 0.001, "spans": []},
        {"name": "call", "start_s": 0.001, "end_s": 4.0, "spans": [
            {"name": "held", "start_s": 0.0, "end_s": 2.0, "spans": []},
            *({"name": "prefill", "start_s": 2 + i / 8, "end_s": 2 + (i + 1) / 8, "spans": []} for i in range(8)),
            {"name": "decode", "start_s": 3.0, "end_s": 4.0, "spans": []},
        ]},
    ],
}  # fmt: skip


class FakeServer(BaseHTTPRequestHandler):
    """Answers as a gateway and the admin port do; remembers the bodies it was sent."""

    bodies: list[dict[str, Any]] = []  # noqa: RUF012  (the fixture empties it)
    keys: list[str | None] = []  # noqa: RUF012
    groups: tuple[GroupStatus, ...] = (GroupStatus("running", "0", num_blocks=9, block_size=16, ranks=RANKS),)

    def do_GET(self) -> None:
        metrics = render({("m", "0"): ReplicaMetrics().snapshot(EngineStats(num_running=2, drafts=DRAFTS))})
        answers = {
            "/v1/models": json.dumps({"data": [{"id": "m", "max_model_len": 64}]}),
            "/status": encode({"models": [{"name": "m", "max_model_len": 64, "groups": self.groups}]}).decode(),
            "/metrics": metrics,
            "/debug/requests/mine": json.dumps(TIMELINE),
            "/debug/requests?limit=20": json.dumps(
                {"recent": [], "slowest": [{**TIMELINE, "reason": "a long prompt"}]}
            ),
        }
        if self.path in answers:
            self._answer(200, answers[self.path].encode())
        else:
            self._answer(404, b'{"error": {"message": "no gateway knows that request"}}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.keys.append(self.headers["authorization"])
        self.bodies.append(body)
        if body["model"] != "m":
            self._answer(404, b'{"error": {"message": "there is no model x", "code": "model_not_found"}}')
            return
        events = [{"choices": [{"delta": {"content": part}}]} for part in ("Hello", " you")]
        if body["messages"][-1]["content"] == "fail":
            events.append({"error": {"message": "the replica failed"}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        self._answer(200, "".join([*lines, "data: [DONE]\n\n"]).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    FakeServer.bodies.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "command",
    [
        [], ["serve"], ["deploy"], ["delete"], ["drain"], ["config"], ["ray-env"], ["plan"], ["chat"], ["status"],
        ["why"],
    ],
)  # fmt: skip
def test_help_is_worth_reading(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    assert not command or "examples:" in capsys.readouterr().out


def test_why_says_it_in_words_and_bars(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["why", "mine", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine: m, finished with status 200 after 4.00 s, first token after 3.00 s"
    assert "  2.0 s of 4.0 s: held in the gateway, 14 calls of 3 tenants were there already" in lines
    bars = {line.split("|")[0].strip(): line.split("|")[1] for line in lines if "|" in line}
    assert list(bars) == ["call", "held", "prefill x8", "decode"], "what is too short to see has no line"
    assert bars["held"] == "#" * 24 + " " * 24
    assert bars["prefill x8"] == " " * 24 + "#" * 12 + " " * 12
    assert bars["decode"] == " " * 36 + "#" * 12


def test_why_without_an_id_lists_the_slowest(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["why", "--url", url]) == 0
    assert capsys.readouterr().out == "  4.00 s  mine  m  a long prompt\n"
    assert cli.main(["why", "mine", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TIMELINE


def test_why_of_an_unknown_request_is_an_error_of_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["why", "a/../b", "--url", url]) == 1
    assert capsys.readouterr().err == "shoal: error: no gateway knows that request\n"


def test_arguments_become_configuration() -> None:
    model_arguments = ["--model-name", "tiny", "--dtype", "fp32", "--kv-memory", "1GiB", "--replicas", "2"]
    shape = ["--tensor-parallel", "3", "--pipeline-parallel", "2", "--num-threads", "3"]
    nodes = ["--stages", "strict_spread", "--node-labels", "zone=a,ray.io/accelerator-type=H100"]
    args = cli.build_parser().parse_args(["serve", "--port", "9001", *model_arguments, *shape, *nodes])
    config = cli.serve_config(args)
    model = config.models[0]
    assert (config.http.port, model.name, model.replicas) == (9001, "tiny", 2)
    assert (model.engine.dtype, model.engine.kv_memory, model.engine.num_threads) == ("fp32", 2**30, 3)
    assert (model.tensor_parallel, model.pipeline_parallel) == (3, 2)
    assert model.nodes.stages == "strict_spread"
    assert model.nodes.labels == {"zone": "a", "ray.io/accelerator-type": "H100"}


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("ngram", SpeculativeOptions(method="ngram")),
        (
            "method=suffix,num_speculative_tokens=4,adaptive=false",
            SpeculativeOptions(method="suffix", num_speculative_tokens=4, adaptive=False),
        ),
    ],
)
def test_speculation_is_a_method_or_settings(argument: str, options: SpeculativeOptions) -> None:
    config = cli.serve_config(cli.build_parser().parse_args(["serve", "--speculative", argument]))
    assert config.models[0].options("m").speculative == options


def test_a_draft_model_on_the_command_line_is_relative_to_the_current_folder() -> None:
    arguments = ["serve", "--speculative", "method=draft_model,model=draft.gguf"]
    (model,) = cli.serve_config(cli.build_parser().parse_args(arguments)).models
    assert model.speculative is not None
    assert model.speculative.model == str(Path.cwd() / "draft.gguf")


def test_labels_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--node-labels", "zone"])
    assert "write KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/model"], "there is no no/such/model"),
        (["--port", "0"], "http.port"),
        (["--port", "65535"], "admin.port would be 65536, the one after http.port"),
        (["--port", "9000", "--admin-port", "9000"], "admin.port and http.port are both 9000"),
        (["--kv-memory", "much"], "'much' is no amount of memory"),
        (["--dtype", "int3"], "dtype 'int3' is not known"),
        (["--max-model-len", "1000000"], "max_model_len 1000000 is longer than the 8192 positions"),
        (["--stages", "near"], "models[0].nodes.stages"),
        (["--speculative", "magic"], "models[0].speculative.method"),
        (["--speculative", "method=draft_model,model=no/such/draft"], "speculative.model: there is no"),
        (["--routing", "best"], "there is no routing policy 'best'"),
        (["--tensor-parallel", "4"], "4 tensor ranks cannot share 9 heads with 3 KV heads"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ports = [] if "--port" in arguments else ["--port", str(_free_port()), "--admin-port", str(_free_port())]
    assert cli.main(["serve", *ports, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("shoal: error: ")
    assert len(error.splitlines()) == 1
    assert "ray" not in error


def test_a_keys_file_that_is_not_there_or_wrong_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "shoal.yaml"
    config.write_text(
        f"auth: {{keys_file: keys.yaml}}\nhttp: {{port: {_free_port()}}}\nadmin: {{port: {_free_port()}}}"
    )
    assert cli.main(["serve", str(config)]) == 2
    assert f"there is no {tmp_path / 'keys.yaml'}: make its first key with" in capsys.readouterr().err
    (tmp_path / "keys.yaml").write_text("keys:\n- id: a\n")
    assert cli.main(["serve", str(config)]) == 2
    assert f"{tmp_path / 'keys.yaml'}:2: keys[0].tenant: field required" in capsys.readouterr().err


def test_a_port_in_use_is_refused_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port} .*--port"):
            check_port("127.0.0.1", port)
        assert cli.main(["serve", "--port", str(_free_port()), "--admin-port", str(port)]) == 2
        assert f"127.0.0.1:{port}" in (error := capsys.readouterr().err)
        assert "choose another admin.port with --admin-host or --admin-port" in error
    check_port("127.0.0.1", port)


def test_the_announcement_can_be_pasted() -> None:
    text = announcement(base_url("0.0.0.0", 8000), base_url("127.0.0.1", 8001), "m", 12.34)
    assert "ready after 12.3 s" in text
    assert "http://127.0.0.1:8001\n" in text
    command = next(line for line in text.splitlines() if "curl" in line).split(" -d ")
    assert "http://127.0.0.1:8000/v1/chat/completions" in command[0]
    assert json.loads(command[1].strip("'"))["model"] == "m"


def test_chat_prints_one_answer(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["chat", "--url", url, "-m", "hi", "--system", "be kind", "--temperature", "0"])
    assert (code, capsys.readouterr().out) == (0, "Hello you\n")
    body = FakeServer.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert (body["model"], body["temperature"], "max_tokens" in body) == ("m", 0.0, False)


def test_commands_send_the_key_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeServer.keys.clear()
    assert cli.main(["chat", "--url", url, "-m", "Hi"]) == 0
    monkeypatch.setenv("SHOAL_API_KEY", "sk-shoal-x")
    assert cli.main(["chat", "--url", url, "-m", "Hi"]) == 0
    assert set(FakeServer.keys) == {None, "Bearer sk-shoal-x"}


def test_a_conversation_remembers_until_reset(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["one", "two", "/reset", "three", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert cli.main(["chat", "--url", url]) == 0
    asked = [[message["content"] for message in body["messages"]] for body in FakeServer.bodies]
    assert asked == [["one"], ["one", "Hello you", "two"], ["three"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--model", "x"], "there is no model x"), (["-m", "fail"], "the replica failed")],
)
def test_the_servers_own_words_are_shown(
    url: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", "--url", url, "-m", "hi", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_no_server_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["chat", "-m", "hi"], ["status"]):
        assert cli.main([*command, "--url", f"http://127.0.0.1:{_free_port()}"]) == 1
        assert "start one with `shoal serve`" in capsys.readouterr().err


def test_status_shows_every_rank_of_every_group(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--url", url, "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["models"][0]["groups"]
    assert (group["state"], group["running"], [rank["pid"] for rank in group["ranks"]]) == ("running", 2, [11, 12])
    assert cli.main(["status", "--url", url]) == 0
    shown = capsys.readouterr().out
    assert "replica 0: 144 KV tokens, 0.0% used; 2 running" in shown
    assert "3 of 5 drafts accepted" in shown
    assert "stage 1 rank 0: 10.0.0.2 pid 12, AMD EPYC, layers 15-29, weights 4 MiB, KV 2 MiB" in shown


def test_a_group_that_is_not_up_is_shown_and_not_healthy(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeServer, "groups", (*FakeServer.groups, GroupStatus("starting")))
    assert cli.main(["status", "--url", url]) == 1
    shown = capsys.readouterr().out
    assert "NOT HEALTHY" in shown
    assert "2 replica(s)" in shown
    assert "replica: starting" in shown


def test_progress_reaches_the_starting_command_and_never_blocks_without_it() -> None:
    with ProgressReceiver("127.0.0.1") as receiver, ProgressSender(receiver.address, "m") as sender:
        sender.send("loading weights", 1, 2)
        sender.fail("no memory")
        assert receiver.receive(2.0) == Progress("m", "loading weights", 1, 2)
        last = receiver.receive(2.0)
        assert last is not None
        assert last.error == "no memory"
        assert receiver.receive(0.01) is None
    for address in (None, receiver.address):
        with ProgressSender(address, "m") as sender:
            sender.send("loading weights", 1, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_orphans_are_found_and_ended() -> None:
    script = """
import subprocess, sys
from shoal.cluster.commands.processes import adopt_orphans, descendants, end_descendants
adopt_orphans()
sleeper = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
subprocess.run([sys.executable, "-c", sleeper], check=True)
print(len(descendants()), end_descendants(0.0), len(descendants()))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["1", "1", "0"]


def test_the_command_starts_without_ray_or_torch() -> None:
    script = (
        "import sys, shoal.cluster.cli as cli; cli.build_parser(); "
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert answer.stdout.strip() == "[]"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
