"""A real server: `shoal serve` in a process of its own, with the embedded model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.cluster.commands.serve import free_ports

START_TIMEOUT_S = 180.0  # on a busy two-core machine
STOP_TIMEOUT_S = 40.0


class Server:
    """`shoal serve` with these arguments, in a session of its own as a terminal would give it."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.port, admin_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self._log = log
        ports = ("--port", str(self.port), "--admin-port", str(admin_port))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shoal.cluster.cli", "serve", *ports, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        """Until the server has printed `text`; fails with its output when it ends or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Ctrl-C: a terminal sends SIGINT to every process in the foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def processes(self) -> dict[int, str]:
        """Everything that this server started and that still runs, itself included: id and command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if state != "Z" and int(session) == self.process.pid:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def kill_one(self, name: str) -> None:
        """SIGKILL the process whose command line begins with `name`."""
        (pid,) = (pid for pid, command in self.processes().items() if command.startswith(name))
        os.kill(pid, signal.SIGKILL)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Until it has ended; answers the exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """Whatever a failed test left."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with the given arguments; what a test leaves of them is killed."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(tmp_path / f"output{len(servers)}.txt", *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """Servers for longer than one test: `with make_server(arguments) as server`."""

    @contextlib.contextmanager
    def make(*arguments: str) -> Iterator[Server]:
        server = Server(tmp_path_factory.mktemp("serve") / "output.txt", *arguments)
        try:
            yield server
        finally:
            server.kill()

    return make


@pytest.fixture(scope="module")
def server(make_server: Callable[..., contextlib.AbstractContextManager[Server]]) -> Iterator[Server]:
    """One running server for a module's tests, started as a newcomer would."""
    with make_server() as server:
        server.wait_for("ready after")
        yield server
