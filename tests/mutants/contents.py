"""Which bytes of a slot a store moves, keeps and clears."""

from __future__ import annotations

from unittest.mock import patch

import scenarios

from mutants.registry import Patch, instead, mutant, serving, together
from triton_offload.transfer.contents import SlotContents
from triton_offload.transfer.lane_streams import LaneStreams
from triton_offload.transfer.paths.staged import Staged

# -- 8: partial chunks, and what must not stay --


def _without_marks(**nothing: tuple[int, ...]) -> Patch:
    def make(mark):
        return lambda self, run: mark(self, run)._replace(**nothing)

    return instead(SlotContents, "store", make)


@mutant("8", serving("staged"))
def a_partial_chunk_is_copied_whole():
    return _without_marks(kept=())


@mutant("stale bytes: a partial chunk", serving("staged"))
def what_a_partial_chunk_lacks_is_not_cleared():
    return _without_marks(unfilled=())


@mutant("stale bytes: in the slot", serving("staged, hybrid"))
def what_a_slot_held_before_stays_readable():
    return _without_marks(stale=())


@mutant("stale bytes: in staging", serving("staged, hybrid"))
def gaps_between_pages_are_not_cleared():
    def make(take):
        def take_dirty(self, stream):
            buffer = take(self, stream)
            buffer.holds = self._packed
            return buffer

        return take_dirty

    def make_store(store):
        def store_dirty(self, streams, segment, pages, slots):
            streams._packed = segment.run.group.packed
            return store(self, streams, segment, pages, slots)

        return store_dirty

    return together(instead(LaneStreams, "take_buffer", make), instead(Staged, "store", make_store))


@mutant("stale bytes: a failed job", scenarios.a_slot_after_a_failure)
def a_failed_store_is_taken_to_have_cleared_its_slots():
    return patch.object(SlotContents, "doubt", lambda self, runs: None)
