"""The scheduler side: which chunks the host pool holds, in which slots, and for how long.

Bookkeeping only: ids and counts, no device, no tensors. A transfer is prepared here (which
protects the slots it uses), carried out elsewhere, and completed here (which releases them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import repeat

from triton_offload.policies import ARCPolicy, EvictionPolicy, FreeSlots, Key, LRUPolicy
from triton_offload.specs import CPULoadStoreSpec


class UnknownKeyError(KeyError):
    """A key that the pool doesn't hold (never stored, evicted, dropped by a reset)."""


class PendingKeyError(KeyError):
    """A key whose first store hasn't been completed."""


class UnwrittenBlocksError(ValueError):
    """A load wants blocks of a chunk that none of its stores has written."""


class ChunkState(Enum):
    """What the pool knows of a key."""

    MISSING = "missing"
    PENDING = "pending"  # its first store is under way
    READY = "ready"  # at least some of its blocks can be loaded


@dataclass(frozen=True, slots=True)
class OffloadingEvent:
    """Keys that have become loadable (`removed` False) or are gone (`removed` True)."""

    keys: tuple[Key, ...]
    removed: bool


@dataclass(frozen=True, slots=True)
class PrepareStoreOutput:
    """What to store, where, and what had to go for it.

    `keys_to_store`, `blocks` and the slots of `store_spec` run in parallel: of chunk
    `keys_to_store[i]` exactly the blocks whose bits are set in `blocks[i]` are to be written.
    `store_spec.fresh[i]` is False for a chunk that already holds other blocks, to be kept.
    `pending_keys` are not stored by this call, since an earlier store of them is under way (offer
    them again after it; it may fail). Offered keys in neither list are held already.
    """

    keys_to_store: tuple[Key, ...]
    store_spec: CPULoadStoreSpec
    evicted_keys: tuple[Key, ...]
    blocks: tuple[int, ...]
    pending_keys: tuple[Key, ...]


class OffloadingManager(ABC):
    """Decides what is offloaded. The caller makes all calls under one lock of its own.

    `keys`: one hashable key per chunk, in the order of the prefix. `blocks`: one bitmask per key,
    bit s for block s of the chunk; None means every block. A call that raises changes nothing.
    """

    @abstractmethod
    def lookup(self, keys: Sequence[Key], blocks: Sequence[int] | None = None) -> int:
        """Length of the leading run of keys that can be loaded.

        A chunk that was stored in part counts; with `blocks`, it counts only when these blocks
        have been written.
        """

    @abstractmethod
    def touch(self, keys: Sequence[Key]) -> None:
        """Counts one use of each key. Keys that can't be loaded (yet) are ignored."""

    @abstractmethod
    def prepare_store(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        """Reserves slots for those of `keys` that need a store; None, if there's no room.

        What is to be stored is not evicted until `complete_store`, nor loadable when it is new.
        No key of this call is evicted for it. Raises ValueError on duplicate keys or bad masks.
        """

    @abstractmethod
    def complete_store(self, keys: Sequence[Key], success: bool = True) -> None:
        """Ends the stores of `keys`; a failed one leaves nothing behind that could be loaded.

        Raises ValueError on a key that isn't being stored, or that is given twice.
        """

    @abstractmethod
    def prepare_load(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None
    ) -> CPULoadStoreSpec:
        """Pins every key and returns its slot. Any number of loads can pin one key.

        Raises UnknownKeyError, PendingKeyError, or UnwrittenBlocksError.
        """

    @abstractmethod
    def complete_load(self, keys: Sequence[Key]) -> None:
        """Takes back one pin of each key. Raises ValueError on a key that has none."""

    @abstractmethod
    def take_events(self) -> list[OffloadingEvent]:
        """The events since the last call, in order: at most one of each kind per manager call."""

    @abstractmethod
    def reset(self) -> None:
        """Drops every key at once. Transfers that are under way are completed as usual later."""


class _Chunk:
    """One slot with a key. Busy (loading or storing) chunks are held by the policy."""

    __slots__ = ("loads", "slot", "storing", "written")

    def __init__(self, slot: int, storing: int) -> None:
        self.slot = slot
        self.written = 0  # blocks that can be loaded; none as long as the first store runs
        self.storing = storing  # blocks that the store under way writes
        self.loads = 0


class CPUOffloadingManager(OffloadingManager):
    """A pool of `num_chunks` slots in host memory with LRU or ARC eviction.

    Lookup, touch, prepare, complete and eviction are O(1) a key (freed slots are sorted within
    one call). Events are kept until they are taken, and only with `enable_events`.

    A chunk can be stored in parts. A later store that offers blocks which are not written yet
    extends it in its slot: what was there stays loadable, and a failure loses the new blocks only.

    The slot of a chunk that a reset dropped with transfers under way is not given out before these
    are completed. A completion only names its key: where that has been stored anew since, the
    first completions count for the old chunk, for loads and stores each.

    Raises ValueError if `num_chunks` or `blocks_per_chunk` isn't positive, or on an unknown policy.
    """

    def __init__(
        self,
        num_chunks: int,
        policy: str = "lru",
        blocks_per_chunk: int = 1,
        enable_events: bool = False,
    ) -> None:
        if num_chunks < 1:
            raise ValueError(f"num_chunks: expected at least 1, got {num_chunks}")
        if blocks_per_chunk < 1:
            raise ValueError(f"blocks_per_chunk: expected at least 1, got {blocks_per_chunk}")
        if policy not in ("lru", "arc"):
            raise ValueError(f"policy: expected 'lru' or 'arc', got {policy!r}")
        self._num_chunks = num_chunks
        self._every_block = (1 << blocks_per_chunk) - 1
        self._policy: EvictionPolicy = (LRUPolicy if policy == "lru" else ARCPolicy)(num_chunks)
        self._chunks: dict[Key, _Chunk] = {}
        self._orphans: dict[Key, list[_Chunk]] = {}  # busy when a reset dropped them; oldest first
        self._num_busy = 0  # chunks and orphans that are loading or storing
        self._slots = FreeSlots(num_chunks)
        self._events: list[OffloadingEvent] | None = [] if enable_events else None

    @property
    def num_chunks(self) -> int:
        """Slots of the pool."""
        return self._num_chunks

    @property
    def num_used(self) -> int:
        """Slots that aren't free: chunks, and what transfers older than a reset still use."""
        return self._num_chunks - len(self._slots)

    @property
    def num_pinned(self) -> int:
        """Used slots that can't be evicted now, since a transfer reads or writes them."""
        return self._num_busy

    def lookup_state(self, key: Key) -> ChunkState:
        """Tells a key that is still being stored from one that is missing."""
        if (chunk := self._chunks.get(key)) is None:
            return ChunkState.MISSING
        return ChunkState.READY if chunk.written else ChunkState.PENDING

    def lookup(self, keys: Sequence[Key], blocks: Sequence[int] | None = None) -> int:
        masks = repeat(0) if blocks is None else self._masks(keys, blocks)
        for length, (key, wanted) in enumerate(zip(keys, masks, strict=False)):
            chunk = self._chunks.get(key)
            if chunk is None or not chunk.written or wanted & ~chunk.written:
                return length
        return len(keys)

    def touch(self, keys: Sequence[Key]) -> None:
        self._policy.touch(keys)

    def prepare_store(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        offered_keys = _distinct(keys)
        get = self._chunks.get
        to_store: list[Key] = []
        to_write: list[int] = []  # their masks
        pending: list[Key] = []
        extended: list[Key] = []  # idle chunks to be extended
        num_new = num_idle = 0
        for key, offered in zip(keys, self._masks(keys, blocks), strict=False):
            chunk = get(key)
            if chunk is None:
                to_store.append(key)
                to_write.append(offered)
                num_new += 1
                continue
            missing = offered & ~chunk.written
            idle = not (chunk.loads or chunk.storing)
            num_idle += idle
            if missing and chunk.storing:
                pending.append(key)
            elif missing:
                to_store.append(key)
                to_write.append(missing)
                if idle:
                    extended.append(key)

        num_to_evict = max(0, num_new - len(self._slots))
        if num_to_evict > self.num_used - self._num_busy - num_idle:
            return None
        evicted = self._policy.evict(num_to_evict, offered_keys)
        self._slots.put([chunk.slot for chunk in map(self._chunks.pop, evicted)])
        self._record(evicted, removed=True)
        self._policy.hold(extended)
        self._num_busy += num_new + len(extended)
        slots = self._slots.take(num_new)
        fresh: bool | list[bool] = True
        if num_new == len(to_store):
            self._chunks.update(zip(to_store, map(_Chunk, slots, to_write), strict=True))
        else:
            fresh = [key not in self._chunks for key in to_store]
            new_slots, slots = iter(slots), []
            for key, mask, is_new in zip(to_store, to_write, fresh, strict=True):
                if is_new:
                    self._chunks[key] = _Chunk(next(new_slots), mask)
                self._chunks[key].storing = mask
                slots.append(self._chunks[key].slot)
        return PrepareStoreOutput(
            keys_to_store=tuple(to_store),
            store_spec=CPULoadStoreSpec(slots, fresh),
            evicted_keys=tuple(evicted),
            blocks=tuple(to_write),
            pending_keys=tuple(pending),
        )

    def complete_store(self, keys: Sequence[Key], success: bool = True) -> None:
        _distinct(keys)
        get, orphans = self._chunks.get, self._orphans
        storing: list[_Chunk] = []
        for key in keys:
            chunk = get(key)
            if orphans and key in orphans:
                chunk = next((old for old in orphans[key] if old.storing), chunk)
            if chunk is None or not chunk.storing:
                raise ValueError(f"keys: expected keys that are being stored, got {key!r}")
            storing.append(chunk)
        stored: list[Key] = []
        extended: list[Key] = []
        self._num_busy -= sum([not chunk.loads for chunk in storing])
        for key, chunk in zip(keys, storing, strict=True):
            mask, chunk.storing = chunk.storing, 0
            if orphans and get(key) is not chunk:
                self._drop_idle_orphans(key)
            elif not chunk.written and success:
                chunk.written = mask
                stored.append(key)
            elif not chunk.written:
                self._slots.put((self._chunks.pop(key).slot,))
            else:
                chunk.written |= mask if success else 0
                if not chunk.loads:
                    extended.append(key)
        self._policy.release(extended)
        self._policy.admit(stored)
        self._record(stored, removed=False)

    def prepare_load(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None
    ) -> CPULoadStoreSpec:
        get = self._chunks.get
        chunks: list[_Chunk] = []
        for key, wanted in zip(keys, self._masks(keys, blocks), strict=False):
            chunk = get(key)
            if chunk is None or wanted & ~chunk.written:
                raise _refusal(key, chunk, wanted)
            chunks.append(chunk)
        idle: list[Key] = []
        for key, chunk in zip(keys, chunks, strict=True):
            if not (chunk.loads or chunk.storing):
                idle.append(key)
            chunk.loads += 1
        self._policy.hold(idle)
        self._num_busy += len(idle)
        return CPULoadStoreSpec([chunk.slot for chunk in chunks])

    def complete_load(self, keys: Sequence[Key]) -> None:
        get, orphans = self._chunks.get, self._orphans
        loading: list[_Chunk] = []
        for key in keys:
            chunk = get(key)
            if orphans and key in orphans:
                chunk = next((old for old in orphans[key] if old.loads), chunk)
            if chunk is None or not chunk.loads:
                for taken in loading:
                    taken.loads += 1
                raise ValueError(f"keys: expected keys that are being loaded, got {key!r}")
            chunk.loads -= 1
            loading.append(chunk)
        released: dict[Key, None] = {}  # ordered, and once where a key was given twice
        for key, chunk in zip(keys, loading, strict=True):
            if get(key) is not chunk:
                self._num_busy -= self._drop_idle_orphans(key)
            elif not (chunk.loads or chunk.storing):
                released[key] = None
        self._num_busy -= len(released)
        self._policy.release(tuple(released))

    def take_events(self) -> list[OffloadingEvent]:
        events, self._events = self._events or [], None if self._events is None else []
        return events

    def reset(self) -> None:
        dropped = [key for key, chunk in self._chunks.items() if chunk.written]
        for key, chunk in self._chunks.items():
            if chunk.loads or chunk.storing:
                self._orphans.setdefault(key, []).append(chunk)
        self._chunks.clear()
        self._policy.clear()
        self._slots.reset({chunk.slot for orphans in self._orphans.values() for chunk in orphans})
        self._record(dropped, removed=True)

    def _masks(self, keys: Sequence[Key], blocks: Sequence[int] | None) -> Iterable[int]:
        """One valid mask per key, or one mask without an end where all blocks are meant."""
        if blocks is None:
            return repeat(self._every_block)
        if len(blocks) != len(keys):
            raise ValueError(f"blocks: expected {len(keys)} masks, got {len(blocks)}")
        for mask in blocks:
            if not 0 < mask <= self._every_block:
                raise ValueError(f"blocks: expected masks of 1 to {self._every_block}, got {mask}")
        return blocks

    def _drop_idle_orphans(self, key: Key) -> int:
        """Frees the slots of those orphans of `key` whose transfers have all ended."""
        orphans = self._orphans.pop(key, [])
        if busy := [chunk for chunk in orphans if chunk.loads or chunk.storing]:
            self._orphans[key] = busy
        self._slots.put([chunk.slot for chunk in orphans if chunk not in busy])
        return len(orphans) - len(busy)

    def _record(self, keys: Sequence[Key], removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent(tuple(keys), removed))

    def _check(self) -> None:
        """Asserts every invariant, in O(num_chunks). For tests."""
        orphans = [chunk for chunks in self._orphans.values() for chunk in chunks]
        for chunk in (chunks := [*self._chunks.values(), *orphans]):
            assert not chunk.written & chunk.storing
            assert 0 < chunk.written | chunk.storing <= self._every_block
            assert chunk.loads == 0 or (chunk.loads > 0 and chunk.written)
        assert all(self._orphans.values())
        assert all(chunk.loads or chunk.storing for chunk in orphans)
        self._slots._check(used=[chunk.slot for chunk in chunks])
        busy = {key for key, chunk in self._chunks.items() if chunk.loads or chunk.storing}
        assert self._num_busy == len(busy) + len(orphans)
        ready = {key for key, chunk in self._chunks.items() if chunk.written}
        self._policy._check(free=ready - busy, held=ready & busy)


def _distinct(keys: Sequence[Key]) -> set[Key]:
    distinct = set(keys)
    if len(distinct) != len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"keys: expected distinct keys, got {twice!r} twice")
    return distinct


def _refusal(key: Key, chunk: _Chunk | None, wanted: int) -> Exception:
    if chunk is None:
        return UnknownKeyError(f"keys: expected keys in the pool, got {key!r}")
    if not chunk.written:
        return PendingKeyError(f"keys: expected keys with a completed store, got {key!r}")
    expected = f"written blocks of {key!r}, within {chunk.written:#b}"
    return UnwrittenBlocksError(f"blocks: expected {expected}, got {wanted:#b}")
