"""A mixture of gated feed-forward layers, of which each token uses a few (Shazeer et al. 2017, arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shoal.engine.layers.linear import Linear
from shoal.engine.layers.weight_reader import WeightReader
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Activation, Operations, QuantizedWeight


class Router:
    """Chooses each token's experts: softmax over all of them, then the most likely ones.

    It is the same on every rank, and so are the hidden states: all ranks choose the same experts without a message.
    """

    def __init__(self, linear: Linear, experts_per_token: int, is_renormalized: bool) -> None:
        self.weight_bytes = linear.weight_bytes
        self._linear = linear
        self._experts_per_token = experts_per_token
        self._is_renormalized = is_renormalized

    @classmethod
    def load(
        cls, reader: WeightReader, name: str, *, hidden_size: int, num_experts: int, experts_per_token: int,
        is_renormalized: bool, ops: Operations,
    ) -> Router:  # fmt: skip
        weight = reader.empty(num_experts, hidden_size)
        reader.read_into(weight, f"{name}.weight")
        return cls(Linear(weight, None, ops), experts_per_token, is_renormalized)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> experts [tokens, experts_per_token] int64, ascending, and their weights, float32.

        Among equally likely experts the first ones are chosen, which torch.topk does not promise.
        """
        shares = self._linear(x, out_dtype=torch.float32).softmax(-1)  # [tokens, experts]
        ranked = shares.sort(dim=-1, descending=True, stable=True).indices
        chosen = ranked[:, : self._experts_per_token].sort(dim=-1).values
        weights = shares.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) if self._is_renormalized else weights


class ParallelExperts:
    """All experts, each split over ranks by its inner features; one all-reduce adds up.

    Whole experts per rank would make a step as slow as the rank whose experts most tokens chose, and memory equal only
    where the ranks divide the experts. So split, every rank does the same work whichever experts are chosen.
    """

    def __init__(
        self, gate_up: Tensor | Sequence[QuantizedWeight], down: Tensor | Sequence[QuantizedWeight],
        activation: Activation, ops: Operations, collectives: Collectives,
    ) -> None:  # fmt: skip
        """gate_up [experts, 2 * inner, hidden] and down [experts, hidden, inner] of this rank; takes them over."""
        self.weight_bytes = sum(weight.nbytes for stack in (gate_up, down) for weight in stack)
        self._packed = ops.pack_experts(gate_up, down)
        self._activation = activation
        self._experts = ops.experts
        self._all_reduce = collectives.all_reduce

    @classmethod
    def load(
        cls, reader: WeightReader, names: Sequence[tuple[str, str, str]], *, hidden_size: int, inner_size: int,
        activation: Activation, ops: Operations, topology: Topology, collectives: Collectives,
    ) -> ParallelExperts:  # fmt: skip
        """`names` are gate, up and down of every expert, `inner_size` is of one whole expert."""
        own = topology.shard(inner_size)
        gate_up: Tensor | list[QuantizedWeight] = _quantized(
            reader.read_quantized([(f"{gate}.weight", own), (f"{up}.weight", own)]) for gate, up, _ in names
        )
        if not gate_up:
            dense = reader.empty(len(names), 2, len(own), hidden_size)
            for expert, (gate, up, _) in enumerate(names):
                reader.read_into(dense[expert, 0], f"{gate}.weight", rows=own)
                reader.read_into(dense[expert, 1], f"{up}.weight", rows=own)
            gate_up = dense.flatten(1, 2)
        down: Tensor | list[QuantizedWeight] = _quantized(
            reader.read_quantized([(f"{name}.weight", range(hidden_size))], own) for _, _, name in names
        )
        if not down:
            down = reader.empty(len(names), hidden_size, len(own))
            for expert, (_, _, name) in enumerate(names):
                reader.read_into(down[expert], f"{name}.weight", columns=own)
        return cls(gate_up, down, activation, ops, collectives)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], a token's experts and their weights -> [tokens, hidden], the same on every rank."""
        return self._all_reduce(self._experts(x, self._packed, chosen, weights, self._activation))


def _quantized(weights: Iterable[QuantizedWeight | None]) -> list[QuantizedWeight]:
    """All of them, or none: experts are stored alike."""
    found: list[QuantizedWeight] = []
    for weight in weights:
        if weight is None:
            return []
        found.append(weight)
    return found


class MoE:
    """Weighted sum of what each token's experts make of it. Takes the place of a GatedMLP."""

    def __init__(self, router: Router, experts: ParallelExperts) -> None:
        self.weight_bytes = router.weight_bytes + experts.weight_bytes
        self._router = router
        self._experts = experts

    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        return self._experts(x, *self._router(x))
