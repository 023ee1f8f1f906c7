"""What users write against. A change here is a change for them: mention it in CHANGELOG.md."""

from __future__ import annotations

import argparse
import dataclasses
import inspect

import shoal.engine
from shoal.cluster.cli import build_parser
from shoal.cluster.config import (
    AdminSettings,
    AuthSettings,
    AutoscalingSettings,
    ClusterConfig,
    EngineSettings,
    FairnessSettings,
    HttpSettings,
    ModelSettings,
    NodeSettings,
    ObjectiveSettings,
    RaySettings,
    RoutingSettings,
    SpeculativeSettings,
)
from shoal.cluster.gateway.routes import build_app
from shoal.cluster.keys import KeyEntry, KeyLimits
from shoal.engine import LLM, SamplingParams
from shoal.engine.config import EngineOptions, SpeculativeOptions
from shoal.engine.llm import Completion, GenerationResult


def field_names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def test_names_of_the_engine() -> None:
    assert shoal.engine.__all__ == ["LLM", "SamplingParams"]
    assert all(getattr(shoal.engine, name) for name in shoal.engine.__all__)


def test_offline_calls() -> None:
    signatures = {
        name: str(inspect.signature(member))
        for name, member in vars(LLM).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    params = "params: 'SamplingParams | Sequence[SamplingParams] | None' = None"
    results = "-> 'list[GenerationResult]'"
    assert signatures == {
        "stats": "(self) -> 'EngineStats'",
        "close": "(self) -> 'None'",
        "generate": f"(self, prompts: 'Prompt | Sequence[Prompt]', {params}, *, use_tqdm: 'bool' = True) {results}",
        "chat": f"(self, messages: 'Sequence[Message] | Sequence[Sequence[Message]]', {params}, "
        f"*, use_tqdm: 'bool' = True) {results}",
    }
    assert str(inspect.signature(LLM)) == "(model: 'str', *, dtype: 'str' = 'auto', **options: 'Any') -> 'None'"


def test_options_of_the_engine() -> None:
    assert field_names(EngineOptions) == [
        "model", "dtype", "quantization", "device", "max_model_len", "block_size", "kv_memory_bytes", "num_blocks",
        "memory_fraction", "max_step_tokens", "max_running_requests", "enable_prefix_caching", "scheduling_policy",
        "watermark", "ageing_s", "num_threads", "seed", "tensor_parallel", "pipeline_parallel", "stage_layers",
        "async_scheduling", "cuda_graphs", "speculative", "step_timeout_s", "heartbeat_timeout_s",
    ]  # fmt: skip


def test_offline_results() -> None:
    assert field_names(GenerationResult) == ["prompt", "prompt_token_ids", "outputs", "num_cached_tokens"]
    assert field_names(Completion) == [
        "index", "text", "token_ids", "logprobs", "finish_reason", "stop_string", "drafts",
    ]  # fmt: skip


def test_sampling_params_and_their_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "max_tokens": 16,
        "min_tokens": 0,
        "n": 1,
        "best_of": None,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "early_stopping": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "bad_words": (),
        "bad_words_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
    }


def options_of(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Of each of its commands."""
    return {
        name: [option for action in each._actions for option in action.option_strings if option.startswith("--")]
        for name, each in commands_of(parser).items()
    }


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def test_commands_and_their_options() -> None:
    options = options_of(build_parser())
    assert options == {
        "serve": [
            "--help", "--host", "--port", "--admin-host", "--admin-port", "--model-name", "--replicas", "--routing",
            "--tensor-parallel",
            "--pipeline-parallel", "--stages", "--node-labels", "--speculative",
            "--dtype", "--quantization", "--device", "--max-model-len", "--kv-memory", "--max-running-requests",
            "--num-threads", "--ray-address", "--verbose",
        ],
        "deploy": ["--help", "--ray-address", "--no-wait", "--timeout", "--verbose"],
        "delete": ["--help", "--ray-address", "--timeout", "--shutdown-serve", "--verbose"],
        "drain": ["--help", "--timeout", "--ray-address"],
        "config": ["--help"],
        "ray-env": ["--help"],
        "plan": [
            "--help", "--gpus", "--dtype", "--quantization", "--max-model-len", "--max-running-requests", "--json",
        ],
        "chat": ["--help", "--url", "--message", "--model", "--system", "--temperature", "--max-tokens"],
        "status": ["--help", "--url", "--ray-address", "--json"],
        "why": ["--help", "--url", "--json"],
        "bench": ["--help", "--num-threads", "--calibrate", "--out"],
        "simulate": [
            "--help", "--trace", "--format", "--speed", "--replicas", "--policy", "--hardware", "--ttft-ms",
            "--tpot-ms", "--admission", "--autoscaling", "--min-replicas", "--max-replicas", "--seed", "--plot",
            "--json",
        ],
        "keys": ["--help"],
    }  # fmt: skip
    options = options_of(commands_of(build_parser())["keys"])
    assert options == {
        "new": [
            "--help", "--tenant", "--id", "--models", "--rpm", "--tpm", "--concurrent", "--max-tokens", "--expires",
            "--shared-cache", "--append",
        ],
        "check": ["--help"],
    }  # fmt: skip


def test_keys_of_a_configuration_file() -> None:
    assert set(ClusterConfig.model_fields) == {
        "models", "http", "admin", "auth", "tracing", "logging", "gateways", "gateway_labels", "ray",
    }  # fmt: skip
    assert set(ModelSettings.model_fields) == {
        "name", "model", "replicas", "tensor_parallel", "pipeline_parallel", "stage_layers", "nodes", "engine",
        "speculative", "resources", "max_ongoing_requests", "max_queued_requests", "objectives", "fairness",
        "routing", "autoscaling", "drain_timeout", "max_surge", "usd_per_hour",
    }  # fmt: skip
    assert set(EngineSettings.model_fields) == {
        "dtype", "quantization", "device", "max_model_len", "block_size", "kv_memory", "memory_fraction",
        "max_step_tokens",
        "max_running_requests", "prefix_caching", "scheduling_policy", "num_threads", "seed", "async_scheduling",
        "cuda_graphs", "step_timeout", "heartbeat_timeout",
    }  # fmt: skip
    assert set(SpeculativeSettings.model_fields) == set(field_names(SpeculativeOptions)) == {
        "method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max", "suffix_history_tokens", "model",
        "draft_tensor_parallel", "adaptive",
    }  # fmt: skip
    assert set(RoutingSettings.model_fields) == {"policy", "options"}
    assert set(ObjectiveSettings.model_fields) == {"ttft_ms", "tpot_ms"}
    assert set(AutoscalingSettings.model_fields) == {
        "policy", "min_replicas", "max_replicas", "target_ttft_ms", "target_kv_usage", "target_ongoing_requests",
        "idle_timeout",
    }  # fmt: skip
    assert set(FairnessSettings.model_fields) == {"window_ms", "weights"}
    assert set(NodeSettings.model_fields) == {"labels", "stages"}
    assert set(AdminSettings.model_fields) == {"host", "port", "hosts"}
    assert set(HttpSettings.model_fields) == {
        "host", "port", "max_body_bytes", "header_timeout", "body_timeout", "stream_interval", "cors_origins",
    }  # fmt: skip
    assert set(AuthSettings.model_fields) == {"keys_file"}
    assert set(KeyEntry.model_fields) == {
        "id", "tenant", "sha256", "models", "limits", "expires", "revoked", "shared_cache",
    }  # fmt: skip
    assert set(KeyLimits.model_fields) == {
        "requests_per_minute", "tokens_per_minute", "max_concurrent_requests", "max_tokens_per_request",
    }  # fmt: skip
    assert set(RaySettings.model_fields) == {"address"}


def test_http_routes() -> None:
    routes = {
        (method, getattr(route, "path", ""))
        for route in build_app({}).routes
        for method in getattr(route, "methods", None) or ()
    }
    assert {(method, path) for method, path in routes if method != "HEAD"} == {
        ("GET", "/v1/models"),
        ("GET", "/v1/models/{name:path}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/health"),
        ("GET", "/ping"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
    }
