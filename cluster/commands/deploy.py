"""`shoal deploy` and `shoal delete`: an application that outlives the command, on a Ray cluster that is there."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from shoal.cluster import hub
from shoal.cluster.commands.rollout import (
    Narrator,
    StartError,
    as_start_error,
    check_address,
    check_routing,
    join_ray,
    roll_out,
)
from shoal.cluster.commands.takedown import delete as delete_app
from shoal.cluster.commands.takedown import drain, is_deployed
from shoal.cluster.config import ClusterConfig, LogSettings, base_url, locate_model
from shoal.cluster.logs import log_to
from shoal.engine.config import ConfigError, Device, Machine
from shoal.engine.shapes import check_shape, planned_config

_ENOUGH_BYTES: Final = 2**50  # of memory: how much the nodes have is not known here
# Where Ray unpacks the working directory of a job: on one node, as long as the job runs.
_JOB_FOLDER: Final = "working_dir_files"
# Of a job's runtime environment, what its replicas need too. Not its working directory: that holds the configuration,
# and a changed configuration must not restart what it does not change.
_CODE: Final = ("py_modules", "pip", "uv", "conda", "image_uri", "container", "env_vars")


def deploy(
    config: ClusterConfig,
    *,
    ray_address: str | None = None,
    is_waiting: bool = True,
    timeout_s: float | None = None,
    is_verbose: bool = False,
) -> int:
    """Deploy over what runs there, and return when it serves; answers the exit code.

    Raises ConfigError for what cannot work, before anything is touched.
    """
    start = time.monotonic()
    check_routing(config)
    check_paths(config)
    if config.logging.format == "json":
        log_to(sys.stdout, "json", config.logging.level)
    narrator = Narrator(start, config.logging)
    address = address_of(ray_address or config.ray.address)
    try:
        narrator.say(f"joining Ray at {address}")
        with as_start_error():
            join_ray(address, is_verbose=is_verbose)
            check_address(config)
        check_checkpoints(config)
        env = runtime_env()
        roll_out(config, narrator, own_ip=None, runtime_env=env, is_waiting=is_waiting, timeout_s=timeout_s)
    except StartError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1
    url = base_url(config.http.host, config.http.port)
    names = ", ".join(model.name for model in config.models)
    print(f"\n  {'ready' if is_waiting else 'submitted'} after {time.monotonic() - start:.1f} s")
    print(f"  address  {url}/v1, on every node that has a gateway and on the head node\n  models   {names}", flush=True)
    return 0


def delete(
    ray_address: str | None = None,
    *,
    timeout_s: float | None = None,
    has_shutdown: bool = False,
    is_verbose: bool = False,
) -> int:
    """Refuse new requests, finish the open ones within `timeout_s` (None: the deployed drain_timeout), and delete.

    Serve itself goes on for others; with `has_shutdown` it stops too, unless it has other applications. Answers the
    exit code.
    """
    narrator = Narrator(time.monotonic(), LogSettings())
    address = address_of(ray_address)
    try:
        with as_start_error():
            join_ray(address, is_verbose=is_verbose)
            return _delete(narrator, timeout_s, has_shutdown=has_shutdown)
    except StartError as error:
        print(f"shoal: error: {error}", file=sys.stderr)
        return 1


def _delete(narrator: Narrator, timeout_s: float | None, *, has_shutdown: bool) -> int:
    from ray import serve

    if is_deployed():
        narrator.say("refusing new requests")
        drain(timeout_s, narrator.say)
        narrator.say("deleting")
        if not delete_app():
            narrator.say("some replicas take longer to end; Ray Serve goes on with it")
            return 1
        narrator.say("deleted")
    else:
        narrator.say("nothing is deployed")
    if has_shutdown:
        if others := serve.status().applications:
            narrator.say(f"Serve goes on: it has {', '.join(others)}")
        else:
            serve.shutdown()
    return 0


def address_of(given: str | None) -> str:
    """Where the Ray is that a command shall join. Raises ConfigError for an address of something else."""
    address = given or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} takes jobs, and this command joins Ray itself: give host:port with --ray-address, or run it "
            f"there with `ray job submit --address {address}`",
            field="ray.address",
        )
    return address


def check_checkpoints(config: ClusterConfig) -> None:
    """Raise ConfigError for a model that is not there, or settings that no device could serve it with.

    Headers are read, without torch: the devices are those of other nodes.
    """
    for model in config.models:
        if model.model.startswith(hub.PREFIX):
            hub.check(model.model)  # the nodes fetch it
        else:
            device: Device = "cpu" if model.engine.device == "cpu" else "cuda"
            some = Machine(device, _ENOUGH_BYTES, model.num_threads)
            check_shape(planned_config(model.options(locate_model(model.model)), some), some)


def check_paths(config: ClusterConfig) -> None:
    """Raise ConfigError for a model or a keys file in the job's own folder: other nodes do not have that."""
    for index, model in enumerate(config.models):
        drafts = model.speculative.model if model.speculative is not None else None
        for key, path in (("model", model.model), ("speculative.model", drafts)):
            if path is not None and _JOB_FOLDER in Path(path).parts:
                raise ConfigError(
                    f"models[{index}].{key}: {Path(path).name} is in the working directory of this job, which goes "
                    f"with it: give a path that every node has, or hf://organization/name",
                    field="models",
                )
    if config.auth.keys_file is not None and _JOB_FOLDER in Path(config.auth.keys_file).parts:
        raise ConfigError(
            f"auth.keys_file: {Path(config.auth.keys_file).name} is in the working directory of this job, which goes "
            f"with it: give a path that every node with a gateway has, such as that of a mounted secret",
            field="auth.keys_file",
        )


def runtime_env() -> dict[str, Any]:
    """Ray's, for gateways and replicas: what brings the code of this job to its nodes."""
    import ray

    own = ray.get_runtime_context().runtime_env
    # None keeps Serve from putting in the job's.
    return {"working_dir": None, **{key: own[key] for key in _CODE if own.get(key)}}
