"""`ray job submit` brings a model up on a running Ray, an update under load loses nothing, and delete drains."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")]

COMMAND_TIMEOUT_S = 180.0  # on a busy two-core machine
ANSWER_TIMEOUT_S = 120.0
PROMPTS = ("The capital of France is", "Count: 1, 2, 3,", "Once upon a time", "The sun is")
MAX_TOKENS = 24
PAUSE_S = 0.3  # of a client between two requests: what starts needs the cores too


def free_ports(count: int) -> list[int]:
    """Outside the range that Ray's workers take theirs from."""
    probes: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        while len(probes) < count:
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(10_000)))
                probes.append(probe)
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """Ray with a dashboard, started as its operator would, with Shoal not known to its nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        gcs, self.dashboard, agent, client, metrics, stats, fallback, self.http = free_ports(8)
        self.address = f"127.0.0.1:{gcs}"
        exported = self._shoal("ray-env").splitlines()
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **dict(line.removeprefix("export ").replace("'", "").split("=", 1) for line in exported),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # What several Rays on one machine would share.
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        }
        self.process = subprocess.Popen(
            [
                self._ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
                f"--dashboard-port={self.dashboard}", f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}", "--num-cpus=4", "--object-store-memory=100000000",
            ],
            env=self.environment, cwd=folder, start_new_session=True,
            stdout=(folder / "ray.txt").open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @contextlib.contextmanager
    def second_node(self) -> Iterator[dict[str, str]]:
        """Another node, on this machine too; answers the environment of a command on it."""
        http, metrics, stats, agent = free_ports(4)
        environment = {
            **self.environment,
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(http),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "PYTHONPATH": str(ROOT / "src"),
        }
        node = subprocess.Popen(
            [
                self._ray, "start", "--block", f"--address={self.address}", "--node-ip-address=127.0.0.1",
                f"--dashboard-agent-listen-port={agent}", "--num-cpus=2", "--labels=node=second",
                "--object-store-memory=100000000",
            ],
            env=environment, cwd=self._folder, start_new_session=True,
            stdout=(self._folder / "second.txt").open("wb"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield environment
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As a job whose working directory has the configuration and nothing else."""
        jobs = self._folder / "jobs"
        for attempt in range(30):  # the dashboard and its agent take some seconds to be there
            done = subprocess.run(
                [
                    self._ray, "job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}",
                    "--runtime-env", "deploy/ray/runtime_env.yaml", "--working-dir", str(jobs), "--",
                    "python", "-m", "shoal.cluster.cli", *command,
                ],
                cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S,
            )  # fmt: skip
            if not any(word in done.stderr for word in ("Failed to connect", "No available agent")) or attempt == 29:
                return done
            time.sleep(1.0)
        raise AssertionError("the last attempt answers")

    def deploy(self, **config: Any) -> str:
        """Submit this configuration; answers what the job printed."""
        done = self.try_deploy(**config)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.log}"
        return done.stdout

    def try_deploy(self, timeout_s: float = 150, **config: Any) -> subprocess.CompletedProcess[str]:
        self._file.parent.mkdir(exist_ok=True)
        http = {"host": "127.0.0.1", "port": self.http}
        self._file.write_text(yaml.safe_dump({"http": http, **config}))
        return self.submit("deploy", self._file.name, "--timeout", str(timeout_s))

    def rendered(self) -> dict[str, Any]:
        """The configuration that was submitted last, for Serve's own tool."""
        rendered: dict[str, Any] = yaml.safe_load(self._shoal("config", "render", str(self._file)))
        rendered["applications"][0]["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT / "src")}}
        return rendered

    def serve_deploy(self, rendered: dict[str, Any]) -> None:
        """`serve deploy`, and until it runs."""
        url = f"http://127.0.0.1:{self.dashboard}/api/serve/applications/"
        headers = {"authorization": f"Bearer {self._session}"}
        assert httpx.put(url, json=rendered, headers=headers, timeout=60).status_code == 200
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        status = ""
        while status != "RUNNING":
            assert status != "DEPLOY_FAILED"
            assert time.monotonic() < deadline, status
            time.sleep(0.5)
            status = httpx.get(url, headers=headers, timeout=60).json()["applications"]["shoal"]["status"]

    @property
    def _file(self) -> Path:
        return self._folder / "jobs" / "cluster.yaml"

    @property
    def log(self) -> str:
        return (self._folder / "ray.txt").read_text()

    def workers(self) -> dict[int, str]:
        """Gateways, replicas and the admin port's process: process id and title."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                own = f"{self._session}" in (folder / "environ").read_text(errors="replace")
                if title.startswith("ray::ServeReplica:shoal:") and own:
                    found[int(folder.name)] = title
        return found

    @property
    def _session(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def kill(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def _ray(self) -> str:
        return str(Path(sys.executable).with_name("ray"))

    @staticmethod
    def _shoal(*arguments: str) -> str:
        command = [sys.executable, "-m", "shoal.cluster.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster
    finally:
        cluster.kill()


@dataclass
class Load(threading.Thread):
    """Clients that ask again and again, half of them streaming, each time on a new connection, until `stop`."""

    url: str
    answers: list[tuple[str, str]] = field(default_factory=list)  # prompt, text
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._is_over = threading.Event()

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        asyncio.run(self._all())

    def stop(self) -> None:
        self._is_over.set()
        self.join(ANSWER_TIMEOUT_S)
        assert not self.is_alive(), "a client hangs"

    async def _all(self) -> None:
        await asyncio.gather(*(self._client(prompt, number % 2 == 0) for number, prompt in enumerate(PROMPTS)))

    async def _client(self, prompt: str, is_stream: bool) -> None:
        while not self._is_over.is_set():
            try:
                async with httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S) as client:
                    self.answers.append((prompt, await ask(client, self.url, prompt, is_stream=is_stream)))
                await asyncio.sleep(PAUSE_S)
            except Exception as error:
                self.failures.append(f"{'stream' if is_stream else 'plain'}: {error!r}")


async def ask(client: httpx.AsyncClient, url: str, prompt: str, *, is_stream: bool, model: str = "demo") -> str:
    """The greedy continuation. Raises AssertionError for anything else than a whole answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": is_stream}
    if not is_stream:
        answer = await client.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return str(answer.json()["choices"][0]["text"])
    text = ""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        assert answer.status_code == 200, f"{answer.status_code}: {await answer.aread()!r}"
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line:
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["text"]
    raise AssertionError(f"the stream ended early: {text!r}")


def model(name: str = "demo", **settings: Any) -> dict[str, Any]:
    engine = {"device": "cpu", "num_threads": 1, "kv_memory": "128MiB", "max_model_len": 1024}
    return {"name": name, "engine": {**engine, **settings.pop("engine", {})}, **settings}


async def expected(url: str) -> dict[str, str]:
    async with httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S) as client:
        return {prompt: await ask(client, url, prompt, is_stream=False) for prompt in PROMPTS}


def by_name(workers: dict[int, str], name: str) -> set[int]:
    return {pid for pid, title in workers.items() if f":{name}" in title}


def test_a_model_comes_up_changes_under_load_and_goes(cluster: Cluster) -> None:
    """One story, because bringing a cluster up takes longest: each step begins with what the last one left."""
    output = cluster.deploy(models=[model()])
    assert "ready after" in output
    first = cluster.workers()
    assert len(by_name(first, "replica-demo")) == len(by_name(first, "gateway")) == 1, first

    with under_load(cluster) as load:
        cluster.deploy(models=[model(engine={"max_running_requests": 8}, objectives={"ttft_ms": 60_000})])
        second = wait_for_workers(cluster, 3)
        assert not by_name(second, "replica-demo") & by_name(first, "replica-demo")
        assert not by_name(second, "gateway") & by_name(first, "gateway")
        assert by_name(second, "admin") == by_name(first, "admin")
    assert len(load.answers) > 2 * len(PROMPTS)

    deleted = asyncio.run(delete_while_streaming(cluster))
    assert "deleted" in deleted
    assert cluster.workers() == {}


@contextlib.contextmanager
def under_load(cluster: Cluster) -> Iterator[Load]:
    """Clients ask all the while, and each of them gets what it gets when nothing else happens."""
    texts = asyncio.run(expected(cluster.url))
    load = Load(cluster.url)
    load.start()
    try:
        yield load
    finally:
        load.stop()
    assert not load.failures, load.failures[:5]
    assert {answer for answer in load.answers if texts[answer[0]] != answer[1]} == set()


def wait_for_workers(cluster: Cluster, count: int) -> dict[int, str]:
    """Once those that were replaced have finished what they had."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while len(workers := cluster.workers()) != count:
        assert time.monotonic() < deadline, workers
        time.sleep(0.1)
    return workers


async def delete_while_streaming(cluster: Cluster) -> str:
    """A stream that has begun ends, and what comes after is told to come back; answers what the job printed."""
    body = {
        "model": "demo",
        "prompt": "Count:",
        "max_tokens": 150,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    async with (
        httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S) as client,
        client.stream("POST", f"{cluster.url}/v1/completions", json=body) as answer,
    ):
        lines = answer.aiter_lines()
        await anext(lines)
        job = asyncio.create_task(asyncio.to_thread(cluster.submit, "delete"))
        refused = None
        async for line in lines:
            if line == "data: [DONE]":
                break
            if refused is None:
                probe = await client.get(f"{cluster.url}/health")
                refused = probe if probe.status_code == 503 else None
        else:
            raise AssertionError("the stream was cut off")
        if refused is not None:  # else the stream was faster than the job
            assert refused.json()["error"]["code"] == "draining"
            assert int(refused.headers["retry-after"]) > 0
    done = await job
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_models_and_replicas_come_and_go_under_load(cluster: Cluster) -> None:
    cluster.deploy(models=[model()])
    with under_load(cluster):
        changed = model(engine={"max_running_requests": 8}, replicas=2, drain_timeout=60)
        cluster.deploy(models=[model("other"), changed])
        first = wait_for_workers(cluster, 5)
        # What stays the same goes on: all but a replica that is one too many.
        cluster.deploy(models=[model("other"), {**changed, "replicas": 1}])
        assert wait_for_workers(cluster, 4).keys() <= first.keys()
    assert cluster.submit("delete", "--shutdown-serve").returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_same_again_restarts_nothing_and_a_model_may_go(cluster: Cluster) -> None:
    cluster.deploy(models=[model(), model("other")])
    first = cluster.workers()
    with under_load(cluster):
        cluster.deploy(models=[model(), model("other")])
        assert cluster.workers().keys() == first.keys()
        refused = cluster.submit("deploy", "none.yaml")
        assert refused.returncode != 0
        assert "there is no none.yaml" in refused.stdout + refused.stderr
        cluster.deploy(models=[model()])
        assert by_name(wait_for_workers(cluster, 3), "replica-demo") == by_name(first, "replica-demo")
    assert cluster.submit("delete", "--shutdown-serve").returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_serves_own_tool_deploys_the_same_application(cluster: Cluster) -> None:
    """`serve deploy` of the rendered file over `shoal deploy`, and back, under load."""
    cluster.deploy(models=[model()])
    with under_load(cluster):
        cluster.serve_deploy(cluster.rendered())
        before = cluster.workers()
        scaled = cluster.rendered()
        scaled["applications"][0]["deployments"][0]["num_replicas"] = 2
        cluster.serve_deploy(scaled)
        assert before.keys() <= wait_for_workers(cluster, 4).keys()
        cluster.deploy(models=[model()])
        wait_for_workers(cluster, 3)
    assert cluster.submit("delete", "--shutdown-serve").returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_without_room_the_old_replica_goes_first_and_requests_wait(cluster: Cluster) -> None:
    cluster.deploy(models=[model(max_surge=0)])
    with under_load(cluster):
        cluster.deploy(models=[model(max_surge=0, engine={"max_running_requests": 8})])
    assert cluster.submit("delete", "--shutdown-serve").returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_version_that_cannot_start_leaves_the_old_one_serving(cluster: Cluster) -> None:
    cluster.deploy(models=[model()])
    first = by_name(cluster.workers(), "replica-demo")
    failed = cluster.try_deploy(20, models=[model(resources={"num_cpus": 64})])
    assert failed.returncode != 0
    assert "not running when the time was up" in failed.stdout + failed.stderr
    assert by_name(cluster.workers(), "replica-demo") >= first
    asyncio.run(expected(cluster.url))
    cluster.deploy(models=[model()])
    assert by_name(cluster.workers(), "replica-demo") == first
    assert cluster.submit("delete", "--shutdown-serve").returncode == 0


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_node_that_is_drained_loses_no_request(cluster: Cluster) -> None:
    """Its replica and its gateway move; the load goes to the head's port, whose proxy knows the gateways of both."""
    with cluster.second_node() as environment:
        cluster.deploy(models=[model(replicas=2)], gateways=2)
        with under_load(cluster):
            drained = subprocess.run(
                [sys.executable, "-m", "shoal.cluster.cli", "drain", "--timeout", "120"],
                env={**environment, "RAY_ADDRESS": cluster.address}, capture_output=True, text=True, timeout=180,
            )  # fmt: skip
        print(drained.stdout, drained.stderr)
        assert drained.returncode == 0
    assert cluster.submit("delete", "--shutdown-serve").returncode == 0
