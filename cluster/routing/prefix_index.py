"""Which replicas hold which prefix: an exact index from block hashes to replicas, for all replicas of a model.

One dict from a block's hash to a bit mask of slots; a slot is one epoch of one replica. Hashes are chained, so a block
stands for its whole prefix, and an engine evicts a prefix after what is built on it: whoever holds a block holds its
parents. Along a prompt the mask can therefore only lose bits, and `match` looks for the few places where it does
instead of visiting every block.

Not thread-safe: one lock around it is its users' business.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from typing import Final

from shoal.engine.request import BlockHash

# Entries that each change moves while a closed slot's are being swept out: 1,000,000 take some 4,000 changes.
_SWEPT_PER_CHANGE: Final = 256
_BITS_OF_DIGITS: Final = bytes.maketrans(b"01", b"\0\1")


@dataclass(slots=True, eq=False)
class _Slot:
    """One epoch of one replica."""

    number: int
    bit: int
    capacity: int | None
    num_pairs: int = 0
    is_over: bool = False
    predictions: set[Prediction] = field(default_factory=set)  # the open ones
    predicted: set[BlockHash] = field(default_factory=set)  # their blocks
    only_predicted: set[BlockHash] = field(default_factory=set)  # those of them that the replica does not hold


@dataclass(slots=True, eq=False)
class Prediction:
    """Blocks that a routed request will bring to a slot. Made by `PrefixIndex.predict`, ended by `settle`."""

    _slot: _Slot
    block_hashes: tuple[BlockHash, ...]

    @property
    def slot(self) -> int:
        return self._slot.number

    def num_shared(self, others: Iterable[Prediction]) -> int:
        """Leading blocks that the nearest of the others has too. Chained hashes differ from where prompts do."""
        mine, low = self.block_hashes, 0
        for other in others:
            theirs = other.block_hashes
            high = min(len(mine), len(theirs))
            while low < high:
                middle = (low + high) >> 1
                if mine[middle] == theirs[middle]:
                    low = middle + 1
                else:
                    high = middle
        return low


class PrefixIndex:
    """Leading blocks of a prompt that each replica holds, or will hold once what was routed to it is computed.

    `on_gone` is called with a block that was removed from the only slot that had it. A slot's capacity bounds what it
    takes: at most 200 bytes a pair of block and slot (bench/routing.py measures it).
    """

    def __init__(self, *, on_gone: Callable[[BlockHash], None] | None = None) -> None:
        self._on_gone = on_gone
        self._masks: dict[BlockHash, int] = {}
        self._unswept: dict[BlockHash, int] = {}  # while closed slots are swept out: entries still to be moved over
        self._bits: list[int] = []  # by slot number: the one object for "held by this slot alone"
        self._slots: dict[int, _Slot] = {}
        self._live = 0  # bits of open slots
        self._predicting: set[int] = set()  # slots with blocks that are only predicted, and perhaps some without
        self._free: list[int] = []  # slot numbers that no entry mentions
        self._closed: list[int] = []  # to be swept out next
        self._sweeping: list[int] = []
        self._kept_bits = -1  # all but those being swept out

    def __len__(self) -> int:
        """Blocks that are known; those of closed slots count until they are swept out."""
        return len(self._masks) + len(self._unswept)

    # -- slots -------------------------------------------------------------------------------------------------

    def open(self, capacity: int | None = None) -> int:
        """A new, empty slot, for a replica or a new epoch of one. `capacity`: most blocks it can hold."""
        if self._free:
            number = self._free.pop()
        else:
            number = len(self._bits)
            self._bits.append(1 << number)
        bit = self._bits[number]
        self._slots[number] = _Slot(number, bit, capacity)
        self._live |= bit
        return number

    def close(self, slot: int) -> None:
        """Forget a slot. No lookup finds it any more; its memory comes back, and its number may be given out again,
        after some thousand more changes.
        """
        state = self._slots.pop(slot)
        state.predictions.clear()
        self._predicting.discard(slot)
        self._live ^= state.bit
        self._closed.append(slot)
        self._sweep()

    def num_pairs(self, slot: int) -> int:
        """Blocks that the slot's replica says it holds."""
        return self._slots[slot].num_pairs

    def is_over(self, slot: int) -> bool:
        """Whether more was stored than there was room for, so that the entry of some block is missing: either removals
        were not heard of.
        """
        return self._slots[slot].is_over

    # -- what replicas hold ------------------------------------------------------------------------------------

    def store(self, slot: int, block_hashes: Collection[BlockHash]) -> None:
        """The replica holds these blocks. Those that exceed the slot's capacity are left out."""
        state = self._slots[slot]
        bit, only_predicted = state.bit, state.only_predicted
        masks = self._pull(block_hashes)
        room = state.capacity - state.num_pairs if state.capacity is not None else None
        num_new = 0
        for block_hash in block_hashes:
            mask = masks.get(block_hash, 0)
            is_new = not mask & bit
            if not is_new and block_hash not in only_predicted:
                continue
            if num_new == room:
                state.is_over = True
                break
            num_new += 1
            if is_new:
                masks[block_hash] = mask | bit if mask else bit
            else:
                only_predicted.discard(block_hash)
        state.num_pairs += num_new
        self._sweep()

    def remove(self, slot: int, block_hashes: Collection[BlockHash]) -> None:
        """The replica holds these blocks no more. Unknown ones are ignored."""
        state = self._slots[slot]
        bit, predicted, only_predicted = state.bit, state.predicted, state.only_predicted
        masks = self._pull(block_hashes)
        num_gone = 0
        for block_hash in block_hashes:
            mask = masks.get(block_hash, 0)
            if not mask & bit or block_hash in only_predicted:
                continue
            num_gone += 1
            if block_hash in predicted:
                only_predicted.add(block_hash)
                self._predicting.add(slot)
            else:
                self._put(block_hash, mask ^ bit)
                if mask == bit and self._on_gone is not None:
                    self._on_gone(block_hash)
        state.num_pairs -= num_gone
        self._sweep()

    # -- what is to come ---------------------------------------------------------------------------------------

    def predict(self, slot: int, block_hashes: Sequence[BlockHash]) -> Prediction:
        """Count these blocks, a prompt's first ones, as held by the slot until the prediction is settled."""
        state = self._slots[slot]
        bit = state.bit
        masks = self._pull(block_hashes)
        state.predicted.update(block_hashes)
        for block_hash in block_hashes[self._num_held(bit, block_hashes) :]:
            mask = masks.get(block_hash, 0)
            if not mask & bit:
                masks[block_hash] = mask | bit if mask else bit
                state.only_predicted.add(block_hash)
        prediction = Prediction(state, tuple(block_hashes))
        state.predictions.add(prediction)
        self._predicting.add(slot)
        return prediction

    def settle(self, prediction: Prediction) -> None:
        """The request is computed, or gone, or was predicted too long ago: what its replica has not reported by now
        is forgotten, unless another prediction stands for it. Settling twice does no harm, nor does a closed slot.
        """
        state = prediction._slot
        if prediction not in state.predictions:
            return
        state.predictions.remove(prediction)
        over = prediction.block_hashes[prediction.num_shared(state.predictions) :]
        state.predicted.difference_update(over)
        not_held = state.only_predicted.intersection(over)
        state.only_predicted -= not_held
        masks = self._pull(not_held)
        for block_hash in not_held:
            self._put(block_hash, masks[block_hash] ^ state.bit)

    # -- lookup ------------------------------------------------------------------------------------------------

    def match(self, block_hashes: Sequence[BlockHash]) -> dict[int, int]:
        """Slot -> leading blocks of the prompt that it holds or is predicted to hold; slots with none are left out.

        A bisection that shares its probes among all slots: where two blocks have the same mask, so have all between
        them. About log2(blocks) probes for each depth at which some replica's match ends, and at most one a block.
        """
        if not block_hashes:
            return {}
        get = self._find if self._unswept else self._masks.get
        high = len(block_hashes)
        held = get(block_hashes[0], 0) & self._live
        kept = get(block_hashes[-1], 0) & held
        depths = dict.fromkeys(_slots_in(kept), high)
        spans = [(0, held, high - 1, kept)] if held != kept else []
        while spans:
            low, held, high, kept = spans.pop()
            while high - low > 1:
                middle = (low + high) >> 1
                mask = get(block_hashes[middle], 0) & held
                if mask == held:
                    low = middle
                    continue
                if mask & kept != mask:
                    spans.append((middle, mask, high, mask & kept))
                high, kept = middle, mask
            lost = held ^ kept
            if lost & (lost - 1):
                depths.update(dict.fromkeys(_slots_in(lost), high))
            else:
                depths[lost.bit_length() - 1] = high
        return depths

    def pending(self, block_hashes: Sequence[BlockHash], matched: Mapping[int, int]) -> dict[int, int]:
        """Slot -> how many of the blocks that `match` has found are only predicted, where there are any."""
        pending = {}
        for slot in tuple(self._predicting):
            only_predicted, num_blocks = self._slots[slot].only_predicted, matched.get(slot, 0)
            if not only_predicted:
                self._predicting.remove(slot)
            if not num_blocks or block_hashes[num_blocks - 1] not in only_predicted:
                continue
            low, high = 0, num_blocks - 1
            while low < high:
                middle = (low + high) >> 1
                if block_hashes[middle] in only_predicted:
                    high = middle
                else:
                    low = middle + 1
            pending[slot] = num_blocks - low
        return pending

    # -- entries -----------------------------------------------------------------------------------------------

    def _find(self, block_hash: BlockHash, default: int) -> int:
        return self._masks.get(block_hash) or self._unswept.get(block_hash, default)

    def _pull(self, block_hashes: Iterable[BlockHash]) -> dict[BlockHash, int]:
        """The masks, where those of `block_hashes` can be changed."""
        if self._unswept:
            for block_hash in block_hashes:
                mask = self._unswept.pop(block_hash, 0) & self._kept_bits
                if mask:
                    self._masks[block_hash] = mask
        return self._masks

    def _put(self, block_hash: BlockHash, mask: int) -> None:
        if mask:
            self._masks[block_hash] = self._bits[mask.bit_length() - 1] if mask.bit_count() == 1 else mask
        else:
            del self._masks[block_hash]

    def _num_held(self, bit: int, block_hashes: Sequence[BlockHash]) -> int:
        """Leading blocks with this bit."""
        low, high = 0, len(block_hashes)
        while low < high:
            middle = (low + high) // 2
            if self._find(block_hashes[middle], 0) & bit:
                low = middle + 1
            else:
                high = middle
        return low

    def _sweep(self) -> None:
        """Move some entries over to a new dict without the bits of closed slots. A dict never shrinks, so this is also
        what gives memory back.
        """
        if not self._unswept:
            self._free += self._sweeping
            self._sweeping, self._closed = self._closed, []
            if not self._sweeping:
                return
            self._unswept, self._masks = self._masks, {}
            self._kept_bits = ~sum(self._bits[number] for number in self._sweeping)
        for _ in range(min(_SWEPT_PER_CHANGE, len(self._unswept))):
            block_hash, mask = self._unswept.popitem()
            mask &= self._kept_bits
            if mask:
                self._put(block_hash, mask)


def _slots_in(mask: int) -> Iterator[int]:
    """Numbers of the bits that are set."""
    return compress(count(), bin(mask)[:1:-1].encode().translate(_BITS_OF_DIGITS))
