"""What `shoal deploy` and `shoal config` decide without a Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from shoal.cluster import cli
from shoal.cluster.channel import DrainState
from shoal.cluster.commands import takedown
from shoal.cluster.commands.configuration import serve_config
from shoal.cluster.commands.deploy import address_of, check_checkpoints, check_paths
from shoal.cluster.commands.ray_env import ray_environment
from shoal.cluster.config import NODE_CHECK_ENV, SERVE_ENV, HttpSettings, load_config, parse_config
from shoal.engine.config import ConfigError

ROOT = Path(__file__).parents[3]
CONFIG: dict[str, Any] = {
    "models": [
        {"name": "a", "replicas": 3, "engine": {"device": "cpu", "kv_memory": "256MiB"}, "routing": "round_robin"},
        {"name": "b", "model": "hf://org/b", "autoscaling": {"min_replicas": 0, "max_replicas": 2}, "replicas": 2},
    ],
    "http": {"host": "0.0.0.0", "port": 9000},
    "gateways": 2,
    "ray": {"address": "auto"},
}


def test_a_rendered_configuration_is_one_for_serve_and_means_the_same() -> None:
    rendered = yaml.safe_load(yaml.safe_dump(serve_config(parse_config(CONFIG))))
    schema = ServeDeploySchema.model_validate(rendered)
    (application,) = schema.applications
    assert (application.name, application.route_prefix) == ("shoal", "/")
    assert application.import_path == "shoal.cluster.app:app"
    assert (rendered["http_options"], rendered["proxy_location"]) == ({"host": "0.0.0.0", "port": 9000}, "EveryNode")
    again = parse_config(application.args)
    config = parse_config(CONFIG)
    assert again.models[0] == config.models[0].model_copy(update={"replicas": 1})
    assert again.models[1] == config.models[1]
    assert again.http == config.http
    numbers = {deployment.name: deployment.num_replicas for deployment in application.deployments}
    assert numbers == {"gateway": 2, "replica-a": 3}


def test_only_numbers_of_replicas_leave_the_arguments_as_they_are() -> None:
    models = [{**CONFIG["models"][0], "replicas": 5}, CONFIG["models"][1]]
    before, after = (serve_config(parse_config(one)) for one in (CONFIG, {**CONFIG, "models": models, "gateways": 4}))
    assert before["applications"][0]["args"] == after["applications"][0]["args"]
    assert before != after


def test_the_default_configuration_renders() -> None:
    ServeDeploySchema.model_validate(serve_config(parse_config({})))


@pytest.mark.parametrize("path", ["models/tiny", "~/tiny", "./tiny.gguf"])
def test_a_path_of_this_machine_is_not_rendered(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"models": [{"model": path}]}))
    assert cli.main(["config", "render", str(file)]) == cli.EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"models[0].model: {path} is relative to a folder of this machine" in error
    assert "hf://organization/name" in error


def test_config_check_says_what_is_served_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({**CONFIG, "models": [CONFIG["models"][0]]}))
    assert cli.main(["config", "check", str(file)]) == 0
    assert "3 x a, 1 ranks each" in capsys.readouterr().out
    file.write_text("gatways: 2")
    assert cli.main(["config", "check", str(file)]) == cli.EXIT_BAD_INPUT
    assert "gatways: unknown key; did you mean 'gateways'?" in capsys.readouterr().err


def test_a_model_in_the_folder_of_the_job_is_refused() -> None:
    path = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/models/tiny"
    with pytest.raises(ConfigError, match=r"models\[0\].model: tiny is in the working directory of this job"):
        check_paths(parse_config({"models": [{"name": "m", "model": path}]}))
    check_paths(parse_config({"models": [{"name": "m", "model": "/models/tiny"}]}))


def test_what_no_device_could_serve_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    check_checkpoints(parse_config({"models": [{"name": "m", "engine": {"device": "cuda"}}]}))
    for model, reason in (
        ({"model": str(tmp_path / "none")}, "there is no"),
        ({"pipeline_parallel": 1000}, "stage"),
        ({"engine": {"max_model_len": 10**9}}, "max_model_len"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_checkpoints(parse_config({"models": [{"name": "m", **model}]}))


def test_the_address_is_given_or_of_the_environment_or_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert address_of(None) == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert address_of(None) == "10.0.0.1:6379"
    assert address_of("10.0.0.2:6379") == "10.0.0.2:6379"
    with pytest.raises(ConfigError, match="ray job submit --address http://head:8265"):
        address_of("http://head:8265")


def test_ray_env_is_what_a_shell_exports(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ray-env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    exported = dict(line.removeprefix("export ").replace("'", "").split("=", 1) for line in lines)
    assert exported == {**ray_environment(HttpSettings().header_timeout), **NODE_CHECK_ENV}
    assert exported.keys() >= SERVE_ENV.keys()


def test_the_sample_can_be_deployed_by_either_tool() -> None:
    config = load_config(str(ROOT / "deploy/ray/cluster.yaml"))
    check_paths(config)
    ServeDeploySchema.model_validate(serve_config(config))
    env = yaml.safe_load((ROOT / "deploy/ray/runtime_env.yaml").read_text())
    assert [(ROOT / module / "cluster" / "cli.py").is_file() for module in env["py_modules"]] == [True]


def test_a_gateway_that_does_not_answer_is_not_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [([], 1), ([DrainState(True, 0, 5.0)], 0)]
    monkeypatch.setattr(takedown, "_ask", lambda node_id, *, is_over: answers.pop(0))
    assert takedown.drain(10.0)
    assert not answers
    asked: list[bool] = []

    def silent(node_id: str | None, *, is_over: bool) -> tuple[list[DrainState], int]:
        asked.append(is_over)
        return [], 1

    monkeypatch.setattr(takedown, "_ask", silent)
    assert not takedown.drain(0.0)
    assert asked == [False, True]
