"""Whatever the chart renders, Kubernetes, KubeRay, Ray Serve and Shoal take it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from shoal.cluster import config
from shoal.cluster.config import NODE_CHECK_ENV, parse_config

Object = dict[str, Any]
Render = Callable[..., Any]  # the fixture: values, or a values file of the chart's, as Helm renders them

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "shoal"
DATA = Path(os.environ.get("SHOAL_DATA", ROOT.parent / "shared" / "data"))
VALUES = sorted(path.name for path in (CHART / "ci").glob("*.yaml"))
HELM_TIMEOUT_S = 60
KUBES = ("1.31", "1.32", "1.33", "1.34")
SAMPLES = ROOT / "deploy" / "kuberay"
CRDS = {"RayService": "ray.io_rayservices.yaml", "RayJob": "ray.io_rayjobs.yaml"}

_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_SELECTOR = {"type": "object", "additionalProperties": False, "properties": {"matchLabels": _STRINGS}}
_INTERVAL = {"type": "string", "pattern": r"^\d+(ms|s|m|h)$"}


# It reads a megabyte of JSON for every object otherwise.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)


def _closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [*properties] if required is None else required,
        "properties": properties,
    }


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


# Of the public APIs, what the chart uses of them and nothing else.
SPECS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _closed(
        selector=_SELECTOR,
        endpoints=_list(_closed(port={"type": "string"}, path={"type": "string"}, interval=_INTERVAL)),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _closed(
        selector=_SELECTOR, podMetricsEndpoints=_list(_closed(port={"type": "string"}, interval=_INTERVAL))
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _closed(
        groups={
            "type": "array",
            "items": _closed(
                ["name", "rules"],
                name={"type": "string", "minLength": 1},
                interval=_INTERVAL,
                rules=_list(
                    _closed(
                        ["expr"],
                        alert={"type": "string"},
                        record={"type": "string"},
                        expr={"type": ["string", "integer"]},
                        **{"for": _INTERVAL, "keep_firing_for": _INTERVAL},
                        labels=_STRINGS,
                        annotations=_STRINGS,
                    )
                ),
            ),
        }
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _closed(
        ["parentRefs", "rules"],
        parentRefs=_list(_closed(["name"], name=_NAME, namespace=_NAME, sectionName=_NAME)),
        hostnames=_list({"type": "string", "pattern": r"^(\*\.)?[a-z0-9.-]+$"}),
        rules=_list(
            _closed(
                matches=_list(_closed(path=_closed(type={"enum": ["PathPrefix"]}, value={"type": "string"}))),
                timeouts=_closed(request={"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
                backendRefs=_list(
                    _closed(["name"], group={"type": "string"}, kind={"type": "string"}, name=_NAME, port=_PORT)
                ),
            )
        ),
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): _closed(
        selector=_closed(matchLabels=_STRINGS),
        targetPorts=_list(_closed(number=_PORT)),
        appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        endpointPickerRef=_closed(
            name=_NAME, port=_closed(number=_PORT), failureMode={"enum": ["FailOpen", "FailClose"]}
        ),
    ),
}


@cache
def _kuberay(kind: str) -> Mapping[str, Any]:
    """Of KubeRay's own schema."""
    path = DATA / "kuberay" / CRDS[kind]
    if not path.exists():
        pytest.skip(f"needs KubeRay's CRDs: SHOAL_DATA names the folder above kuberay/{path.name}")
    versions = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema: dict[str, Any] = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    _close(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _close(schema: dict[str, Any]) -> None:
    """No unknown key goes through, as an API server would drop it; a number or text where the CRD says so."""
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema.pop("anyOf", None)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for inner in schema.get("properties", {}).values():
        _close(inner)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            _close(schema[key])


def _with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    """As an API server completes it before it checks."""
    if isinstance(value, list):
        return [_with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known: Mapping[str, Any] = schema.get("properties", {})
    given = {key: inner["default"] for key, inner in known.items() if "default" in inner} | value
    return {key: _with_defaults(item, known.get(key, {})) for key, item in given.items()}


def check(found: Object, kubes: Sequence[str] = KUBES) -> None:
    """Raises if one of those versions of Kubernetes would not take it."""
    kind = (found["apiVersion"], found["kind"])
    if found["apiVersion"] == "ray.io/v1":
        schema = _kuberay(found["kind"])
        jsonschema.Draft7Validator(schema).validate(_with_defaults(found, schema))
        pods = {json.dumps(template) for template in pod_templates(found)}
        objects = [{"apiVersion": "v1", "kind": "Pod", "metadata": {}, **json.loads(pod)} for pod in pods]
    elif kind in SPECS:
        jsonschema.Draft7Validator(SPECS[kind]).validate(found["spec"])
        objects = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": found["metadata"]}]  # metadata is that of all
    else:
        objects = [found]
    for one in objects:
        for kube in kubes:
            kubernetes_validate.validate(one, kube, strict=True)


def pod_templates(ray: Object) -> Iterator[Object]:
    """Of a RayService or RayJob."""
    cluster = ray["spec"].get("rayClusterConfig") or ray["spec"].get("rayClusterSpec")
    if cluster is not None:
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster.get("workerGroupSpecs", ()))


def test_helm_lints_strictly(helm: str) -> None:
    def lint(name: str, kube: str = f"{KUBES[0]}.0") -> str:
        command = [helm, "lint", "--strict", str(CHART), "--values", str(CHART / "ci" / name), "--kube-version", kube]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HELM_TIMEOUT_S)
        return "" if done.returncode == 0 else f"{name}: {done.stdout}{done.stderr}"

    with ThreadPoolExecutor(4) as pool:
        assert [problem for problem in pool.map(lint, VALUES) if problem] == []


@pytest.mark.parametrize("name", VALUES)
def test_every_object_is_one_that_kubernetes_takes(render: Render, name: str) -> None:
    rendered = render(name)
    assert rendered.error == ""
    for kube in KUBES[:-1]:
        assert render(name, kube=f"{kube}.0").objects == rendered.objects
    for found in rendered.objects:
        check(found)


def test_a_kubernetes_that_is_too_old_is_refused(render: Render) -> None:
    assert "incompatible with Kubernetes v1.30.0" in render("cpu-demo.yaml", kube="1.30.0").error


def test_the_checks_see_what_is_wrong(render: Render) -> None:
    rendered = render("everything.yaml")
    for kind, path, wrong in (
        ("RayService", ("spec", "rayClusterConfig", "headGroupSpec", "replica"), 1),
        ("RayService", ("spec", "rayClusterConfig", "enableInTreeAutoscaling"), "yes"),
        ("HTTPRoute", ("spec", "rules"), []),
        ("InferencePool", ("spec", "endpointPickerRef", "port"), 9002),
        ("ServiceMonitor", ("spec", "endpoint"), []),
        ("PrometheusRule", ("spec", "groups"), [{"name": "x"}]),
        ("Ingress", ("spec", "rule"), []),
        ("Service", ("spec", "ports"), [{"port": "serve"}]),
    ):
        found = rendered.one(kind)
        block = found
        for key in path[:-1]:
            block = block[key]
        block[path[-1]] = wrong
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            check(found, KUBES[-1:])


@pytest.mark.parametrize("name", VALUES)
def test_serve_and_shoal_take_the_serve_config(render: Render, name: str) -> None:
    rendered = render(name)
    schema = ServeDeploySchema.model_validate(rendered.serve_config)
    (app,) = schema.applications
    assert (app.name, app.route_prefix, app.import_path) == ("shoal", "/", "shoal.cluster.app:app")
    parsed = parse_config(rendered.args)
    assert parsed.http.port == schema.http_options.port
    ports = _ports(rendered.service["rayClusterConfig"]["headGroupSpec"])
    assert (ports["serve"], ports["admin"]) == (parsed.http.port, parsed.admin_port)


@pytest.mark.parametrize("name", VALUES)
def test_every_pod_finds_what_its_models_need(render: Render, name: str) -> None:
    """A stage's labels lead to exactly one group, whose pods hold its ranks."""
    rendered = render(name)
    for model in parse_config(rendered.args).models:
        labels = model.nodes.labels if isinstance(model.nodes.labels, tuple) else (model.nodes.labels,)
        for selector in labels:
            groups = [g for g in rendered.groups if selector.items() <= g.get("labels", {}).items()]
            assert len(groups) == 1, (model.name, selector)
            start = groups[0]["rayStartParams"]
            num_stages = model.pipeline_parallel if len(labels) == 1 else 1
            stages = -(-num_stages // groups[0]["numOfHosts"])
            assert model.resources.num_cpus is not None
            assert model.resources.num_gpus is not None
            assert float(start["num-gpus"]) >= stages * model.tensor_parallel * model.resources.num_gpus
            assert float(start["num-cpus"]) >= stages * model.tensor_parallel * model.resources.num_cpus
            assert groups[0]["maxReplicas"] >= model.max_replicas


def test_pods_are_not_root_and_cannot_write_but_where_they_must(render: Render) -> None:
    for name in VALUES:
        rendered = render(name)
        pods = [t["spec"] for t in pod_templates(rendered.one("RayService")) if "securityContext" in t["spec"]]
        pods.append(rendered.one("Pod")["spec"])
        assert len(pods) >= 3
        for pod in pods:
            (container,) = pod["containers"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["automountServiceAccountToken"] in (
                False,
                rendered.service["rayClusterConfig"]["enableInTreeAutoscaling"],
            )
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", ())}
            assert set(mounts.values()) <= {volume["name"] for volume in pod.get("volumes", ())}
            if "ray" in container["name"]:
                assert {"/tmp", "/dev/shm", "/cache"} <= mounts.keys()
                written = {e["name"]: e.get("value", "") for e in container["env"]}
                for place in ("HOME", "SHOAL_CACHE_DIR", "HF_HOME", "TRITON_CACHE_DIR"):
                    assert written[place].startswith(("/tmp", "/cache"))


def test_a_pod_has_the_time_to_drain(render: Render) -> None:
    for name, longest in (("cpu-demo.yaml", 300), ("tp8-pp2.yaml", 600), ("everything.yaml", 120)):
        for template in pod_templates(render(name).one("RayService")):
            pod = template["spec"]
            if "terminationGracePeriodSeconds" not in pod:
                continue  # a group of the user's own
            command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["shoal", "drain", "--timeout", str(longest)]
            assert pod["terminationGracePeriodSeconds"] > longest


def test_ray_runs_as_shoal_wants_it(render: Render) -> None:
    environment = {
        e["name"]: e.get("value")
        for e in next(pod_templates(render("cpu-demo.yaml").one("RayService")))["spec"]["containers"][0]["env"]
    }
    assert environment.items() >= getattr(config, "SERVE_ENV", {}).items()
    assert environment["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/opt/shoal/bin/haproxy"
    assert "RAY_AUTH_MODE" not in environment  # KubeRay sets it, with the token
    assert render("cpu-demo.yaml").service["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    open_to_all = render({"ray": {"auth": {"mode": "disabled"}}})
    for template in pod_templates(open_to_all.one("RayService")):
        assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in template["spec"]["containers"][0]["env"]
    assert "authOptions" not in open_to_all.service["rayClusterConfig"]


def test_the_head_computes_nothing_and_every_node_is_watched(render: Render) -> None:
    head = render("one-h200.yaml").service["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["num-gpus"] == "0"
    environment = {e["name"]: e.get("value") for e in head["template"]["spec"]["containers"][0]["env"]}
    assert environment.items() >= NODE_CHECK_ENV.items()
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert {"gcs-server", "dashboard", "client", "serve", "metrics", "admin"} == _ports(head).keys()


def test_a_shape_larger_than_a_node_takes_several_pods(render: Render) -> None:
    (group,) = render("tp8-pp2.yaml").groups
    assert (group["replicas"], group["numOfHosts"]) == (1, 2)
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_groups_grow_with_the_load(render: Render) -> None:
    rendered = render("autoscaled.yaml")
    bounds = {
        g["groupName"].partition("-")[0]: (g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in rendered.groups
    }
    assert bounds == {"gateway": (2, 2, 2), "cpu1": (1, 1, 4), "h100x1": (1, 0, 8), "h100x2": (2, 2, 6)}
    assert rendered.service["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    assert render("cpu-demo.yaml").service["rayClusterConfig"]["enableInTreeAutoscaling"] is False


def test_models_whose_pods_are_alike_share_a_group(render: Render) -> None:
    model = {"name": "a", "model": "hf://org/a", "gpu": {"type": "L4"}}
    rendered = render(
        {"models": [model, {**model, "name": "b", "replicas": 2}, {**model, "name": "c", "tensorParallel": 2}]}
    )
    assert [(g["replicas"], g["rayStartParams"]["num-gpus"]) for g in rendered.groups] == [(3, "1"), (1, "2")]


def test_another_chart_version_or_number_of_replicas_is_no_new_cluster(
    render: Render, helm: str, tmp_path: Path
) -> None:
    """KubeRay makes a new cluster of another pod template, and needs the GPUs twice meanwhile."""
    before = render("one-h200.yaml").service["rayClusterConfig"]
    values = yaml.safe_load((CHART / "ci" / "one-h200.yaml").read_text())
    values["models"][0] |= {"replicas": 3, "objectives": {"ttftMs": 1000}, "routing": "round_robin"}
    after = render(values).service["rayClusterConfig"]
    assert after["workerGroupSpecs"][0].pop("replicas") == 3
    assert after["headGroupSpec"] == before["headGroupSpec"]
    for group in (before["workerGroupSpecs"][0], after["workerGroupSpecs"][0]):
        for bound in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(bound, None)
    assert after["workerGroupSpecs"] == before["workerGroupSpecs"]
    assert "helm.sh/chart" not in json.dumps(before)
    more = {**values, "models": [*values["models"], {"name": "more", "model": "hf://org/more", "gpu": {"type": "L4"}}]}
    added = render(more).service["rayClusterConfig"]
    assert added["workerGroupSpecs"][0]["groupName"] == before["workerGroupSpecs"][0]["groupName"]
    assert len(added["workerGroupSpecs"]) == 2


def test_no_secret_is_in_what_everybody_may_read(render: Render) -> None:
    secret = "5e" * 32
    keys = [{"id": "ci", "tenant": "t", "sha256": secret, "limits": {"requests_per_minute": 3}}]
    rendered = render({"auth": {"keys": keys}, "hub": {"tokenSecret": {"name": "hub"}}})
    for found in rendered.objects:
        if found["kind"] == "Secret":
            (text,) = found["data"].values()
            assert yaml.safe_load(base64.b64decode(text)) == {"keys": keys}
        else:
            assert secret not in json.dumps(found)
    assert rendered.args["auth"] == {"keys_file": "/etc/shoal/keys/keys.yaml"}
    head, worker = (t["spec"] for t in pod_templates(rendered.one("RayService")))
    assert {"name": "keys", "mountPath": "/etc/shoal/keys", "readOnly": True} in head["containers"][0]["volumeMounts"]
    assert "keys" not in {volume["name"] for volume in worker["volumes"]}  # no gateway runs there
    token = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}}
    assert all(token in pod["containers"][0]["env"] for pod in (head, worker))


def test_the_network_policy_opens_nothing_but_the_public_port(render: Render) -> None:
    rendered = render({"networkPolicy": {"enabled": True}})
    own, public, dashboard, agent = rendered.one("NetworkPolicy")["spec"]["ingress"]
    assert "ports" not in own
    assert own["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "demo"
    assert public == {"ports": [{"port": 8000, "protocol": "TCP"}]}
    for rule in (dashboard, agent):
        assert rule["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}
    for admin in ("8001", "8080"):
        assert admin not in json.dumps(rendered.one("NetworkPolicy")["spec"])
    watched = render("everything.yaml").one("NetworkPolicy")["spec"]["ingress"]
    (metrics,) = (rule for rule in watched if {"port": 9001, "protocol": "TCP"} in rule.get("ports", ()))
    assert metrics["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}


def test_ways_in_lead_to_the_service_that_kuberay_turns(render: Render) -> None:
    """A Service of the chart's own would ask clusters that are not ready yet, too."""
    rendered = render(
        {"ingress": {"enabled": True}, "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}
    )
    name = rendered.service["serveService"]["metadata"]["name"]
    assert rendered.one("Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"] == name
    assert rendered.one("HTTPRoute")["spec"]["rules"][0]["backendRefs"] == [{"name": name, "port": 8000}]
    assert rendered.service["serveService"]["spec"]["sessionAffinity"] == "None"
    assert [o["metadata"]["name"] for o in rendered.objects if o["kind"] == "Service"] == ["demo-shoal-admin"]


def test_dashboards_and_rules_are_those_of_the_folders(render: Render) -> None:
    rendered = render("everything.yaml")
    labelled = (o for o in rendered.objects if o["metadata"].get("labels", {}).get("grafana_dashboard") == "1")
    boards = {o["metadata"]["name"]: o for o in labelled}
    files = sorted((CHART / "dashboards").glob("*.json"))
    assert len(boards) == len(files)
    for path in files:
        assert json.loads(boards[f"demo-llm-{path.stem}"]["data"][path.name]) == json.loads(path.read_text())
    groups = [
        g for path in sorted((CHART / "rules").glob("*.yaml")) for g in yaml.safe_load(path.read_text())["groups"]
    ]
    assert rendered.one("PrometheusRule")["spec"]["groups"] == groups


def test_notes_tell_the_first_question(helm: str) -> None:
    def notes(*arguments: str) -> str:
        command = [helm, "install", "demo", str(CHART), "--dry-run=client", "--disable-openapi-validation", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HELM_TIMEOUT_S, check=True)
        return done.stdout.partition("NOTES:")[2]

    plain = notes()
    assert "port-forward service/demo-shoal-gateway 8000:8000" in plain
    assert "authorization" not in plain
    (body,) = (
        line.strip().removeprefix("-d ").strip("'") for line in plain.splitlines() if line.strip().startswith("-d ")
    )
    assert json.loads(body)["model"] == "smollm2"
    locked = notes("--set", "auth.existingSecret=keys", "--set", "ingress.enabled=true,ingress.hosts={llm.example.com}")
    assert "authorization: Bearer $KEY" in locked
    assert "URL=http://llm.example.com" in locked


def test_the_sample_is_the_chart_s_demo(helm: str) -> None:
    command = "helm template shoal helm/shoal --values helm/shoal/ci/cpu-demo.yaml --skip-tests"
    done = subprocess.run(
        [helm, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=HELM_TIMEOUT_S
    )
    assert (SAMPLES / "rayservice.yaml").read_text() == done.stdout, f"run `{command} > deploy/kuberay/rayservice.yaml`"


def test_every_sample_is_one_that_kuberay_takes() -> None:
    found = [o for path in SAMPLES.glob("*.yaml") for o in yaml.safe_load_all(path.read_text())]
    assert {o["kind"] for o in found} == {"RayJob", "RayService", "Service", "ServiceAccount"}
    for one in found:
        check(one)


def _ports(group: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
