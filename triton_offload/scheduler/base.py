"""What an offloading manager is asked and answers: the scheduler side's interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from triton_offload.scheduler.order import Key
from triton_offload.specs import CPULoadStoreSpec


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
    them again after it; it may fail). Offered keys in neither list are held already. `all_new`: no
    offered key was known, so that every block that was offered is to be stored, in fresh slots.
    """

    keys_to_store: tuple[Key, ...]
    store_spec: CPULoadStoreSpec
    evicted_keys: tuple[Key, ...]
    blocks: tuple[int, ...]
    pending_keys: tuple[Key, ...]
    all_new: bool


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
        """Counts one use of each key, and gives them their place in the order of eviction: the
        last of them leaves first. Keys whose first store is under way get the place without the
        use. Keys that the pool doesn't hold are ignored.
        """

    @abstractmethod
    def prepare_store(
        self, keys: Sequence[Key], blocks: Sequence[int] | None = None
    ) -> PrepareStoreOutput | None:
        """Reserves slots for those of `keys` that need a store; None, if there's no room.

        What is to be stored is not evicted until `complete_store`, nor loadable when it is new.
        No key of this call is evicted for it. All of them get their place in the order of eviction
        now, as one prefix; only `touch` counts a use of those that are known. Raises ValueError on
        duplicate keys or bad masks.
        """

    @abstractmethod
    def complete_store(
        self, keys: Sequence[Key], success: bool = True, *, slots: Sequence[int] | None = None
    ) -> None:
        """Ends the stores of `keys`; a failed one leaves nothing behind that could be loaded.

        `slots`: that of each key, as the store was prepared. A reset may lie between two stores of
        a key that are both under way: they tell which one ends. None: the older one.

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
    def complete_load(self, keys: Sequence[Key], *, slots: Sequence[int] | None = None) -> None:
        """Takes back one pin of each key; `slots` as for stores. Raises ValueError on a key that
        has none."""

    @abstractmethod
    def take_events(self) -> list[OffloadingEvent]:
        """The events since the last call, in order: at most one of each kind per manager call."""

    @abstractmethod
    def reset(self) -> None:
        """Drops every key at once. Transfers that are under way are completed as usual later."""
