"""Philox against its published vectors, and what sampling relies on."""

from __future__ import annotations

import numpy as np

from shoal.engine.sampling.random_numbers import philox4x32, uniforms


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], np.uint32) for value in values)


def test_known_answers_of_random123():
    """The kat_vectors of the Random123 distribution for philox4x32-10."""
    zero = philox4x32(words(0, 0, 0, 0), words(0, 0))
    assert [int(word[0]) for word in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox4x32(words(*[0xFFFFFFFF] * 4), words(*[0xFFFFFFFF] * 2))
    assert [int(word[0]) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = philox4x32(words(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), words(0xA4093822, 0x299F31D0))
    assert [int(word[0]) for word in pi] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_draw_depends_on_its_own_counters_only():
    seeds = np.arange(100, dtype=np.uint64) + np.uint64(2**63)
    streams = np.arange(100, dtype=np.uint32) % np.uint32(3)
    positions = np.arange(100, dtype=np.int64) * 7
    together = uniforms(seeds, streams, positions)
    alone = [uniforms(seeds[i : i + 1], streams[i : i + 1], positions[i : i + 1])[0] for i in range(100)]
    assert together.tolist() == alone


def test_uniform_in_the_unit_interval():
    count = 200_000
    draws = uniforms(np.full(count, 5, np.uint64), np.zeros(count, np.uint32), np.arange(count))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=64, range=(0, 1))
    expected = count / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square with 63 degrees, p = 1e-5


def test_streams_seeds_and_purposes_differ():
    positions = np.arange(1000)
    zeros, ones = np.zeros(1000, np.uint64), np.ones(1000, np.uint64)
    stream = np.zeros(1000, np.uint32)
    base = uniforms(zeros, stream, positions)
    for other in (
        uniforms(ones, stream, positions),
        uniforms(zeros, stream + np.uint32(1), positions),
        uniforms(zeros, stream, positions, purpose=1),
        uniforms(zeros, stream, positions + 1),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.12
