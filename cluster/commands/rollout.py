"""How an application comes up on a Ray that is there: deploy, say how it goes, and answer why it does not."""

from __future__ import annotations

import contextlib
import http.client
import logging
import multiprocessing
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

from shoal.cluster import hub
from shoal.cluster.channel import Progress, local_ip
from shoal.cluster.config import ClusterConfig, LogSettings, base_url, locate_model
from shoal.cluster.progress import ProgressReceiver
from shoal.cluster.routing.policies import make_policy

log = logging.getLogger(__name__)

STATUS_PERIOD_S: Final = 0.25
HTTP_TIMEOUT_S: Final = 30.0  # from the last replica's word to the first answer through the proxy
SILENCE_TIMEOUT_S: Final = 600.0  # a start that says nothing for so long hangs
ALL_INTERFACES: Final = ("0.0.0.0", "::")


class StartError(RuntimeError):
    """The cluster did not come up."""


def tell(logs: LogSettings, text: str) -> None:
    """To who started this, as lines that people read or that programs do."""
    if logs.format == "json":
        log.info("%s", " ".join(text.split()))
    else:
        print(text, flush=True)


class Narrator:
    """Says what is being done, with the seconds since the command began."""

    def __init__(self, start: float, logs: LogSettings) -> None:
        self._start = start
        self._logs = logs
        self._shown: dict[tuple[str, str], int] = {}

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self._start
        tell(self._logs, text if self._logs.format == "json" else f"  {seconds:5.1f} s  {text}")

    def show(self, progress: Progress) -> None:
        """Every fifth of a phase, so that a log file stays readable."""
        fifth = 5 * progress.done // progress.total if progress.total else 0
        key = (progress.model, progress.phase)
        if self._shown.get(key) == fifth:
            return
        self._shown[key] = fifth
        share = f" {20 * fifth} %" if progress.total else ""
        self.say(f"{progress.model}: {progress.phase}{share}")


@contextlib.contextmanager
def as_start_error() -> Iterator[None]:
    """Any other error as a StartError."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{type(error).__name__}: {last_line(str(error))} (--verbose shows Ray's logs)") from error


def check_routing(config: ClusterConfig) -> None:
    """Raise ConfigError for a routing policy that cannot be made."""
    for model in config.models:
        make_policy(model.routing.policy, model.routing.options)


def check_models(config: ClusterConfig) -> None:
    """Raise ConfigError for a checkpoint or setting that no replica could start with on this host.

    Looked at by a process that ends with it: torch and a model's vocabulary take 140 MiB, and the caller stays.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(_resolve_models, config).result()


def _resolve_models(config: ClusterConfig) -> None:
    from shoal.engine.worker import resolve_options  # brings torch

    for model in config.models:
        if not model.model.startswith(hub.PREFIX):  # replicas fetch it
            resolve_options(model.options(locate_model(model.model)))


def join_ray(address: str, *, is_verbose: bool) -> None:
    """Join the Ray at `address`. Raises StartError."""
    import ray
    import ray.serve  # sets the level of its log

    level = logging.INFO if is_verbose else logging.ERROR
    logging.getLogger("ray.serve").setLevel(level)
    try:
        ray.init(address=address, log_to_driver=is_verbose, logging_level=level)
    except ConnectionError as error:
        raise StartError(
            f"cannot join Ray at {address} ({last_line(str(error))}): check that it runs there, and "
            f"that it takes this user's token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)"
        ) from None


def roll_out(
    config: ClusterConfig,
    narrator: Narrator,
    *,
    own_ip: str | None,
    runtime_env: Mapping[str, Any] | None = None,
    is_waiting: bool = True,
    timeout_s: float | None = None,
) -> None:
    """Deploy on the Ray that this process has joined, over what runs there of Shoal, and wait until all of it runs.

    `own_ip`: where replicas and gateways can reach each other and this process; None is each node's address.
    Raises StartError; what ran before may go on serving then.
    """
    import ray

    deadline = time.monotonic() + timeout_s if timeout_s is not None else None
    with ProgressReceiver(own_ip or str(ray.util.get_node_ip_address())) as progress:
        narrator.say("starting " + ", ".join(f"{model.first_replicas} x {model.name}" for model in config.models))
        with as_start_error():
            _deploy(config, progress.address, own_ip, runtime_env)
        if not is_waiting:
            return
        _wait_until_running(progress, narrator, deadline)
    if has_proxy_here():
        _wait_until_answering(base_url(config.http.host, config.http.port))


def _deploy(
    config: ClusterConfig, progress_address: str, own_ip: str | None, runtime_env: Mapping[str, Any] | None
) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    from shoal.cluster.app import APP_NAME, build_app

    app = build_app(config, progress_address=progress_address, own_ip=own_ip, runtime_env=runtime_env)
    encoding = "JSON" if config.logging.format == "json" else "TEXT"
    quiet = LoggingConfig(encoding=encoding, log_level="WARNING", enable_access_log=False)
    check_address(config)
    serve.start(http_options=HTTPOptions(host=config.http.host, port=config.http.port), logging_config=quiet)
    target = serve.RunTarget(app, name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def check_address(config: ClusterConfig) -> None:
    """Raise StartError where Serve runs already and listens elsewhere: it does so until it is shut down."""
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        running = _get_global_client().http_config
    except RayServeException:
        return
    is_reachable = running.host in (*ALL_INTERFACES, config.http.host)
    if running.port != config.http.port or not is_reachable:
        raise StartError(
            f"Ray Serve runs in this cluster already and listens on {running.host}:{running.port}: write "
            f"http: {{host: {running.host}, port: {running.port}}}, or stop it with `shoal delete --shutdown-serve`"
        )


def _wait_until_running(progress: ProgressReceiver, narrator: Narrator, deadline: float | None) -> None:
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
        reason = next((last_line(deployment.message) for deployment in deployments if deployment.message), "")
        if overview is not None and overview.status is not ApplicationStatus.DEPLOYING:
            raise StartError(reason or last_line(overview.message) or "unknown")
        if reason and reason != told:  # Serve says so when it waits for resources that the cluster lacks
            narrator.say(told := reason)
        now = time.monotonic()
        if now - heard_s > SILENCE_TIMEOUT_S:
            raise StartError(f"no replica has made progress for {SILENCE_TIMEOUT_S:g} s: {reason or 'unknown'}")
        if deadline is not None and now > deadline:
            raise StartError(f"not running when the time was up, and it goes on: {reason or 'replicas are starting'}")


def has_proxy_here() -> bool:
    """Whether Serve takes HTTP on this node."""
    import ray
    from ray import serve

    return ray.get_runtime_context().get_node_id() in serve.status().proxies


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


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else text


def own_address(config: ClusterConfig) -> str | None:
    """`own_ip` of a rollout: this host's loopback where Ray is our own, else each node's address."""
    return local_ip() if config.ray.address is None else None
