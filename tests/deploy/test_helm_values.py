"""The chart's values: every key of Shoal's configuration is one of them, and what is wrong is refused in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from shoal.cluster import config
from shoal.cluster.config import ClusterConfig, parse_config

Render = Callable[..., Any]  # the fixture: values as Helm renders them

CHART = Path(__file__).resolve().parents[2] / "helm" / "shoal"

# Values that must fit each other; all others are made from their type.
SAMPLES: Mapping[str, Any] = {
    "models.model": "/models/x",
    "models.stage_layers": [3, 4],
    "models.pipeline_parallel": 2,
    "models.nodes.labels": {"zone": "a"},
    "models.engine.dtype": "float16",
    "models.engine.device": "cuda",
    "models.engine.memory_fraction": 0.5,
    "models.speculative": {"method": "draft_model", "model": "/models/y", "num_speculative_tokens": 3},
    "models.routing": {"policy": "least_loaded", "options": {"aKey": 1}},
    "models.autoscaling.max_replicas": 9,
    "models.resources": {"num_cpus": 3.0, "num_gpus": 0.5},
    "models.fairness.weights": {"aTenant": 2.0},
    "auth.keys_file": "/keys/keys.yaml",
    "gateway_labels": {"aLabel": "b"},
    "gateways": 3,
    "tracing.sample_ratio": 0.25,
}


def _sample(name: str, schema: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """Another value than the default for the key `name`."""
    if name in SAMPLES:
        return SAMPLES[name]
    for reference in (schema.get("$ref"), *(one.get("$ref") for one in schema.get("anyOf", ()))):
        if reference is not None:
            block = defaults[reference.rpartition("/")[2]]
            return {key: _sample(f"{name}.{key}", value, defaults) for key, value in block["properties"].items()}
    kind = next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)
    given = schema.get("default")
    if "enum" in kind:
        return next(one for one in reversed(kind["enum"]) if one != given)
    match kind["type"]:
        case "boolean":
            return not given
        case "integer" | "number":
            least = max(kind.get("minimum", 0), kind.get("exclusiveMinimum", 0), given or 0) + 1
            return min(least, kind.get("maximum", least), kind.get("exclusiveMaximum", least))
        case "string":
            return f"a-{name.rpartition('.')[2]}"
        case "array":
            return [_sample(f"{name}[]", kind["items"], defaults)]
    raise AssertionError(f"{name}: write a value into SAMPLES")


def _camel(value: Any, camel: Callable[[str], str], name: str = "") -> Any:
    """As the chart has it."""
    if isinstance(value, list):
        return [_camel(item, camel, name) for item in value]
    if not isinstance(value, dict) or name.endswith(("labels", "options", "weights")):
        return value
    return {camel(key): _camel(item, camel, key) for key, item in value.items()}


def test_every_key_of_the_configuration_is_reached(render: Render, make_schema: ModuleType) -> None:
    schema = ClusterConfig.model_json_schema()
    blocks = schema["$defs"]
    wanted = {
        key: _sample(key, value, blocks) for key, value in schema["properties"].items() if key not in ("models", "ray")
    }
    model = {
        key: _sample(f"models.{key}", value, blocks) for key, value in blocks["ModelSettings"]["properties"].items()
    }
    wanted["models"] = [model]
    assert parse_config(wanted).models[0].model_fields_set == set(blocks["ModelSettings"]["properties"])

    values = _camel(wanted, make_schema.camel)
    values["gateways"] = {"replicas": wanted["gateways"]}
    values["models"][0]["rankResources"] = values["models"][0].pop("resources")
    values["models"][0] |= {"gpu": {"perRank": 1}, "resources": {"cpu": 64}}
    rendered = render(values)
    assert rendered.error == ""
    args = rendered.args
    assert args["models"][0]["nodes"]["labels"].pop("shoal-group")
    assert parse_config(args) == parse_config(wanted)


def test_the_schema_is_made_from_the_configuration(make_schema: ModuleType) -> None:
    assert make_schema.read_schema() == make_schema.make_schema(), "run `python helm/make_schema.py`"


def test_every_key_is_described_and_every_block_closed(make_schema: ModuleType) -> None:
    schema = make_schema.read_schema()
    for path, one in _objects(schema, ""):
        assert one.get("description"), path
        if "properties" in one and path != "/definitions/any":
            closed = one["additionalProperties"] is False
            assert closed or path in ("/properties/auth/properties/keys/items",), path


def _objects(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, schema
    for key in ("properties", "definitions"):
        for name, one in schema.get(key, {}).items():
            yield from _objects(one, f"{path}/{key}/{name}")
    if "description" in schema.get("items", {}):
        yield from _objects(schema["items"], f"{path}/items")


def test_the_defaults_are_in_the_values_file(make_schema: ModuleType) -> None:
    """Every key of the schema but those of a model, which stand in comments."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = make_schema.read_schema()["properties"].keys() - values.keys()
    assert missing == {"global"}


MODEL: Mapping[str, Any] = {"name": "m", "model": "hf://org/m"}
GPU = {"gpu": {"type": "H100"}}


def _model(**changes: Any) -> dict[str, Any]:
    return {"models": [{**MODEL, **changes}]}


# What is wrong -> what the refusal says.
WRONG: Mapping[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "no model": ({"models": []}, ("/models", "minItems")),
    "text for a number": (_model(replicas="two"), ("/models/0/replicas", "got string, want integer")),
    "negative replicas": (_model(replicas=-1), ("/models/0/replicas", "minimum: got -1, want 1")),
    "half a replica": (_model(replicas=1.5), ("/models/0/replicas", "got number, want integer")),
    "a near name": (_model(replcas=2), ("/models/0", "'replcas' not allowed")),
    "snake case": (_model(tensor_parallel=2), ("/models/0", "'tensor_parallel' not allowed")),
    "an unknown block": ({"gateway": {}}, ("'gateway' not allowed",)),
    "an unknown engine key": (
        _model(engine={"maxModelLength": 1}),
        ("/models/0/engine", "'maxModelLength' not allowed"),
    ),
    "an unknown device": (_model(engine={"device": "tpu"}), ("/models/0/engine/device", "'auto', 'cpu', 'cuda'")),
    "no such memory": (_model(engine={"kvMemory": "lots"}), ("/models/0/engine/kvMemory", "does not match pattern")),
    "a share above 1": (
        _model(engine={"memoryFraction": 1.2}),
        ("/models/0/engine/memoryFraction", "exclusiveMaximum"),
    ),
    "a model without a name": ({"models": [{"model": "hf://org/m"}]}, ("/models/0", "missing property 'name'")),
    "a relative path": (_model(model="models/m"), ('models[0] (m): model "models/m"', "hf://ORG/NAME")),
    "a draft nowhere": (
        _model(speculative={"method": "draft_model", "model": "draft"}),
        ('models[0] (m): speculative.model "draft"',),
    ),
    "an unknown method": (_model(speculative="magic"), ("/models/0/speculative",)),
    "an unknown speculative key": (
        _model(speculative={"method": "ngram", "tokens": 3}),
        ("/models/0/speculative", "'tokens' not allowed"),
    ),
    "two of one name": ({"models": [MODEL, MODEL]}, ('two models are called "m"',)),
    "no shape for a node": (
        _model(tensorParallel=16, **GPU),
        ("models[0] (m): tensorParallel 16", "gpu.perNode 8", "raise pipelineParallel"),
    ),
    "GPUs by the name of a product": (
        _model(gpu={"resourceName": "H100"}),
        ("/models/0/gpu/resourceName", "does not match pattern"),
    ),
    "CPUs as text": (_model(resources={"cpu": "500m"}), ("/models/0/resources/cpu", "got string, want integer")),
    "resources as in a container": (
        _model(resources={"requests": {"cpu": 1}}),
        ("/models/0/resources", "'requests' not allowed"),
    ),
    "no such quantity": (
        _model(resources={"memory": "16 GB"}),
        ("/models/0/resources/memory", "does not match pattern"),
    ),
    "a pod too small": (
        _model(resources={"cpu": 2}, engine={"numThreads": 4}),
        ("models[0] (m): resources.cpu 2 is too little", "lower engine.numThreads"),
    ),
    "a pod too small for a coordinator": (
        _model(resources={"cpu": 2}, tensorParallel=2, **GPU),
        ("models[0] (m): resources.cpu 2 is too little", "and their coordinator"),
    ),
    "a device without one": (_model(engine={"device": "cuda"}), ("engine.device cuda without gpu", "gpu.perRank")),
    "a device for nothing": (_model(engine={"device": "cpu"}, **GPU), ("engine.device cpu with gpu.perRank 1",)),
    "more of a GPU than there is": (
        _model(rankResources={"numGpus": 2}, **GPU),
        ("rankResources.numGpus 2 is more than gpu.perRank 1",),
    ),
    "min above max": (
        _model(autoscaling={"minReplicas": 4, "maxReplicas": 2}),
        ("autoscaling.minReplicas 4 is more than autoscaling.maxReplicas 2",),
    ),
    "more at first than at most": (
        _model(replicas=3, autoscaling={"maxReplicas": 2}),
        ("replicas 3 to begin with are more than autoscaling.maxReplicas 2",),
    ),
    "no max": (_model(autoscaling={"minReplicas": 1}), ("/models/0/autoscaling", "missing property 'maxReplicas'")),
    "layers for other stages": (
        _model(pipelineParallel=2, stageLayers=[8]),
        ("stageLayers has 1 numbers for pipelineParallel 2",),
    ),
    "labels for other stages": (
        _model(pipelineParallel=2, nodes={"labels": [{"zone": "a"}]}),
        ("nodes.labels has 1 selectors for pipelineParallel 2",),
    ),
    "a selector that is no label": (
        _model(nodes={"labels": {"zone": "in(a,b)"}}),
        ('nodes.labels.zone "in(a,b)"', "plain value"),
    ),
    "a volume without a claim": (
        _model(storage={"mountPath": "/models"}),
        ("/models/0/storage", "missing property 'claimName'"),
    ),
    "two volumes at one path": (
        {
            "models": [
                {**MODEL, "storage": {"claimName": "a", "mountPath": "/models"}},
                {"name": "other", "model": "/models/other", "storage": {"claimName": "b", "mountPath": "/models"}},
            ]
        },
        ("models[1] (other): storage.mountPath /models is that of another volume",),
    ),
    "keys here and there": (
        {"auth": {"existingSecret": "s", "keys": [{"id": "a", "tenant": "t", "sha256": "0" * 64}]}},
        ("auth: keys and existingSecret are both set",),
    ),
    "a key of nobody": (
        {"auth": {"keys": [{"id": "a", "sha256": "0" * 64}]}},
        ("/auth/keys/0", "missing property 'tenant'"),
    ),
    "a key for its hash": (
        {"auth": {"keys": [{"id": "a", "sha256": "sk-shoal-secret"}]}},
        ("/auth/keys/0/sha256", "does not match pattern"),
    ),
    "a secret without a name": ({"hub": {"tokenSecret": "hf"}}, ("/hub/tokenSecret", "got string, want object")),
    "a password without its entry": (
        {"ray": {"gcsFaultTolerance": {"redis": {"passwordSecret": {"name": "redis"}}}}},
        ("/ray/gcsFaultTolerance/redis/passwordSecret", "missing property 'key'"),
    ),
    "redis nowhere": (
        {"ray": {"gcsFaultTolerance": {"backend": "redis"}}},
        ("ray.gcsFaultTolerance.redis.address", "needs it"),
    ),
    "an unknown backend": ({"ray": {"gcsFaultTolerance": {"backend": "etcd"}}}, ("/ray/gcsFaultTolerance/backend",)),
    "half an incremental upgrade": (
        {"ray": {"upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade"}}},
        ("ray.upgradeStrategy.gatewayClassName", "needs it"),
    ),
    "a port that is Ray's": ({"http": {"port": 8265}}, ("http.port: 8265 is the port of Ray's dashboard",)),
    "a port twice": ({"http": {"port": 8001}}, ("http.port: 8001 is the port of admin.port",)),
    "no such port": ({"http": {"port": 123456}}, ("/http/port", "maximum")),
    "a route on nothing": ({"httpRoute": {"enabled": True}}, ("httpRoute.parentRefs", "name the Gateway")),
    "a pool without a picker": ({"inferencePool": {"enabled": True}}, ("inferencePool.endpointPicker.name",)),
    "a route to no pool": (
        {"httpRoute": {"enabled": True, "parentRefs": [{"name": "g"}], "useInferencePool": True}},
        ("httpRoute.useInferencePool", "inferencePool.enabled"),
    ),
    "a monitor of nothing": (
        {"adminService": {"enabled": False}, "metrics": {"serviceMonitor": {"enabled": True}}},
        ("metrics.serviceMonitor", "adminService.enabled"),
    ),
    "an unknown service type": ({"service": {"type": "ExternalName"}}, ("/service/type", "'LoadBalancer'")),
    "a name for no host": ({"fullnameOverride": "1shoal"}, ('"1shoal"', "begins with a letter")),
    "no such digest": ({"image": {"digest": "latest"}}, ("/image/digest", "does not match pattern")),
    "a budget of words": (
        {"podDisruptionBudget": {"maxUnavailable": "most"}},
        ("/podDisruptionBudget/maxUnavailable",),
    ),
    "a number for text": ({"ray": {"env": {"NCCL_DEBUG": 1}}}, ("/ray/env/NCCL_DEBUG", "got number, want string")),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_by_its_name(render: Render, what: str) -> None:
    values, words = WRONG[what]
    error = render(values).error
    assert error, "accepted"
    for word in words:
        assert word in error
    assert len(error) < 1500


def test_what_a_key_of_the_chart_says_is_a_key_of_shoal() -> None:
    """Sprig's snakecase, which the templates use, undoes what the schema does."""
    for block in vars(config).values():
        if isinstance(block, type) and issubclass(block, config.Settings):
            for name in block.model_fields:
                assert not any(c.isdigit() for c in name), f"{name}: snakecase parts digits from letters"
