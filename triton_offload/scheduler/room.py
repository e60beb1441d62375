"""Which chunk lies in which slot, and which chunks leave where there is no slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence, Set

from triton_offload.scheduler.free_slots import FreeSlots
from triton_offload.scheduler.guarded_policy import make_policy
from triton_offload.scheduler.order import Key
from triton_offload.scheduler.policies import PolicyChoice


class Room(ABC):
    """A pool's slots, and the chunks in them.

    `most_chunks`: how many there is room for, at most. `slot_of`: the slot of every chunk; others
    only read it. `policy`: the order of eviction. `num_pinned`: used slots that can't be given to
    other chunks now: of chunks that transfers read or write, and those that a reset left to their
    transfers.
    """

    def __init__(self, most_chunks: int, policy: PolicyChoice) -> None:
        self.most_chunks = most_chunks
        self.slot_of: dict[Key, int] = {}
        self.policy = make_policy(policy, most_chunks, self.slot_of)
        self.num_pinned = 0

    @property
    def num_used(self) -> int:
        """Slots that aren't free."""
        return sum(self.used_by_size())

    @property
    def wasted_bytes(self) -> int:
        """Bytes that no chunk can take, behind the slots of slabs that are cut."""
        return 0

    @abstractmethod
    def used_by_size(self) -> list[int]:
        """Slots that aren't free, of each size."""

    @abstractmethod
    def use(self, keys: Iterable[Key]) -> None:
        """Chunks are used now."""

    @abstractmethod
    def make(
        self, num_new: int, size: int, kept: Set[Key], num_idle: int, busy: Sequence[Set[Key]]
    ) -> Sequence[Key] | None:
        """Evict what so many new chunks of a size need, but none of `busy`, nor of `kept`, chunks
        of the same size of which `num_idle` could go.

        Returns the evicted; None where there is no such room, and nothing has changed then.
        """

    @abstractmethod
    def free(self, keys: Sequence[Key]) -> None:
        """The policy has let these go, of which none is pinned: their slots are free."""

    @abstractmethod
    def place(self, keys: Sequence[Key], size: int) -> list[int]:
        """A slot for each new chunk, pinned; `make` has seen to it that there is one."""

    @abstractmethod
    def take_back(self, keys: Sequence[Key]) -> None:
        """Forgets what was placed, and is pinned still: these slots are free."""

    @abstractmethod
    def pin(self, keys: Sequence[Key]) -> None:
        """These may not be evicted from now on; each is pinned once at a time."""

    @abstractmethod
    def unpin(self, keys: Sequence[Key]) -> None:
        """Takes that back."""

    @abstractmethod
    def free_pinned(self, slots: Sequence[int]) -> None:
        """Slots that a reset left pinned are free."""

    @abstractmethod
    def reset(self, busy: Set[Key]) -> None:
        """Forgets every chunk; the slots of the busy ones, which are pinned, stay so."""

    @abstractmethod
    def _check(self, busy: Set[Key], orphans: Set[int]) -> None:
        """Asserts that each slot is free, a chunk's or an orphan, once, and the policy's order."""


class RoomOfOneSize(Room):
    """Slots that are all alike. All is O(1) per key."""

    def __init__(self, num_slots: int, policy: PolicyChoice) -> None:
        super().__init__(num_slots, policy)
        self._free = FreeSlots(num_slots)

    def used_by_size(self) -> list[int]:
        return [self.most_chunks - len(self._free)]

    def use(self, keys: Iterable[Key]) -> None:
        pass

    def make(
        self, num_new: int, size: int, kept: Set[Key], num_idle: int, busy: Sequence[Set[Key]]
    ) -> Sequence[Key] | None:
        num_free = len(self._free)
        num_to_evict = num_new - num_free
        if num_to_evict <= 0:
            return ()
        if num_to_evict > self.most_chunks - num_free - self.num_pinned - num_idle:
            return None
        evicted = self.policy.evict(num_to_evict, kept, busy)
        self.free(evicted)
        return evicted

    def free(self, keys: Sequence[Key]) -> None:
        self._free.put(map(self.slot_of.pop, keys))

    def place(self, keys: Sequence[Key], size: int) -> list[int]:
        slots = self._free.take(len(keys))
        self.slot_of.update(zip(keys, slots, strict=True))
        self.num_pinned += len(keys)
        return slots

    def take_back(self, keys: Sequence[Key]) -> None:
        self.num_pinned -= len(keys)
        self._free.put(map(self.slot_of.pop, keys))

    def pin(self, keys: Sequence[Key]) -> None:
        self.num_pinned += len(keys)

    def unpin(self, keys: Sequence[Key]) -> None:
        self.num_pinned -= len(keys)

    def free_pinned(self, slots: Sequence[int]) -> None:
        self.num_pinned -= len(slots)
        self._free.put(slots)

    def reset(self, busy: Set[Key]) -> None:
        if self.num_pinned:
            idle = (slot for key, slot in self.slot_of.items() if key not in busy)
            self._free.put(sorted(idle, reverse=True))
        else:
            self._free.reset()
        self.slot_of.clear()

    def _check(self, busy: Set[Key], orphans: Set[int]) -> None:
        assert self.num_pinned == len(busy) + len(orphans)
        self._free._check(used=[*self.slot_of.values(), *orphans])
        self.policy._check(self.slot_of.keys(), busy)
