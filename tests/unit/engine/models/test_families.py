"""Every family computes what transformers computes, through the paged pool and however the prompt is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

PROMPT = tuple((7 * index) % 190 + 3 for index in range(40))  # longer than every window here
NUM_GREEDY = 24
TOLERANCE = 1e-4  # |difference| of fp32 logits, whose range is about 10

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 13}
_QWEN3_MOE = {"head_dim": 32, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biased": (
        "LlamaConfig",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama3-scaling": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama-linear-scaling": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "mistral-window": ("MistralConfig", {"sliding_window": 13}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 2, "rope_parameters": _YARN},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
    "mixtral-window": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 13}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe-some-layers-dense": (
        "Qwen3MoeConfig",
        {
            **_QWEN3_MOE,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 13,
        },
    ),
    "smollm3-nope": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "gemma2": ("Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gpt-neox-by-transformers": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "stablelm-by-transformers": ("StableLmConfig", {"partial_rotary_factor": 0.5}),
    "olmo2-by-transformers": ("Olmo2Config", {}),
    "olmoe-by-transformers": ("OlmoeConfig", {"num_experts": 3, "num_experts_per_tok": 2}),
    "gpt2-learned-positions-by-transformers": ("GPT2Config", {"num_key_value_heads": 4}),
    "starcoder2-window-by-transformers": ("Starcoder2Config", {"sliding_window": 13}),
}


class Case:
    """A checkpoint, the transformers model that wrote it, and what that model answers."""

    def __init__(self, path: Any, oracle: Any) -> None:
        self.path = path
        self.oracle = oracle
        self.greedy = self._greedy()
        self.tokens = (*PROMPT, *self.greedy[:-1])
        self.logits = self.answer(self.tokens)

    def answer(self, tokens: tuple[int, ...]) -> Tensor:
        """Logits [tokens, vocab] of one pass without any cache."""
        with torch.inference_mode():
            logits: Tensor = self.oracle(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    def _greedy(self) -> list[int]:
        tokens = list(PROMPT)
        for _ in range(NUM_GREEDY):
            tokens.append(int(self.answer(tuple(tokens))[-1].argmax()))
        return tokens[len(PROMPT) :]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, save_checkpoint: Any) -> Case:
    path = tmp_path_factory.mktemp(request.param)
    return Case(path, save_checkpoint(path, *CASES[request.param]))


@pytest.fixture(scope="module")
def start_request(case: Case, open_model: Callable[..., Any], paged_request: Callable[..., Any]) -> Callable[[], Any]:
    """A fresh request on one loaded float32 model."""
    config, model = open_model(case.path)
    return lambda: paged_request(model, config)


@pytest.mark.parametrize("chunk", [1, 7, 8, 9, 64])
def test_logits_equal_transformers_for_every_chunk_size(
    case: Case, start_request: Callable[[], Any], chunk: int
) -> None:
    assert (start_request().steps(case.tokens, chunk) - case.logits).abs().max() <= TOLERANCE


def test_greedy_tokens_equal_transformers(case: Case, start_request: Callable[[], Any]) -> None:
    assert start_request().greedy(PROMPT, NUM_GREEDY) == case.greedy
    assert len(set(case.greedy)) > 1, "the oracle repeats itself: the comparison shows nothing"


@pytest.mark.parametrize("case", [name for name in CASES if "transformers" not in name], indirect=True, scope="module")
def test_bfloat16_stays_near_float32(
    case: Case, open_model: Callable[..., Any], paged_request: Callable[..., Any]
) -> None:
    """bfloat16 has 8 bits of mantissa: within a tenth of the logits' range; a wrong layer is off by half.

    A router's close call may go the other way, and that token's logits with it: with experts, one in twenty may.
    """
    config, model = open_model(case.path, "bfloat16")
    found = paged_request(model, config).steps(case.tokens, 16)
    span = case.logits.max() - case.logits.min()
    errors = (found.float() - case.logits).abs().amax(1)  # [tokens]
    has_experts = hasattr(case.oracle.config, "num_experts_per_tok")
    assert errors.quantile(0.95 if has_experts else 1.0) <= 0.1 * span
