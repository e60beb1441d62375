"""The manager's side, and the seam to the device."""

from __future__ import annotations

from unittest.mock import patch

import scenarios

from mutants.order import a_store_does_not_wait_for_a_load_of_its_slots
from mutants.registry import instead, mutant, serving, together
from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.scheduler.order import Order
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.lane_streams import LaneStreams

# -- the manager's side --


@mutant("pins and 6", scenarios.offloader)
def a_chunk_is_evicted_while_it_is_loaded():
    """Where pins end at once, a store into the slot still waits for the load, by rule 6: only
    without both it overtakes."""
    complete = CPUOffloadingManager.complete_load

    def make(prepare):
        def prepare_unpinned(self, keys, blocks=None):
            spec = prepare(self, keys, blocks)
            complete(self, keys)
            return spec

        return prepare_unpinned

    return together(
        instead(CPUOffloadingManager, "prepare_load", make),
        patch.object(CPUOffloadingManager, "complete_load", lambda *_, **__: None),
        a_store_does_not_wait_for_a_load_of_its_slots(),
    )


@mutant("pins", scenarios.offloader)
def a_held_chunk_stays_in_the_order_of_eviction():
    def make(take):
        return lambda self, number, protected, busy: take(self, number, protected, busy[:1])

    return instead(Order, "take", make)


@mutant("pins", scenarios.offloader)
def a_reset_frees_slots_under_transfer():
    def make(reset):
        def reset_all(self):
            reset(self)
            self._room._free.reset()

        return reset_all

    return instead(CPUOffloadingManager, "reset", make)


@mutant("pins, a failed job", scenarios.offloader)
def the_chunk_of_a_failed_store_is_loaded():
    def make(complete):
        return lambda self, keys, success=True, **which: complete(self, keys, **which)

    return instead(CPUOffloadingManager, "complete_store", make)


# -- the device --


@mutant("the seam: kernels reach registered memory only", scenarios.before_the_pool_is_pinned)
def a_kernel_reaches_memory_that_is_not_pinned():
    return patch.object(LaneStreams, "reaches_pool", True)


@mutant("the seam: sources of a batch in stream order", serving("copy engine"))
def a_batch_reads_its_sources_ahead_of_the_stream():
    def make(copy_batch):
        def copy_ahead(self, dst, src, sizes, stream):
            self._simulation.host_access("reading ahead", self._places.ranges(src, sizes), [])
            copy_batch(self, dst, src, sizes, stream)

        return copy_ahead

    return instead(SimulatedDevice, "copy_batch", make)
