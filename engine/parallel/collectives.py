"""What tensor ranks ask of each other. With one rank both answers are the argument."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collectives(Protocol):
    """Operations over the tensor ranks of one stage. Every rank calls them in the same order with the same shapes."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of all ranks' `x` [...]; may be computed in place."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` [..., n], in rank order along the last dimension: [..., tensor_size * n]."""
        ...


class SingleRank:
    """Collectives of a rank that is alone."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x
