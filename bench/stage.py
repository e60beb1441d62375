"""One world and one contender at a time, built when a measurement first asks for them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from contenders import BatchedCopy, Contender, CopyPerPage, IndexSelect, Ours, PlainCopy
from peers import VLLMWorker
from results import ONE_COPY, PATHS
from results import OURS as ALL_OURS
from sizes import HAS_GPU, SIZES
from timing import DEVICE, note, rounds_for, seconds, synchronize
from world import World

from triton_offload.specs import Direction

#: what this package is measured as; on the host device the rule is always zero copy
OURS = ALL_OURS if HAS_GPU else PATHS
PEERS = ("index_select", "copy per page", "batched copy", "batched copy, overlap", "vLLM")

_BUILD: dict[str, Callable[[World], Contender]] = {
    "index_select": IndexSelect,
    "copy per page": CopyPerPage,
    "batched copy": lambda world: BatchedCopy(world, overlap=False),
    "batched copy, overlap": lambda world: BatchedCopy(world, overlap=True),
    "vLLM": VLLMWorker,
    "whole slots": lambda world: PlainCopy(len(world.slot_ids) * world.layout.slot_bytes),
    ONE_COPY: lambda world: PlainCopy(world.num_bytes),
}
_MOVES_NO_PAGES = ("whole slots", ONE_COPY)


class Stage:
    """Keeps what the last measurement used, for the next one that uses the same."""

    def __init__(self) -> None:
        self._cold: torch.Tensor | None = None
        self._world: tuple[object, World, PlainCopy] | None = None
        self._contender: tuple[str, Contender] | None = None

    def world(self, page_bytes: int, pages: int, slots: str) -> tuple[World, PlainCopy]:
        """The world, and one plain copy of as many bytes: the limit."""
        key = page_bytes, pages, slots
        if self._world is None or self._world[0] != key:
            self.clear()
            world = World.build(page_bytes, pages, slots)
            synchronize()
            self._world = key, world, PlainCopy(world.num_bytes, duplex=slots == "duplex")
        return self._world[1], self._world[2]

    def contender(self, name: str) -> Contender:
        """For the world asked for last: built, warmed up and seen to move every byte right."""
        assert self._world is not None
        if self._contender is None or self._contender[0] != name:
            self._drop_contender()
            world = self._world[1]
            contender = _BUILD[name](world) if name in _BUILD else Ours(world, name)
            self._contender = name, contender
            if world.slots != "duplex" and name not in _MOVES_NO_PAGES:
                verify(contender, world)
        return self._contender[1]

    def cold(self) -> None:
        """Push everything out of the caches."""
        if self._cold is None:
            self._cold = torch.empty(SIZES.cold_bytes, dtype=torch.uint8, device=DEVICE)
        self._cold.zero_()
        synchronize()

    def clear(self) -> None:
        self._drop_contender()
        self._world = None
        if HAS_GPU:
            torch.cuda.empty_cache()

    def _drop_contender(self) -> None:
        if self._contender is not None:
            self._contender[1].close()
            self._contender = None


def verify(contender: Contender, world: World) -> None:
    """Store, overwrite the pages, load: every byte must be as it was, untouched blocks too."""
    before = [cache.clone() for cache in world.caches]
    synchronize()
    contender.run(Direction.STORE)
    for cache in world.moved:
        cache.index_fill_(0, torch.from_numpy(world.block_ids).to(DEVICE), 0x5A)
    synchronize()
    contender.run(Direction.LOAD)
    for cache, old in zip(world.caches, before, strict=True):
        if not torch.equal(cache, old):
            raise AssertionError("the pages did not come back as they were: no speed is reported")


def measure(
    benchmark: Any,
    stage: Stage,
    kind: str,
    name: str,
    directions: tuple[Direction, ...],
    job: tuple[int, int, str],
    budget: float,
) -> None:
    """Time a contender from submission to the last byte, in turn with the plain copy."""
    world, limit = stage.world(*job)
    contender = stage.contender(name)
    num_bytes = world.num_bytes * len(directions)
    one = seconds(lambda: contender.run(*directions)) + seconds(lambda: limit.run(*directions))
    limits: list[float] = []

    def in_turn() -> None:
        stage.cold()
        limits.append(seconds(lambda: limit.run(*directions)))
        stage.cold()

    contender.device_seconds.clear()
    benchmark.pedantic(
        lambda: contender.run(*directions), setup=in_turn, rounds=rounds_for(one, budget)
    )
    ours, plain = benchmark.stats.stats.median, statistics.median(limits)
    by_events = contender.device_seconds
    note(
        benchmark,
        kind,
        contender=name,
        direction=" and ".join(direction.value for direction in directions),
        page_bytes=job[0],
        pages=len(world.block_ids) * len(world.moved),
        slots=job[2],
        bytes=num_bytes,
        gb_per_s=num_bytes / ours / 1e9,
        limit_gb_per_s=num_bytes / plain / 1e9,
        ratio=plain / ours,
        event_seconds=statistics.median(by_events) if by_events else None,
    )
