"""vLLM's manager of a pool whose slots are as large as a chunk's group needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, cast

from vllm.v1.kv_offload.base import get_offload_group_idx
from vllm.v1.kv_offload.cpu.common import CPUOffloadingMetrics
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus

from triton_offload.scheduler.shared_room import SharedRoom
from triton_offload.slabs import Slabs


class GroupSlotManager(CPUOffloadingManager):  # type: ignore[misc]  # vllm is untyped
    """vLLM's CPUOffloadingManager, all of whose chunks lie in `slabs`.

    `size_of_group`: which of the slabs' sizes the chunks of a group have, by vLLM's index of the
    group. `options`: vLLM's, but for the number of chunks. What is looked up, counted, evicted and
    told is vLLM's; its policy names what leaves, until what is to be stored has room: as many bytes
    of one size or another, whichever were used least recently. Ids of chunks are ids of slots.
    """

    _policy: Any

    def __init__(self, slabs: Slabs, size_of_group: Mapping[int, int], **options: Any) -> None:
        super().__init__(num_chunks=slabs.most_chunks, **options)
        self._slabs = slabs
        self._policy = self._slots = GroupSlots(self._policy, slabs, size_of_group)
        self._offered: Sequence[Any] = ()

    def prepare_store(self, keys: Collection[Any], req_context: Any) -> Any:
        self._offered = list(keys)
        return super().prepare_store(self._offered, req_context)

    def get_stats(self) -> Any:
        """vLLM's, whose parts of the pool in use are parts of its bytes."""
        stats = super().get_stats()
        pinned, written = self._slots.pinned_bytes(), self._slots.written_bytes()
        for name, num_bytes in (
            (CPUOffloadingMetrics.CPU_CACHE_USAGE_PERC, pinned),
            (CPUOffloadingMetrics.CPU_CACHE_WRITE_USAGE_PERC, written),
            (CPUOffloadingMetrics.CPU_CACHE_READ_USAGE_PERC, pinned - written),
        ):
            stats.set_gauge(name, num_bytes / self._slabs.num_bytes)
        return stats

    # -- what vLLM's `prepare_store` asks of its pool, and `complete_store` of one that failed --

    def _get_num_free_chunks(self) -> int:
        """Free slots, as vLLM counts: as many as it wants of them, or one less where something has
        to leave first. How much, `evict` finds."""
        wanted = [key for key in self._offered if self._is_wanted(key)]
        return len(wanted) - (not self._slots.want(wanted))

    def _is_wanted(self, key: Any) -> bool:
        """Whether vLLM is about to store it, of what was offered."""
        if self._policy.get(key) is not None:
            return False
        return self.counts is None or self.counts.get(key, 0) >= self.store_threshold

    def _allocate_chunks(self, keys: list[Any]) -> list[Any]:
        return [ChunkStatus(slot) for slot in self._slots.place(keys)]

    def _free_chunk(self, chunk: Any) -> None:
        """Its slot was free when its key left."""


class GroupSlots:
    """A CachePolicy of vLLM's, `policy`, and the slots of the chunks that it orders.

    Every chunk that comes, goes, is pinned or is used is told to the policy: so nothing else needs
    to be told of slots.
    """

    def __init__(self, policy: Any, slabs: Slabs, size_of_group: Mapping[int, int]) -> None:
        self._policy = policy
        #: vLLM's, of a key: asked several times for each chunk
        self.get: Callable[[Any], Any] = policy.get
        self._slabs = slabs
        self._size_of_group = size_of_group
        self._evictor = _Evictor(policy)
        self._room = self._new_room()
        self._wanted: Mapping[int, int] = {}
        self._writing: set[Any] = set()  # stores under way
        self._context: tuple[Any, ...] = ()  # what vLLM since 0.33 says beside an insertion

    # -- slots --

    def want(self, keys: Iterable[Any]) -> bool:
        """These are to be stored: whether there is room, without `evict`."""
        self._wanted = Counter(map(self._size_of, keys))
        return self._room.has_room(self._wanted)

    def place(self, keys: Sequence[Any]) -> list[int]:
        """A slot for each chunk, pinned until it is there or has failed."""
        by_size: dict[int, list[Any]] = {}
        for key in keys:
            by_size.setdefault(self._size_of(key), []).append(key)
        for size, group in by_size.items():
            self._room.place(group, size)
        self._writing.update(keys)
        return [self._room.slot_of[key] for key in keys]

    def pinned_bytes(self) -> int:
        """Bytes of chunks that transfers read or write."""
        pinned = self._room.pinned_by_size()
        return sum(n * cut.num_bytes for n, cut in zip(pinned, self._slabs.sizes, strict=True))

    def written_bytes(self) -> int:
        """Bytes of those that stores write."""
        return sum(self._slabs.sizes[self._size_of(key)].num_bytes for key in self._writing)

    # -- the policy --

    def insert(self, key: Any, chunk: Any, *context: Any) -> None:
        self._context = context
        self._policy.insert(key, chunk, *context)

    def remove(self, key: Any) -> None:
        """Of a chunk whose store failed, or that was pinned for it."""
        self._policy.remove(key)
        self._writing.discard(key)
        self._room.take_back([key])

    def touch(self, keys: Iterable[Any], context: Any) -> None:
        keys = list(keys)
        self._use(keys)
        self._policy.touch(keys, context)

    def on_store_miss(self, keys: Iterable[Any], context: Any) -> None:
        self._policy.on_store_miss(keys, context)

    def on_request_access(self, keys: Iterable[Any], context: Any) -> None:
        """Since vLLM 0.33."""
        keys = list(keys)
        self._use(keys)
        self._policy.on_request_access(keys, context)

    def on_request_finished(
        self, groups: Sequence[Sequence[Any]], inserted: set[Any], reused: set[Any], context: Any
    ) -> None:
        for keys in groups:
            self._use(keys)
        self._policy.on_request_finished(groups, inserted, reused, context)

    def mark_evictable(self, key: Any) -> None:
        self._writing.discard(key)
        self._room.unpin([key])
        self._policy.mark_evictable(key)

    def mark_non_evictable(self, key: Any) -> None:
        self._room.pin([key])
        self._policy.mark_non_evictable(key)

    def evict(self, n: int, protected: set[Any]) -> list[tuple[Any, Any]] | None:
        """What leaves for the chunks of the last `want`; `n` is not looked at.

        None where there is no such room, and all chunks stay.
        """
        idle = [key for key in protected if self._is_idle(key)]
        try:
            evicted = self._room.make_several(self._wanted, protected, idle)
        except _NothingLeftError:
            # The policy keeps to itself what it could let go. What it had named comes back.
            for key, chunk in self._evictor.take().items():
                self._policy.insert(key, chunk, *self._context)
            return None
        chunks = self._evictor.take()
        return None if evicted is None else [(key, chunks[key]) for key in evicted]

    def clear(self) -> None:
        """All chunks are gone, those that transfers use too, as vLLM has it: a job waits for those
        before it on its slots, whatever their size."""
        self._policy.clear()
        self._writing.clear()
        self._room = self._new_room()

    def _new_room(self) -> SharedRoom:
        room = SharedRoom(self._slabs, "lru")
        room.policy = cast(Any, self._evictor)  # which is all that it asks of one
        return room

    def _size_of(self, key: Any) -> int:
        return self._size_of_group[get_offload_group_idx(key)]

    def _is_idle(self, key: Any) -> bool:
        chunk = self.get(key)
        return chunk is not None and chunk.ref_cnt == 0

    def _use(self, keys: Iterable[Any]) -> None:
        self._room.use(key for key in keys if key in self._room.slot_of)

    def _check(self) -> None:
        """Asserts that slots, pins and chunks belong together. For tests."""
        pinned = set()
        for key, slot in self._room.slot_of.items():
            chunk = self._policy.get(key)
            assert chunk.chunk_id == slot
            assert (chunk.ref_cnt < 0) == (key in self._writing)
            if chunk.ref_cnt:
                pinned.add(key)
        assert self._writing <= pinned
        self._room._check(pinned, frozenset())


class _NothingLeftError(Exception):
    """The policy names no more, though there are idle chunks."""


class _Evictor:
    """What a room asks of a policy, by vLLM's `policy`: the chunks that it let go are kept here
    until they are taken."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self._chunks: dict[Any, Any] = {}

    def evict(
        self, count: int, protected: AbstractSet[Any], busy: Sequence[AbstractSet[Any]]
    ) -> list[Any]:
        named = self._policy.evict(count, protected)
        if named is None:
            raise _NothingLeftError
        self._chunks.update(named)
        return [key for key, _ in named]

    def drop(self, keys: Iterable[Any]) -> None:
        for key in keys:
            self._chunks[key] = self._policy.get(key)
            self._policy.mark_non_evictable(key)
            self._policy.remove(key)

    def take(self) -> dict[Any, Any]:
        """The chunks by their keys."""
        chunks, self._chunks = self._chunks, {}
        return chunks

    def _check(self, keys: Collection[Any], busy: AbstractSet[Any]) -> None:
        """The policy's own chunks are looked at by whoever knows it."""
        assert not self._chunks
