"""How a pool is cut: into equal slabs, and each slab into slots of one size.

    pool      | slab 0              | slab 1              |
    size 0    | 0  | 1  | 2  | 3  |.| 4  | 5  | 6  | 7  |.|
    size 1    | 8                   | 9                   |

At any time a slab is cut by one of the sizes, or free. Every slot of every size has an id of its
own; those of one slab are the same bytes. What is left behind the last slot of a slab is lost while
it is cut so.

A slot's place is a row: its first byte, counted in units that divide slab and slot. The slots of
one size are rows of one tensor, whatever lies between them. A pool of one size has slabs of one
slot, and there ids are rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triton_offload.kernels.arguments import IdArray as Ids

# In a slab of so many of the largest slots, what is left behind those of another size (less than
# one of these) is less than 1/64 of it.
_MOST_LARGEST = 64
_ALIGNMENT = 16  # what the kernels' widest accesses ask for


@dataclass(frozen=True, slots=True)
class SlotSize:
    """Slots of `num_bytes` bytes, `per_slab` of them side by side at the head of a slab.

    `first`: the id of the first slot of the first slab. `step`: rows from a slot to the next one;
    `rows_per_slab`: from a slab to the next one.
    """

    num_bytes: int
    per_slab: int
    first: int
    step: int
    rows_per_slab: int

    @classmethod
    def of(cls, num_bytes: int, slab_bytes: int, first: int) -> SlotSize:
        """As many as a slab holds."""
        unit = math.gcd(num_bytes, slab_bytes)
        return cls(num_bytes, slab_bytes // num_bytes, first, num_bytes // unit, slab_bytes // unit)

    @property
    def unit(self) -> int:
        """Bytes of a row."""
        return self.num_bytes // self.step

    def slots(self, slab: int) -> range:
        """The ids of a slab's slots."""
        first = self.first + slab * self.per_slab
        return range(first, first + self.per_slab)

    def rows(self, slot_ids: Ids) -> Ids:
        """Where slots lie; the ids are those of this size."""
        places = slot_ids - self.first if self.first else slot_ids
        if self.rows_per_slab == self.per_slab * self.step:  # nothing is left behind the last slot
            return places * self.step if self.step > 1 else places
        slabs = places // self.per_slab
        return places * self.step + slabs * (self.rows_per_slab - self.per_slab * self.step)


@dataclass(frozen=True, slots=True)
class Slabs:
    """`num_slabs` slabs of `slab_bytes` bytes, each cut by one of `sizes`."""

    slab_bytes: int
    num_slabs: int
    sizes: tuple[SlotSize, ...]

    @classmethod
    def of(cls, slab_bytes: int, num_slabs: int, slot_bytes: Sequence[int]) -> Slabs:
        """Slabs that are cut into as many slots of each size as they hold."""
        sizes: list[SlotSize] = []
        first = 0
        for num_bytes in slot_bytes:
            sizes.append(SlotSize.of(num_bytes, slab_bytes, first))
            first += num_slabs * sizes[-1].per_slab
        return cls(slab_bytes, num_slabs, tuple(sizes))

    @classmethod
    def fit(cls, pool_bytes: int, slot_bytes: Sequence[int]) -> Slabs:
        """The slabs by which the least of a pool is lost to slots of these sizes.

        Lost are: what is behind the slots of a slab, and behind the last slab; and, beside one slab
        that is being filled, one more for each further size. Slots keep the alignment that their
        sizes have. Raises ValueError that names `host_bytes` where the largest does
        not fit.
        """
        largest = max(slot_bytes)
        if pool_bytes < largest:
            raise ValueError(
                f"host_bytes: expected room for at least one chunk of {largest} bytes, "
                f"got {pool_bytes}"
            )
        # Multiples of the largest, and what is just more, so that one more of another size fits.
        ends = {
            -(-count * largest // size) * size
            for count in range(1, _MOST_LARGEST + 1)
            for size in slot_bytes
        }
        alignment = max(math.gcd(size, _ALIGNMENT) for size in slot_bytes)
        fitting = {-(-end // alignment) * alignment for end in ends} | {largest}
        slab_bytes = min(
            (slab for slab in fitting if slab <= pool_bytes),
            key=lambda slab: (_loss(slab, pool_bytes, slot_bytes), slab),
        )
        return cls.of(slab_bytes, pool_bytes // slab_bytes, slot_bytes)

    @property
    def num_bytes(self) -> int:
        return self.num_slabs * self.slab_bytes

    @property
    def num_slots(self) -> int:
        """How many ids there are."""
        return self.num_slabs * sum(size.per_slab for size in self.sizes)

    @property
    def most_chunks(self) -> int:
        """How many chunks there is room for where all are of the smallest size."""
        return self.num_slabs * max(size.per_slab for size in self.sizes)

    def rows(self, size: int, slot_ids: Ids) -> Ids:
        """`SlotSize.rows`, of slots that are checked; raises ValueError for others' slots."""
        cut = self.sizes[size]
        count = self.num_slabs * cut.per_slab
        others = (slot_ids < cut.first) | (slot_ids >= cut.first + count)
        if others.any():
            raise ValueError(
                f"slot_ids: expected slots of {cut.num_bytes} bytes, {cut.first} to "
                f"{cut.first + count - 1}, got {slot_ids[others][0]}"
            )
        return cut.rows(slot_ids)

    def check_apart(self, used: Sequence[tuple[int, Ids]]) -> None:
        """Raises ValueError where slots (those of one size each) lie across others."""
        taken: dict[int, int] = {}  # by slab: the size
        for size, slot_ids in used:
            for slab in np.unique((slot_ids - self.sizes[size].first) // self.sizes[size].per_slab):
                if taken.setdefault(int(slab), size) != size:
                    raise ValueError(
                        f"slot_ids: expected slots of one size in each slab, got two in {slab}"
                    )

    def sizes_of(self, slot_ids: Ids) -> Ids:
        """The size that each slot has, as its index."""
        return np.searchsorted([size.first for size in self.sizes], slot_ids, side="right") - 1


def _loss(slab_bytes: int, pool_bytes: int, slot_bytes: Sequence[int]) -> float:
    """The part of the pool that may not be put to use, at worst."""
    behind_slots = max(slab_bytes % size for size in slot_bytes) / slab_bytes
    begun = (len(slot_bytes) - 1) * slab_bytes
    return behind_slots + (pool_bytes % slab_bytes + begun) / pool_bytes
