"""Traces: what is read, how it is played, and what is refused with the line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.simulation.trace import (
    AZURE_BLOCK_TOKENS,
    MOONCAKE_BLOCK_TOKENS,
    Trace,
    TracedRequest,
    load_trace,
    shared_prefix_trace,
)
from shoal.engine.config import ConfigError

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def line(timestamp: float, input_length: int, hash_ids: list[int], output_length: int = 5) -> dict[str, Any]:
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": hash_ids,
    }


def mooncake(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def azure(folder: Path, *lines: str) -> Path:
    path = folder / "trace.csv"
    path.write_text("\n".join((AZURE_HEADER, *lines)))
    return path


def test_mooncake_lines_become_requests_in_the_order_of_arrival(tmp_path: Path) -> None:
    path = mooncake(tmp_path, line(5000, 1025, [0, 1, 2], 7), line(2000, 512, [0]))
    trace = load_trace(path)
    assert trace.name == "trace"
    assert trace.block_tokens == MOONCAKE_BLOCK_TOKENS
    assert [(r.arrival_s, r.num_prompt, r.num_output, r.block_ids) for r in trace.requests] == [
        (0.0, 512, 5, (0,)),
        (3.0, 1025, 7, (0, 1, 2)),
    ]


def test_azure_lines_share_nothing(tmp_path: Path) -> None:
    trace = load_trace(azure(tmp_path, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,130,9"))
    first, second = trace.requests
    assert second.arrival_s == pytest.approx(4.314579, abs=1e-5)
    assert (first.num_prompt, first.num_output, second.num_prompt, second.num_output) == (374, 44, 130, 9)
    assert trace.block_tokens == AZURE_BLOCK_TOKENS
    assert len(first.block_ids) == 6
    assert not set(first.block_ids) & set(second.block_ids)
    assert first.session != second.session


def test_azure_times_may_have_an_offset(tmp_path: Path) -> None:
    trace = load_trace(
        azure(tmp_path, "2024-05-10 00:00:00.009930+00:00,10,1", "2024-05-10 02:00:01.009930+02:00,10,1")
    )
    assert [r.arrival_s for r in trace.requests] == pytest.approx([0.0, 1.0])


def test_speed_brings_arrivals_closer(tmp_path: Path) -> None:
    trace = load_trace(mooncake(tmp_path, line(0, 512, [0]), line(3000, 512, [1])), speed=2)
    assert [r.arrival_s for r in trace.requests] == [0.0, 1.5]


def test_what_generated_nothing_is_played_with_one_token(tmp_path: Path) -> None:
    (request,) = load_trace(mooncake(tmp_path, line(0, 512, [0], output_length=0))).requests
    assert request.num_output == 1


@pytest.mark.parametrize("speed", [0, -1, float("nan"), float("inf")])
def test_a_speed_that_moves_nothing_is_refused(tmp_path: Path, speed: float) -> None:
    with pytest.raises(ConfigError, match="use a number above 0"):
        load_trace(mooncake(tmp_path, line(0, 512, [0])), speed=speed)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"timestamp": 0, "input_length": 512, "output_length": 1}, "missing required field `hash_ids`"),
        (line(0, 0, []), "`int` >= 1"),
        (line(0, 512, [0], output_length=-1), "`int` >= 0"),
        (line(-1, 512, [0]), ">= 0"),
        (line(0, 1025, [0]), "1025 tokens are 3 blocks of 512, but hash_ids names 1"),
        (line(0, 512, [0, 1]), "512 tokens are 1 blocks of 512, but hash_ids names 2"),
    ],
)
def test_a_wrong_mooncake_line_is_named(tmp_path: Path, wrong: dict[str, Any], problem: str) -> None:
    path = mooncake(tmp_path, line(0, 512, [0]), wrong)
    with pytest.raises(ConfigError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("wrong", ["yesterday,1,1", "2023-11-16 18:15:46,1", "2023-11-16 18:15:46,0,1", "a,b,c,d"])
def test_a_wrong_azure_line_is_named(tmp_path: Path, wrong: str) -> None:
    path = azure(tmp_path, "2023-11-16 18:15:46,1,1", wrong)
    with pytest.raises(ConfigError, match="ContextTokens") as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_half_a_line_of_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"timestamp": 0, "input')
    with pytest.raises(ConfigError, match=r"cut\.jsonl:1: "):
        load_trace(path)


def test_an_unknown_format_says_which_are_known(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("hello\n")
    with pytest.raises(ConfigError, match=r"Mooncake's are lines of JSON.*Azure's are CSV"):
        load_trace(path)


def test_the_wrong_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace\.jsonl:1: expected the header"):
        load_trace(mooncake(tmp_path, line(0, 512, [0])), format="azure")


def test_a_trace_that_is_absent_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no trace"):
        load_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no requests"):
        load_trace(azure(tmp_path))


def test_a_follow_up_has_the_session_of_what_it_continues(tmp_path: Path) -> None:
    system, rest = 0, 9
    path = mooncake(
        tmp_path,
        line(0, 1100, [system, 1, 2]),
        line(1, 1100, [system, 3, 4]),
        line(2, 1600, [system, 1, 5, rest]),
        line(3, 600, [system, 6]),
    )
    first, second, follow_up, other = (request.session for request in load_trace(path).requests)
    assert follow_up == first
    assert len({first, second, other}) == 3


@given(
    prompts=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    small=st.sampled_from([1, 2, 4]),
    factor=st.integers(1, 4),
    data=st.data(),
)
def test_blocks_of_another_size_share_the_whole_blocks_that_prompts_had_in_common(
    prompts: list[int], small: int, factor: int, data: st.DataObject
) -> None:
    large = small * factor
    tokens = [
        [data.draw(st.integers(0, 1)) for _ in range(min(num, 6 * large))]  # few symbols: many prompts begin alike
        for num in prompts
    ]

    def played(block_tokens: int) -> Trace:
        names: dict[tuple[int, ...], int] = {}
        requests = [
            TracedRequest(
                float(index),
                len(prompt),
                1,
                tuple(
                    names.setdefault(tuple(prompt[: start + block_tokens]), len(names))
                    for start in range(0, len(prompt), block_tokens)
                ),
            )
            for index, prompt in enumerate(tokens)
        ]
        return Trace("drawn", requests, block_tokens)

    def shared(trace: Trace, left: int, right: int) -> int:
        count = 0
        a, b = trace.requests[left], trace.requests[right]
        limit = min(a.num_prompt, b.num_prompt) // trace.block_tokens
        while count < limit and a.block_ids[count] == b.block_ids[count]:
            count += 1
        return count * trace.block_tokens

    merged = played(small).in_blocks_of(large)
    split = played(large).in_blocks_of(small)
    for left in range(len(tokens)):
        assert len(split.requests[left].block_ids) == -(-len(tokens[left]) // small)
        for right in range(left):
            exact = shared(played(large), left, right)
            assert shared(merged, left, right) == exact
            assert exact <= shared(split, left, right) <= shared(played(small), left, right)


def test_blocks_that_do_not_divide_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="use block_tokens that divide 16"):
        Trace("t", [], 16).in_blocks_of(24)


def test_requests_of_one_prefix_share_its_whole_blocks_and_nothing_else() -> None:
    trace = shared_prefix_trace(
        num_requests=200, requests_per_s=10, num_prefixes=4, prefix_tokens=40, question_tokens=10, output_tokens=3
    )
    owners: dict[int, set[str]] = {}
    for request in trace.requests:
        assert (request.num_prompt, request.num_output, len(request.block_ids)) == (50, 3, 4)
        for block in request.block_ids:
            owners.setdefault(block, set()).add(request.session)
    assert all(len(sessions) == 1 for sessions in owners.values())
    uses = [sum(block in request.block_ids for request in trace.requests) for block in range(8)]
    assert sum(uses) == 2 * 200, "the first two blocks of each are its prefix's"
    assert len(owners) == 8 + 2 * 200
    assert trace.requests[-1].arrival_s == pytest.approx(20, rel=0.3)


def test_a_skewed_trace_asks_for_the_first_prefix_most() -> None:
    def most(skew: float) -> int:
        trace = shared_prefix_trace(
            num_requests=400, requests_per_s=1, num_prefixes=10, prefix_tokens=16, question_tokens=1, output_tokens=1,
            skew=skew,
        )  # fmt: skip
        return sum(request.session == "prefix-0" for request in trace.requests)

    assert most(0.0) < 80 < most(1.5)
