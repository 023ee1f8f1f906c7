"""What a gateway and a replica say to each other.

A call goes to the replica as one Serve request, which stays open until all samples of the call are finished,
so that Serve's routing, queue accounting and cancellation hold for it. The tokens come back beside it: the
replica pushes one ZeroMQ message per engine step to each gateway, holding what that step gave all of the
gateway's calls. A message of 32 outputs takes 12 us to encode and 16 us to decode.

The answer to the Serve request says how many tokens each sample got, so a lost message is noticed. Between the tokens
the replica names the calls that it still holds, so a gateway knows a replica that it cannot hear any more.

Replicas publish what they have to do (`LoadReport`) and name the gateways that call them. Gateways tell each other
where they send requests (`Reserved`, `Held`, `Settled`) and what API keys have spent (`Spent`), to the same sockets
that the tokens come to.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec

from shoal.engine.executor import RankInfo
from shoal.engine.load import EngineLoad
from shoal.engine.request import Request, RequestError, RequestId, RequestOutput, SamplingParams, requests_of

# A message that would have to wait behind this many is dropped: its gateway has stopped reading.
MAX_QUEUED_MESSAGES: Final = 100_000
KEEPALIVE_PERIOD_S: Final = 1.0
# A call of which a gateway has heard before, and then not for this long, is lost.
SILENCE_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """One user call on its way to a replica: a prompt, and what is generated of it. Its seed is decided."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    session: str = ""  # calls that the client says belong together
    http_request_id: str = ""  # the x-request-id of the HTTP request that it is for
    traceparent: str = ""  # W3C Trace Context of that request's span, where it has one

    @property
    def sample_ids(self) -> tuple[RequestId, ...]:
        """What each sample goes by in the engine."""
        return tuple(RequestId(f"{self.request_id}-{i}") for i in range(self.params.num_samples))

    def requests(self, arrival_s: float) -> list[Request]:
        """What the engine is given for it. `arrival_s` is time.monotonic() of the replica."""
        assert self.params.seed is not None, f"the gateway decides the seed of {self.request_id}"
        return requests_of(
            self.sample_ids,
            self.prompt_ids,
            self.params,
            seed=self.params.seed,
            arrival_s=arrival_s,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


@dataclass(frozen=True, slots=True)
class CallSummary:
    """The answer to a call after its last token: tokens per sample, or why the engine refused it."""

    num_tokens: tuple[int, ...] = ()
    refusal: str | None = None
    refusal_param: str | None = None
    refusal_code: str | None = None

    @classmethod
    def refused(cls, error: RequestError) -> CallSummary:
        return cls(refusal=str(error), refusal_param=error.param, refusal_code=error.code)

    def check(self) -> None:
        """Raise RequestError if the engine refused the call."""
        if self.refusal is not None:
            raise RequestError(self.refusal, param=self.refusal_param, code=self.refusal_code)


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What a gateway must know of a model beside its tokenizer."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class DrainState:
    """How far a gateway is with its last requests. `timeout_s`: what the configuration gives them."""

    is_draining: bool
    num_open: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """What a gateway knows of a replica. None is unknown.

    staleness_s: since its index was known to hold all that the replica had. num_tokens_routed: prompt tokens to compute
    that this gateway has sent there.
    """

    seconds_per_prompt_token: float | None
    num_indexed_blocks: int
    staleness_s: float | None
    num_tokens_routed: int


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One replica group as `shoal status` shows it. One that is not up yet has neither a label nor ranks."""

    state: str  # "running", or Serve's word for a replica that is not
    label: str = ""  # the `engine` label of its metrics
    num_blocks: int = 0
    block_size: int = 0
    ranks: tuple[RankInfo, ...] = ()
    routing: ReplicaView | None = None  # as the gateway that was asked sees it


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model and all of its groups, those that are not up included."""

    name: str
    max_model_len: int
    groups: tuple[GroupStatus, ...]


@dataclass(frozen=True, slots=True)
class GatewayFacts:
    """A gateway that answers: the `gateway` label of its metrics, and where it runs."""

    label: str
    node: str
    pid: int


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """How far a replica has come with starting. `error` ends it: the replica cannot start."""

    model: str
    phase: str
    done: int = 0
    total: int = 0
    error: str | None = None


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """What a replica has to do now. `gateways`: where those listen that have called it."""

    load: EngineLoad
    gateways: tuple[str, ...] = ()


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """A gateway sends a request to a replica: what it will compute there, and the blocks that it will bring.

    Ends with `Settled`, or when its gateway has not said `Held` for a while.
    """

    deployment: str
    request_id: str
    replica: str
    num_uncached: int
    block_hashes: tuple[bytes, ...]


class Held(msgspec.Struct, frozen=True, tag=True):
    """These requests still wait for their first token."""

    deployment: str
    request_ids: tuple[str, ...]


class Settled(msgspec.Struct, frozen=True, tag=True):
    """This request has its first token, or is gone."""

    deployment: str
    request_id: str


class Spending(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway let one key spend of one limit.

    total: since the gateway started. own: of that, what has not come back by time yet. used: the same of all gateways,
    as far as this one knows.
    """

    total: float
    own: float
    used: float


class KeySpending(msgspec.Struct, frozen=True, array_like=True):
    """What a gateway let one key spend. num_open: its requests that are being answered there."""

    key: str  # the id of the key
    num_open: int
    requests: Spending
    tokens: Spending


class Spent(msgspec.Struct, frozen=True, tag=True):
    """What `gateway`, one process in its life, let keys spend. A higher `number` says it later."""

    gateway: str
    number: int
    keys: tuple[KeySpending, ...]


PeerMessage: TypeAlias = Reserved | Held | Settled | Spent

_encoder = msgspec.msgpack.Encoder()
_gateway_decoder: msgspec.msgpack.Decoder[list[RequestOutput | RequestId] | PeerMessage] = msgspec.msgpack.Decoder(
    list[RequestOutput | RequestId] | PeerMessage
)
_load_decoder = msgspec.msgpack.Decoder(LoadReport)
_progress_decoder = msgspec.msgpack.Decoder(Progress)


def encode_step(outputs: list[RequestOutput]) -> bytes:
    """One engine step's outputs as a message."""
    return _encoder.encode(outputs)


def encode_keepalive(request_ids: list[RequestId]) -> bytes:
    """The first samples of the calls that a replica still holds, as a message."""
    return _encoder.encode(request_ids)


def encode_peer_message(message: PeerMessage) -> bytes:
    return _encoder.encode(message)


def decode_gateway_message(message: bytes) -> list[RequestOutput | RequestId] | PeerMessage:
    """What a gateway is sent: the outputs in a message of `encode_step`, the ids in one of `encode_keepalive`, or what
    another gateway says.

    Raises msgspec.DecodeError for anything else.
    """
    return _gateway_decoder.decode(message)


def encode_load(report: LoadReport) -> bytes:
    return _encoder.encode(report)


def decode_load(message: bytes) -> LoadReport:
    """Raises msgspec.DecodeError for anything but a message of `encode_load`."""
    return _load_decoder.decode(message)


def encode_progress(progress: Progress) -> bytes:
    return _encoder.encode(progress)


def decode_progress(message: bytes) -> Progress:
    """Raises msgspec.DecodeError for anything but a message of `encode_progress`."""
    return _progress_decoder.decode(message)


def local_ip(peer: str | None = None) -> str:
    """This host's address on the way to `peer`; 127.0.0.1 without one."""
    if peer is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 1))  # sends nothing: a UDP connect only picks the route
        return str(probe.getsockname()[0])
