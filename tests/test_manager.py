"""CPUOffloadingManager, case by case. Random actions on it are in test_policies.py."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from triton_offload.errors import PendingKeyError, UnknownKeyError, UnwrittenBlocksError
from triton_offload.scheduler.manager import (
    ChunkState,
    CPUOffloadingManager,
    OffloadingEvent,
    OffloadingManager,
    PrepareStoreOutput,
)

A, B, C, D = b"a", b"b", b"c", b"d"


def prepare(manager: CPUOffloadingManager, *args: Any) -> PrepareStoreOutput:
    output = manager.prepare_store(*args)
    assert output is not None
    return output


def store(manager: CPUOffloadingManager, *args: Any) -> PrepareStoreOutput:
    output = prepare(manager, *args)
    manager.complete_store(output.keys_to_store)
    manager._check()
    return output


@pytest.fixture(params=["lru", "arc"])
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_manager_side_imports_no_torch() -> None:
    code = "import triton_offload.scheduler.manager, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_interface_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        OffloadingManager()  # type: ignore[abstract]


def test_a_chunk_is_pending_until_its_store_has_landed(policy: str) -> None:
    manager = CPUOffloadingManager(4, policy)
    assert manager.lookup_state(A) is ChunkState.MISSING
    output = prepare(manager, [A, B])
    assert output.keys_to_store == (A, B)
    assert output.store_spec.slot_ids.tolist() == [0, 1]
    assert output.store_spec.fresh is not None
    assert output.store_spec.fresh.all()
    assert manager.lookup_state(A) is ChunkState.PENDING
    assert manager.lookup([A, B]) == 0
    again = prepare(manager, [A, B])
    assert (again.keys_to_store, again.pending_keys) == ((), (A, B))
    manager.complete_store([A])
    assert manager.lookup_state(A) is ChunkState.READY
    assert manager.lookup([A, B]) == 1
    manager.complete_store([B])
    assert manager.lookup([A, B, C]) == 2
    assert manager.lookup([C, A]) == 0
    assert prepare(manager, [A, B]).keys_to_store == ()


def test_a_load_names_the_slots_in_the_order_of_its_keys(policy: str) -> None:
    manager = CPUOffloadingManager(4, policy)
    store(manager, [A, B, C])
    assert manager.prepare_load([C, A]).slot_ids.tolist() == [2, 0]


def test_what_is_being_loaded_is_never_evicted(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy)
    store(manager, [A, B])
    manager.prepare_load([A])
    manager.prepare_load([A])
    manager.complete_load([A])
    assert manager.num_pinned == 1
    assert prepare(manager, [C]).evicted_keys == (B,)
    assert manager.prepare_store([D]) is None
    manager.complete_load([A])
    assert prepare(manager, [D]).evicted_keys == (A,)


def test_no_room_changes_nothing(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy, blocks_per_chunk=2, enable_events=True)
    store(manager, [A], [0b01])
    store(manager, [B])
    manager.prepare_load([B])
    manager.take_events()
    assert manager.prepare_store([A, C], [0b10, 0b11]) is None  # A is of the call, B is pinned
    manager._check()
    assert manager.lookup([A, B]) == 2
    assert (manager.num_pinned, manager.num_used, manager.take_events()) == (1, 2, [])
    assert prepare(manager, [C]).evicted_keys == (A,)


def test_more_keys_than_the_pool_holds_find_no_room(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy)
    assert manager.prepare_store([A, B, C]) is None
    assert manager.num_used == 0


def test_keys_of_the_same_call_are_not_evicted_for_it(policy: str) -> None:
    manager = CPUOffloadingManager(3, policy)
    store(manager, [C, B, A])  # A is the least recent one
    output = prepare(manager, [A, D])
    assert (output.keys_to_store, output.evicted_keys) == ((D,), (B,))
    assert prepare(manager, [b"e"]).evicted_keys == (C,)  # A was offered with D, and outlives it


def test_the_leading_chunk_outlives_the_trailing_ones(policy: str) -> None:
    manager = CPUOffloadingManager(3, policy)
    store(manager, [A, B, C])
    assert prepare(manager, [D]).evicted_keys == (C,)
    manager.complete_store([D])
    manager.touch([A, B])
    assert prepare(manager, [b"e", b"f"]).evicted_keys == (D, B)


def test_a_failed_store_leaves_nothing_behind(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy, enable_events=True)
    prepare(manager, [A, B])
    manager.complete_store([A, B], success=False)
    manager._check()
    assert manager.lookup_state(A) is ChunkState.MISSING
    assert (manager.num_used, manager.num_pinned, manager.take_events()) == (0, 0, [])
    assert sorted(prepare(manager, [C, D]).store_spec.slot_ids.tolist()) == [0, 1]


def test_an_extension_stores_only_the_missing_blocks_in_the_same_slot(policy: str) -> None:
    manager = CPUOffloadingManager(4, policy, blocks_per_chunk=4)
    store(manager, [A], [0b0011])
    assert manager.lookup([A]) == 1
    assert manager.lookup([A], [0b0100]) == 0
    output = prepare(manager, [B, A], [0b1111, 0b0110])
    assert output.keys_to_store == (B, A)
    assert output.blocks == (0b1111, 0b0100)
    assert output.store_spec.slot_ids.tolist() == [1, 0]
    assert output.store_spec.fresh is not None
    assert output.store_spec.fresh.tolist() == [True, False]
    manager.prepare_load([A], [0b0011])  # what was written before stays loadable
    with pytest.raises(UnwrittenBlocksError, match="blocks"):
        manager.prepare_load([A], [0b0100])
    waiting = prepare(manager, [A], [0b1000])
    assert (waiting.keys_to_store, waiting.pending_keys) == ((), (A,))
    assert prepare(manager, [A], [0b0001]).pending_keys == ()  # covered, nothing to wait for
    manager.complete_store([A])
    assert manager.lookup([A], [0b0111]) == 1
    manager._check()


def test_a_failed_extension_loses_only_its_own_blocks(policy: str) -> None:
    manager = CPUOffloadingManager(1, policy, blocks_per_chunk=2, enable_events=True)
    store(manager, [A], [0b01])
    prepare(manager, [A], [0b11])
    assert manager.prepare_store([B]) is None  # an extension in flight is not evicted
    manager.complete_store([A], success=False)
    manager._check()
    assert (manager.lookup([A], [0b01]), manager.lookup([A], [0b10])) == (1, 0)
    assert manager.take_events() == [OffloadingEvent((A,), removed=False)]
    assert prepare(manager, [B]).evicted_keys == (A,)


def test_a_load_without_a_mask_wants_the_whole_chunk(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy, blocks_per_chunk=2)
    store(manager, [A], [0b01])
    with pytest.raises(UnwrittenBlocksError, match="got 0-1"):
        manager.prepare_load([A])
    assert manager.num_pinned == 0


def test_a_refused_load_names_blocks_by_their_numbers(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy, blocks_per_chunk=8)
    store(manager, [A], [0b1000111])
    with pytest.raises(
        UnwrittenBlocksError, match=r"expected written blocks of chunk b'a' \(0-2, 6\), got 0, 3"
    ):
        manager.prepare_load([A], [0b1001])
    manager._check()
    assert manager.num_pinned == 0


def test_a_refused_load_pins_nothing(policy: str) -> None:
    manager = CPUOffloadingManager(4, policy)
    store(manager, [A])
    prepare(manager, [B])
    with pytest.raises(PendingKeyError, match=r"keys: expected .* got b'b'"):
        manager.prepare_load([A, B])
    with pytest.raises(UnknownKeyError, match=r"keys: expected .* got b'c'"):
        manager.prepare_load([A, C])
    assert manager.num_pinned == 1  # B, which is being stored
    manager._check()


@pytest.mark.parametrize("method", ["complete_load", "complete_store"])
def test_what_was_not_prepared_cannot_be_completed(policy: str, method: str) -> None:
    manager = CPUOffloadingManager(4, policy)
    store(manager, [A, B])
    prepare(manager, [C])
    manager.prepare_load([A])
    good = A if method == "complete_load" else C
    for bad in ([good, B], [good, D], [good, good]):
        with pytest.raises(ValueError, match="keys: expected"):
            getattr(manager, method)(bad)
        manager._check()
        assert manager.num_pinned == 2
    getattr(manager, method)([good])


def test_one_call_can_load_a_key_twice(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy)
    store(manager, [A])
    manager.prepare_load([A, A])
    manager.complete_load([A])
    assert manager.num_pinned == 1
    manager.prepare_load([A])
    manager.complete_load([A, A])
    manager._check()
    assert manager.num_pinned == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([A, A],), "keys"),
        (([A], [1, 1]), "blocks"),
        (([A], [0]), "blocks"),
        (([A], [4]), "blocks"),
        (([A, B], [1, -1]), "blocks"),
        (([A], [1.0]), "blocks"),
        (([A], [None]), "blocks"),
        (([A, B], [1]), "blocks"),
    ],
)
def test_wrong_arguments_are_named(policy: str, arguments: tuple[Any, ...], name: str) -> None:
    manager = CPUOffloadingManager(2, policy, blocks_per_chunk=2)
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        manager.prepare_store(*arguments)
    assert manager.num_used == 0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1, "mru"), "policy"),
        *(((bad,), "num_chunks") for bad in (0, -1, 1.0, True, None, "1")),
        *(((1, "lru", bad), "blocks_per_chunk") for bad in (0, 2.0, True, np.bool_(1), None)),
    ],
)
def test_a_pool_that_cannot_be_is_refused(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected .* got"):
        CPUOffloadingManager(*arguments)


def test_numpy_s_integers_are_integers(policy: str) -> None:
    manager = CPUOffloadingManager(np.int64(2), policy, blocks_per_chunk=np.int64(64))
    assert (type(manager.num_chunks), manager.num_chunks) == (int, 2)
    output = prepare(manager, [A])
    assert output.blocks == ((1 << 64) - 1,)
    manager.complete_store([A], success=False)
    store(manager, [A, B], np.array([1, 6]))
    assert manager.lookup([A, B], [np.uint64(1), np.int8(2)]) == 2
    assert manager.lookup([A, B], np.array([1, 8])) == 1
    assert prepare(manager, [A], [np.int64(7)]).blocks == (6,)
    manager.complete_store([A])
    manager.prepare_load([A, B], np.array([7, 6]))
    manager._check()


def test_a_load_older_than_a_reset_keeps_its_slot_and_never_unpins_the_new_chunk(
    policy: str,
) -> None:
    manager = CPUOffloadingManager(2, policy)
    store(manager, [A])
    old = manager.prepare_load([A]).slot_ids.tolist()
    manager.reset()
    assert manager.lookup_state(A) is ChunkState.MISSING
    assert (manager.num_used, manager.num_pinned) == (1, 1)
    assert store(manager, [A]).store_spec.slot_ids.tolist() != old
    manager.prepare_load([A])
    manager.complete_load([A])  # the old one
    manager._check()
    assert manager.num_used == 1
    store(manager, [B])
    assert prepare(manager, [C]).evicted_keys == (B,)  # the new A is still pinned
    manager.complete_load([A])
    with pytest.raises(ValueError, match="keys"):
        manager.complete_load([A])


def test_a_refused_load_unpins_nothing_that_is_older_than_a_reset(policy: str) -> None:
    manager = CPUOffloadingManager(3, policy)
    store(manager, [A])
    manager.prepare_load([A])
    manager.reset()
    with pytest.raises(UnknownKeyError):
        manager.prepare_load([A])
    store(manager, [A])
    slots = manager.prepare_load([A]).slot_ids.tolist()
    manager.complete_load([A], slots=slots)  # it could not be submitted
    with pytest.raises(ValueError, match="being loaded"):
        manager.complete_load([A], slots=slots)  # and the older one isn't meant
    manager._check()
    assert (manager.num_used, manager.num_pinned) == (2, 1)
    manager.complete_load([A])
    assert (manager.num_used, manager.num_pinned) == (1, 0)


@pytest.mark.parametrize("success", [True, False])
def test_a_store_older_than_a_reset_does_not_complete_the_new_one(
    policy: str, success: bool
) -> None:
    manager = CPUOffloadingManager(2, policy)
    prepare(manager, [A])
    manager.reset()
    assert prepare(manager, [A]).store_spec.slot_ids.tolist() == [1]
    assert manager.prepare_store([B]) is None  # the old slot is still being written
    manager.complete_store([A], success)
    assert manager.lookup_state(A) is ChunkState.PENDING
    assert prepare(manager, [B]).store_spec.slot_ids.tolist() == [0]
    manager.complete_store([A])
    assert manager.lookup_state(A) is ChunkState.READY
    manager._check()


def test_what_could_not_be_submitted_is_taken_back_from_the_new_chunk(policy: str) -> None:
    manager = CPUOffloadingManager(4, policy)
    store(manager, [A])
    manager.prepare_load([A])
    prepare(manager, [B])
    manager.reset()
    store(manager, [A])
    loaded = manager.prepare_load([A]).slot_ids.tolist()
    stored = prepare(manager, [B]).store_spec.slot_ids.tolist()
    manager.complete_load([A], slots=loaded)
    manager.complete_store([B], False, slots=stored)
    manager._check()
    assert manager.num_pinned == 2  # what is older than the reset
    manager.complete_store([B])
    manager.complete_load([A])
    manager._check()
    assert manager.lookup_state(B) is ChunkState.MISSING
    assert (manager.num_used, manager.num_pinned) == (1, 0)


def test_what_is_being_stored_is_never_evicted(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy)
    prepare(manager, [A])
    store(manager, [B])
    assert prepare(manager, [C]).evicted_keys == (B,)
    assert manager.prepare_store([D]) is None
    manager.complete_store([A, C])
    assert prepare(manager, [D]).evicted_keys == (A,)


def test_what_was_written_of_an_evicted_chunk_is_forgotten(policy: str) -> None:
    manager = CPUOffloadingManager(1, policy, blocks_per_chunk=2)
    store(manager, [A], [0b01])
    store(manager, [B])
    assert prepare(manager, [A]).blocks == (0b11,)
    assert manager.lookup_state(A) is ChunkState.PENDING
    manager.complete_store([A], success=False)
    manager._check()


def test_a_reset_leaves_nothing_to_evict(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy, blocks_per_chunk=2)
    store(manager, [A, B], [0b11, 0b01])
    manager.reset()
    manager._check()
    store(manager, [C, D])
    assert prepare(manager, [A, B]).evicted_keys == (D, C)


def test_the_slots_that_a_reset_frees_are_given_out_as_a_run(policy: str) -> None:
    manager = CPUOffloadingManager(6, policy)
    store(manager, [A, B, C, D])
    manager.prepare_load([B])
    manager.reset()
    manager._check()
    assert manager.num_used == 1
    slots = store(manager, [b"1", b"2", b"3", b"4", b"5"]).store_spec.slot_ids
    assert slots.tolist() == [0, 2, 3, 4, 5]
    manager.complete_load([B])
    manager.reset()
    assert store(manager, [A, B]).store_spec.slot_ids.tolist() == [0, 1]


def test_the_slots_that_a_reset_frees_are_given_out_in_order(policy: str) -> None:
    manager = CPUOffloadingManager(4, policy)
    store(manager, [A, B, C, D])
    manager.prepare_load([B])
    manager.reset()
    assert [store(manager, [key]).store_spec.slot_ids[0] for key in (A, C, D)] == [0, 2, 3]


def test_a_second_reset_keeps_the_slots_of_older_transfers(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy)
    store(manager, [A])
    manager.prepare_load([A])
    manager.reset()
    store(manager, [B])
    manager.reset()
    manager._check()
    assert store(manager, [B]).store_spec.slot_ids.tolist() == [1]
    assert manager.prepare_store([B, C]) is None


def test_an_extension_that_a_load_shares_is_pinned_until_both_have_ended(policy: str) -> None:
    for load_first in (True, False):
        manager = CPUOffloadingManager(1, policy, blocks_per_chunk=2)
        store(manager, [A], [0b01])
        if load_first:
            manager.prepare_load([A], [0b01])
        prepare(manager, [A], [0b10])
        if not load_first:
            manager.prepare_load([A], [0b01])
        assert manager.num_pinned == 1
        assert manager.prepare_store([B]) is None
        (manager.complete_load if load_first else manager.complete_store)([A])
        manager._check()
        assert manager.num_pinned == 1
        assert manager.prepare_store([B]) is None
        (manager.complete_store if load_first else manager.complete_load)([A])
        manager._check()
        assert manager.num_pinned == 0
        assert prepare(manager, [B]).evicted_keys == (A,)


@pytest.mark.parametrize("times", [2, 3])
def test_keys_given_twice_are_named(policy: str, times: int) -> None:
    manager = CPUOffloadingManager(8, policy)
    for method in (manager.prepare_store, manager.complete_store):
        with pytest.raises(ValueError, match="expected distinct keys, got b'c' twice"):
            method([A, B, *[C] * times, D])
    assert manager.num_used == 0


def test_events_are_merged_per_call(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy, enable_events=True)
    store(manager, [A, B])
    store(manager, [C, D])
    manager.reset()
    events = manager.take_events()
    assert [(set(event.keys), event.removed) for event in events] == [
        ({A, B}, False),
        ({A, B}, True),
        ({C, D}, False),
        ({C, D}, True),
    ]
    assert manager.take_events() == []


def test_events_are_not_kept_unless_asked_for(policy: str) -> None:
    manager = CPUOffloadingManager(2, policy)
    store(manager, [A])
    assert manager.take_events() == []


def test_slots_of_chunks_that_went_together_are_handed_out_as_a_run(policy: str) -> None:
    manager = CPUOffloadingManager(64, policy)
    for i in range(8):
        store(manager, [bytes([i, j]) for j in range(8)])
    slots = store(manager, [bytes([9, j]) for j in range(8)]).store_spec.slot_ids
    assert slots.tolist() == list(range(8))


def test_a_big_pool_of_which_nearly_all_is_being_loaded_goes_on_storing(policy: str) -> None:
    """That it searches for nothing is in test_scheduler_steps.py."""
    manager = CPUOffloadingManager(100_000, policy)
    keys = [i.to_bytes(8, "little") for i in range(100_000)]
    for i in range(0, len(keys), 1000):
        manager.complete_store(prepare(manager, keys[i : i + 1000]).keys_to_store)
    assert manager.num_used == 100_000
    manager.prepare_load(keys[:99_900])  # all but 100 are pinned
    for i in range(1000):
        manager.complete_store(prepare(manager, [b"%d" % i]).keys_to_store)
    assert manager.lookup(keys) == 99_900
    manager._check()


def test_transfers_older_than_two_resets_end_in_any_order(policy: str) -> None:
    """A slot is given out when its own transfer has ended, and not when another of its key has."""
    manager = CPUOffloadingManager(3, policy)
    loads = []
    for _ in range(2):
        store(manager, [A])
        loads.append(manager.prepare_load([A]).slot_ids.tolist())
        manager.reset()
    written = prepare(manager, [A]).store_spec.slot_ids.tolist()
    manager.reset()
    assert manager.prepare_store([B]) is None
    manager.complete_load([A], slots=loads[1])
    manager._check()
    assert prepare(manager, [B]).store_spec.slot_ids.tolist() == loads[1]
    manager.complete_store([A], slots=written)
    manager.complete_store([B])
    assert [manager.lookup([key]) for key in (A, B)] == [0, 1]
    manager.complete_load([A], slots=loads[0])
    manager._check()
    assert (manager.num_used, manager.num_pinned) == (1, 0)
