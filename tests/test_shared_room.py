"""Chunks of several sizes in one pool: what leaves for what, and how much each size keeps."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import pytest
from sieve_policy import SIEVEPolicy

from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.scheduler.policies import LRUPolicy
from triton_offload.slabs import Slabs

SMALL, LARGE = 0, 1
POLICIES = ["lru", "arc", LRUPolicy, SIEVEPolicy]
FOUR = Slabs.of(30, 4, [10, 30])  # three small ones in a slab, or a large one


def named(size: int, first: int, count: int = 1) -> list[bytes]:
    return [b"%d.%d" % (size, number) for number in range(first, first + count)]


def store(
    manager: CPUOffloadingManager, keys: list[bytes], size: int, success: bool = True
) -> tuple[bytes, ...] | None:
    """What it evicted; None where there was no room."""
    output = manager.prepare_store(keys, size=size)
    if output is None:
        return None
    manager._check()
    manager.touch(keys)
    manager.complete_store(output.keys_to_store, success)
    manager._check()
    return output.evicted_keys


def held(manager: CPUOffloadingManager, keys: Sequence[bytes]) -> list[bytes]:
    return [key for key in keys if manager.lookup([key])]


def test_the_oldest_of_all_leaves_whatever_its_size():
    manager = CPUOffloadingManager(FOUR)
    assert store(manager, named(LARGE, 0, 2), LARGE) == ()
    assert store(manager, named(SMALL, 0, 6), SMALL) == ()
    manager.touch(named(LARGE, 0))
    assert store(manager, named(LARGE, 2), LARGE) == (b"1.1",)
    # Of the other size so many leave, until there is a slab free of it.
    assert store(manager, named(LARGE, 3), LARGE) == (b"0.5", b"0.4", b"0.3")
    assert store(manager, named(SMALL, 6), SMALL) == (b"0.2",)
    assert manager.used_by_size() == [3, 3]
    assert manager.num_used == 6


def test_a_small_one_takes_a_large_ones_slab_and_others_fill_it():
    manager = CPUOffloadingManager(FOUR)
    store(manager, named(LARGE, 0, 4), LARGE)
    assert store(manager, named(SMALL, 0), SMALL) == (b"1.3",)
    assert store(manager, named(SMALL, 1, 2), SMALL) == ()
    assert store(manager, named(SMALL, 3, 4), SMALL) == (b"1.2", b"1.1")
    assert manager.used_by_size() == [7, 1]


def test_all_that_lies_in_the_slabs_of_another_size_may_leave():
    manager = CPUOffloadingManager(FOUR)
    store(manager, named(LARGE, 0, 4), LARGE)
    assert len(store(manager, named(SMALL, 0, 12), SMALL)) == 4


def test_what_leaves_for_another_size_makes_room_for_its_own():
    manager = CPUOffloadingManager(FOUR)
    store(manager, named(SMALL, 0, 6), SMALL)
    store(manager, named(LARGE, 0, 2), LARGE)
    manager.touch([b"0.0", b"0.3"])  # one in each slab
    # Four small ones are older than the first large one, and no slab of theirs is free.
    assert store(manager, named(LARGE, 2), LARGE) == (b"0.5", b"0.4", b"0.2", b"0.1", b"1.1")
    assert store(manager, named(SMALL, 6, 4), SMALL) == ()
    assert manager.used_by_size() == [6, 2]


def test_the_slab_is_emptied_that_was_used_least_recently():
    manager = CPUOffloadingManager(Slabs.of(30, 6, [10, 30]))
    store(manager, named(SMALL, 0, 12), SMALL)
    store(manager, named(LARGE, 0, 2), LARGE)
    for key in (b"0.3", b"0.6", b"0.9", b"0.0"):  # one in each slab
        manager.touch([key])
    # Six leave in their order; then all that is left in the slab of the oldest of the others.
    assert store(manager, named(LARGE, 2), LARGE) == (
        *(b"0.11", b"0.10", b"0.8", b"0.7", b"0.5", b"0.4"),
        b"0.3",
    )
    assert manager.used_by_size() == [5, 3]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_slab_of_which_a_transfer_uses_anything_stays(policy):
    manager = CPUOffloadingManager(FOUR, policy)
    store(manager, named(SMALL, 0, 3), SMALL)
    store(manager, named(SMALL, 3, 3), SMALL)
    store(manager, named(LARGE, 0, 2), LARGE)
    manager.prepare_load(named(SMALL, 1))
    manager.prepare_load(named(LARGE, 0))
    evicted = store(manager, named(LARGE, 2, 2), LARGE)
    assert {*named(SMALL, 3, 3), *named(LARGE, 1)} <= set(evicted)
    assert manager.lookup(named(SMALL, 1)) == manager.lookup(named(LARGE, 0)) == 1
    manager.prepare_load(named(LARGE, 2, 2))
    assert store(manager, named(LARGE, 4), LARGE) is None
    manager.complete_load(named(SMALL, 1))
    manager._check()
    assert b"0.1" in store(manager, named(LARGE, 4), LARGE)
    assert manager.used_by_size() == [0, 4]


@pytest.mark.parametrize("policy", POLICIES)
def test_where_there_is_no_room_nothing_changes(policy):
    manager = CPUOffloadingManager(FOUR, policy, enable_events=True)
    store(manager, named(SMALL, 0, 4), SMALL)
    store(manager, named(LARGE, 0, 2), LARGE)
    manager.prepare_load(named(SMALL, 0))
    manager.prepare_load(named(LARGE, 1))
    manager.take_events()
    known = [*named(SMALL, 0, 4), *named(LARGE, 0, 2)]
    # Three slots of the large, of which one is in use; and of the small's two slabs one.
    for size, most in ((LARGE, 2), (SMALL, 8)):
        keys = named(size, 10, most + 1)
        assert manager.prepare_store(keys, size=size) is None
        manager._check()
        assert held(manager, known) == known
        assert manager.take_events() == []
    output = manager.prepare_store(named(LARGE, 10, 2), size=LARGE)
    assert output is not None
    assert {b"0.3", b"1.0"} <= set(output.evicted_keys)
    assert not {b"0.0", b"1.1"} & set(output.evicted_keys)


def test_a_policy_that_raises_between_two_sizes_changes_nothing():
    class Failing(LRUPolicy):
        calls = 0

        def evict(self, *args):  # type: ignore[no-untyped-def]
            type(self).calls += 1
            if self.calls > 1:
                raise LookupError("no more")
            return super().evict(*args)

    manager = CPUOffloadingManager(FOUR, Failing, enable_events=True)
    store(manager, named(SMALL, 0, 6), SMALL)
    store(manager, named(LARGE, 0, 2), LARGE)
    manager.take_events()
    with pytest.raises(RuntimeError, match="no more"):
        manager.prepare_store(named(LARGE, 2), size=LARGE)
    assert held(manager, named(SMALL, 0, 6)) == named(SMALL, 0, 6)
    assert manager.take_events() == []
    assert manager.used_by_size() == [6, 2]
    manager.reset()
    assert store(manager, named(SMALL, 0, 5), SMALL) == ()


def test_what_a_failed_store_took_is_free_for_any_size():
    manager = CPUOffloadingManager(FOUR)
    store(manager, named(SMALL, 0, 12), SMALL, success=False)
    assert manager.num_used == 0
    assert store(manager, named(LARGE, 0, 4), LARGE) == ()


def test_a_slab_that_a_reset_left_to_a_transfer_is_cut_anew_when_that_has_ended():
    manager = CPUOffloadingManager(FOUR)
    store(manager, named(SMALL, 0, 12), SMALL)
    slots = manager.prepare_load(named(SMALL, 4)).slot_ids.tolist()
    manager.reset()
    manager._check()
    assert manager.used_by_size() == [1, 0]
    assert store(manager, named(LARGE, 0, 4), LARGE) is None
    assert store(manager, named(LARGE, 0, 3), LARGE) == ()
    assert store(manager, named(SMALL, 4, 2), SMALL) == ()  # beside it
    assert b"1.2" in store(manager, named(LARGE, 3, 1), LARGE)
    manager.complete_load(named(SMALL, 4), slots=slots)
    manager._check()
    assert manager.used_by_size()[1] == 3
    assert store(manager, named(LARGE, 9, 4), LARGE) is not None
    assert manager.used_by_size() == [0, 4]


def test_no_chunk_of_a_call_is_evicted_for_it():
    manager = CPUOffloadingManager(FOUR)
    store(manager, named(LARGE, 0, 4), LARGE)
    keys = [*named(LARGE, 3), *named(LARGE, 10, 4)]
    assert manager.prepare_store(keys, size=LARGE) is None
    assert held(manager, named(LARGE, 0, 4)) == named(LARGE, 0, 4)
    assert store(manager, keys[:4], LARGE) == (b"1.2", b"1.1", b"1.0")


def test_what_left_with_its_slab_is_a_ghost_of_arc():
    manager = CPUOffloadingManager(Slabs.of(30, 6, [10, 30]), "arc")
    store(manager, named(SMALL, 0, 12), SMALL)
    store(manager, named(LARGE, 0, 2), LARGE)
    for key in (b"0.3", b"0.6", b"0.9", b"0.0"):  # one in each slab
        manager.touch([key])
    evicted = store(manager, named(LARGE, 2), LARGE)
    assert b"0.3" in evicted
    policy = manager._policy
    assert {*policy._ghost_recent, *policy._ghost_frequent} >= set(evicted)


# -- fair by bytes --

MANY = Slabs.of(120, 200, [10, 120])
ROOM = MANY.num_bytes


def bytes_of(manager: CPUOffloadingManager) -> list[int]:
    return [
        count * size.num_bytes
        for count, size in zip(manager.used_by_size(), MANY.sizes, strict=True)
    ]


def traffic(seed: int, *, share: float, reuse: float, length: int = 12) -> Callable[[], tuple]:
    """Requests of as many bytes of either size; `share`: of the requests that are small's."""
    rng = random.Random(seed)
    recent: list[OrderedDict[int, None]] = [OrderedDict(), OrderedDict()]
    numbers = [0, 0]

    def next_request() -> tuple[int, list[bytes]]:
        size = SMALL if rng.random() < share else LARGE
        known = recent[size]
        if known and rng.random() < reuse:
            number = rng.choice(list(known))
        else:
            number = numbers[size]
            numbers[size] += 1
            known[number] = None
            if len(known) > 40:
                known.popitem(last=False)
        count = length if size == SMALL else 1
        return size, named(size, number * count, count)

    return next_request


def drive(manager: CPUOffloadingManager, request: Callable[[], tuple], steps: int) -> list[float]:
    """The mean bytes of each size over the second half."""
    sums, samples = [0, 0], 0
    for step in range(steps):
        size, keys = request()
        found = manager.lookup(keys)
        manager.touch(keys[:found])
        if found < len(keys):
            output = manager.prepare_store(keys[found:], size=size)
            assert output is not None
            manager.complete_store(output.keys_to_store)
        if step > steps // 2:
            sums = [a + b for a, b in zip(sums, bytes_of(manager), strict=True)]
            samples += 1
    manager._check()
    return [each / samples for each in sums]


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize("reuse", [0.0, 0.5])
def test_equal_demand_and_equal_reuse_keep_equal_bytes(policy, reuse):
    small, large = drive(
        CPUOffloadingManager(MANY, policy), traffic(1, share=0.5, reuse=reuse), 6000
    )
    assert small + large > 0.97 * ROOM
    assert abs(small - large) < 0.1 * ROOM


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_who_brings_more_bytes_keeps_more_in_proportion(share):
    small, large = drive(CPUOffloadingManager(MANY), traffic(2, share=share, reuse=0.0), 6000)
    assert abs(small / (small + large) - share) < 0.08


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_is_used_no_more_loses_its_bytes_to_what_is(policy, size):
    manager = CPUOffloadingManager(MANY, policy)
    other = 1 - size
    drive(manager, traffic(3, share=float(other == SMALL), reuse=0.3), 600)
    assert bytes_of(manager)[size] == 0
    drive(manager, traffic(4, share=float(size == SMALL), reuse=0.3), 900)
    assert bytes_of(manager)[size] > 0.97 * ROOM


@pytest.mark.parametrize(("largest", "least"), [(16, 0.7), (64, 0.84), (400, 0.95)])
def test_a_pool_is_full_before_anything_is_evicted(largest, least):
    """Sizes that have nothing in common, in a pool of so many chunks of the largest: of a small one
    the slab that is begun for each size, and what is left behind its slots, are a larger part."""
    rng = random.Random(7)
    for _ in range(12):
        sizes = [rng.randint(10_000, 200_000) for _ in range(rng.randint(2, 3))]
        room = largest * max(sizes)
        slabs = Slabs.fit(room, sizes)
        manager = CPUOffloadingManager(slabs)
        number = 0
        while True:
            number += 1
            size = rng.randrange(len(sizes))
            count = rng.randint(1, 1 + max(sizes) // sizes[size])
            used = sum(n * each for n, each in zip(manager.used_by_size(), sizes, strict=True))
            output = manager.prepare_store(named(size, 1000 * number, count), size=size)
            assert output is not None
            if output.evicted_keys:
                break
            manager.complete_store(output.keys_to_store)
        assert used > least * room, (sizes, slabs, used / room)


# -- anything, at random --


class Plain:
    """LRU without `drop`, as a user's may be."""

    def __init__(self, capacity: int) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def admit(self, keys: Sequence[bytes]) -> None:
        self._order.update(dict.fromkeys(reversed(keys)))

    def land(self, keys: Sequence[bytes]) -> None:
        assert self._order.keys() >= set(keys)

    def release(self, keys: Sequence[bytes]) -> None:
        assert self._order.keys() >= set(keys)

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            del self._order[key]

    def refresh(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._order.move_to_end(key)

    def touch(self, keys: Sequence[bytes], pending: Collection[bytes] = ()) -> None:
        self.refresh(keys)

    def evict(self, count, protected, busy=()):  # type: ignore[no-untyped-def]
        kept = {*protected, *(key for each in busy for key in each)}
        evicted = [key for key in self._order if key not in kept][:count]
        self.remove(evicted)
        return evicted

    def clear(self) -> None:
        self._order.clear()


@pytest.mark.parametrize("policy", ["lru", "arc", Plain, SIEVEPolicy])
def test_whatever_is_called_no_slot_is_lost_and_none_is_in_use_twice(policy):
    rng = random.Random(11)
    sizes = [10, 35, 100]
    slabs = Slabs.of(100, 6, sizes)
    manager = CPUOffloadingManager(slabs, policy, 2, enable_events=True)
    known: set[bytes] = set()  # by the events
    jobs: list[tuple[str, list[bytes], list[int]]] = []
    refused = 0
    for _ in range(2500):
        draw, size = rng.random(), rng.randrange(3)
        keys = named(size, rng.randrange(40), rng.randint(1, 5))
        if draw < 0.4:
            blocks = [rng.randint(1, 3) for _ in keys]
            output = manager.prepare_store(keys, blocks, size=size)
            refused += output is None
            if output is not None:
                slots = output.store_spec.slot_ids.tolist()
                assert (slabs.sizes_of(output.store_spec.slot_ids) == size).all()
                jobs.append(("store", list(output.keys_to_store), slots))
        elif draw < 0.6:
            found = manager.lookup(keys)
            if found:
                blocks = [manager.loadable_blocks(key) for key in keys[:found]]
                slots = manager.prepare_load(keys[:found], blocks).slot_ids.tolist()
                jobs.append(("load", keys[:found], slots))
        elif draw < 0.95 and jobs:
            kind, moved, slots = jobs.pop(rng.randrange(len(jobs)))
            if kind == "store":
                manager.complete_store(moved, rng.random() < 0.8, slots=slots)
            else:
                manager.complete_load(moved, slots=slots)
        elif draw > 0.995:
            manager.reset()
        else:
            manager.touch(keys)
        manager._check()
        for event in manager.take_events():
            known = known - set(event.keys) if event.removed else known | set(event.keys)
        ready = {key for key in manager._slot_of if manager.loadable_blocks(key)}
        assert ready == known
    assert refused > 20
