"""The scheduler side: which chunks the host pool holds, in which slots, and for how long.

Bookkeeping only: ids and counts, no device, no tensors. A transfer is prepared here (which
protects the slots it uses), carried out elsewhere, and completed here (which releases them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence, Set
from itertools import takewhile
from typing import SupportsIndex

from triton_offload.errors import PendingKeyError, UnknownKeyError, UnwrittenBlocksError
from triton_offload.kernels.arguments import as_integer
from triton_offload.scheduler.base import (
    ChunkState,
    OffloadingEvent,
    OffloadingManager,
    PrepareStoreOutput,
)
from triton_offload.scheduler.chunks import check_masks, positions
from triton_offload.scheduler.order import Key
from triton_offload.scheduler.orphans import Orphans
from triton_offload.scheduler.policies import PolicyChoice
from triton_offload.scheduler.room import Room, RoomOfOneSize
from triton_offload.scheduler.shared_room import SharedRoom
from triton_offload.slabs import Slabs
from triton_offload.specs import CPULoadStoreSpec, Direction

__all__ = [
    "CPUOffloadingManager",
    "ChunkState",
    "OffloadingEvent",
    "OffloadingManager",
    "PrepareStoreOutput",
]


class CPUOffloadingManager(OffloadingManager):
    """A pool of `num_chunks` slots in host memory, with LRU, ARC or a policy of your own. Where
    its slots differ in size, it is given as `Slabs`, and `num_chunks` is the most that it holds.

    Lookup, touch, prepare, complete and eviction are O(1) per key (freed slots are sorted
    within one call), reset is O(1) per chunk that it drops. Events are kept until they are taken,
    and only with `enable_events`.

    Of the chunks that one call of `prepare_store` or `touch` named, the last is evicted first,
    whatever jobs stored them and in whatever order these end; with ARC, of those in each of its
    lists. Transfers move no chunk in the order of eviction.

    A chunk can be stored in parts. A later store that offers blocks which are not written yet
    extends it in its slot: what was there stays loadable, and a failure loses the new blocks only.

    The slot of a chunk that a reset dropped with transfers under way is not given out before these
    are completed. A completion that does not name its `slots` counts for the oldest chunk of its
    key that such a transfer is under way for.

    Of several sizes, that chunk leaves next which the policy names of all, whatever its size.
    Where two slabs' worth of another size's slots are free, all leaves that lies in the slab of it
    which was used least recently, and in which nothing is in use (`SharedRoom`).

    `policy`: "lru", "arc", or what makes an `EvictionPolicy` of the number of chunks. One that
    raises, or names what may not be evicted, is asked no more: `prepare_store` raises RuntimeError
    where it would evict, until a `reset`, and everything else works on.

    Raises ValueError where `num_chunks` or `blocks_per_chunk` isn't an integer of at least 1, or on
    an unknown policy; TypeError where it is none.
    """

    def __init__(
        self,
        num_chunks: SupportsIndex | Slabs,
        policy: PolicyChoice = "lru",
        blocks_per_chunk: SupportsIndex = 1,
        enable_events: bool = False,
    ) -> None:
        self._room: Room
        if isinstance(num_chunks, Slabs) and len(num_chunks.sizes) > 1:
            self._room = SharedRoom(num_chunks, policy)
        else:
            number = num_chunks.num_slots if isinstance(num_chunks, Slabs) else num_chunks
            self._room = RoomOfOneSize(as_integer("num_chunks", number, 1), policy)
        blocks_per_chunk = as_integer("blocks_per_chunk", blocks_per_chunk, 1)
        self._every_block = (1 << blocks_per_chunk) - 1
        # What is known of chunks lies in dicts by key, not in an object per chunk: so most calls
        # deal with all their keys inside one call of a dict. Only the first has every chunk.
        self._slot_of, self._policy = self._room.slot_of, self._room.policy
        self._partial: dict[Key, int] = {}  # blocks that can be loaded, where some but not all can
        self._storing: dict[Key, int] = {}  # blocks that the store under way writes
        self._loading: dict[Key, int] = {}  # number of loads under way
        self._orphans = Orphans()
        self._events: list[OffloadingEvent] | None = [] if enable_events else None

    @property
    def num_chunks(self) -> int:
        """Chunks that the pool has room for; where sizes differ, of the smallest."""
        return self._room.most_chunks

    @property
    def num_used(self) -> int:
        """Slots that aren't free: chunks, and what transfers older than a reset still use."""
        return self._room.num_used

    def used_by_size(self) -> list[int]:
        """`num_used` of each size."""
        return self._room.used_by_size()

    @property
    def wasted_bytes(self) -> int:
        """Bytes that no chunk can take, since other sizes' slots leave them over."""
        return self._room.wasted_bytes

    @property
    def num_pinned(self) -> int:
        """Used slots that can't be evicted now, since a transfer reads or writes them."""
        return self._room.num_pinned

    def lookup_state(self, key: Key) -> ChunkState:
        """Tells a key that is still being stored from one that is missing."""
        if key not in self._slot_of:
            return ChunkState.MISSING
        return ChunkState.READY if self._loadable(key) else ChunkState.PENDING

    def loadable_blocks(self, key: Key) -> int:
        """The blocks of a chunk that can be loaded, as a bitmask; 0 where there are none."""
        return self._loadable(key) if key in self._slot_of else 0

    def lookup(self, keys: Sequence[Key], blocks: Sequence[int] | None = None) -> int:
        masks = None if blocks is None else check_masks(blocks, len(keys), self._every_block)
        return self._lookup(keys, masks)

    def _lookup(self, keys: Sequence[Key], masks: Sequence[int] | None) -> int:
        """`lookup` with checked masks; None: any block of a chunk will do."""
        storing, partial = self._storing, self._partial
        held = list(takewhile(self._slot_of.__contains__, keys))
        if storing.keys().isdisjoint(held) and partial.keys().isdisjoint(held):
            return len(held)  # every one is a whole chunk
        for i, key in enumerate(held):
            if key in storing or key in partial:
                loadable = self._loadable(key)
                if not loadable or (masks and masks[i] & ~loadable):
                    return i
        return len(held)

    def _loadable(self, key: Key) -> int:
        """The blocks of a chunk that can be loaded; none while its first store is under way."""
        return self._partial.get(key, 0 if key in self._storing else self._every_block)

    def touch(self, keys: Sequence[Key]) -> None:
        slot_of, storing = self._slot_of, self._storing
        pending: Collection[Key] = ()
        if storing:
            pending = {key for key in keys if key in storing and key not in self._partial}
        known = [key for key in keys if key in slot_of]
        self._room.use(known)
        self._policy.touch(known, pending)

    def prepare_store(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None, *, size: int = 0
    ) -> PrepareStoreOutput | None:
        """`size`: which of the pool's sizes the slots of these chunks have, and always have."""
        to_write = self._offered(keys, blocks)
        known = self._slot_of.keys() & to_write.keys()
        extended: Sequence[Key] = ()
        pending: Sequence[Key] = ()
        num_idle = 0
        if known:
            extended, pending, num_idle = self._take_out_written(keys, known, to_write)
        num_new = len(keys) - len(known)
        storing, loading = self._storing, self._loading
        busy = (storing.keys(), loading.keys()) if storing or loading else ()
        evicted = self._room.make(num_new, size, known, num_idle, busy)
        if evicted is None:
            return None
        if evicted:
            self._note_evicted(evicted)

        keys_to_store = tuple(to_write)
        new = [key for key in to_write if key not in known] if extended else keys_to_store
        slots = self._room.place(new, size)
        self._policy.admit(new)
        fresh: bool | list[bool] = True
        if extended:
            slots = [self._slot_of[key] for key in to_write]
            fresh = [key not in known for key in to_write]
            self._room.pin([key for key in extended if key not in loading])
        if known:
            self._room.use(known)
            self._policy.refresh(keys)
        self._storing.update(to_write)
        return PrepareStoreOutput(
            keys_to_store=keys_to_store,
            store_spec=CPULoadStoreSpec(slots, fresh),
            evicted_keys=tuple(evicted),
            blocks=tuple(to_write.values()),
            pending_keys=tuple(pending),
            all_new=not known,
        )

    def _note_evicted(self, keys: Sequence[Key]) -> None:
        for key in keys if self._partial else ():
            self._partial.pop(key, None)
        self._record(keys, removed=True)

    def _offered(self, keys: Sequence[Key], blocks: Sequence[int] | None) -> dict[Key, int]:
        """The mask of each key, in their order."""
        if blocks is None:
            offered = dict.fromkeys(keys, self._every_block)
        else:
            masks = check_masks(blocks, len(keys), self._every_block)
            offered = dict(zip(keys, masks, strict=True))
        if len(offered) != len(keys):
            raise _named_twice(keys)
        return offered

    def _take_out_written(
        self, keys: Sequence[Key], known: Set[Key], to_write: dict[Key, int]
    ) -> tuple[list[Key], list[Key], int]:
        """Leave in `to_write` what is to be written, of chunks that the pool has: nothing of those
        that are whole or being stored.

        Returns the chunks that it extends, those that another store is writing a block of, and how
        many of all of them could be evicted, if they were not of this call.
        """
        storing, loading = self._storing, self._loading
        extended: list[Key] = []
        pending: list[Key] = []
        num_idle = 0
        for key in (key for key in keys if key in known):
            num_idle += key not in loading and key not in storing
            to_write[key] &= ~self._loadable(key)
            if to_write[key] and key not in storing:
                extended.append(key)
            elif to_write.pop(key):
                pending.append(key)
        return extended, pending, num_idle

    def complete_store(
        self, keys: Sequence[Key], success: bool = True, *, slots: Sequence[int] | None = None
    ) -> None:
        live, masks = self._end_stores(keys, slots)
        stored: Sequence[Key] = live  # for the first time
        idle: Sequence[Key] = ()  # extended ones that are idle again
        # A mask of every block is a first store, and whole chunks are the common case.
        if not success or masks.count(self._every_block) < len(masks):
            stored, idle = self._end_parts(live, masks if success else ())
        if idle:
            self._policy.release(idle)
            self._room.unpin(idle)
        if success:
            self._policy.land(stored)
            self._room.unpin(stored)
            self._record(stored, removed=False)
        else:
            self._policy.remove(stored)
            self._room.take_back(stored)

    def _end_stores(
        self, keys: Sequence[Key], slots: Sequence[int] | None
    ) -> tuple[Sequence[Key], list[int]]:
        """Those of the keys whose chunks the pool still has, and the blocks that each was to write.

        The others' chunks were dropped by a reset: their slots are free from now on.
        """
        if len(set(keys)) != len(keys):
            raise _named_twice(keys)
        older = self._orphans or None
        live = older.without(keys, Direction.STORE, slots) if older else keys
        storing = self._storing
        if not all(map(storing.__contains__, live)):
            wrong = next(key for key in live if key not in storing)
            raise ValueError(f"keys: expected keys that are being stored, got {wrong!r}")
        if older:
            self._room.free_pinned(older.complete(keys, Direction.STORE, slots))
        return live, list(map(storing.pop, live))

    def _end_parts(
        self, keys: Sequence[Key], written: Sequence[int]
    ) -> tuple[Sequence[Key], Sequence[Key]]:
        """Stores have ended that failed, or wrote some blocks only: add what was `written` (a mask
        per key, none of a failure) to what can be loaded.

        Returns the chunks that were stored for the first time, and the extended ones that are idle.
        """
        partial = self._partial
        stored = [key for key in keys if key not in partial]
        idle = [key for key in keys if key in partial and key not in self._loading]
        for key, mask in zip(keys, written, strict=False):
            partial[key] = mask | partial.get(key, 0)
            if partial[key] == self._every_block:
                del partial[key]
        return stored, idle

    def prepare_load(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None
    ) -> CPULoadStoreSpec:
        if blocks is None:
            blocks = [self._every_block] * len(keys)
        else:
            blocks = check_masks(blocks, len(keys), self._every_block)
        if (length := self._lookup(keys, blocks)) < len(keys):
            raise self._refusal(keys[length], blocks[length])
        storing, loading, idle = self._storing, self._loading, []
        for key in keys:
            num_loads = loading.get(key, 0)
            if not num_loads and key not in storing:
                idle.append(key)
            loading[key] = num_loads + 1
        self._room.pin(idle)
        return CPULoadStoreSpec([self._slot_of[key] for key in keys])

    def complete_load(self, keys: Sequence[Key], *, slots: Sequence[int] | None = None) -> None:
        older = self._orphans or None
        live = older.without(keys, Direction.LOAD, slots) if older else keys
        loading, storing = self._loading, self._storing
        idle: list[Key] = []
        for i, key in enumerate(live):
            num_loads = loading.pop(key, 0)
            if num_loads > 1:
                loading[key] = num_loads - 1
            elif num_loads == 0:
                for taken in live[:i]:
                    loading[taken] = loading.get(taken, 0) + 1
                raise ValueError(f"keys: expected keys that are being loaded, got {key!r}")
            elif key not in storing:
                idle.append(key)
        if older:
            self._room.free_pinned(older.complete(keys, Direction.LOAD, slots))
        self._policy.release(idle)
        self._room.unpin(idle)

    def drop(self, keys: Sequence[Key], *, slots: Sequence[int]) -> None:
        """Evict those of the keys that lie in these slots still, and that no transfer uses,
        whatever the policy thinks: their bytes are wrong. Raises what an eviction does."""
        pairs = zip(keys, slots, strict=True)
        wrong = {key for key, slot in pairs if self._slot_of.get(key) == slot}
        wrong -= self._storing.keys() | self._loading.keys()
        if not wrong:
            return
        dropped = list(dict.fromkeys(key for key in keys if key in wrong))  # in their order
        self._policy.drop(dropped)
        self._room.free(dropped)
        self._note_evicted(dropped)

    def take_events(self) -> list[OffloadingEvent]:
        events, self._events = self._events or [], None if self._events is None else []
        return events

    def reset(self) -> None:
        dropped = [key for key in self._slot_of if self._loadable(key)]
        busy = self._storing.keys() | self._loading.keys()
        for key in busy:
            num_stores, num_loads = int(key in self._storing), self._loading.get(key, 0)
            self._orphans.add(key, self._slot_of[key], num_stores, num_loads)
        self._room.reset(busy)
        for known in (self._partial, self._storing, self._loading):
            known.clear()
        self._policy.clear()
        self._record(dropped, removed=True)

    def _record(self, keys: Sequence[Key], removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent(tuple(keys), removed))

    def _refusal(self, key: Key, wanted: int) -> Exception:
        if key not in self._slot_of:
            return UnknownKeyError(f"keys: expected keys in the pool, got {key!r}")
        if not (loadable := self._loadable(key)):
            return PendingKeyError(f"keys: expected keys with a completed store, got {key!r}")
        expected = f"written blocks of chunk {key!r} ({positions(loadable)})"
        return UnwrittenBlocksError(f"blocks: expected {expected}, got {positions(wanted)}")

    def _check(self) -> None:
        """Asserts every invariant, in O(num_chunks). For tests."""
        keys = self._slot_of.keys()
        busy = self._storing.keys() | self._loading.keys()
        assert busy <= keys
        assert self._partial.keys() <= keys
        assert all(0 < blocks < self._every_block for blocks in self._partial.values())
        for key, mask in self._storing.items():
            assert 0 < mask <= self._every_block
            assert not mask & self._loadable(key)
        for key, num_loads in self._loading.items():
            assert num_loads > 0
            assert self._loadable(key)
        self._orphans._check()
        self._room._check(busy, self._orphans.slots)

    def _pins(self) -> tuple[Counter[Key], Counter[Key]]:
        """How many loads and stores hold each key, chunks that a reset dropped included."""
        loads = Counter(self._loading) + self._orphans._pins(Direction.LOAD)
        return loads, Counter(self._storing.keys()) + self._orphans._pins(Direction.STORE)


def _named_twice(keys: Sequence[Key]) -> ValueError:
    twice = next(key for key, count in Counter(keys).items() if count > 1)
    return ValueError(f"keys: expected distinct keys, got {twice!r} twice")
