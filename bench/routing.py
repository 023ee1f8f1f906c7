"""What a routing decision costs, and what the index behind it: ours, Ray's prefix tree, Dynamo's radix tree.

    python bench/routing.py [--quick] [--pairs 1000000] [--blocks 750]

Every contender holds the same: all replicas the same first 100 blocks (a system prompt), and one or two of them each
conversation, 1,000,000 (block, replica) pairs together. Asked are prompts of 12,000 tokens (750 blocks of 16) that go
on from somewhere in a conversation. Each contender runs in a process of its own; memory is what the process grew by.

Ray's tree is called as a plain object; in Serve it stands in an actor, and a decision pays two or three remote calls
besides. It compares characters, here four for a token. Dynamo's tree (pip install ai-dynamo-runtime) has a thread of
its own, whose answer is waited for. sglang-router keeps its tree inside its HTTP server and has no way to ask it in
process, so it is not here.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import machine

from shoal.cluster.routing.policies import RoutedRequest
from shoal.cluster.routing.prefix_index import PrefixIndex
from shoal.cluster.routing.router import Router
from shoal.engine.load import EngineLoad
from shoal.engine.memory.prefix_cache import chain_hashes, root_hash
from shoal.engine.request import BlockHash, RequestId
from shoal.engine.step_time import StepTime

BLOCK_SIZE = 16
REPLICA_COUNTS = (64, 1000)
NUM_ASKED = 300
ROUNDS = 5

Blocks = Sequence[int]  # a prompt as numbers, equal ones for equal blocks of tokens
Ask = Callable[[Any], object]
Contender = tuple[Ask, Callable[[Blocks], Any]]  # how to ask it, and the form in which it takes a prompt


@dataclass(frozen=True, slots=True)
class Workload:
    """The same for every contender, drawn from one seed."""

    num_replicas: int
    num_pairs: int
    num_blocks: int

    @property
    def system(self) -> Blocks:
        return range(min(100, self.num_blocks // 2))

    def conversation(self, number: int, num_blocks: int) -> list[int]:
        first = (number + 1) * 1000
        return [*self.system, *range(first, first + num_blocks - len(self.system))]

    def held(self) -> Iterator[tuple[int, list[int]]]:
        """(replica, blocks from the first one on) until there are enough pairs."""
        draw = random.Random(7)
        num_system = len(self.system)
        num_pairs = self.num_replicas * num_system
        for replica in range(self.num_replicas):
            yield replica, list(self.system)
        number = 0
        while num_pairs < self.num_pairs:
            for depth in (self.num_blocks, draw.randrange(num_system + 1, self.num_blocks))[: draw.choice((1, 1, 2))]:
                yield draw.randrange(self.num_replicas), self.conversation(number, depth)
                num_pairs += depth - num_system
            number += 1

    def asked(self) -> Iterator[list[int]]:
        draw = random.Random(8)
        num_conversations = max(1, self.num_pairs // (2 * self.num_blocks))
        for number in range(NUM_ASKED):
            known = self.conversation(draw.randrange(num_conversations), self.num_blocks)
            known = known[: draw.randrange(len(self.system), self.num_blocks)]
            new = 10**9 + 1000 * number
            yield [*known, *range(new, new + self.num_blocks - len(known))]


def our_hashes(blocks: Blocks) -> list[BlockHash]:
    hashes, parent = [], b""
    for block in blocks:
        parent = blake2b(parent + block.to_bytes(8, "big"), digest_size=16).digest()
        hashes.append(BlockHash(parent))
    return hashes


def fill(index: PrefixIndex, slots: Sequence[int], workload: Workload) -> None:
    for replica, blocks in workload.held():
        index.store(slots[replica], our_hashes(blocks))


def shoal_match(workload: Workload) -> Contender:
    index = PrefixIndex()
    fill(index, [index.open() for _ in range(workload.num_replicas)], workload)
    return index.match, our_hashes


def shoal_decide(workload: Workload) -> Contender:
    """The whole decision: match, costs of all replicas, and their order. The prompt's hashes are known by then."""
    router = Router()
    slots = [router.add(str(number)).slot for number in range(workload.num_replicas)]
    fill(router.index, slots, workload)
    draw = random.Random(9)
    for key in router.keys:
        prefills = tuple((RequestId(f"{key}-{i}"), draw.randrange(1, 8000)) for i in range(draw.randrange(4)))
        router.report(
            key,
            EngineLoad(
                prefills=prefills,
                more_prefill_tokens=0,
                num_running=20,
                max_running_requests=256,
                num_waiting=len(prefills),
                num_waiting_tokens=0,
                num_decoding=draw.randrange(20),
                num_context_tokens=draw.randrange(100_000),
                num_free_blocks=1000,
                num_empty_blocks=0,
                num_blocks=20_000,
                block_size=BLOCK_SIZE,
                max_step_tokens=2048,
                step_time=StepTime(0.005, 1e-4, 1e-5, 1e-8),
                finished_per_s=5.0,
            ),
        )

    def described(blocks: Blocks) -> RoutedRequest:
        tokens = range(len(blocks) * BLOCK_SIZE)
        return router.describe(str(blocks[-1]), tokens, block_size=BLOCK_SIZE, block_hashes=our_hashes(blocks))

    return router.decide, described


def shoal_hash(workload: Workload) -> Contender:
    """Hashing a prompt's tokens, once a request and before anything is decided."""
    return (
        lambda tokens: chain_hashes(tokens, root_hash(""), BLOCK_SIZE),
        lambda blocks: tuple(token for block in blocks for token in range(block, block + BLOCK_SIZE)),
    )


def ray_tree(workload: Workload) -> Contender:
    module = importlib.import_module("ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree")
    tree = module.PrefixTree()
    tenants = [str(number) for number in range(workload.num_replicas)]
    tree.add_tenants(tenants, 0.0)
    for moment, (replica, blocks) in enumerate(workload.held()):
        tree.insert(as_text(blocks), tenants[replica], float(moment))
    return lambda text: tree.prefix_match(text, tenants), as_text


def as_text(blocks: Blocks) -> str:
    return "".join(blake2b(block.to_bytes(8, "big"), digest_size=32).hexdigest() for block in blocks)  # 4 a token


def dynamo_tree(workload: Workload) -> Contender:
    tree = importlib.import_module("dynamo._core").RadixTree()
    for number, (replica, blocks) in enumerate(workload.held()):
        stored = [{"block_hash": block, "tokens_hash": block} for block in blocks]
        event = {"event_id": number, "dp_rank": 0, "data": {"stored": {"parent_hash": None, "blocks": stored}}}
        tree.apply_event(replica, json.dumps(event).encode())
    return lambda blocks: tree.find_matches(blocks, False).scores, list


CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "shoal_match": shoal_match,
    "shoal_decide": shoal_decide,
    "shoal_hash": shoal_hash,
    "ray_prefix_tree": ray_tree,
    "dynamo_radix_tree": dynamo_tree,
}


def measure(name: str, workload: Workload) -> dict[str, float | str]:
    """Microseconds a question, and bytes a pair; why not, where it cannot be run here."""
    before = resident_bytes()
    try:
        ask, form = CONTENDERS[name](workload)
    except ImportError as error:
        return {"skipped": str(error)}
    gc.collect()
    grown = resident_bytes() - before
    asked = [form(blocks) for blocks in workload.asked()]
    gc.freeze()
    times_us = []
    for _ in range(ROUNDS):
        for prompt in asked:
            start = time.perf_counter()
            ask(prompt)
            times_us.append((time.perf_counter() - start) * 1e6)
    cuts = statistics.quantiles(times_us[len(asked) :], n=100)
    result: dict[str, float | str] = {"median_us": round(cuts[49], 1), "p99_us": round(cuts[98], 1)}
    if name != "shoal_hash":
        result["bytes_per_pair"] = round(grown / workload.num_pairs, 1)
    return result


def resident_bytes() -> int:
    fields = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pairs, which only show that the script works")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=750, help="of each prompt (default: %(default)s)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args()
    num_pairs = 200_000 if given.quick else given.pairs
    result: dict[str, Any] = {"machine": machine.facts(threads=1), "pairs": num_pairs, "blocks": given.blocks}
    context = multiprocessing.get_context("spawn")
    for num_replicas in REPLICA_COUNTS:
        workload = Workload(num_replicas, num_pairs, given.blocks)
        of_count = result[f"replicas_{num_replicas}"] = {}
        for name in given.contenders:
            with ProcessPoolExecutor(1, mp_context=context) as child:
                of_count[name] = child.submit(measure, name, workload).result()
            print(f"{num_replicas:5} replicas  {name:18} {of_count[name]}", flush=True)
        machine.write_result(given.results, "routing", result)


if __name__ == "__main__":
    main()
