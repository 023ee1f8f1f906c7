"""What the chart deploys really starts: Ray as its pods start it, and serveConfigV2 through Ray's REST API.

Every pod is a Ray node of this machine. Models are replaced by the embedded one and GPUs by CPUs; the rest is as
rendered. `pytest -m soak tests/deploy/test_helm_start.py` starts all values files, and one node for every group.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.cluster.commands.haproxy import guarded_haproxy
from shoal.cluster.commands.serve import free_ports
from shoal.cluster.config import EMBEDDED_MODEL

Object = dict[str, Any]
Render = Callable[..., Any]  # the fixture: values, or a values file of the chart's, as Helm renders them

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "shoal"
VALUES = sorted(path.name for path in (CHART / "ci").glob("*.yaml"))
NODE_TIMEOUT_S = 120.0
START_TIMEOUT_S = 240.0
DELETE_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


class Node:
    """A pod's Ray, in a session of its own."""

    def __init__(self, folder: Path, group: Object, environment: Mapping[str, str], **ports: int | str) -> None:
        params = {**group["rayStartParams"], "block": "true", "labels": _pairs(group["labels"])}
        params["object-store-memory"] = str(80 * 2**20)
        params |= {key.replace("_", "-"): str(value) for key, value in ports.items()}
        flags = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in params.items()]
        self.log = folder / f"node-{len(list(folder.glob('node-*')))}"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), "start", *flags],
                env={**os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        for pid in _session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Cluster:
    """A Ray cluster with the nodes that the chart asks for."""

    def __init__(self, rendered: Any, *, groups: list[Object]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # short: Ray's sockets are in it
        self._nodes: list[Node] = []
        self._token = secrets.token_hex(16)
        head = rendered.service["rayClusterConfig"]["headGroupSpec"]
        gcs, self.dashboard, agent, metrics, client = free_ports(5)
        environment = self._environment(head)
        try:
            ports: dict[str, int | str] = {
                "port": gcs,
                "dashboard_port": self.dashboard,
                "ray_client_server_port": client,
            }
            own: dict[str, int | str] = {
                "head": "true",
                "dashboard_host": "127.0.0.1",
                "temp_dir": str(self._folder / "r"),
                **ports,
            }
            self._start(head, environment, **own, dashboard_agent_listen_port=agent, metrics_export_port=metrics)
            self.wait_for("/api/version", NODE_TIMEOUT_S)
            for count, group in enumerate(groups, 2):  # several raylets that start at once time out on two cores
                agent, metrics = free_ports(2)
                address = f"{_own_ip()}:{gcs}"
                self._start(
                    group, environment, address=address, dashboard_agent_listen_port=agent, metrics_export_port=metrics
                )
                self._wait_for_nodes(count)
        except BaseException:
            self.stop()
            raise

    def _environment(self, group: Object) -> dict[str, str]:
        """A pod's, with this machine's paths and free ports."""
        env = group["template"]["spec"]["containers"][0]["env"]
        given = {one["name"]: one["value"] for one in env if "value" in one}
        own = {
            "PYTHONPATH": str(ROOT / "src"),
            "RAY_AUTH_MODE": "token",  # as KubeRay sets it where authOptions.mode is token
            "RAY_AUTH_TOKEN": self._token,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(guarded_haproxy()),
        }
        for name, value in given.items():
            if value.startswith("/cache"):
                own[name] = os.environ.get(name, str(Path.home() / ".cache" / Path(value).name))
        own["HOME"] = str(Path.home())
        for name, file in (
            ("CONFIG_FILE_LOC", "haproxy.cfg"),
            ("SOCKET_PATH", "admin.sock"),
            ("SERVER_STATE_FILE", "state"),
        ):
            own[f"RAY_SERVE_HAPROXY_{name}"] = str(self._folder / "h" / file)
        own["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(self._folder / "h")
        ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
        own |= {name: str(port) for name, port in zip(ports, free_ports(3), strict=True)}
        return given | own

    def _start(self, group: Object, environment: Mapping[str, str], **params: int | str) -> None:
        self._nodes.append(Node(self._folder, group, environment, **params))

    def ask(self, path: str, *, method: str = "GET", body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.dashboard}{path}"
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def wait_for(self, path: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return self.ask(path)
            except OSError:
                assert time.monotonic() < deadline, self.logs()
                assert self._nodes[0].process.poll() is None, self.logs()
                time.sleep(0.2)

    def _wait_for_nodes(self, count: int) -> None:
        deadline = time.monotonic() + NODE_TIMEOUT_S
        while True:
            nodes = self.ask("/api/v0/nodes")["data"]["result"]["result"]
            if sum(node["state"] == "ALIVE" for node in nodes) >= count:
                return
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.2)

    def deploy(self, serve_config: Object) -> None:
        """Until the application runs."""
        self.ask("/api/serve/applications/", method="PUT", body=serve_config)
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            app = self.ask("/api/serve/applications/")["applications"].get("shoal", {})
            if app.get("status") == "RUNNING":
                return
            assert app.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), json.dumps(app, indent=1)
            assert time.monotonic() < deadline, f"{json.dumps(app, indent=1)}\n{self.logs()}"
            time.sleep(0.3)

    def delete(self) -> None:
        """As `helm uninstall` does in the end."""
        self.ask("/api/serve/applications/", method="DELETE")
        deadline = time.monotonic() + DELETE_TIMEOUT_S
        while self.ask("/api/serve/applications/")["applications"]:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(node.log.read_text()[-2000:] for node in self._nodes)

    def stop(self) -> None:
        for node in reversed(self._nodes):
            node.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def on_cpus(name: str, port: int, *, is_small: bool) -> Object:
    """The values file for this machine: the embedded model, a thread for each rank, free ports."""
    values: Object = yaml.safe_load((CHART / "ci" / name).read_text())
    for model in values["models"]:
        stages, tensor = model.get("pipelineParallel", 1), min(2, model.get("tensorParallel", 1))
        if is_small:
            tensor, model["replicas"] = 1, 1
            if "autoscaling" in model:
                model["autoscaling"]["minReplicas"] = 1
        for key in ("gpu", "storage", "rankResources", "stageLayers", "affinity", "tolerations", "nodeSelector"):
            model.pop(key, None)
        if isinstance(model.get("speculative"), dict):
            model["speculative"] = "ngram"
        model |= {"model": EMBEDDED_MODEL, "tensorParallel": tensor, "resources": {"cpu": stages * tensor}}
        model["engine"] = {"maxModelLen": 1024, "kvMemory": "64MiB", "numThreads": 1}
        model["drainTimeout"] = 20
    values["http"], values["admin"] = {"port": port}, {"port": free_ports(1)[0]}
    values.pop("auth", None)
    values.pop("tracing", None)
    return values


def chat(port: int, model: str) -> str:
    """The answer to a question; waits until the proxy knows the gateway."""
    question = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body = json.dumps({**question, "temperature": 0, "max_tokens": 16}).encode()
    deadline = time.monotonic() + 60
    while True:
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            request = urllib.request.Request(url, body, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                text: str = json.loads(answer.read())["choices"][0]["message"]["content"]
                return text
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_and_several_models_start(render: Render) -> None:
    """One node beside the head stands for all groups; the soak test has one for each."""
    (port,) = free_ports(1)
    demo = render(on_cpus("cpu-demo.yaml", port, is_small=True))
    several = render(on_cpus("autoscaled.yaml", port, is_small=True))
    assert (demo.error, several.error) == ("", "")
    worker = {"labels": {"shoal-group": "any"}, "rayStartParams": {"num-cpus": "8", "num-gpus": "0"}}
    cluster = Cluster(demo, groups=[worker])
    try:
        for rendered in (demo, several):
            config = json.loads(json.dumps(rendered.serve_config))
            (app,) = config["applications"]
            config["proxy_location"] = "HeadOnly"  # all nodes are this machine, and there is one port
            for model in app["args"]["models"]:
                model["nodes"]["labels"]["shoal-group"] = "any"
            app["args"]["gateway_labels"] = {"shoal-group": "head"}
            cluster.deploy(config)
            for model in app["args"]["models"]:
                assert "Paris" in chat(port, model["name"])
        cluster.delete()
        with pytest.raises((AssertionError, urllib.error.URLError)):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
    finally:
        cluster.stop()


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", VALUES)
def test_every_values_file_starts(render: Render, name: str) -> None:
    """On a node for every pod, found by its labels."""
    (port,) = free_ports(1)
    rendered = render(on_cpus(name, port, is_small=False))
    assert rendered.error == ""
    groups = [g for g in rendered.groups if g.get("labels") for _ in range(g["numOfHosts"] * max(1, g["replicas"]))]
    cluster = Cluster(rendered, groups=groups)
    try:
        cluster.deploy({**rendered.serve_config, "proxy_location": "HeadOnly"})
        for model in rendered.args["models"]:
            assert "Paris" in chat(port, model["name"])
        cluster.delete()
    finally:
        cluster.stop()


def _pairs(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _own_ip() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            found: str = probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
    return found


def _session(leader: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = (folder / "stat").read_text().rpartition(")")[2].split()[3]
        except OSError:
            continue
        if int(session) == leader:
            yield int(folder.name)
