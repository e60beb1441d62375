"""The order of functions' jobs on the slots of the pool.

A device orders its own jobs (rule 6 in `transfer.pipeline`), and knows nothing of functions. Here
each slot has a queue: many readers or one writer hold it, and who comes later waits for its turn
in the order of submission. Whoever waits came later than whom it waits for, so none waits in a
circle.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from triton_offload.specs import CPULoadStoreSpec, Ids, LoadStoreSpec


class WaitForDevice(Protocol):
    """Blocks until a device's jobs submitted so far on these slots have ended: those that write
    them, and where `writing` those that read them too."""

    def __call__(self, slot_ids: Ids, *, writing: bool) -> None: ...


@dataclass(slots=True, eq=False)
class _Slot:
    """Who uses a slot; somebody holds it. `written`: the one who does writes it."""

    holders: set[Turn] = field(default_factory=set)
    written: bool = False
    waiting: OrderedDict[Turn, None] = field(default_factory=OrderedDict)


class Turn:
    """One job's place in the queues of its slots."""

    def __init__(
        self, job_id: int, src: LoadStoreSpec, dst: LoadStoreSpec, order: SlotOrder
    ) -> None:
        self.job_id = job_id
        self.slots = _uses(src, dst)
        self.missing = len(self.slots)  # slots that it does not hold yet
        self.come = threading.Event()
        self._src, self._dst = src, dst
        self._order = order

    def wait(self) -> None:
        """Block until the job may touch its slots, or has left."""
        self.come.wait()
        for wait in self._order.waits_for_device:
            for spec, writing in ((self._src, False), (self._dst, True)):
                if self.slots and isinstance(spec, CPULoadStoreSpec):  # it has not left
                    wait(spec.slot_ids, writing=writing)

    def leave(self) -> None:
        """The job has ended, or will not run. Idempotent."""
        self._order.remove(self)


class SlotOrder:
    """The queues of all slots. Any thread may call."""

    def __init__(self) -> None:
        self.waits_for_device: list[WaitForDevice] = []
        self._lock = threading.Lock()
        self._slots: dict[int, _Slot] = {}  # those that a function uses

    def enter(self, job_id: int, src: LoadStoreSpec, dst: LoadStoreSpec) -> Turn:
        """A place behind those who came before."""
        turn = Turn(job_id, src, dst, self)
        with self._lock:
            for slot_id in turn.slots:
                slot = self._slots.setdefault(slot_id, _Slot())
                slot.waiting[turn] = None
                self._admit(slot_id, slot)
            if not turn.slots:
                turn.come.set()
        return turn

    def remove(self, turn: Turn) -> None:
        with self._lock:
            slots, turn.slots = turn.slots, {}
            for slot_id in slots:
                slot = self._slots[slot_id]
                slot.waiting.pop(turn, None)
                slot.holders.discard(turn)
                self._admit(slot_id, slot)
                if not slot.holders:
                    del self._slots[slot_id]
            turn.come.set()

    def submit_to_device(
        self, src: LoadStoreSpec, dst: LoadStoreSpec, submit: Callable[[], None]
    ) -> None:
        """Submit a device's job, while no function enters.

        Raises RuntimeError where a function's job has to end first.
        """
        with self._lock:
            if self._slots:
                for slot_id, writing in _uses(src, dst).items():
                    self._refuse(slot_id, writing)
            submit()

    def _refuse(self, slot_id: int, writing: bool) -> None:
        slot = self._slots.get(slot_id)
        if slot is None:
            return
        # Where somebody waits beside readers alone, the first of them is a writer.
        writer = next(iter(slot.waiting if not slot.written else slot.holders), None)
        user = writer or (next(iter(slot.holders)) if writing else None)
        if user is not None:
            raise RuntimeError(
                f"slot_ids: expected slots that no function's job is using, got slot {slot_id} of "
                f"job {user.job_id}, which has not ended; wait for it first"
            )

    def _admit(self, slot_id: int, slot: _Slot) -> None:
        """Give the slot to whom it can be given."""
        while slot.waiting:
            turn = next(iter(slot.waiting))
            writing = turn.slots[slot_id]
            if slot.holders and (slot.written or writing):
                return
            del slot.waiting[turn]
            slot.holders.add(turn)
            slot.written = writing
            turn.missing -= 1
            if turn.missing == 0:
                turn.come.set()

    def _check(self) -> None:
        """Asserts that a slot is kept while it is used, and given to all whom it can be given."""
        with self._lock:
            for slot_id, slot in self._slots.items():
                assert slot.holders, "a slot is kept that nobody uses"
                assert slot.written == any(turn.slots[slot_id] for turn in slot.holders)
                assert not slot.written or len(slot.holders) == 1
                for turn in list(slot.waiting)[:1]:
                    assert slot.written or turn.slots[slot_id], "a reader waits for readers"


def _uses(src: LoadStoreSpec, dst: LoadStoreSpec) -> dict[int, bool]:
    """The slots that a job uses, and whether it writes them."""
    uses: dict[int, bool] = {}
    for spec, writing in ((src, False), (dst, True)):
        if isinstance(spec, CPULoadStoreSpec):
            uses.update(dict.fromkeys(spec.slot_ids.tolist(), writing))
    return uses
