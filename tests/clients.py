"""Clients of one KVOffloader, each a thread of an engine with blocks of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from model_content import Bytes, Span
from model_world import Offer, World

from triton_offload.errors import (
    PendingKeyError,
    PoolFullError,
    TransferFailedError,
    UnknownKeyError,
    UnwrittenBlocksError,
)
from triton_offload.job import OffloadJob
from triton_offload.specs import Direction, TransferStatus
from triton_offload.testing import InjectedError

NOT_THERE = (UnknownKeyError, PendingKeyError, UnwrittenBlocksError)
HOWS = ("wait", "timeout", "poll", "released", "wait_on")


class Arguments:
    """What an engine gives in call after call: one block table and one list of keys, written anew
    for each. When a call returns they are overwritten, for they are the caller's again."""

    KINDS = ("array", "tensor", "int32", "list")
    NOBODYS = (10**9, -1, 1 << 62)  # ids of no block: who reads one crashes, or fails its job

    def __init__(self, rng: random.Random, num_blocks: int) -> None:
        self._rng = rng
        self._num_blocks = num_blocks
        # An array may be shared by mistake, so may a tensor; the others only test the kind.
        self.kind = rng.choices(self.KINDS, (6, 2, 1, 1))[0]
        self._ids = np.zeros(num_blocks, dtype=np.int32 if self.kind == "int32" else np.int64)
        self._tensor = torch.from_numpy(self._ids)
        self._list: list[int] = []
        self._keys: list[bytes] = []

    @contextmanager
    def given(
        self, keys: Sequence[bytes], blocks: Sequence[int] = ()
    ) -> Iterator[tuple[list[bytes], Any]]:
        """The keys and ids to call with."""
        count = len(blocks)
        self._keys[:], self._list[:] = keys, blocks
        self._ids[:count] = blocks
        ids: Any = self._ids[:count]
        if self.kind in ("list", "tensor"):
            ids = self._list if self.kind == "list" else self._tensor[:count]
        try:
            yield self._keys, ids
        finally:
            self._spoil(count)

    def _spoil(self, count: int) -> None:
        rng = self._rng
        if rng.random() < 0.2:
            others = [rng.choice(self.NOBODYS)] * count
        else:
            others = [rng.randrange(self._num_blocks) for _ in range(count)]
        self._list[:] = others
        self._ids[:count] = np.array(others, dtype=np.int64).astype(self._ids.dtype)
        self._keys[:] = [b"nobody's"] * rng.randrange(len(self._keys) + 2)


@dataclass(slots=True, eq=False)
class Flight:
    """A job whose end this client has not seen. `blocks`: those that are still the job's."""

    job: OffloadJob
    span: Span
    blocks: list[int]
    submitted: int
    alone: list[bool]  # by chunk: no other store of it was under way
    before: list[Bytes] = field(default_factory=list)
    compared: bool = False  # a load's pages were right
    taken_back: bool = False  # `cancel` said yes
    offered: list[Offer] = field(default_factory=list)  # by chunk, before this store


class Client:
    """Stores, loads and takes back at random. Each call is one step; jobs stay in flight.

    What a job holds is not touched before the rules allow, and then at once: stored blocks are
    poisoned, loaded ones compared.
    """

    MOST_FLIGHTS = 8

    def __init__(self, world: World, blocks: Sequence[int], rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.flights: list[Flight] = []
        self.arguments = Arguments(rng, world.num_blocks)
        self._free = list(blocks)
        self._all = frozenset(blocks)

    # -- one call each --

    def store(self, span: Span) -> None:
        """Compute a span's pages and store them."""
        blocks = self._take(span.count)
        if blocks:
            self.world.pages.fill(span, blocks)
            self._store(span, blocks)

    def load(self, span: Span, *, expedited: bool = False, blindly: bool = False) -> None:
        """Load what is there of a span; `blindly`: all of it, there or not."""
        world = self.world
        found = span.count
        if not blindly:
            size = world.setting.blocks_per_chunk
            found = min(span.count, world.lookup(span) * size - span.first % size)
        there = Span(span.group, span.request, span.first, found)
        blocks = self._take(found) if found > 0 else []
        if not blocks:
            return
        world.pages.poison(blocks)  # what the load leaves out is seen
        try:
            with self.arguments.given(world.content.keys(there), blocks) as (keys, ids):
                job = world.offloader.load(
                    keys, ids, first_block=there.first, group=there.group, expedited=expedited
                )
        except (*NOT_THERE, InjectedError, RuntimeError) as error:
            self._free += blocks
            self._refused(error, there, may_miss=blindly or not world.exact)
            if world.exact and isinstance(error, UnknownKeyError):
                assert world.lookup(there) < len(world.content.keys(there))
            return
        before = world.pages.expect(there, blocks)
        self._fly(Flight(job, there, blocks, world.known.now, [], before))

    def settle(self, flight: Flight, how: str) -> None:
        """Learn of a job's end, or of its pages' release, in one of the ways that there are."""
        job, world = flight.job, self.world
        if how == "timeout" and not self._ends(flight, 0):
            return
        if how == "wait":
            self._ends(flight, None)
        if how == "released":
            if job.source_released:
                self._released(flight, on_host=True)
            return
        if how == "wait_on" and world.exact:
            job.wait_on(world.device.compute_stream)
            self._released(flight, on_host=False)
            return
        if job.done:
            self._end(flight)

    def cancel(self, flight: Flight) -> None:
        """All of a job or none of it: what is answered shows at its end."""
        self.world.num_cancels += 1
        if self.world.offloader.cancel(flight.job):
            flight.taken_back = True
        flight.job.done  # noqa: B018  # a question that may take results in
        if flight.taken_back and flight.job.done:
            assert flight.job.result.status is TransferStatus.CANCELLED

    def touch(self, span: Span) -> None:
        with self.arguments.given(self.world.content.keys(span)) as (keys, _):
            self.world.offloader.touch(keys, group=span.group)

    def reset(self) -> None:
        self.world.offloader.reset()
        self.world.take_events()
        self.world.known.forget()
        if self.world.exact:
            assert self.world.offloader.lookup([b"0.0"]) == 0

    def look(self) -> None:
        """Ask what changes nothing."""
        stats = self.world.offloader.stats()
        assert 0 <= stats.num_pinned <= stats.num_used <= stats.num_chunks
        assert stats.used_bytes + stats.wasted_bytes <= stats.host_bytes
        self.world.take_events()
        self.world.collect()

    def store_around(self, group: int, request: int, chunk: int) -> None:
        """A chunk of which a middle block is stored already: what it lacks are two runs."""
        size = self.world.setting.blocks_per_chunk
        if size > 2:
            self.store(Span(group, request, chunk * size + 1, 1))
            for flight in self.flights[-1:]:
                self.settle(flight, "wait")
            self.store(Span(group, request, chunk * size, size))

    # -- several --

    def step(self) -> None:
        """One random call, which is refused where the offloader is closed meanwhile."""
        try:
            self._step()
        except RuntimeError as error:
            if not self.world.closing or "closed" not in str(error):
                raise

    def drain(self) -> None:
        """See every job's end."""
        while self.flights:  # what was loaded may be stored
            self.settle(self.flights[0], "wait")
        assert frozenset(self._free) == self._all
        assert len(self._free) == len(self._all), "a block was freed twice"

    # -- inside --

    def _step(self) -> None:
        rng, flights = self.rng, self.flights
        draw = rng.random()
        if flights and (draw < 0.35 or len(flights) >= self.MOST_FLIGHTS):
            self.settle(rng.choice(flights), rng.choice(HOWS))
        elif draw < 0.57:
            self.store(self.draw_known() if rng.random() < 0.3 else self.draw_span())
        elif draw < 0.6:
            span = self.draw_span()
            size = self.world.setting.blocks_per_chunk
            self.store_around(span.group, span.request, span.first // size)
        elif draw < 0.85:
            self.load(self.draw_known(), expedited=rng.random() < 0.5, blindly=rng.random() < 0.1)
        elif draw < 0.9 and flights:
            self.cancel(rng.choice(flights))
        elif draw < 0.99:
            self.look()
            self.touch(self.draw_span())
        else:
            self.reset()

    def draw_span(self) -> Span:
        setting, rng = self.world.setting, self.rng
        most = setting.chunks_per_request * setting.blocks_per_chunk
        first = rng.randrange(most)
        count = rng.randint(1, min(most - first, 4 * setting.blocks_per_chunk))
        return Span(
            rng.randrange(len(setting.groups)), rng.randrange(setting.num_requests), first, count
        )

    def draw_known(self) -> Span:
        """Often one that was stored lately, or a part of it."""
        recent, rng = self.world.recent, self.rng
        if not recent or rng.random() < 0.2:
            return self.draw_span()
        span = rng.choice(recent)
        if rng.random() < 0.5:
            return span
        first = rng.randrange(span.count)
        count = rng.randint(1, span.count - first)
        return Span(span.group, span.request, span.first + first, count)

    def _store(self, span: Span, blocks: list[int]) -> None:
        world = self.world
        names = world.content.known_as(span)
        try:
            with self.arguments.given(world.content.keys(span), blocks) as (keys, ids):
                job = world.offloader.store(keys, ids, first_block=span.first, group=span.group)
        except (InjectedError, RuntimeError) as error:
            self._free += blocks
            self._refused(error, span, may_miss=False)
            return
        world.take_events()
        # A store of a key that another job is storing waits for that job, and adds nothing to it.
        alone = [world.storing[name] == 0 for name in names]
        offered = world.known.offers(names) if world.exact else []
        since = world.known.submitted(names, world.content.masks(span)) if world.exact else 0
        world.storing.update(names)
        world.recent.append(span)
        self._fly(Flight(job, span, blocks, since, alone, offered=offered))

    def _fly(self, flight: Flight) -> None:
        self.world.accepted(flight.job.job_id)
        self.world.take_events()
        self.flights.append(flight)

    def _refused(self, error: Exception, span: Span, *, may_miss: bool) -> None:
        world = self.world
        if isinstance(error, PoolFullError):
            if world.exact:
                pinned = world.offloader._manager.num_pinned
                # Each may keep a slab; in that there is room for its own size alone.
                slabs = world.offloader._pool.slabs
                per_slab = world.offloader.num_chunks_of(span.group) // slabs.num_slabs
                needed = len(world.content.keys(span))
                assert needed > (slabs.num_slabs - pinned) * per_slab
        elif isinstance(error, NOT_THERE):
            assert may_miss, error
        elif isinstance(error, InjectedError):
            assert world.faulty
        else:
            assert world.closing, error
            assert "closed" in str(error) or "shut down" in str(error)
        if not world.closing:
            world.take_events()

    def _ends(self, flight: Flight, timeout: float | None) -> bool:
        try:
            flight.job.wait(timeout)
        except TimeoutError:
            assert timeout is not None
            return False
        except TransferFailedError:
            pass  # `_end` looks at the result
        return True

    def _released(self, flight: Flight, *, on_host: bool) -> None:
        """The pages are the engine's again: it uses them at once."""
        world, blocks = self.world, flight.blocks
        if flight.job.direction is Direction.STORE:
            flight.blocks = []
            if blocks:
                world.pages.poison(blocks)
            self._free += blocks
        elif not world.faulty and not flight.compared:
            result = flight.job.result
            if result is None or result.success:
                world.pages.read(blocks, on_host=on_host)
                flight.compared = True

    def _end(self, flight: Flight) -> None:
        world, result = self.world, flight.job.result
        assert result is not None
        self.flights.remove(flight)
        world.take_events()
        if result.status is TransferStatus.FAILED:
            # A job that waits for another one's store of a chunk fails when that is taken back.
            follows = "was cancelled" in str(result.error)
            if world.exact:
                follows = follows and not all(flight.alone)
            assert world.faulty or follows or world.closing, result.error
            world.num_failed += 1
        elif result.status is TransferStatus.CANCELLED:
            assert flight.taken_back or world.closing
        if flight.taken_back:
            assert result.status is TransferStatus.CANCELLED
        if flight.job.direction is Direction.STORE:
            names = world.content.known_as(flight.span)
            world.storing.subtract(names)
            if flight.taken_back and world.exact:
                world.known.taken_back(names, flight.offered)
            if result.success and world.exact:
                chunks = zip(names, world.content.masks(flight.span), flight.alone, strict=True)
                sure = [(name, mask) for name, mask, alone in chunks if alone]
                world.known.stored(
                    [name for name, _ in sure], [mask for _, mask in sure], flight.submitted
                )
            self._free += flight.blocks
            return
        if result.success:
            world.num_loaded += 1
            if world.exact and self.rng.random() < 0.3:
                world.pages.read(flight.blocks, on_host=False)
            else:
                world.pages.read(flight.blocks, on_host=True)
            if self.rng.random() < 0.3 and not world.closing:  # what was loaded may be stored
                self._store(flight.span, flight.blocks)
                return
        elif result.status is TransferStatus.CANCELLED:
            assert not flight.compared
            world.pages.restore(flight.blocks, flight.before)
            world.pages.read(flight.blocks, on_host=False)  # nothing has touched them
        else:
            world.pages.poison(flight.blocks)
        self._free += flight.blocks

    def _take(self, count: int) -> list[int]:
        """Blocks in no order, or none where there are too few."""
        if count > len(self._free):
            return []
        taken = self.rng.sample(self._free, count)
        self._free = [block for block in self._free if block not in taken]
        return taken
