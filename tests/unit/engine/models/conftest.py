"""Tiny random checkpoints written by transformers, and one request driven through the paged pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from shoal.engine.config import EngineConfig, EngineOptions, Machine, Quantization, resolve
from shoal.engine.layers.attention import AttentionBatch
from shoal.engine.models.registry import Model, load_model, read_model_config
from shoal.engine.parallel.collectives import SingleRank
from shoal.engine.parallel.topology import SINGLE
from shoal.kernels.dispatch import reference

BLOCK_SIZE = 8
NUM_BLOCKS = 17

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,  # large enough that the 24 greedy tokens are not all the same
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class PagedRequest:
    """One request on a model: computes tokens in chunks of any size, its blocks scattered over the pool."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        facts = config.model
        shape = (NUM_BLOCKS, 2, facts.num_kv_heads, BLOCK_SIZE, facts.head_dim)
        dtype = getattr(torch, config.dtype)
        # NaN: reading a slot that nothing was written to would show.
        self._kv = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(facts.num_layers)]
        blocks = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(0)) + 1
        self._table = blocks.to(torch.int32)
        self._model = model
        self._num_computed = 0

    def step(self, ids: Sequence[int]) -> Tensor:
        """Compute the next tokens: their logits [len(ids), vocab]."""
        start, end = self._num_computed, self._num_computed + len(ids)
        self._num_computed = end
        positions = torch.arange(start, end)
        batch = AttentionBatch(
            slots=self._table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            block_tables=self._table[None, : -(-end // BLOCK_SIZE)],
            query_starts=torch.tensor([0, len(ids)], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=len(ids),
        )
        with torch.inference_mode():
            return self._model.logits(self._model.forward(torch.tensor(ids), positions, batch, self._kv))

    def steps(self, ids: Sequence[int], chunk: int) -> Tensor:
        """Compute tokens `chunk` at a time: all their logits [len(ids), vocab]."""
        return torch.cat([self.step(ids[start : start + chunk]) for start in range(0, len(ids), chunk)])

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The prompt in one step, then `count` most likely tokens one by one."""
        tokens = [int(self.step(prompt)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step(tokens[-1:])[-1].argmax()))
        return tokens


def _save_checkpoint(directory: Path, config_class: str, fields: dict[str, Any], **save_options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**TINY, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases are trivial as initialised
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory, **save_options)
    return model


def _open_config(path: Path, dtype: str = "float32", quantization: Quantization = "none") -> EngineConfig:
    machine = Machine(device="cpu", free_bytes=2**30, num_cores=1)
    options = EngineOptions(str(path), dtype=dtype, quantization=quantization)
    return resolve(options, read_model_config(str(path)), machine)


def _open_model(path: Path, dtype: str = "float32", quantization: Quantization = "none") -> tuple[EngineConfig, Model]:
    config = _open_config(path, dtype, quantization)
    return config, load_model(config, reference(), SINGLE, SingleRank())


def _save_gguf(path: Path, types: Sequence[str]) -> None:
    """A random Llama. `types` are of q and k, v, o, gate, up, down, the table and the head, if that is another one."""
    hidden, inner, heads, kv_heads, layers, vocab = 128, 192, 4, 2, 2, 199
    qk, v, o, gate, up, down, table, *head = (Kind[name] for name in types)
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_eos_token_id(2)

    def add(name: str, kind: Kind, *shape: int) -> None:
        values = generator.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    kv_width = hidden // heads * kv_heads
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        add(f"blk.{layer}.attn_q.weight", qk, hidden, hidden)
        add(f"blk.{layer}.attn_k.weight", qk, kv_width, hidden)
        add(f"blk.{layer}.attn_v.weight", v, kv_width, hidden)
        add(f"blk.{layer}.attn_output.weight", o, hidden, hidden)
        add(f"blk.{layer}.ffn_gate.weight", gate, inner, hidden)
        add(f"blk.{layer}.ffn_up.weight", up, inner, hidden)
        add(f"blk.{layer}.ffn_down.weight", down, hidden, inner)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    add("token_embd.weight", table, vocab, hidden)
    if head:
        add("output.weight", head[0], vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., Any]:
    """save_checkpoint(directory, config_class, fields, **save_pretrained options) -> the transformers model."""
    return _save_checkpoint


@pytest.fixture(scope="session")
def save_gguf() -> Callable[..., None]:
    """save_gguf(path, types of q and k, v, o, gate, up, down, table[, head])."""
    return _save_gguf


@pytest.fixture(scope="session")
def open_config() -> Callable[..., EngineConfig]:
    """open_config(path, dtype="float32", quantization="none") -> EngineConfig."""
    return _open_config


@pytest.fixture(scope="session")
def open_model() -> Callable[..., tuple[EngineConfig, Model]]:
    """open_model(path, dtype="float32", quantization="none") -> (EngineConfig, Model) on one rank, with the torch
    twins.
    """
    return _open_model


@pytest.fixture(scope="session")
def paged_request() -> Callable[[Model, EngineConfig], PagedRequest]:
    """paged_request(model, config) -> a fresh PagedRequest."""
    return PagedRequest
