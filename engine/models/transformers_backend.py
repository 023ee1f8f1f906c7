"""Runs transformers' own modelling code over the paged pool, for architectures without a family file here.

Our attention is registered in transformers' attention interface and finds the step that is computed on the module that
calls it (some models drop the keywords that others hand through). All but attention is transformers'. One rank only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from shoal.engine.config import ConfigError, EngineConfig
from shoal.engine.layers.attention import Attention, AttentionBatch
from shoal.engine.models.weights.loader import Progress
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Operations

IMPLEMENTATION = "shoal_paged"

# Greatest |difference| to transformers' own attention in the trial, as a share of the logits' range.
_TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_TRIAL_IDS = (1, 2, 3, 4, 5, 6)
_TRIAL_CHUNK = 4


@dataclass(slots=True)
class _Paging:
    """What one model's attention modules share: the step that is being computed."""

    ops: Operations
    batch: AttentionBatch | None = None
    kv: Sequence[Tensor] = ()


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,  # [1, kv_heads, tokens, head_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface over the paged pool: [1, tokens, heads, head_dim], and no weights."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))  # [tokens, heads, head_dim]
    paging: Any = module.shoal_paging
    layer: Any = module.layer_idx
    attention = Attention(
        scale=scaling if scaling is not None else q.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        ops=paging.ops,
    )
    out = attention(q, k, v, paging.kv[layer], paging.batch)
    return out.view(1, *q.shape), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)


@dataclass
class _HiddenOnly(BaseModelOutputWithPast):  # type: ignore[misc]  # transformers is untyped to mypy
    """Hidden states, and None for all else that some head passes on."""

    cross_attentions: None = None
    router_logits: None = None


class _GivenHidden(nn.Module):
    """Stands in for the layers, so that transformers' own head code runs on hidden states that are there already."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> _HiddenOnly:
        return _HiddenOnly(last_hidden_state=inputs_embeds)


class TransformersModel:
    """A whole model run by transformers' code. A Model; its hidden states have passed the final norm already."""

    is_capturable = False  # some of that code looks at values

    def __init__(self, causal: Any, num_layers: int, ops: Operations) -> None:
        """Takes `causal` apart: its layers and its head are called separately from here on."""
        self.layer_range = range(num_layers)
        self.weight_bytes: int = sum(parameter.nbytes for parameter in causal.parameters())
        self._paging = _Paging(ops)
        for module in causal.modules():
            if hasattr(module, "layer_idx"):
                module.shoal_paging = self._paging
        self._layers = causal.base_model
        setattr(causal, causal.base_model_prefix, _GivenHidden())
        self._head = causal

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        kv: Sequence[Tensor],
        hidden: Tensor | None = None,
    ) -> Tensor:
        """As Model.forward, here after the final norm."""
        assert hidden is None, "there is only one stage"
        self._paging.batch, self._paging.kv = attention, kv
        output = self._layers(input_ids=input_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False)
        states: Tensor = output.last_hidden_state[0]
        return states if attention.wanted is None else states[attention.wanted.tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32."""
        logits: Tensor = self._head(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits[0]
        return logits.float()


def load_transformers_model(
    config: EngineConfig, ops: Operations, topology: Topology, progress: Progress | None
) -> TransformersModel:
    """Load with transformers, then hold a trial step against transformers' own attention.

    Raises ConfigError, naming the architecture, if its code does not use the attention interface or computes something
    in attention that the paged one does not (ALiBi, sinks, latent or recurrent state).
    """
    architecture, dtype = config.model.architecture, getattr(torch, config.dtype)
    if topology.tensor_size > 1 or topology.num_stages > 1:
        raise ConfigError(
            f"{architecture} runs through transformers' own code, on one rank only: set both parallel sizes to 1",
            field="tensor_parallel",
        )
    total_bytes = config.model.num_parameters * config.dtype_bytes
    if progress is not None:
        progress(0, total_bytes)
    causal = _from_pretrained(config.model.path, dtype).eval().to(config.device)
    with torch.inference_mode():
        ids = torch.tensor(_TRIAL_IDS, device=config.device)
        expected = causal(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -1]
        causal.set_attn_implementation(IMPLEMENTATION)
        model = TransformersModel(causal, config.model.num_layers, ops)
        _check_trial(config, model, ids, expected)
    if progress is not None:
        progress(total_bytes, total_bytes)
    return model


def _from_pretrained(path: str, dtype: torch.dtype) -> Any:
    """The model on the CPU. Raises ConfigError for missing weights, which transformers would make up."""
    try:
        causal, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, attn_implementation="eager", output_loading_info=True
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ConfigError(f"transformers cannot load {path}: {error}") from error
    lost = sorted(info["missing_keys"])
    if lost:
        raise ConfigError(
            f"{path} lacks {len(lost)} tensors, such as {lost[0]}: the weights do not belong to its configuration"
        )
    return causal


def _check_trial(config: EngineConfig, model: TransformersModel, ids: Tensor, expected: Tensor) -> None:
    """Compute `ids` in two chunks over a small pool; raise ConfigError unless the last logits are the `expected`."""
    refusal = f"{config.model.architecture} cannot be served: over paged attention its code in transformers"
    try:
        found = _trial_logits(config, model, ids)
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{refusal} fails ({type(error).__name__}: {error})") from error
    difference = (found - expected.float()).abs().max().item()
    span = (expected.float().max() - expected.float().min()).item()
    if not difference <= _TRIAL_TOLERANCE[expected.dtype] * span:  # NaN too
        raise ConfigError(f"{refusal} gives logits that are off by {difference:.3g}, where their range is {span:.3g}")


def _trial_logits(config: EngineConfig, model: TransformersModel, ids: Tensor) -> Tensor:
    block_size = len(ids)
    facts, device = config.model, ids.device
    shape = (2, 2, facts.num_kv_heads, block_size, facts.head_dim)  # block 0 stays unused
    kv = [torch.zeros(shape, dtype=getattr(torch, config.dtype), device=device) for _ in model.layer_range]
    hidden = torch.empty(0)
    for start, end in ((0, _TRIAL_CHUNK), (_TRIAL_CHUNK, block_size)):
        positions = torch.arange(start, end, device=device)
        batch = AttentionBatch(
            slots=block_size + positions,
            block_tables=torch.ones((1, 1), dtype=torch.int32, device=device),
            query_starts=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            context_lens=torch.tensor([end], dtype=torch.int32, device=device),
            max_query_len=end - start,
        )
        hidden = model.forward(ids[start:end], positions, batch, kv)
    return model.logits(hidden[-1:])[0]
