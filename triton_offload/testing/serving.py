"""What a serving engine does with its pages, at random: the hazards that transfers must survive."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_offload.specs import (
    CPULoadStoreSpec,
    Direction,
    GPULoadStoreSpec,
    Ids,
    TransferStatus,
)
from triton_offload.testing.engine import EngineMemory
from triton_offload.transfer.queue_manager import OffloadingQueueManager

Flags = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Request:
    """Blocks of one group that hold a request's tokens. `loading`: not to be read yet."""

    group: int
    blocks: list[int]
    loading: Transfer | None = None


@dataclass(slots=True, eq=False)
class Transfer:
    """A job that was not reported yet. `blocks`: those that it has not released."""

    job_id: int
    lane: str
    blocks: frozenset[int]
    slots: frozenset[int]
    cancelled: bool = False


class ServingEngine:
    """Drives a queue manager as an engine does, one random step at a time.

    Blocks are handed to the next request as soon as the rules allow: at once after a request ends
    where the compute stream was told to wait for the transfers of its pages, else when these have
    released them. Slots are handed out anew while older transfers of them still run, as after a
    reset. `num_jobs` counts jobs by lane, `num_ids` the ids that they brought, `num_crossings` jobs
    that were submitted while one of the other direction ran.
    """

    def __init__(
        self,
        memory: EngineMemory,
        queue: OffloadingQueueManager,
        rng: random.Random,
        lanes: Sequence[str] = ("store", "load", "expedited"),
    ) -> None:
        self.memory = memory
        self.queue = queue
        self.num_jobs = dict.fromkeys(lanes, 0)
        self.num_ids = dict(self.num_jobs)
        self.num_crossings = 0
        self.last_options: dict[str, Any] = {}  # of the job submitted last
        self._rng = rng
        shape = memory.shape
        self._span = shape.blocks_per_chunk
        self._num_groups = len(memory.layout.groups)
        self._free = list(range(shape.num_blocks))
        self._ended: set[int] = set()  # blocks of requests that ended, under transfer still
        self._requests: list[Request] = []
        self._transfers: dict[int, Transfer] = {}
        self._stored: dict[int, int] = {}  # the group whose chunk a slot holds
        self._last_of_lane = dict.fromkeys(self.num_jobs, 0)
        # One block table and so on, written anew for each job.
        self._ids = np.zeros(shape.num_blocks, dtype=np.int64)
        self._slot_ids = np.zeros(shape.num_slots, dtype=np.int64)
        self._fresh = np.zeros(shape.num_slots, dtype=np.bool_)
        self._sizes = [0] * self._num_groups
        self._firsts = [0] * self._num_groups

    # -- steps --

    def step(self) -> None:
        """Do one thing that an engine does; more often than else, move pages by the lane that has
        moved least."""
        draw = self._rng.random()
        if draw < 0.5 and self._stored:
            lane = min(self.num_ids, key=self.num_ids.__getitem__)
            self.offload() if lane == "store" else self.reload(lane)
        elif draw < 0.6 or not (self._requests or self._ended):  # else time must go by
            self.prefill()
        elif draw < 0.7:
            self.decode()
        elif draw < 0.8:
            self.finish()
        elif draw < 0.9:
            self.offload()
        elif draw < 0.95:
            self.collect()
        else:
            self.wait()

    def prefill(self) -> None:
        """A new request: its pages are zeroed, perhaps, and written."""
        blocks = self._take_blocks(self._rng.choice((1, 3, 8, 8 if self._span > 1 else 12)))
        if not blocks:
            return
        group = self._rng.randrange(self._num_groups)
        if self._rng.random() < 0.3:
            self.memory.write(group, blocks, self._rng)
        self.memory.write(group, blocks, self._rng)
        self._requests.append(Request(group, blocks))

    def decode(self) -> None:
        """A request's pages are read, and its last one is written if it may be."""
        if not self._requests:
            return
        request = self._rng.choice(self._requests)
        self._await_load(request)
        self.memory.read(request.group, request.blocks)
        if self._rng.random() < 0.5:
            last = request.blocks[-1]
            for transfer in self._users([last]):
                self.queue.wait_on(transfer.job_id, self.memory.device.compute_stream)
                transfer.blocks = frozenset()
            self.memory.write(request.group, [last], self._rng)

    def finish(self) -> None:
        """A request ends, or is preempted: its blocks are free, those under transfer later."""
        if not self._requests:
            return
        request = self._requests.pop(self._rng.randrange(len(self._requests)))
        self._await_load(request)
        self._ended.update(request.blocks)
        if self._rng.random() < 0.5:
            for transfer in self._users(request.blocks):
                self.queue.wait_on(transfer.job_id, self.memory.device.compute_stream)
                transfer.blocks = frozenset()
        self._hand_out()

    def offload(self) -> None:
        """Some consecutive blocks of a request are stored; perhaps that is taken back."""
        if not self._requests:
            return
        request = self._rng.choice(self._requests)
        self._await_load(request)
        begin = int(len(request.blocks) * self._rng.random() ** 4)
        count = len(request.blocks) - begin
        if self._rng.random() < 0.4:
            count = self._rng.randint(1, count)
        blocks = np.array(request.blocks[begin : begin + count], dtype=np.int64)
        first = begin % self._span
        slots = self._pick_slots(request.group, -(-(first + count) // self._span))
        fresh = np.array([self._rng.random() < 0.7 for _ in slots])
        before = self.memory.snapshot_slots(request.group, slots)
        self.memory.model_store(request.group, blocks, slots, first, fresh)
        transfer = self._submit("store", request.group, blocks, slots, first, fresh)
        if self._taken_back(transfer):
            self.memory.restore_slots(request.group, slots, before)
        else:
            self._forget_across(request.group, slots)
            self._stored.update(dict.fromkeys(slots.tolist(), request.group))

    def reload(self, lane: str) -> None:
        """Stored chunks, or such as are just being stored, are loaded for a new request."""
        if not self._stored:
            return
        group = self._stored[self._rng.choice(list(self._stored))]
        held = [slot for slot, holder in self._stored.items() if holder == group]
        count = self._rng.choice((1, 2, 3, 4, 4, 8 // self._span))
        chunks = self._rng.sample(held, min(len(held), count))
        first = self._rng.randrange(self._span)
        most = len(chunks) * self._span - first
        least = most - self._span + 1
        taken = self._take_blocks(self._rng.randint(max(1, least), most), exactly=True)
        if not taken:
            return
        blocks, slots = np.array(taken, dtype=np.int64), np.array(chunks, dtype=np.int64)
        if self._rng.random() < 0.3:  # zeroed by the engine, before the load by the order it asked
            self.memory.write(group, taken, self._rng)
        before = self.memory.snapshot(group, blocks)
        self.memory.model_load(group, blocks, slots, first)
        transfer = self._submit(lane, group, blocks, slots, first, None)
        if self._taken_back(transfer):
            self.memory.restore(group, blocks, before)
            self._ended.update(taken)
        else:
            self._requests.append(Request(group, taken, transfer))

    def collect(self) -> None:
        """Results are got: every job once, those of a lane in order."""
        for result in self.queue.get_finished():
            assert result.job_id in self._transfers, f"reported twice: {result}"
            transfer = self._transfers.pop(result.job_id)
            expected = TransferStatus.CANCELLED if transfer.cancelled else TransferStatus.SUCCESS
            assert result.status is expected, (result, transfer)
            assert result.job_id > self._last_of_lane[transfer.lane], "jobs of a lane out of order"
            self._last_of_lane[transfer.lane] = result.job_id
        self._hand_out()

    def wait(self) -> None:
        """The host waits for some jobs, in no order, and looks at what they brought."""
        if not self._transfers:
            return
        count = self._rng.choice((1, 1, 2, 3))
        everyone = list(self._transfers.values())
        awaited = self._rng.sample(everyone, min(len(everyone), count))
        self.queue.wait([transfer.job_id for transfer in awaited])
        others = [t for t in everyone if t not in awaited]
        slabs_of = self.memory.slabs_of
        busy = slabs_of(slot for other in others for slot in other.slots)
        mine = [slot for transfer in awaited for slot in transfer.slots]
        self.memory.host_reads([slot for slot in mine if not slabs_of([slot]) & busy])
        self.collect()
        late = [t.job_id for t in awaited if t.job_id in self._transfers]
        assert not late, f"jobs {late} were waited for, and are not reported"

    def settle(self) -> None:
        """Wait for everything."""
        self.queue.wait(list(self._transfers))
        self.collect()
        assert not self._transfers, f"never reported: {list(self._transfers)}"

    # -- inside --

    def _submit(
        self, lane: str, group: int, blocks: Ids, slots: Ids, first: int, fresh: Flags | None
    ) -> Transfer:
        ids, slot_ids = self._ids[: len(blocks)], self._slot_ids[: len(slots)]
        ids[:], slot_ids[:] = blocks, slots
        self._sizes[:] = [len(blocks) if g == group else 0 for g in range(self._num_groups)]
        self._firsts[:] = [first] * self._num_groups
        device_spec = GPULoadStoreSpec(ids, self._sizes, self._firsts)
        blocked = self._times_blocked()
        self.last_options = self._load_options() if fresh is None else {}
        if fresh is not None:
            self._fresh[: len(slots)] = fresh
            host_spec = CPULoadStoreSpec(slot_ids, self._fresh[: len(slots)])
            job_id = self.queue.transfer_async(device_spec, host_spec)
        else:
            job_id = self.queue.transfer_async(
                CPULoadStoreSpec(slot_ids),
                device_spec,
                expedited=lane == "expedited",
                **self.last_options,
            )
        self._spoil()
        if self.memory.pool.pinned:  # CUDA's copies of pageable memory block
            assert self._times_blocked() == blocked, "a submission blocked the host"
        direction = Direction.STORE if lane == "store" else Direction.LOAD
        self.num_crossings += any(
            (other.lane == "store") != (direction is Direction.STORE)
            for other in self._transfers.values()
        )
        self.num_jobs[lane] += 1
        self.num_ids[lane] += len(blocks) + len(slots)
        transfer = Transfer(job_id, lane, frozenset(blocks.tolist()), frozenset(slots.tolist()))
        self._transfers[job_id] = transfer
        return transfer

    def _load_options(self) -> dict[str, Any]:
        """What else the next load is to be given."""
        return {}

    def _spoil(self) -> None:
        """What a call was given is the engine's again when it returns: it writes other ids there,
        of blocks that there are or not."""
        far = self._rng.choice((1, 1, 10**9))
        self._ids[:] = np.roll(self._ids, 1) * far
        self._slot_ids[:] = np.roll(self._slot_ids, 1) * far
        np.logical_not(self._fresh, out=self._fresh)
        self._sizes[:] = self._firsts[:] = [far] * self._num_groups

    def _times_blocked(self) -> int:
        """How often the host has waited for the device, by a full queue or on its own account."""
        device = self.memory.device
        return device.num_blocked + sum(device.calls.get(c, 0) for c in ("synchronize", "sleep"))

    def _taken_back(self, transfer: Transfer) -> bool:
        if self._rng.random() < 0.15:
            transfer.cancelled = bool(self.queue.cancel([transfer.job_id]))
        return transfer.cancelled

    def _await_load(self, request: Request) -> None:
        """Let the compute stream follow the load that brings the request's pages."""
        if request.loading is not None:
            self.queue.wait_on(request.loading.job_id, self.memory.device.compute_stream)
            request.loading.blocks = frozenset()
            request.loading = None

    def _users(self, blocks: list[int]) -> list[Transfer]:
        return [t for t in self._transfers.values() if not t.blocks.isdisjoint(blocks)]

    def _hand_out(self) -> None:
        """Blocks of ended requests that no transfer holds any more are free."""
        for transfer in self._transfers.values():
            if not transfer.blocks.isdisjoint(self._ended):
                if not self.queue.source_released(transfer.job_id):
                    continue
                transfer.blocks = frozenset()
        held = frozenset().union(*(transfer.blocks for transfer in self._transfers.values()))
        free = self._ended - held
        self._free.extend(sorted(free))
        self._ended -= free

    def _take_blocks(self, count: int, *, exactly: bool = False) -> list[int]:
        self._hand_out()
        while len(self._free) < count and self._requests:
            self.finish()
        if exactly and len(self._free) < count:
            return []
        count = min(count, len(self._free))
        # The last one freed goes first, as engines do, or any.
        if self._rng.random() < 0.5:
            taken = self._free[len(self._free) - count :]
        else:
            taken = self._rng.sample(self._free, count)
        self._free = [block for block in self._free if block not in taken]
        return taken

    def _pick_slots(self, group: int, count: int) -> Ids:
        slots = self.memory.slots_for(group)
        if self._rng.random() < 0.5:
            start = slots[self._rng.randrange(len(slots) - count + 1)]
            return np.arange(start, start + count)
        return np.array(self._rng.sample(slots, count), dtype=np.int64)

    def _forget_across(self, group: int, slots: Ids) -> None:
        """What slots of other sizes hold in these slabs is gone."""
        mine, slabs = self.memory.slots_for(group), self.memory.slabs_of(slots.tolist())
        for slot in list(self._stored):
            if slot not in mine and self.memory.slabs_of([slot]) & slabs:
                del self._stored[slot]
