"""The chart as the real Helm renders it."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "shoal"
HELM_TIMEOUT_S = 60

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 10 times as fast, where PyYAML has it

Object = dict[str, Any]


def find_helm() -> str | None:
    own = ROOT / ".tools" / "helm"
    return str(own) if own.is_file() else shutil.which("helm")


@dataclass(frozen=True)
class Rendered:
    """What `helm template` said."""

    objects: tuple[Object, ...]
    error: str = ""

    def one(self, kind: str, name: str | None = None) -> Object:
        (found,) = (o for o in self.objects if o["kind"] == kind and name in (None, o["metadata"]["name"]))
        return found

    def kinds(self) -> list[str]:
        return [o["kind"] for o in self.objects]

    @property
    def service(self) -> Object:
        """The RayService's spec."""
        spec: Object = self.one("RayService")["spec"]
        return spec

    @property
    def serve_config(self) -> Object:
        config: Object = yaml.safe_load(self.service["serveConfigV2"])
        return config

    @property
    def args(self) -> Object:
        """Shoal's configuration."""
        (app,) = self.serve_config["applications"]
        args: Object = app["args"]
        return args

    @property
    def groups(self) -> list[Object]:
        groups: list[Object] = self.service["rayClusterConfig"]["workerGroupSpecs"]
        return groups


@pytest.fixture(scope="session")
def helm() -> str:
    program = find_helm()
    if program is None:
        pytest.skip("needs helm: `python deploy/get_helm.py` puts it into .tools/")
    return program


@pytest.fixture(scope="session")
def render(helm: str) -> Callable[..., Rendered]:
    """`helm template` with values, or a values file of the chart's ci folder, as Kubernetes `kube` would be asked."""

    @cache
    def run(text: str, kube: str, release: str) -> Rendered:
        command = [helm, "template", release, str(CHART), "--namespace", "llm", "--kube-version", kube, "--values", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=HELM_TIMEOUT_S)
        if done.returncode != 0:
            return Rendered((), done.stderr)
        return Rendered(tuple(o for o in yaml.load_all(done.stdout, LOADER) if o is not None))

    def render_values(values: Mapping[str, Any] | str, *, kube: str = "1.34.0", release: str = "demo") -> Rendered:
        text = (CHART / "ci" / values).read_text() if isinstance(values, str) else yaml.safe_dump(dict(values))
        return copy.deepcopy(run(text, kube, release))

    return render_values


@pytest.fixture(scope="session")
def make_schema() -> ModuleType:
    """helm/make_schema.py, which is a script."""
    path = ROOT / "helm" / "make_schema.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
