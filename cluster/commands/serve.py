"""`shoal serve`: start or join Ray, deploy, say how it goes, and take everything down again."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

from shoal.cluster.channel import local_ip
from shoal.cluster.commands.processes import adopt_orphans, end_descendants
from shoal.cluster.commands.ray_env import ray_environment
from shoal.cluster.commands.rollout import (
    Narrator,
    StartError,
    as_start_error,
    check_models,
    check_routing,
    join_ray,
    own_address,
    roll_out,
    tell,
)
from shoal.cluster.commands.takedown import delete, drain, is_deployed
from shoal.cluster.config import ClusterConfig, base_url
from shoal.cluster.keys import read_keys
from shoal.cluster.logs import log_to
from shoal.engine.config import ConfigError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES: Final = 128 * 2**20  # nothing large goes through Ray
INTERRUPT_WAIT_S: Final = 10.0  # for open requests after Ctrl-C; after SIGTERM it is the configuration's drain_timeout
DELETE_WAIT_S: Final = 10.0  # for replicas that have nothing left
EXIT_WAIT_S: Final = 5.0
# Of HAProxy, by a variable that Ray 2.60 reads and does not document. One thread passes on more tokens than a gateway
# makes. Each has to be woken for its share of a step: on two cores one takes 15 us a token at 32 streams, and four, as
# Ray has it, 22.
CORES_PER_PROXY_THREAD: Final = 4
MAX_PROXY_THREADS: Final = 4


class Stopped(BaseException):
    """SIGINT or SIGTERM came. `wait_s` is for open requests; None leaves it to the configuration."""

    def __init__(self, wait_s: float | None) -> None:
        super().__init__(wait_s)
        self.wait_s = wait_s


def serve(config: ClusterConfig, *, is_verbose: bool = False) -> int:
    """Serve until SIGINT or SIGTERM. Answers the exit code.

    Raises ConfigError, for what can be known without starting anything.
    """
    start = time.monotonic()
    if config.logging.format == "json":
        log_to(sys.stdout, "json", config.logging.level)
    check_routing(config)
    if config.ray.address is None:  # otherwise port and files are those of other machines
        check_port(config.http.host, config.http.port)
        check_port(config.admin.host, config.admin_port, block="admin", options="--admin-host or --admin-port")
        check_keys(config)
        check_models(config)
    adopt_orphans()
    signals = _Signals()
    with signals.caught():
        code = 0
        wait_s: float | None = 0.0
        try:
            _start_and_wait(config, signals, start, is_verbose=is_verbose)
        except Stopped as stopped:
            tell(config.logging, "\nstopping (Ctrl-C again: without waiting for open requests)")
            wait_s = stopped.wait_s
        except StartError as error:
            if config.logging.format == "json":
                log.error("%s", error)
            print(f"shoal: error: {error}", file=sys.stderr)
            code = 1
        finally:
            signals.is_stopping = True
            try:
                _tear_down(config, wait_s, is_verbose=is_verbose)
            finally:
                end_descendants(EXIT_WAIT_S)
        return code


def check_port(host: str, port: int, *, block: str = "http", options: str = "--host or --port") -> None:
    """Raise ConfigError if nobody could connect there because someone else listens. `block` of the configuration and
    `options` of the command are where another address can be chosen.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror or error}): "
                f"stop what listens there, or choose another {block}.port with {options}",
                field=f"{block}.port",
            ) from None


def check_keys(config: ClusterConfig) -> None:
    """Raise ConfigError for a keys file that is not there or wrong."""
    if config.auth.keys_file is not None:
        read_keys(Path(config.auth.keys_file))


class _Signals:
    """The first SIGINT or SIGTERM raises Stopped in the main thread; one that comes while stopping kills."""

    def __init__(self) -> None:
        self.is_stopping = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Also to be called after `ray.init`, which sets a SIGTERM handler of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.is_stopping:
            self.is_stopping = True
            raise Stopped(INTERRUPT_WAIT_S if number == signal.SIGINT else None)
        end_descendants(0.0)
        os._exit(128 + number)


def _start_and_wait(config: ClusterConfig, signals: _Signals, start: float, *, is_verbose: bool) -> None:
    """Bring everything up, then stay until a signal raises Stopped. Raises StartError."""
    narrator = Narrator(start, config.logging)
    address = config.ray.address
    narrator.say("starting Ray" if address is None else f"joining Ray at {address}")
    with as_start_error():
        if address is None:
            start_ray(config, is_verbose=is_verbose)
        else:
            join_ray(address, is_verbose=is_verbose)
        signals.install()
    roll_out(config, narrator, own_ip=own_address(config))
    url = base_url(config.http.host, config.http.port)
    admin_url = base_url(config.admin.host, config.admin_port)
    tell(config.logging, announcement(url, admin_url, config.models[0].name, time.monotonic() - start))
    while True:
        signal.pause()


def start_ray(config: ClusterConfig, *, is_verbose: bool) -> None:
    """A Ray of our own on this machine."""
    # Read by ray.serve when it is imported, here and in every process that Ray starts.
    for name, value in own_environment(config.http.header_timeout).items():
        os.environ.setdefault(name, value)
    import ray

    from shoal.cluster.app import num_cpus

    level = logging.INFO if is_verbose else logging.ERROR
    logging.getLogger("ray.serve").setLevel(level)
    ray.init(
        address="local",  # never a Ray that happens to run here
        num_cpus=int(sum(num_cpus(model) * model.max_replicas for model in config.models)) + 1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=is_verbose,
        logging_level=level,
        _node_ip_address=local_ip(),
    )


def own_environment(header_timeout_s: float) -> dict[str, str]:
    """Of a Ray that is ours alone: others may run on this machine, and nobody has to notice that a gateway goes."""
    ports = free_ports(3)
    num_proxy_threads = max(1, min(MAX_PROXY_THREADS, (os.cpu_count() or 1) // CORES_PER_PROXY_THREAD))
    return {
        **ray_environment(header_timeout_s),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(num_proxy_threads),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Of Serve's controller, which at 0.1 s takes 3 % of a core for looking whether anything has changed.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",
    }


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def announcement(url: str, admin_url: str, model: str, seconds: float) -> str:
    """What a newcomer needs next: addresses, model name, and a command to paste."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": model, "messages": messages, "temperature": 0})
    return (
        f"\n  ready after {seconds:.1f} s\n"
        f"  address  {url}/v1\n"
        f"  status   {admin_url}\n"
        f"  model    {model}\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n\n"
        f"  Ctrl-C stops the server.\n"
    )


def _tear_down(config: ClusterConfig, wait_s: float | None, *, is_verbose: bool) -> None:
    """`wait_s`: for open requests; None is the configuration's drain_timeout."""
    import ray

    if not ray.is_initialized():
        return
    from ray import serve

    # Ray reports the end of its own controller as a failed task.
    with contextlib.ExitStack() as hidden:
        if not is_verbose:
            hidden.enter_context(contextlib.redirect_stderr(io.StringIO()))
            hidden.enter_context(contextlib.redirect_stdout(io.StringIO()))
        is_gone = not is_deployed() or (drain(wait_s) and delete(DELETE_WAIT_S))
        if config.ray.address is None and is_gone:
            serve.shutdown()
        ray.shutdown()
