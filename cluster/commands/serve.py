"""`shoal serve`: start or join Ray, deploy, say how it goes, and take everything down again."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import FrameType
from typing import Final

from shoal.cluster.channel import Progress, local_ip
from shoal.cluster.commands.haproxy import unspliced_haproxy
from shoal.cluster.commands.processes import adopt_orphans, end_descendants
from shoal.cluster.config import ClusterConfig, base_url, locate_model
from shoal.cluster.progress import ProgressReceiver
from shoal.cluster.routing.policies import make_policy
from shoal.engine.config import ConfigError

OBJECT_STORE_BYTES: Final = 128 * 2**20  # nothing large goes through Ray
STATUS_PERIOD_S: Final = 0.25
STOP_PERIOD_S: Final = 0.05
HTTP_TIMEOUT_S: Final = 30.0  # from the last replica's word to the first answer through the proxy
DRAIN_WAIT_S: Final = 10.0  # for open requests, once it is to stop
EXIT_WAIT_S: Final = 5.0
SILENCE_TIMEOUT_S: Final = 600.0  # a start that says nothing for so long hangs


class StartError(RuntimeError):
    """The cluster did not come up."""


class Stopped(BaseException):
    """SIGINT or SIGTERM came."""


def serve(config: ClusterConfig, *, is_verbose: bool = False) -> int:
    """Serve until SIGINT or SIGTERM. Answers the exit code.

    Raises ConfigError, for what can be known without starting anything.
    """
    start = time.monotonic()
    check_routing(config)
    if config.ray.address is None:  # otherwise port and files are those of other machines
        check_port(config.http.host, config.http.port)
        check_port(config.admin.host, config.admin_port, block="admin", options="--admin-host or --admin-port")
        check_models(config)
    adopt_orphans()
    signals = _Signals()
    with signals.caught():
        code = 0
        try:
            _start_and_wait(config, signals, start, is_verbose=is_verbose)
        except Stopped:
            print("\nstopping (Ctrl-C again: without waiting for open requests)", flush=True)
        except StartError as error:
            print(f"shoal: error: {error}", file=sys.stderr)
            code = 1
        finally:
            signals.is_stopping = True
            _tear_down(config, is_verbose=is_verbose)
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


def check_routing(config: ClusterConfig) -> None:
    """Raise ConfigError for a routing policy that cannot be made."""
    for model in config.models:
        make_policy(model.routing.policy, model.routing.options)


def check_models(config: ClusterConfig) -> None:
    """Raise ConfigError for a checkpoint or setting that no replica could start with."""
    from shoal.engine.worker import resolve_options  # brings torch

    for model in config.models:
        resolve_options(model.options(locate_model(model.model)))


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
            raise Stopped
        end_descendants(0.0)
        os._exit(128 + number)


def _start_and_wait(config: ClusterConfig, signals: _Signals, start: float, *, is_verbose: bool) -> None:
    """Bring everything up, then stay until a signal raises Stopped. Raises StartError."""
    narrator = _Narrator(start)
    address = config.ray.address
    narrator.say("starting Ray" if address is None else f"joining Ray at {address}")
    with _as_start_error():
        _start_ray(config, is_verbose=is_verbose)
        signals.install()
    with ProgressReceiver(_own_ip(config)) as progress:
        narrator.say("starting " + ", ".join(f"{model.first_replicas} x {model.name}" for model in config.models))
        with _as_start_error():
            _deploy(config, progress.address)
        _wait_until_running(progress, narrator)
    url = base_url(config.http.host, config.http.port)
    _wait_until_answering(url)
    admin_url = base_url(config.admin.host, config.admin_port)
    print(announcement(url, admin_url, config.models[0].name, time.monotonic() - start), flush=True)
    while True:
        signal.pause()


@contextlib.contextmanager
def _as_start_error() -> Iterator[None]:
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{type(error).__name__}: {_last_line(str(error))} (--verbose shows Ray's logs)") from error


def _own_ip(config: ClusterConfig) -> str:
    """Where replicas can reach this process, once Ray is up."""
    import ray

    return local_ip() if config.ray.address is None else str(ray.util.get_node_ip_address())


def _start_ray(config: ClusterConfig, *, is_verbose: bool) -> None:
    if config.ray.address is None:
        # Read by ray.serve when it is imported, here and in every process that Ray starts.
        for name, value in _ray_environment().items():
            os.environ.setdefault(name, value)
    import ray

    from shoal.cluster.app import num_cpus

    level = logging.INFO if is_verbose else logging.ERROR
    logging.getLogger("ray.serve").setLevel(level)
    if config.ray.address is not None:
        try:
            ray.init(address=config.ray.address, log_to_driver=is_verbose, logging_level=level)
        except ConnectionError as error:
            raise StartError(
                f"cannot join Ray at {config.ray.address} ({_last_line(str(error))}): check that it runs there, and "
                f"that it takes this user's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)"
            ) from None
        return
    ray.init(
        address="local",  # never a Ray that happens to run here
        num_cpus=int(sum(num_cpus(model) * model.max_replicas for model in config.models)) + 1,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=is_verbose,
        logging_level=level,
        _node_ip_address=local_ip(),
    )


def _ray_environment() -> dict[str, str]:
    haproxy = unspliced_haproxy()
    ports = free_ports(3)
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Measured on 2 busy cores: 4 to 6 times the requests/s of Serve's Python proxy and half the time to first
        # token at 32 streams.
        "RAY_SERVE_ENABLE_HA_PROXY": "0" if haproxy is None else "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": "" if haproxy is None else str(haproxy),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
        # No second event loop for routing and user code: half the CPU time per request in the gateway.
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Ray runs its workers at nice 15, behind everything else on the machine, and this is a server.
        "RAY_worker_niceness": "0",
        # No load balancer in front of this machine has to notice that it goes.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _deploy(config: ClusterConfig, progress_address: str) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from shoal.cluster.app import APP_NAME, build_app

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options=HTTPOptions(host=config.http.host, port=config.http.port), logging_config=quiet)
    app = build_app(
        config,
        progress_address=progress_address,
        own_ip=local_ip() if config.ray.address is None else None,
    )
    target = serve.RunTarget(app, name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def _wait_until_running(progress: ProgressReceiver, narrator: _Narrator) -> None:
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    from shoal.cluster.app import APP_NAME

    heard_s = time.monotonic()
    told = ""
    while True:
        message = progress.receive(STATUS_PERIOD_S)
        if message is not None:
            if message.error is not None:
                raise StartError(f"{message.model}: {message.error}")
            narrator.show(message)
            heard_s = time.monotonic()
            continue
        overview = serve.status().applications.get(APP_NAME)
        if overview is not None and overview.status is ApplicationStatus.RUNNING:
            return
        deployments = overview.deployments.values() if overview is not None else ()
        reason = next((_last_line(deployment.message) for deployment in deployments if deployment.message), "")
        if overview is not None and overview.status is not ApplicationStatus.DEPLOYING:
            raise StartError(reason or _last_line(overview.message) or "unknown")
        if reason and reason != told:  # Serve says so when it waits for resources that the cluster lacks
            narrator.say(told := reason)
        if time.monotonic() - heard_s > SILENCE_TIMEOUT_S:
            raise StartError(f"no replica has made progress for {SILENCE_TIMEOUT_S:g} s: {reason or 'unknown'}")


def _wait_until_answering(url: str) -> None:
    """The proxy learns of the gateway a moment after Serve calls it running."""
    deadline = time.monotonic() + HTTP_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if time.monotonic() > deadline:
                raise StartError(f"{url} does not answer: {error}") from None
            time.sleep(0.05)


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


def _tear_down(config: ClusterConfig, *, is_verbose: bool) -> None:
    import ray

    if not ray.is_initialized():
        return
    from ray import serve

    # Ray reports the end of its own controller as a failed task.
    with contextlib.ExitStack() as hidden:
        if not is_verbose:
            hidden.enter_context(contextlib.redirect_stderr(io.StringIO()))
            hidden.enter_context(contextlib.redirect_stdout(io.StringIO()))
        is_gone = _delete_app()
        if config.ray.address is None and is_gone:
            serve.shutdown()
        ray.shutdown()


def _delete_app() -> bool:
    """Let open requests finish for DRAIN_WAIT_S; whether all are. Replicas may take a whole drain_timeout: in a cluster
    they do so after this process has left, on a Ray of our own they end with it.
    """
    from ray import serve

    from shoal.cluster.app import APP_NAME

    if APP_NAME not in serve.status().applications:
        return True
    serve.delete(APP_NAME, _blocking=False)
    deadline = time.monotonic() + DRAIN_WAIT_S
    while APP_NAME in serve.status().applications:
        if time.monotonic() > deadline:
            return False
        time.sleep(STOP_PERIOD_S)
    return True


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else text


class _Narrator:
    """Says what is being done, with the seconds since the command began."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._shown: dict[tuple[str, str], int] = {}

    def say(self, text: str) -> None:
        print(f"  {time.monotonic() - self._start:5.1f} s  {text}", flush=True)

    def show(self, progress: Progress) -> None:
        """Every fifth of a phase, so that a log file stays readable."""
        fifth = 5 * progress.done // progress.total if progress.total else 0
        key = (progress.model, progress.phase)
        if self._shown.get(key) == fifth:
            return
        self._shown[key] = fifth
        share = f" {20 * fifth} %" if progress.total else ""
        self.say(f"{progress.model}: {progress.phase}{share}")
