"""What the runner asks of a model, whichever code computes it. No torch at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.engine.layers.attention import AttentionBatch


class Model(Protocol):
    """One stage of a model on one rank. The caller sets torch.inference_mode."""

    @property
    def layer_range(self) -> range:
        """The layers of this stage, numbered over the whole model."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Memory of this rank's weights, in bytes."""
        ...

    @property
    def is_capturable(self) -> bool:
        """Whether what `forward` and `logits` launch depends on shapes only, so that a CUDA graph can repeat it."""
        ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        kv: Sequence[Tensor],
        hidden: Tensor | None = None,
    ) -> Tensor:
        """The stage's hidden states [tokens, hidden], the residual added in; the final norm belongs to `logits`. Of the
        last stage those of `attention.wanted` alone, [wanted, hidden].

        input_ids and positions are [tokens] int64. kv[i] is the pool of this stage's i-th layer,
        [num_blocks, 2, kv_heads, block_size, head_dim], written in place. A stage after the first takes `hidden`
        [tokens, hidden] from the one before instead of ids, and writes over it.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] of the last stage -> [rows, columns] float32, soft-capped where the family does that.

        The columns are this rank's part of the vocabulary, Topology.vocab_shard; -inf where it is padded. The caller
        may write over them.
        """
        ...
