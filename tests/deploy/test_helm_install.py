"""The real Helm installs, upgrades, rolls back and uninstalls the chart, on an emulated API server.

kmock keeps objects as a server would, without admission or scheduling. Helm keeps its own records in a throw-away
PostgreSQL, because the emulator lacks what it needs for keeping them in secrets.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kmock import KubernetesEmulator, ResourceInfo, Server

Object = dict[str, Any]

CHART = Path(__file__).resolve().parents[2] / "helm" / "shoal"
HELM_TIMEOUT_S = 60
START_TIMEOUT_S = 60
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
KINDS = {
    "v1/namespaces": "Namespace",
    "v1/services": "Service",
    "v1/serviceaccounts": "ServiceAccount",
    "v1/secrets": "Secret",
    "v1/configmaps": "ConfigMap",
    "v1/pods": "Pod",
    "ray.io/v1/rayservices": "RayService",
    "networking.k8s.io/v1/ingresses": "Ingress",
    "networking.k8s.io/v1/networkpolicies": "NetworkPolicy",
    "policy/v1/poddisruptionbudgets": "PodDisruptionBudget",
    "gateway.networking.k8s.io/v1/httproutes": "HTTPRoute",
    "inference.networking.k8s.io/v1/inferencepools": "InferencePool",
    "monitoring.coreos.com/v1/servicemonitors": "ServiceMonitor",
    "monitoring.coreos.com/v1/podmonitors": "PodMonitor",
    "monitoring.coreos.com/v1/prometheusrules": "PrometheusRule",
}


class Cluster:
    """An emulated API server, in a thread of its own."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Cluster:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_TIMEOUT_S)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with KubernetesEmulator() as self._emulator, Server(self._emulator) as server:
            self._emulator["get /version"] << {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
            for name, kind in KINDS.items():
                self._emulator.resources[name] = ResourceInfo(
                    kind=kind, singular=kind.lower(), namespaced=kind != "Namespace", verbs=set(VERBS)
                )
            # kmock 0.8 calls the core group "/v1".
            core = [
                {"name": name[3:], "kind": kind, "singularName": kind.lower(), "namespaced": True, "verbs": VERBS}
                for name, kind in KINDS.items()
                if name.startswith("v1/")
            ]
            self._emulator["get /api/v1"] << {"kind": "APIResourceList", "groupVersion": "v1", "resources": core}
            self.url = str(server.url)
            self._ready.set()
            await self._stop.wait()

    def objects(self) -> dict[tuple[str, str], Object]:
        """What there is now, by kind and name."""
        found = {}
        for (resource, _, name), history in self._emulator.objects.items():
            if not history.deleted:
                found[KINDS[f"{resource.group}/{resource.version}/{resource.plural}".lstrip("/")], name] = history.raw
        return found


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of a PostgreSQL that begins and ends with the tests."""
    if POSTGRES is None:
        pytest.skip("needs PostgreSQL's server (Debian's package postgresql)")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="shoal-sql-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(program: str, *arguments: str) -> None:
        command = [str(POSTGRES / program), *arguments]
        who: dict[str, Any] = {"user": user} if os.geteuid() == 0 else {}
        log = folder / "out"
        with log.open("ab") as output:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=START_TIMEOUT_S, cwd=folder, **who)
        assert done.returncode == 0, log.read_text()

    try:
        shutil.chown(folder, user)
        data = folder / "data"
        run("initdb", "--no-sync", "--auth=trust", f"--username={user}", "-D", str(data))
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c shared_buffers=1MB"
        run("pg_ctl", "start", "--wait", "-D", str(data), "-l", str(folder / "log"), "-o", options)
        try:
            yield f"postgresql://{user}@127.0.0.1:{port}/postgres?sslmode=disable"
        finally:
            run("pg_ctl", "stop", "--wait", "-m", "immediate", "-D", str(data))
    finally:
        shutil.rmtree(folder)


class Helm:
    def __init__(self, program: str, cluster: Cluster, database: str, folder: Path) -> None:
        self._program, self._folder = program, folder
        config = folder / "kubeconfig"
        named = {
            "clusters": {"server": cluster.url},
            "users": {},
            "contexts": {"cluster": "emulated", "user": "emulated"},
        }
        blocks = {key: [{"name": "emulated", key.removesuffix("s"): value}] for key, value in named.items()}
        content = {"apiVersion": "v1", "kind": "Config", "current-context": "emulated", **blocks}
        config.write_text(yaml.safe_dump(content))
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(config),
            "HELM_DRIVER": "sql",
            "HELM_DRIVER_SQL_CONNECTION_STRING": database,
            "HELM_CACHE_HOME": str(folder / "cache"),
            "HELM_CONFIG_HOME": str(folder / "config"),
            "HELM_DATA_HOME": str(folder / "data"),
            "NO_PROXY": "127.0.0.1",
        }

    def __call__(self, *arguments: str) -> str:
        command = [self._program, *arguments, "--namespace", "llm"]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=HELM_TIMEOUT_S, cwd=self._folder
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def apply(self, verb: str, values: Object) -> str:
        file = self._folder / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        plain = ["--disable-openapi-validation", "--server-side=false"]
        return self(verb, "demo", str(CHART), "--values", str(file), *plain)


def test_a_release_comes_changes_goes_back_and_leaves_nothing(helm: str, database: str, tmp_path: Path) -> None:
    with Cluster() as cluster:
        run = Helm(helm, cluster, database, tmp_path)
        demo = yaml.safe_load((CHART / "ci" / "cpu-demo.yaml").read_text())

        assert "service/demo-shoal-gateway 8000:8000" in run.apply("install", demo)
        assert cluster.objects().keys() == {
            ("RayService", "demo-shoal"),
            ("Service", "demo-shoal-admin"),
            ("ServiceAccount", "demo-shoal"),
        }
        first = _args(cluster)

        everything = yaml.safe_load((CHART / "ci" / "everything.yaml").read_text())
        run.apply("upgrade", {**everything, "nameOverride": ""})
        grown = cluster.objects()
        for kind in set(KINDS.values()) - {"Namespace", "Pod"}:
            assert kind in {found for found, _ in grown}, kind
        assert [model["name"] for model in _args(cluster)["models"]] == ["first", "second"]
        assert "sk-" not in str(grown["RayService", "demo-shoal"])

        run("rollback", "demo", "1", "--server-side=false")
        assert cluster.objects().keys() == {
            ("RayService", "demo-shoal"),
            ("Service", "demo-shoal-admin"),
            ("ServiceAccount", "demo-shoal"),
        }
        assert _args(cluster) == first
        assert [line.split()[0] for line in run("history", "demo").splitlines()[1:]] == ["1", "2", "3"]

        run("uninstall", "demo")
        assert cluster.objects() == {}


def _args(cluster: Cluster) -> Object:
    config = yaml.safe_load(cluster.objects()["RayService", "demo-shoal"]["spec"]["serveConfigV2"])
    args: Object = config["applications"][0]["args"]
    return args
