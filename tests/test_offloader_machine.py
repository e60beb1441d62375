"""Random calls of KVOffloader by several clients at once, on a device where no order is lucky.

The simulated device runs what is queued in any order that CUDA allows, and calls the other clients
where one of them blocks: as threads would, but so that a failure can be replayed.
"""

from __future__ import annotations

import random

from clients import HOWS, Client
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_content import ONE_GROUP, OVERLAYS, Setting, Span
from model_world import World

from triton_offload.calibration import Path
from triton_offload.testing import SimulatedDevice

BLOCKS_OF_CLIENT = 20
NUM_OTHERS = 2
CALLS_OF_OTHERS = 3  # each, for every call of the first one
FAILING = ("gather", "scatter", "copy", "copy_batch", "fill_zero")
ENDINGS = ("settled", "under load", "by another thread", "at the second try")

SETTINGS = st.builds(
    Setting,
    path=st.sampled_from(Path),
    groups=st.sampled_from((ONE_GROUP, OVERLAYS)),
    policy=st.sampled_from(("lru", "arc")),
    blocks_per_chunk=st.integers(1, 3),
    num_chunks=st.integers(4, 8),
    window_chunks=st.sampled_from((None, 0.2, 1, 2)),
    packed=st.booleans(),
)


class OffloaderMachine(RuleBasedStateMachine):
    """One client that hypothesis leads, and others that make calls where that one blocks."""

    with_faults = False
    # What the examples of a run came to.
    jobs = loads = cancels = failures = calls_of_others = 0

    @initialize(seed=st.integers(0, 2**32 - 1), setting=SETTINGS, ending=st.sampled_from(ENDINGS))
    def build(self, seed: int, setting: Setting, ending: str) -> None:
        self.device = SimulatedDevice(seed)
        count = 1 + NUM_OTHERS
        self.world = World(self.device, setting, count * BLOCKS_OF_CLIENT)
        self.world.faulty = self.with_faults
        self.ending = ending
        self.clients = [
            Client(
                self.world,
                range(i * BLOCKS_OF_CLIENT, (i + 1) * BLOCKS_OF_CLIENT),
                random.Random(seed + i),
            )
            for i in range(count)
        ]
        self.first = self.clients[0]
        self.calls_left = [0] * count
        self.others = [
            self.device.background(f"client {i}", lambda i=i: self.call_of(i))
            for i in range(1, count)
        ]

    def call_of(self, i: int) -> float | None:
        """What another thread does next, where the first one blocks. It holds no lock then."""
        assert not self.world.offloader._lock._lock._is_owned(), "blocks with the lock held"
        if not self.calls_left[i]:
            return None
        self.calls_left[i] -= 1
        type(self).calls_of_others += 1
        self.clients[i].step()
        self.world.check()
        return 0.0

    def span(self, data: st.DataObject) -> Span:
        setting = self.world.setting
        most = setting.chunks_per_request * setting.blocks_per_chunk
        first = data.draw(st.integers(0, most - 1))
        count = data.draw(st.integers(1, min(most - first, 4 * setting.blocks_per_chunk)))
        group = data.draw(st.integers(0, len(setting.groups) - 1))
        return Span(group, data.draw(st.integers(0, setting.num_requests - 1)), first, count)

    # -- what the first client calls --

    @rule(data=st.data())
    def store(self, data):
        self.first.store(self.span(data))

    @precondition(lambda self: self.world.recent)
    @rule(data=st.data())
    def store_again(self, data):
        self.first.store(data.draw(st.sampled_from(list(self.world.recent))))

    @precondition(lambda self: self.world.setting.blocks_per_chunk > 2)
    @rule(data=st.data(), how=st.sampled_from(("cancel", "wait_on", "released")))
    def store_in_two_runs(self, data, how):
        span = self.span(data)
        chunk = span.first // self.world.setting.blocks_per_chunk
        self.first.store_around(span.group, span.request, chunk)
        for flight in self.first.flights[-1:]:
            self.first.cancel(flight) if how == "cancel" else self.first.settle(flight, how)

    @precondition(lambda self: self.world.recent)
    @rule(data=st.data(), expedited=st.booleans())
    def load_what_was_stored_lately(self, data, expedited):
        span = data.draw(st.sampled_from(list(self.world.recent)))
        cut = data.draw(st.integers(0, span.count - 1))
        part = Span(span.group, span.request, span.first + cut, span.count - cut)
        self.first.load(part, expedited=expedited)

    @rule(data=st.data(), expedited=st.booleans())
    def load_blindly(self, data, expedited):
        self.first.load(self.span(data), expedited=expedited, blindly=True)

    @precondition(lambda self: self.first.flights)
    @rule(data=st.data(), how=st.sampled_from(HOWS))
    def settle(self, data, how):
        self.first.settle(data.draw(st.sampled_from(self.first.flights)), how)

    @precondition(lambda self: self.first.flights)
    @rule(data=st.data())
    def cancel(self, data):
        self.first.cancel(data.draw(st.sampled_from(self.first.flights)))

    @rule(data=st.data())
    def ask_and_touch(self, data):
        span = self.span(data)
        self.world.lookup(span)
        self.first.touch(span)
        self.first.look()

    @rule()
    def reset(self):
        self.first.reset()

    @rule()
    def pause(self):
        self.device.sleep(1e-4)

    @precondition(lambda self: self.with_faults)
    @rule(kind=st.sampled_from(FAILING), nth=st.integers(1, 4), at_once=st.booleans())
    def break_something(self, kind, nth, at_once):
        faults = self.device.faults
        (faults.in_call if at_once else faults.in_run)(kind, nth)

    @precondition(lambda self: self.with_faults)
    @rule()
    def break_a_submission(self):
        """The next store or load raises, whatever it is."""
        self.device.faults.in_call("current_stream")

    # -- what always holds --

    @invariant()
    def everything_is_in_order(self):
        self.world.check()
        self.calls_left = [CALLS_OF_OTHERS] * len(self.clients)
        for other in self.others:
            other.wake()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world, offloader = self.world, self.world.offloader
        self.device.faults.clear()
        if self.ending == "settled":
            self.first.drain()
            for other in self.others:
                other.stop()
            for client in self.clients:
                client.drain()
        world.closing = True
        if self.ending == "by another thread":

            def close() -> float:
                offloader.close()
                return float("inf")

            self.others.append(self.device.background("closer", close))
            self.first.drain()
        if self.ending == "at the second try":
            try:
                offloader.close(0)
            except TimeoutError:
                world.check()
        offloader.close()
        for other in self.others:
            other.stop()
        for client in self.clients:
            client.drain()
        self.device.drain()
        world.close()
        machine = type(self)
        machine.jobs += world.num_jobs
        machine.loads += world.num_loaded
        machine.cancels += world.num_cancels
        machine.failures += world.num_failed


class FaultyMachine(OffloaderMachine):
    """The same, with transfers that fail when they are queued and when they run."""

    with_faults = True


def run(machine: type[OffloaderMachine], evidence: int) -> None:
    """Runs enough examples, and sees that they came to what `evidence` of them come to at least:
    one alone may come to anything, so that four times as many are run."""
    machine.jobs = machine.loads = machine.cancels = machine.failures = 0
    machine.calls_of_others = 0
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=4 * evidence,
            stateful_step_count=40,
            deadline=None,
            # A failure is replayed from what is printed; to shrink it took minutes.
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.jobs > 2 * evidence
    assert machine.loads > evidence / 4
    assert machine.cancels > evidence / 10
    assert machine.calls_of_others > 5 * evidence


def test_whatever_several_clients_call_every_byte_is_right():
    run(OffloaderMachine, settings.default.max_examples // 2)


def test_a_transfer_that_fails_costs_its_own_job_and_nothing_else():
    run(FaultyMachine, settings.default.max_examples // 3)
    assert FaultyMachine.failures > 3
