"""What a coordinator and its ranks say to each other: msgpack over ZeroMQ, never pickle.

A life: Hello, Welcome, Found, Configure, Loading (again and again), Loaded, Allocate, Ready; then a Step out to every
rank for each plan and a Stepped back from one. Beat and Alive go to and fro beside it, a rank tells what it has Worked
now and then, and Failed may come at any time.

Each rank has a socket for each purpose, because a ZeroMQ socket belongs to one thread. A socket's name holds the
group's key, so the coordinator knows from the name of the sender alone whom it hears, and answers nobody else.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shoal.engine.config import EngineConfig, Machine
from shoal.engine.executor import RankInfo
from shoal.engine.plan import StepPlan, StepResult

Purpose = Literal["plans", "results", "beats"]
PURPOSES: tuple[Purpose, ...] = ("plans", "results", "beats")


def socket_name(key: str, rank: int, purpose: Purpose) -> bytes:
    """The ZeroMQ routing id of a rank's socket."""
    return f"{key}/{rank}/{purpose}".encode()


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Any of the messages below."""


# -- from a rank ----------------------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """A rank's process is up."""

    node: str  # host name
    pid: int


class Found(Message, frozen=True):
    """What the rank runs on, and where it opened the store over which process groups meet (rank 0 only)."""

    machine: Machine
    store_host: str
    store_port: int


class Loading(Message, frozen=True):
    """Bytes of weights read, and to be read in all."""

    done: int
    total: int


class Loaded(Message, frozen=True):
    """Weights are there; the rank has memory for so many KV blocks."""

    num_blocks: int


class Ready(Message, frozen=True):
    """The KV pool is there: plans may come."""

    info: RankInfo


class Stepped(Message, frozen=True):
    """What a step gave. Only the first tensor rank of the last stage says so."""

    result: StepResult


class Failed(Message, frozen=True):
    """The rank cannot go on. `field` is a ConfigError's, None for any other error."""

    error: str
    field: str | None = None


class Worked(Message, frozen=True):
    """What the rank has done since it began; see `RankWork`."""

    num_steps: int
    compute_s: float
    wait_s: float


class Beat(Message, frozen=True):
    """The rank is alive, and has launched so many steps."""

    num_steps: int


# -- from the coordinator -------------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """First answer to a rank: which device to look for, and after what silence either side counts as dead."""

    device: str
    heartbeat_timeout_s: float


class Configure(Message, frozen=True):
    """Connect to the other ranks and load."""

    config: EngineConfig
    store_host: str
    store_port: int
    ranks_on_host: int


class Allocate(Message, frozen=True):
    """Make a KV pool of so many blocks."""

    num_blocks: int


class Step(Message, frozen=True):
    """Carry out a plan behind those before."""

    plan: StepPlan


class Alive(Message, frozen=True):
    """The answer to a Beat."""


FromRank = Hello | Found | Loading | Loaded | Ready | Stepped | Worked | Failed | Beat
ToRank = Welcome | Configure | Allocate | Step | Alive

_encoder = msgspec.msgpack.Encoder()
_from_rank = msgspec.msgpack.Decoder(FromRank)
_to_rank = msgspec.msgpack.Decoder(ToRank)


def encode(message: FromRank | ToRank) -> bytes:
    return _encoder.encode(message)


def decode_from_rank(data: bytes) -> FromRank:
    """Raises msgspec.MsgspecError for anything else."""
    message: FromRank = _from_rank.decode(data)
    return message


def decode_to_rank(data: bytes) -> ToRank:
    """Raises msgspec.MsgspecError for anything else."""
    message: ToRank = _to_rank.decode(data)
    return message
