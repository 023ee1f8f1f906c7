"""Collectives and stage links over c10d process groups: gloo on CPUs, NCCL on CUDA devices.

Process groups are values here: nothing is registered with torch.distributed, so one process can be any number of ranks.
Each communicator meets under a prefix of its own in the store, and ranks that need none make none.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
import struct
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from shoal.engine.config import Device, EngineConfig
from shoal.engine.parallel.collectives import Collectives, SingleRank
from shoal.engine.parallel.pipeline import SingleStage, StageLinks
from shoal.engine.parallel.topology import Topology

ProcessGroup = Any  # a c10d backend: ProcessGroupGloo or ProcessGroupNCCL
_TAG = 0


def open_store(host: str) -> TCPStore:
    """A store on a free port of `host`, for all ranks of a group to meet."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def join_store(host: str, port: int) -> TCPStore:
    """The store that another rank has opened."""
    return TCPStore(host, port, is_master=False)


def connect(
    topology: Topology, config: EngineConfig, store: Store, host: str, timeout_s: float
) -> tuple[Collectives, StageLinks]:
    """This rank's connections to its neighbours. Returns when they are there; every rank of the group must call it.

    host: this host's address towards the other ranks. timeout_s: of meeting and, on CPUs, of each operation.
    Raises RuntimeError if another rank does not come.
    """
    if config.device == "cuda":
        _bind_nccl(host)

    def group(name: str, rank: int, size: int) -> ProcessGroup:
        return open_process_group(config.device, PrefixStore(name, store), rank, size, host, timeout_s)

    collectives: Collectives = SingleRank()
    if topology.tensor_size > 1:
        ranks = group(f"tensor/{topology.stage}", topology.tensor_rank, topology.tensor_size)
        collectives = NcclCollectives(ranks) if config.device == "cuda" else GlooCollectives(ranks)
    if topology.num_stages == 1:
        return collectives, SingleStage()
    stages = group(f"hidden/{topology.tensor_rank}", topology.stage, topology.num_stages)
    ends = None
    if topology.is_first_stage or topology.is_last_stage:
        ends = group(f"tokens/{topology.tensor_rank}", int(topology.is_last_stage), 2)
    return collectives, GroupLinks(topology, config, stages, ends)


class GlooCollectives:
    """Collectives of CPU ranks: each sends its part to each other directly, one hop instead of a ring's.

    A sum adds the parts in rank order, whatever came first, so it is bit for bit the same on every rank, and does not
    depend on how many rows there are.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._rank, self._size = int(group.rank()), int(group.size())
        self._buffer = torch.empty(0, dtype=torch.uint8)  # the largest exchange so far

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.contiguous()
        first, *rest = self._exchange(total)
        second, *others = rest
        torch.add(first, second, out=total)
        for part in others:
            total += part
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x.contiguous()), dim=-1)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        """Each rank's `x`, in rank order; valid until the next exchange."""
        if self._buffer.numel() < self._size * x.nbytes:
            self._buffer = torch.empty(self._size * x.nbytes, dtype=torch.uint8)
        flat = self._buffer[: self._size * x.nbytes].view(x.dtype).view(self._size, *x.shape)
        parts = list(flat.unbind())
        parts[self._rank].copy_(x)
        others = [rank for rank in range(self._size) if rank != self._rank]
        if x.numel():
            work = [self._group.recv([parts[rank]], rank, _TAG) for rank in others]
            work += [self._group.send([parts[self._rank]], rank, _TAG) for rank in others]
            for one in work:
                one.wait()
        return parts


class NcclCollectives:
    """Collectives of CUDA ranks, queued on the current stream."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        total = x.contiguous()
        self._group.allreduce([total]).wait()
        return total

    def all_gather(self, x: Tensor) -> Tensor:
        parts = x.new_empty((self._group.size(), *x.shape))
        self._group._allgather_base(parts, x.contiguous()).wait()
        return torch.cat(parts.unbind(), dim=-1)


class GroupLinks:
    """Hidden states from stage to stage, tokens from the last stage back to the first.

    Tokens go over a communicator of their own, so that on CUDA the two directions do not wait for each other.
    """

    def __init__(
        self, topology: Topology, config: EngineConfig, stages: ProcessGroup, ends: ProcessGroup | None
    ) -> None:
        """`stages` has all stages of this tensor rank. `ends` has the first stage as rank 0 and the last as rank 1; it
        is None on any other.
        """
        self._topology = topology
        self._device = torch.device(config.device)
        self._dtype = getattr(torch, config.dtype)
        self._hidden_size = config.model.hidden_size
        self._stages, self._ends = stages, ends
        self._expected: deque[tuple[Any, Tensor]] = deque()  # hidden states on their way here, oldest first
        # A step's result is out before so many more steps are launched: nothing waits for a send.
        self._hidden_out = _Outbox(stages, config.max_steps_in_flight)
        self._tokens_out = _Outbox(ends, config.max_steps_in_flight + 1)

    def expect_hidden(self, num_tokens: int) -> None:
        if not self._topology.is_first_stage:
            hidden = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._device)
            self._expected.append((self._stages.recv([hidden], self._topology.stage - 1, _TAG), hidden))

    def receive_hidden(self) -> Tensor | None:
        if self._topology.is_first_stage:
            return None
        work, hidden = self._expected.popleft()
        work.wait()
        return hidden

    def send_hidden(self, hidden: Tensor) -> None:
        if not self._topology.is_last_stage:
            self._hidden_out.send(hidden, self._topology.stage + 1)

    def send_tokens(self, tokens: Tensor) -> None:
        if self._topology.is_last_stage:
            self._tokens_out.send(tokens, 0)

    def receive_tokens(self, num_samples: int) -> Tensor:
        assert self._topology.is_first_stage, f"tokens go to the first stage: {self._topology}"
        assert self._ends is not None
        tokens = torch.empty(num_samples, dtype=torch.int64, device=self._device)  # [samples]
        self._ends.recv([tokens], 1, _TAG).wait()
        return tokens


class _Outbox:
    """Messages under way. Each tensor is kept until it has left; at most `limit` are."""

    def __init__(self, group: ProcessGroup, limit: int) -> None:
        self._group = group
        self._limit = limit
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def send(self, tensor: Tensor, target: int) -> None:
        while len(self._sent) >= self._limit:
            self._sent.popleft()[0].wait()
        tensor = tensor.contiguous()
        self._sent.append((self._group.send([tensor], target, _TAG), tensor))


def open_process_group(device: Device, store: Store, rank: int, size: int, host: str, timeout_s: float) -> ProcessGroup:
    """A communicator of `size` ranks that meet in `store`: gloo on "cpu", NCCL on "cuda". Others as for `connect`."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if device == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The host's own name need not lead anywhere, so the address is given.
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timeout
    gloo._threads = 1  # they would only serve collectives, which are not used
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def _bind_nccl(host: str) -> None:
    """Have NCCL use the network that leads to the coordinator, unless the user has named one."""
    name = interface_of(host)
    if name is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_of(host: str) -> str | None:
    """The network interface that has this IPv4 address; None if none has."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    return None
