"""Three hosts on one machine, a group of two stages over two of them, and what clients see when a host is gone.

A host is a network namespace with an address of its own, on one bridge. `pytest -m soak tests/e2e/test_hosts.py -s`
prints the times.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import pytest

from shoal.cluster.config import EMBEDDED_MODEL, NODE_CHECK_ENV

_BRIDGE = "shoal-net"
_NETWORK = "10.231.77"


def missing() -> str | None:
    """Why this machine cannot play several hosts; None if it can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and the command `ip` (iproute2)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = subprocess.run(["ip", "netns", "add", "shoal-probe"], capture_output=True, text=True)
    if probe.returncode != 0:
        return f"no network namespaces here: {probe.stderr.strip()}"
    _ip("netns", "del", "shoal-probe")
    return None


class Host:
    """One of them. Its processes see only its network."""

    def __init__(self, number: int, environment: Mapping[str, str]) -> None:
        self.name = f"shoal-host{number}"
        self.address = f"{_NETWORK}.{number + 1}"
        self._link = f"shoal-link{number}"
        self._environment = {**os.environ, **environment}

    def make(self, undo: contextlib.ExitStack) -> None:
        _ip("netns", "add", self.name)
        undo.callback(_ip, "netns", "del", self.name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        undo.callback(_ip, "link", "del", self._link)
        undo.callback(self.kill)
        _ip("link", "set", self._link, "master", _BRIDGE, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", self.name, "link", "set", "lo", "up")

    def run(self, *command: str) -> None:
        done = subprocess.run(self._in_it(command), env=self._environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"

    def start(self, log: Path, *command: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                self._in_it(command), env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )

    def processes(self) -> set[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return {int(pid) for pid in found.stdout.split()}

    def cut(self) -> None:
        """Its packets go nowhere from now on, without a word to either side."""
        _ip("link", "set", self._link, "down")

    def join_again(self) -> None:
        _ip("link", "set", self._link, "up")

    def kill(self) -> None:
        """SIGKILL all that runs on it."""
        deadline = time.monotonic() + 10
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, pids
            time.sleep(0.05)

    def _in_it(self, command: tuple[str, ...]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]


class Hosts:
    """A number of hosts, as long as the context lasts. This process can reach them at their addresses."""

    def __init__(self, count: int, environment: Mapping[str, str]) -> None:
        self._hosts = [Host(number, environment) for number in range(count)]
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Hosts:
        try:
            _ip("link", "add", _BRIDGE, "type", "bridge")
            self._undo.callback(_ip, "link", "del", _BRIDGE)
            _ip("addr", "add", f"{_NETWORK}.254/24", "dev", _BRIDGE)
            _ip("link", "set", _BRIDGE, "up")
            for host in self._hosts:
                host.make(self._undo)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


_MISSING = missing()
pytestmark = [pytest.mark.soak, pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
              pytest.mark.timeout(900)]  # fmt: skip

PORT = 8000
WORKER = {"role": "worker"}
ERROR_BOUND_S = 20.0  # from the loss of a host to the answer or the error at every client
START_BOUND_S = 240.0
RETURN_BOUND_S = 120.0  # to the first answer of a new group, on a busy two-core machine
CONFIG = f"""
models:
  - name: {EMBEDDED_MODEL}
    pipeline_parallel: 2
    nodes: {{stages: strict_spread, labels: LABELS}}
    engine: {{num_threads: 1, kv_memory: 256MiB, device: cpu}}
gateway_labels: {{role: head}}
http: {{host: 0.0.0.0, port: {PORT}}}
admin: {{host: 0.0.0.0}}
ray: {{address: "ADDRESS"}}
"""


class Cluster:
    """Ray on all hosts. The gateway is on the first, the head; the others are labelled as workers."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.head, *self.others = hosts
        self.url = f"http://{self.head.address}:{PORT}"
        self.admin_url = f"http://{self.head.address}:{PORT + 1}"
        self._address = f"{self.head.address}:6379"
        self._folder = folder

    def start(self) -> None:
        begin = time.monotonic()
        self.head.run(*self._ray(self.head), "--head", "--port=6379", "--include-dashboard=false", "--labels=role=head")
        for host in self.others:
            self.join(host)
        print(f"\nRay on {1 + len(self.others)} hosts: {time.monotonic() - begin:.1f} s")

    @contextlib.contextmanager
    def serving(self, labels: list[dict[str, str]]) -> Iterator[None]:
        """`shoal serve` on the head, with a label selector for each stage."""
        config, log = self._folder / "cluster.yaml", self._folder / "serve.txt"
        config.write_text(CONFIG.replace("ADDRESS", self._address).replace("LABELS", json.dumps(labels)))
        begin = time.monotonic()
        server = self.head.start(log, sys.executable, "-m", "shoal.cluster.cli", "serve", str(config))
        try:
            while "ready after" not in log.read_text():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < begin + START_BOUND_S, log.read_text()
                time.sleep(0.2)
            print(f"shoal serve: ready after {time.monotonic() - begin:.1f} s")
            yield
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)

    def join(self, host: Host) -> None:
        host.run(*self._ray(host), f"--address={self._address}", "--labels", f"role={WORKER['role']}")

    def group_hosts(self) -> dict[int, Host]:
        """The host of each stage of the running group."""
        with urllib.request.urlopen(f"{self.admin_url}/status", timeout=30) as response:
            (model,) = json.load(response)["models"]
        (group,) = [group for group in model["groups"] if group["state"] == "running"]
        return {
            rank["stage"]: next(host for host in (self.head, *self.others) if rank["pid"] in host.processes())
            for rank in group["ranks"]
        }

    def _ray(self, host: Host) -> list[str]:
        ray = str(Path(sys.executable).with_name("ray"))
        return [
            ray, "start", f"--node-ip-address={host.address}", "--num-cpus=2", "--disable-usage-stats",
            "--object-store-memory=100000000",
        ]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**NODE_CHECK_ENV, **token, "RAY_worker_niceness": "0"}
    with Hosts(3, environment) as hosts:
        cluster = Cluster(hosts, tmp_path_factory.mktemp("hosts"))
        cluster.start()
        yield cluster


class Client(threading.Thread):
    """Streams a completion until it ends, whichever way."""

    def __init__(self, url: str, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self._request = completion(url, max_tokens, is_stream=True)
        self.has_begun = threading.Event()
        self.error: str | None = None
        self.ended_s: float | None = None

    def run(self) -> None:
        try:
            with urllib.request.urlopen(self._request, timeout=120) as response:
                self.error = "truncated"
                for line in response:
                    self.has_begun.set()
                    if line.startswith(b"data: [DONE]") and self.error == "truncated":
                        self.error = None
                    if line.startswith(b'data: {"error"'):
                        self.error = json.loads(line.removeprefix(b"data: "))["error"]["code"]
        except urllib.error.HTTPError as error:
            self.error = json.loads(error.read())["error"]["code"]
        except OSError as error:
            self.error = repr(error)
        self.ended_s = time.monotonic()


def completion(url: str, max_tokens: int, *, is_stream: bool) -> urllib.request.Request:
    body = {"model": EMBEDDED_MODEL, "prompt": "Count: 1, 2, 3,", "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": is_stream}  # fmt: skip
    return urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )


def until_answering(url: str, deadline_s: float) -> str:
    while True:
        try:
            with urllib.request.urlopen(completion(url, 16, is_stream=False), timeout=60) as response:
                text: str = json.load(response)["choices"][0]["text"]
                return text
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


# The coordinator is with the first stage.
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("loss", [Host.kill, Host.cut])
def test_a_lost_host_hangs_nobody_and_a_new_group_serves(
    cluster: Cluster, loss: Callable[[Host], None], stage: int
) -> None:
    with cluster.serving([WORKER if stage == 0 else {}, WORKER if stage == 1 else {}]):
        expected = until_answering(cluster.url, time.monotonic() + RETURN_BOUND_S)
        hosts = cluster.group_hosts()
        lost = hosts[stage]
        assert lost is not hosts[1 - stage]
        waiting = [Client(cluster.url, max_tokens=4000) for _ in range(3)]
        for client in waiting:
            client.start()
        assert all(client.has_begun.wait(60) for client in waiting)
        loss(lost)
        lost_s = time.monotonic()
        late = Client(cluster.url, max_tokens=8)  # after the loss, before anybody has noticed
        late.start()
        for client in waiting:
            client.join(max(0.0, lost_s + ERROR_BOUND_S - time.monotonic()))
            assert client.ended_s is not None, "a client hangs"
            assert client.error == "replica_failed", client.error
        assert until_answering(cluster.url, lost_s + RETURN_BOUND_S) == expected
        answered_s = time.monotonic()
        late.join(max(0.0, lost_s + RETURN_BOUND_S - time.monotonic()))
        assert late.ended_s is not None, "the client that came late hangs"
        assert lost not in cluster.group_hosts().values()
        print(
            f"{loss.__name__} of the host of stage {stage}: errors after "
            f"{max(client.ended_s or 0.0 for client in waiting) - lost_s:.1f} s, "
            f"the late client {'an error' if late.error else 'an answer'} after {late.ended_s - lost_s:.1f} s, "
            f"a new group answers after {answered_s - lost_s:.1f} s"
        )
    lost.kill()
    lost.join_again()
    cluster.join(lost)
