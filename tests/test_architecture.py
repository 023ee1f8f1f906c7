"""The layers hold, as the source says it: imports go down, in no circle, and outside packages stay where they belong.

Every import counts, also those inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("kernels", "engine", "cluster")
BESIDE = ("tests", "bench", "examples", "deploy")  # use the source, are used by nothing

FACTS = {"engine.config", "engine.request", "engine.plan", "engine.spans"}
ENGINE_FACE = FACTS | {
    "engine.core",
    "engine.executor",
    "engine.load",
    "engine.machine",
    "engine.memory.kv_events",
    "engine.memory.kv_layout",
    "engine.memory.prefix_cache",
    "engine.shapes",
    "engine.step_time",
    "engine.streaming",
    "engine.tokenizer",
    "engine.worker",
    "engine.group",
}
# What gateway, routing and replica know together; of each other they know nothing.
SHARED = {
    "cluster.channel",
    "cluster.config",
    "cluster.hub",
    "cluster.keys",
    "cluster.kv_events",
    "cluster.logs",
    "cluster.metrics",
    "cluster.progress",
}

# Part of the source (the longest matching name wins) -> the parts it may import, besides itself. "engine" and
# "cluster" are those packages' own __init__ and nothing below.
LAYERS: Mapping[str, set[str]] = {
    "kernels.torch_ops": set(),
    "kernels.cpu_ops": {"kernels.torch_ops"},
    "kernels.triton_ops": {"kernels.torch_ops"},
    "kernels.dispatch": {"kernels.torch_ops", "kernels.cpu_ops", "kernels.triton_ops"},
    # The host half: what a step does.
    "engine.config": set(),
    "engine.spans": set(),
    "engine.request": {"engine.spans"},
    "engine.plan": {"engine.request", "engine.spans"},
    "engine.executor": FACTS,
    "engine.memory": FACTS,
    "engine.step_time": {"engine.plan"},
    "engine.load": FACTS | {"engine.step_time"},
    "engine.speculation": FACTS | {"engine.step_time"},
    "engine.scheduling": FACTS | {"engine.memory", "engine.load", "engine.speculation", "engine.step_time"},
    "engine.core": FACTS
    | {
        "engine.scheduling",
        "engine.speculation",
        "engine.memory",
        "engine.executor",
        "engine.load",
        "engine.step_time",
    },
    "engine.gguf_header": FACTS,
    "engine.machine": {"engine.config"},
    "engine.sizing": {"engine.config", "engine.memory.kv_layout", "engine.models", "engine.parallel.topology"},
    "engine.shapes": {"engine.config", "engine.memory.kv_layout", "engine.models.registry", "engine.sizing"},
    # The rank half: doing it.
    "engine.parallel": FACTS,
    "engine.layers": {"engine.parallel", "kernels.dispatch"},
    "engine.models": FACTS | {"engine.gguf_header", "engine.layers", "engine.parallel", "kernels.dispatch"},
    "engine.sampling": FACTS | {"engine.parallel", "kernels.dispatch"},
    "engine.runner": FACTS
    | {
        "engine.models",
        "engine.layers",
        "engine.parallel",
        "engine.sampling",
        "engine.memory.kv_layout",
        "kernels.dispatch",
    },
    "engine.worker": FACTS
    | {
        "engine.executor",
        "engine.machine",
        "engine.runner",
        "engine.models",
        "engine.parallel",
        "engine.memory.kv_layout",
        "engine.shapes",
        "engine.sizing",
        "kernels.dispatch",
    },
    # Many ranks: their coordinator is of the host half, a rank's process of both.
    "engine.group": FACTS
    | {"engine.executor", "engine.models.registry", "engine.parallel.topology", "engine.shapes", "engine.sizing"},
    "engine.group.rank": FACTS | {"engine.executor", "engine.group", "engine.parallel", "engine.worker"},
    # Fronts.
    "engine.tokenizer": FACTS | {"engine.gguf_header"},
    "engine.streaming": FACTS | {"engine.core", "engine.executor"},
    "engine.llm": FACTS | {"engine.core", "engine.executor", "engine.group", "engine.tokenizer", "engine.worker"},
    "engine": {"engine.llm", "engine.request"},
    "cluster.config": ENGINE_FACE | {"cluster.hub"},
    "cluster.hub": {"engine.config"},
    "cluster.channel": ENGINE_FACE,
    "cluster.metrics": ENGINE_FACE,
    "cluster.keys": {"engine.config", "cluster.config"},
    "cluster.kv_events": set(),
    "cluster.logs": set(),
    "cluster.progress": {"cluster.channel"},
    "cluster.gateway": ENGINE_FACE | SHARED | {"cluster.routing"},
    "cluster.routing": ENGINE_FACE | SHARED,
    "cluster.replica": ENGINE_FACE | SHARED | {"cluster.autoscaling.signals"},
    "cluster.autoscaling": ENGINE_FACE,
    "cluster.simulation": ENGINE_FACE
    | {"cluster.autoscaling", "cluster.routing"}
    | {"engine.load", "engine.memory", "engine.scheduling", "engine.step_time"},
    "cluster.admin": ENGINE_FACE
    | SHARED
    | {"cluster.gateway.errors", "cluster.gateway.front", "cluster.gateway.responses", "cluster.gateway.sse"},
    "cluster.app": ENGINE_FACE | SHARED | {"cluster.admin", "cluster.gateway", "cluster.routing", "cluster.replica"},
    "cluster.commands": ENGINE_FACE
    | SHARED
    | {"cluster.app", "cluster.autoscaling", "cluster.routing", "cluster.simulation"},
    "cluster.cli": ENGINE_FACE | {"cluster.commands", "cluster.config", "cluster.keys"},
    "cluster": set(),
}
# (module, module it imports): why the rule does not hold there.
EXCEPTIONS: Mapping[tuple[str, str], str] = {}

# Part of the source -> outside packages it may import. What is not named here imports the standard library only.
OUTSIDE: Mapping[str, set[str]] = {
    "kernels": {"torch"},
    "kernels.triton_ops": {"torch", "triton"},
    "engine.llm": {"tqdm"},
    "engine.tokenizer": {"tokenizers", "jinja2", "transformers"},  # transformers converts old formats
    "engine.group": {"msgspec", "zmq"},
    "engine.layers": {"torch"},
    "engine.models": {"torch", "numpy", "transformers", "safetensors", "gguf"},
    "engine.parallel": {"torch"},
    "engine.runner": {"torch", "numpy"},
    "engine.sampling": {"torch", "numpy"},
    "engine.worker": {"torch"},
    "cluster": {
        "ray", "fastapi", "starlette", "pydantic", "pydantic_core", "msgspec", "zmq", "yaml", "prometheus_client",
    },
    "cluster.admin": {"httpx", "ray", "starlette", "uvicorn"},
    "cluster.gateway.tracing": {"opentelemetry"},
    "cluster.hub": {"huggingface_hub", "tqdm"},
    "cluster.simulation": {"matplotlib", "msgspec", "yaml"},
}  # fmt: skip

# Promises about processes, which the source alone cannot keep: modules -> what importing them leaves out.
LEFT_OUT = (
    ("shoal.engine.core shoal.engine.scheduling.scheduler shoal.engine.memory.kv_manager", "torch numpy transformers"),
    ("shoal.engine shoal.engine.streaming", "torch numpy ray"),
    ("shoal.engine.tokenizer shoal.engine.models.registry", "torch transformers ray"),
    ("shoal.engine.group.coordinator shoal.engine.group.processes", "torch numpy transformers ray"),
    ("shoal.engine.llm", "ray fastapi pydantic"),
    ("shoal.cluster.cli", "ray torch transformers"),
    ("shoal.cluster.app shoal.cluster.gateway.deployment shoal.cluster.replica.deployment", "torch transformers"),
    ("shoal.cluster.commands.keys", "ray torch fastapi"),
    ("shoal.cluster.commands.simulate", "ray torch transformers fastapi matplotlib"),
)


class Import(NamedTuple):
    """One imported name and where it stands."""

    module: str  # the importing one, "engine.core", or the file's path outside the source
    target: str  # "shoal.engine.plan", "torch.nn.functional"
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_in(name: str, source: str) -> Iterator[Import]:
    """Every import of a file; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} has a relative import: write it out"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(name, full if full.removeprefix("shoal.") in MODULES else node.module, node.lineno)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = {module_name(path): path for path in python_files(*SOURCE)}
IMPORTS = [found for name, path in MODULES.items() for found in imports_in(name, path.read_text())]
INSIDE = [found._replace(target=found.target.removeprefix("shoal.")) for found in IMPORTS
          if found.target.startswith("shoal.")]  # fmt: skip
FOREIGN = [found for found in IMPORTS if found.target.partition(".")[0] not in (*sys.stdlib_module_names, "shoal")]


def part_of(module: str, parts: Iterable[str]) -> str | None:
    """The longest name in `parts` that is `module` or a package around it."""
    names = [name for name in parts if module == name or module.startswith(f"{name}.")]
    return max(names, key=len, default=None)


def may_import(module: str, target: str) -> bool:
    if module in SOURCE:
        allowed = LAYERS[module]
    else:
        part = part_of(module, LAYERS.keys() - SOURCE)
        assert part is not None, f"{module} belongs to no layer: give it one in LAYERS"
        allowed = {part} | LAYERS[part]
    return part_of(target, allowed) is not None or (module, target) in EXCEPTIONS


def test_imports_go_down() -> None:
    assert len(INSIDE) > 100, "the source was not found"
    wrong = [str(found) for found in INSIDE if not may_import(found.module, found.target)]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_still_needed() -> None:
    used = {(found.module, found.target) for found in INSIDE}
    assert set(EXCEPTIONS) <= used, f"no longer needed: {set(EXCEPTIONS) - used}"


def test_there_is_no_import_cycle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in INSIDE:
        graph[found.module].add(found.target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_outside_packages_stay_where_they_belong() -> None:
    wrong = []
    for found in FOREIGN:
        part = part_of(found.module, OUTSIDE)
        if found.target.partition(".")[0] not in (OUTSIDE[part] if part is not None else ()):
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def requirements(*, has_dev: bool) -> set[str]:
    """Distribution names in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(project["optional-dependencies"]["dev"] if has_dev else ())]
    names = [re.match(r"[\w.-]+", requirement) for requirement in listed]
    return {normalized(name.group()) for name in names if name}


def normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def distributions(package: str, by_package: Mapping[str, list[str]]) -> set[str]:
    return {normalized(name) for name in by_package.get(package, [package])}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    by_package = importlib.metadata.packages_distributions()
    declared = requirements(has_dev=False) | {"triton"}  # triton comes with CUDA builds of torch
    imported = {found.target.partition(".")[0] for found in FOREIGN}
    missing = [package for package in imported if not distributions(package, by_package) & declared]
    assert not missing, f"add to pyproject.toml: {sorted(missing)}"
    used = {name for package in imported for name in distributions(package, by_package)}
    assert declared <= used, f"nothing imports {sorted(declared - used)}"


def test_tests_and_benchmarks_import_only_what_is_declared() -> None:
    by_package = importlib.metadata.packages_distributions()
    declared = requirements(has_dev=True) | {"shoal"}
    siblings = {
        "bench": {path.stem for path in python_files("bench")},
        # Other systems, in environments of their own.
        "peers_child.py": {"vllm", "openvino", "openvino_genai", "onnxruntime_genai"},
        "deploy": {"dashboards", "monitoring"},  # of deploy/ and tests/deploy/
    }
    wrong = []
    for path in python_files(*BESIDE):
        for found in imports_in(str(path.relative_to(ROOT)), path.read_text()):
            package = found.target.partition(".")[0]
            beside = {name for folder, names in siblings.items() if folder in path.parts for name in names}
            is_known = package in sys.stdlib_module_names or package in beside
            if not is_known and not distributions(package, by_package) & declared:
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_folders_by_their_own_names() -> None:
    """`kernels` is somebody else's package, which transformers probes for; ours is shoal.kernels."""
    everything = [found for path in python_files(*SOURCE, *BESIDE) for found in imports_in(str(path), path.read_text())]
    wrong = [str(found) for found in everything if found.target.partition(".")[0] in SOURCE]
    assert not wrong, "\n".join(wrong)


def test_kernels_and_tests_are_no_packages() -> None:
    """With `kernels/__init__.py`, `import kernels` from the checkout would find ours; tests stay off sys.path."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_packages_of_the_source_have_an_init() -> None:
    folders = {path.parent for path in python_files(*SOURCE)} - {ROOT / "kernels"}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_no_file_is_named_for_having_no_subject() -> None:
    nameless = {"utils", "util", "common", "helpers", "helper", "misc", "base"}
    assert not [str(path) for path in python_files(*SOURCE, *BESIDE) if path.stem in nameless]


@pytest.mark.parametrize(("modules", "left_out"), LEFT_OUT)
def test_importing_leaves_out_what_it_does_not_need(modules: str, left_out: str) -> None:
    script = f"import sys, {', '.join(modules.split())}; print(*set({left_out.split()}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
