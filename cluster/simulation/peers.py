"""How other systems route, as policies to compare with, each with its published defaults. Written from their sources.

None gets more than it knows in its own system. Ray's and SGLang's routers and vLLM's production-stack do not hear of
the engines' caches: they remember which prompts they sent where (`SentPrompts`) and count open requests. Dynamo and
LMetric know what the engines hold; both are given Shoal's index and reports, which are at least as exact as theirs.
Text is not in a trace, so a block stands for its characters; what is ranked first counts as sent.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final

from shoal.cluster.routing.policies import POLICIES, Matched, Policy, PowerOfTwo, Ranked, RoutedRequest, Target
from shoal.engine.request import BlockHash

CHARS_PER_TOKEN: Final = 4  # of English text, for limits that are given in characters


class SentPrompts:
    """Which prompts went where: an approximate radix tree, for which a dict will do, as a hash covers all before it."""

    def __init__(self) -> None:
        self._keys_of: dict[BlockHash, dict[str, None]] = {}  # the one it was sent to last comes last
        self._blocks_of: dict[str, OrderedDict[BlockHash, None]] = {}  # the least recently sent first

    def insert(self, block_hashes: Sequence[BlockHash], key: str) -> None:
        blocks = self._blocks_of.setdefault(key, OrderedDict())
        for block_hash in reversed(block_hashes):  # the end of a prompt is forgotten before its beginning
            blocks[block_hash] = None
            blocks.move_to_end(block_hash)
            keys = self._keys_of.setdefault(block_hash, {})
            keys.pop(key, None)
            keys[key] = None

    def longest_match(self, block_hashes: Sequence[BlockHash], keys: Sequence[str]) -> tuple[int, list[str]]:
        """Leading blocks that one of `keys` was sent, and those that were sent all of them, the last one last."""
        known = set(keys)
        num_blocks, holders = 0, list(keys)
        for block_hash in block_hashes:
            found = [key for key in self._keys_of.get(block_hash, ()) if key in known]
            if not found:
                break
            num_blocks, holders = num_blocks + 1, found
        return num_blocks, holders

    def num_blocks(self, key: str) -> int:
        return len(self._blocks_of.get(key, ()))

    def shrink(self, max_blocks: int) -> None:
        """Let every replica's share be at most so large, by forgetting what was sent to it the longest time ago."""
        for key, blocks in self._blocks_of.items():
            for block_hash in list(islice(blocks, max(0, len(blocks) - max_blocks))):
                del blocks[block_hash]
                keys = self._keys_of[block_hash]
                del keys[key]
                if not keys:
                    del self._keys_of[block_hash]


class RandomChoice:
    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        return _unpriced([self._random.choice(targets)])


class RayPrefixAffinity:
    """Ray Serve's PrefixCacheAffinityRouter (Ray 2.60, ray.llm prefix_aware_router.py).

    Of the replicas that were sent the longest part of the prompt, the one with the shortest queue; below a match rate
    of 10 %, of those that were sent the fewest characters; power of two choices where queues differ by more than
    `imbalanced_threshold`, by default never. The tree is not bounded by default.
    """

    def __init__(
        self,
        imbalanced_threshold: float = math.inf,
        match_rate_threshold: float = 0.1,
        seed: int | None = None,
    ) -> None:
        self._imbalanced_threshold = imbalanced_threshold
        self._match_rate_threshold = match_rate_threshold
        self._fallback = PowerOfTwo(seed)
        self._sent = SentPrompts()

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        queues = [target.load.num_open for target in targets]
        if max(queues) - min(queues) > self._imbalanced_threshold:
            ranked = self._fallback.rank(request, targets, matched, now)
        else:
            ranked = _unpriced(sorted(self._affine(request, targets), key=_num_open))
        self._sent.insert(request.block_hashes, ranked[0].target.key)
        return ranked

    def _affine(self, request: RoutedRequest, targets: Sequence[Target]) -> list[Target]:
        keys = [target.key for target in targets]
        num_blocks, holders = self._sent.longest_match(request.block_hashes, keys)
        if num_blocks * request.block_size < self._match_rate_threshold * request.num_prompt:
            fewest = min(map(self._sent.num_blocks, keys))
            return [target for target in targets if self._sent.num_blocks(target.key) == fewest]
        return [target for target in targets if target.key in holders]


class SGLangCacheAware:
    """SGLang's `cache_aware` (sgl-model-gateway, cache_aware.rs), with the defaults of its command line.

    The worker that was sent the longest part of the prompt if that is more than `cache_threshold` of it, otherwise, and
    wherever the load is out of balance, the one with the fewest open requests.
    """

    def __init__(
        self,
        cache_threshold: float = 0.3,
        balance_abs_threshold: int = 64,
        balance_rel_threshold: float = 1.5,
        eviction_interval_s: float = 120.0,
        max_tree_chars: int = 2**26,
    ) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs_threshold = balance_abs_threshold
        self._balance_rel_threshold = balance_rel_threshold
        self._eviction_interval_s = eviction_interval_s
        self._max_tree_tokens = max_tree_chars // CHARS_PER_TOKEN
        self._next_eviction_s = eviction_interval_s
        self._sent = SentPrompts()

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        if now >= self._next_eviction_s:
            self._next_eviction_s = now + self._eviction_interval_s
            self._sent.shrink(self._max_tree_tokens // request.block_size)
        chosen = self._choose(request, targets)
        self._sent.insert(request.block_hashes, chosen.key)
        return _unpriced([chosen])

    def _choose(self, request: RoutedRequest, targets: Sequence[Target]) -> Target:
        least, most = min(targets, key=_num_open), max(map(_num_open, targets))
        is_out_of_balance = (
            most - _num_open(least) > self._balance_abs_threshold
            and most > _num_open(least) * self._balance_rel_threshold
        )
        num_blocks, holders = self._sent.longest_match(request.block_hashes, [target.key for target in targets])
        is_match = num_blocks * request.block_size > self._cache_threshold * request.num_prompt
        if is_out_of_balance or not is_match:
            return least
        return next(target for target in targets if target.key == holders[-1])


class ProductionStackPrefix:
    """vLLM production-stack's `prefixaware`: any of those that were sent the longest part of the prompt, by chance.

    Its trie of 128-character pieces is not bounded, and no load is looked at.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._sent = SentPrompts()

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        _, holders = self._sent.longest_match(request.block_hashes, [target.key for target in targets])
        chosen = self._random.choice([target for target in targets if target.key in holders])
        self._sent.insert(request.block_hashes, chosen.key)
        return _unpriced([chosen])


class DynamoCost:
    """Dynamo's KV router (lib/kv-router, selector/default.rs) with its defaults: credit 1, scale 1, temperature 0.

    The least of prompt blocks to compute there, those of open requests included, plus blocks in use by open requests;
    ties by chance.
    """

    def __init__(
        self, overlap_score_credit: float = 1.0, prefill_load_scale: float = 1.0, seed: int | None = None
    ) -> None:
        self._credit = overlap_score_credit
        self._prefill_load_scale = prefill_load_scale
        self._random = random.Random(seed)

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        costs = [self._cost(request, target, matched.get(target.slot, 0)) for target in targets]
        least = min(costs)
        return _unpriced([self._random.choice([t for t, cost in zip(targets, costs, strict=True) if cost == least])])

    def _cost(self, request: RoutedRequest, target: Target, num_matched: int) -> float:
        load, report = target.load, target.load.report
        prefill_blocks = (load.backlog + request.num_prompt) / request.block_size - self._credit * num_matched
        in_use = report.num_blocks - report.num_free_blocks if report is not None else 0
        decode_blocks = in_use + load.backlog / request.block_size
        return self._prefill_load_scale * max(0.0, prefill_blocks) + decode_blocks


class LMetric:
    """New prompt tokens times the requests there, this one included (Zhang et al., arXiv 2603.15202): no settings."""

    def rank(self, request: RoutedRequest, targets: Sequence[Target], matched: Matched, now: float) -> Sequence[Ranked]:
        def score(target: Target) -> tuple[int, int]:
            num_new = request.num_prompt - matched.get(target.slot, 0) * request.block_size
            num_open = target.load.num_open
            return num_new * (num_open + 1), num_open

        return _unpriced(sorted(targets, key=score))


def _num_open(target: Target) -> int:
    return target.load.num_open


def _unpriced(targets: Sequence[Target]) -> list[Ranked]:
    return [Ranked(target, None) for target in targets]


PEERS: Mapping[str, Callable[..., Policy]] = {
    "random": RandomChoice,
    "ray_prefix": RayPrefixAffinity,
    "sglang_cache_aware": SGLangCacheAware,
    "production_stack": ProductionStackPrefix,
    "dynamo": DynamoCost,
    "lmetric": LMetric,
}
SIMULATED_POLICIES: Mapping[str, Callable[..., Policy]] = {**POLICIES, **PEERS}
