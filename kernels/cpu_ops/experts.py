"""Experts on the CPU: tokens sorted by expert, then our matrix products, once for each expert that has tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.kernels.cpu_ops.linear import gated_linear, linear, pack_linear
from shoal.kernels.torch_ops.activation import Activation
from shoal.kernels.torch_ops.experts import PackedExperts
from shoal.kernels.torch_ops.quantized import QuantizedWeight


def pack_experts(
    gate_up: Tensor | Sequence[QuantizedWeight], down: Tensor | Sequence[QuantizedWeight]
) -> PackedExperts:
    return PackedExperts(tuple(map(pack_linear, gate_up)), tuple(map(pack_linear, down)), None)


def experts(x: Tensor, packed: PackedExperts, chosen: Tensor, weights: Tensor, activation: Activation) -> Tensor:
    if not len(x):
        return torch.empty_like(x)
    pairs = chosen.flatten()  # of a token and one of its experts
    order = pairs.argsort(stable=True)
    counts = torch.bincount(pairs, minlength=len(packed.gate_up)).tolist()
    rows = torch.split(x[order // chosen.shape[1]], counts)  # by expert: [its pairs, hidden]
    products = [
        linear(gated_linear(own, gate_up, None, activation), down, out_dtype=torch.float32)
        for own, gate_up, down in zip(rows, packed.gate_up, packed.down, strict=True)
        if len(own)
    ]
    terms = torch.empty((len(pairs), x.shape[1]), dtype=torch.float32)
    terms[order] = torch.cat(products)
    first, *others = terms.view(*chosen.shape, -1).mul_(weights.unsqueeze(2)).unbind(1)  # [tokens, hidden] each
    for term in others:
        first += term  # one by one: torch's own sum may take another order in another batch
    return first.to(x.dtype).contiguous()
