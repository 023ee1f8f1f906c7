"""`shoal config check` and `shoal config render`: a configuration for people, and for Ray Serve's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from shoal.cluster import hub
from shoal.cluster.commands.rollout import check_routing
from shoal.cluster.config import EMBEDDED_MODEL, ClusterConfig, load_config, parse_config, read_yaml
from shoal.engine.config import ConfigError

_HEADER: Final = """\
# Made by `shoal config render {file}`: `serve deploy` takes it, and a RayService as its serveConfigV2.
# Where Shoal is not installed on the nodes, give the application a runtime_env that brings it.
"""


def check(file: str) -> int:
    """Print what is served; answers the exit code. Raises ConfigError."""
    config = load_config(file)
    check_routing(config)
    shapes = (f"{model.first_replicas} x {model.name}, {model.num_ranks} ranks each" for model in config.models)
    print(f"{file}: {'; '.join(shapes)}")
    return 0


def render(file: str) -> int:
    """Print the file as a Serve config; answers the exit code. Raises ConfigError."""
    config = parse_config(read_yaml(Path(file).expanduser()), source=file)
    check_routing(config)
    check_portable(config, file)
    print(_HEADER.format(file=file) + yaml.safe_dump(serve_config(config), sort_keys=False), end="")
    return 0


def check_portable(config: ClusterConfig, source: str) -> None:
    """Raise ConfigError for a path that means something here only."""
    for index, model in enumerate(config.models):
        drafts = model.speculative.model if model.speculative is not None else None
        for key, path in (("model", model.model), ("speculative.model", drafts)):
            if path in (None, EMBEDDED_MODEL) or path.startswith(hub.PREFIX) or Path(path).is_absolute():
                continue
            raise ConfigError(
                f"{source}: models[{index}].{key}: {path} is relative to a folder of this machine: write the path that "
                f"every node of the cluster has, or {hub.PREFIX}organization/name",
                field="models",
            )
    keys_file = config.auth.keys_file
    if keys_file is not None and not Path(keys_file).is_absolute():
        raise ConfigError(
            f"{source}: auth.keys_file: {keys_file} is relative to a folder of this machine: write the path that every "
            f"node with a gateway has",
            field="auth.keys_file",
        )


def serve_config(config: ClusterConfig) -> dict[str, Any]:
    """The same application as `shoal deploy` makes, as data of Serve's ServeDeploySchema.

    Numbers of replicas stand beside the arguments: when only they change, Serve restarts nothing.
    """
    from shoal.cluster.app import APP_NAME, GATEWAY_NAME, deployment_name

    args = config.model_dump(mode="json", exclude_defaults=True, exclude={"ray", "gateways"})
    fixed = [model for model in config.models if model.autoscaling is None]
    for model in args.get("models", ()):
        if not model.get("autoscaling"):
            model.pop("replicas", None)
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.http.host, "port": config.http.port},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": "shoal.cluster.app:app",
                "args": args,
                "deployments": [
                    {"name": GATEWAY_NAME, "num_replicas": config.gateways},
                    *({"name": deployment_name(model.name), "num_replicas": model.replicas} for model in fixed),
                ],
            }
        ],
    }
