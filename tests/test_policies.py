"""LRU, ARC and the SIEVE of the examples: alone, and below a manager that random actions drive.

The manager's answers are compared with those of a plain model; for LRU these include which chunk
is evicted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sieve_policy import SIEVEPolicy
from steps import count_steps

from triton_offload.errors import PendingKeyError, UnknownKeyError, UnwrittenBlocksError
from triton_offload.scheduler.free_slots import FreeSlots
from triton_offload.scheduler.manager import (
    ChunkState,
    CPUOffloadingManager,
    OffloadingEvent,
)
from triton_offload.scheduler.policies import (
    ARCPolicy,
    EvictionPolicy,
    LRUPolicy,
    PolicyChoice,
)

A, B, C, D, E = b"a", b"b", b"c", b"d", b"e"
NOBODY: set[bytes] = set()


def stored(policy: EvictionPolicy, keys: list[bytes]) -> None:
    policy.admit(keys)
    policy.land(keys)


@pytest.mark.parametrize("make", [LRUPolicy, ARCPolicy])
def test_protected_and_busy_keys_keep_their_places(
    make: type[LRUPolicy] | type[ARCPolicy],
) -> None:
    policy = make(9)
    stored(policy, [E, D, C, B, A])  # A is the least recent one
    assert policy.evict(1, {A}, [{B}]) == [C]
    policy._check([A, B, D, E], {B})
    assert policy.evict(2, NOBODY, [{B}]) == [A, D]
    policy.release([B])
    assert policy.evict(2, NOBODY) == [B, E]


@pytest.mark.parametrize("make", [LRUPolicy, ARCPolicy])
def test_what_was_busy_when_its_turn_came_leaves_first_then_and_in_order(
    make: type[LRUPolicy] | type[ARCPolicy],
) -> None:
    policy = make(9)
    stored(policy, [E, D, C, B, A])
    assert policy.evict(1, NOBODY, [{A, C}, {B}]) == [D]
    policy.release([C])
    policy.release([A, B])
    policy.refresh([B])  # used since
    policy._check([A, B, C, E], set())
    assert policy.evict(4, NOBODY) == [A, C, E, B]


@pytest.mark.parametrize("make", [LRUPolicy, ARCPolicy])
def test_what_did_not_land_leaves_no_trace(make: type[LRUPolicy] | type[ARCPolicy]) -> None:
    policy = make(9)
    stored(policy, [B, A])
    policy.admit([D, C])
    stored(policy, [E])
    assert policy.evict(2, NOBODY, [{A, C, D}]) == [B, E]
    assert policy.evict(0, NOBODY) == []
    policy.remove([C])
    policy.land([D])
    policy._check([A, D], {A})
    policy.release([A])
    policy._check([A, D], set())
    assert policy.evict(2, NOBODY) == [A, D]


@pytest.mark.parametrize("make", [LRUPolicy, ARCPolicy])
def test_a_policy_that_is_cleared_is_as_new(make: type[LRUPolicy] | type[ARCPolicy]) -> None:
    policy = make(2)
    stored(policy, [A, B])
    assert policy.evict(1, NOBODY, [{B}]) == [A]
    stored(policy, [A])  # a ghost's return, for ARC
    assert policy.evict(1, NOBODY, [{B}]) == [A]
    policy.admit([D])
    policy.clear()
    policy._check([], set())
    assert len(getattr(policy, "_ghost_recent", ())) == 0
    assert getattr(policy, "_target", 0.0) == 0.0
    assert getattr(policy, "_num_landing", 0) == 0
    stored(policy, [A, B])
    assert policy.evict(2, NOBODY) == [B, A]


@pytest.mark.parametrize("make", [LRUPolicy, ARCPolicy])
def test_what_is_busy_is_passed_once_by_all_evictions_together(
    make: type[LRUPolicy] | type[ARCPolicy],
) -> None:
    def steps(number: int) -> int:
        policy = make(2 * number)
        busy = [b"busy%d" % i for i in range(number)]
        stored(policy, busy)
        stored(policy, [b"idle%d" % i for i in range(number)])

        def evict() -> None:
            for _ in range(number // 2):
                assert policy.evict(1, NOBODY, [set(busy)])[0] not in busy
            policy.release(busy)
            for _ in range(number):
                assert policy.evict(1, NOBODY, [])[0] in busy

        return count_steps(evict)

    assert steps(200) < 2.2 * steps(100)


def test_lru_evicts_what_was_used_least_recently() -> None:
    policy = LRUPolicy(4)
    stored(policy, [D, C, B, A])
    policy.touch([C, A])
    assert policy.evict(4, NOBODY) == [B, D, A, C]


def test_arc_keeps_what_was_used_twice_from_a_scan() -> None:
    policy = ARCPolicy(3)
    stored(policy, [A])
    policy.touch([A])
    stored(policy, [B, C])
    for scanned in (b"1", b"2", b"3", b"4", b"5"):
        assert policy.evict(1, NOBODY) != [A]
        stored(policy, [scanned])
        policy._check([A, *policy._recent], set())


def test_arc_a_touch_counts_while_a_key_is_busy() -> None:
    policy = ARCPolicy(3)
    stored(policy, [A, B, C])
    assert policy.evict(1, NOBODY, [{C}, {B}]) == [A]
    policy.touch([B])
    policy._check([B, C], {B, C})
    assert (list(policy._recent), list(policy._frequent)) == ([C], [B])


def test_arc_a_touch_of_what_has_not_landed_is_no_use() -> None:
    policy = ARCPolicy(4)
    policy.admit([A, B])
    policy.touch([B, A], pending={A, B})
    policy._check([A, B], {A, B})
    assert (list(policy._recent), list(policy._frequent)) == ([A, B], [])
    policy.land([A, B])
    policy.refresh([A])
    assert list(policy._recent) == [B, A]
    policy.touch([B])
    assert (list(policy._recent), list(policy._frequent)) == ([A], [B])


def test_arc_where_one_list_has_nothing_to_give_the_other_one_gives() -> None:
    policy = ARCPolicy(4)
    stored(policy, [A, B])
    policy.touch([A])
    policy._target = 4.0  # frequent is to give
    assert policy.evict(1, NOBODY, [{A}]) == [B]
    policy.release([A])
    stored(policy, [C, D])
    policy._target = 0.0  # recent is to give
    assert policy.evict(1, NOBODY, [{C, D}]) == [A]
    policy._check([C, D], {C, D})


def test_arc_remembers_no_more_ghosts_of_frequent_than_the_paper() -> None:
    policy = ARCPolicy(1)
    for key, ghosts in ((A, []), (B, [A]), (C, [B])):
        if key != A:
            policy.evict(1, NOBODY)
        stored(policy, [key])
        policy.touch([key])
        assert list(policy._ghost_frequent) == ghosts


def test_arc_what_is_under_way_does_not_count_against_the_target() -> None:
    policy = ARCPolicy(4)
    stored(policy, [A, B])
    policy.touch([A])
    policy._target = 1.0
    policy.admit([C, D])
    assert policy.evict(1, NOBODY, [{C, D}]) == [A]  # B alone is within the target
    policy.land([C, D])
    assert policy.evict(1, NOBODY) == [B]


def test_arc_a_ghost_that_returns_moves_the_target_towards_its_list() -> None:
    policy = ARCPolicy(2)
    stored(policy, [A])
    policy.touch([A])
    stored(policy, [B])
    assert policy.evict(1, NOBODY) == [B]  # the target of the recent list is 0
    stored(policy, [B])
    assert policy._target == 1.0
    assert policy.evict(1, NOBODY) == [A]  # nothing is left in recent: B was used again
    stored(policy, [C])
    assert policy.evict(1, NOBODY) == [B]  # recent is within its target, so frequent gives
    stored(policy, [A])
    assert policy._target == 0.0


def test_arc_a_ghost_teaches_only_when_its_store_has_landed() -> None:
    manager = CPUOffloadingManager(2, "arc")
    policy = manager._policy
    assert isinstance(policy, ARCPolicy)
    for keys in ([A], [B], [C]):
        if keys == [B]:
            manager.touch([A])
        output = manager.prepare_store(keys)
        assert output is not None
        manager.complete_store(output.keys_to_store)
    assert list(policy._ghost_recent) == [B]
    manager.prepare_store([B])
    manager.complete_store([B], success=False)
    manager._check()
    assert B in policy._ghost_recent
    assert policy._target == 0.0


@settings(deadline=None)
@given(
    capacity=st.integers(1, 6),
    references=st.lists(st.integers(0, 12).map(lambda i: b"%d" % i), max_size=120),
)
def test_arc_agrees_with_the_paper_s_lists(capacity: int, references: list[bytes]) -> None:
    """One key at a time, with plain lists; ghosts teach after the eviction, as documented."""
    policy = ARCPolicy(capacity)
    t1: list[bytes] = []
    t2: list[bytes] = []
    b1: list[bytes] = []
    b2: list[bytes] = []
    target = 0.0
    for key in references:
        if key in t1 or key in t2:
            policy.touch([key])
            (t1 if key in t1 else t2).remove(key)
            t2.append(key)
            continue
        if len(t1) + len(t2) == capacity:
            source, ghosts = (t1, b1) if t1 and (len(t1) > target or not t2) else (t2, b2)
            ghosts.append(source.pop(0))
            assert policy.evict(1, NOBODY) == ghosts[-1:]
            del b2[: max(0, len(t1) + len(t2) + len(b1) + len(b2) - 2 * capacity)]
        stored(policy, [key])
        if key in b1:
            target = min(capacity, target + max(1, len(b2) / len(b1)))
            b1.remove(key)
            t2.append(key)
        elif key in b2:
            target = max(0, target - max(1, len(b1) / len(b2)))
            b2.remove(key)
            t2.append(key)
        else:
            t1.append(key)
        del b1[: max(0, len(t1) + len(b1) - capacity)]
        del b2[: max(0, len(t1) + len(t2) + len(b1) + len(b2) - 2 * capacity)]
        policy._check(t1 + t2, set())
        assert [list(policy._recent), list(policy._frequent)] == [t1, t2]
        assert [list(policy._ghost_recent), list(policy._ghost_frequent)] == [b1, b2]
        assert policy._target == target


@settings(deadline=None)
@given(data=st.data(), capacity=st.integers(1, 12))
def test_arc_evicts_several_keys_as_one_after_another(data: st.DataObject, capacity: int) -> None:
    at_once, one_by_one = ARCPolicy(capacity), ARCPolicy(capacity)
    policies = at_once, one_by_one
    free: list[bytes] = []
    held: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 12))):
        offered = data.draw(st.sets(st.integers(0, 20).map(lambda i: b"%d" % i), max_size=capacity))
        new = sorted(offered - {*free, *held})
        protected = offered & set(free)
        candidates = len(free) - len(protected)
        new = new[: capacity - len(free) - len(held) + candidates]
        count = max(0, len(new) - (capacity - len(free) - len(held)))
        busy = [set(held)]
        evicted = at_once.evict(count, protected, busy)
        assert evicted == [one_by_one.evict(1, protected, busy)[0] for _ in range(count)]
        free = [key for key in free if key not in evicted]
        known = [*free, *held]
        touched = data.draw(st.sets(st.sampled_from(known))) if known else set()
        to_hold = data.draw(st.sets(st.sampled_from(free))) if free else set()
        released = sorted(data.draw(st.sets(st.sampled_from(held)))) if held else []
        for policy in policies:
            stored(policy, new)
            policy.touch(sorted(touched))
            policy.release(released)
        free = [key for key in [*free, *new, *released] if key not in to_hold]
        held = [key for key in [*held, *to_hold] if key not in released]
        for policy in policies:
            policy._check([*free, *held], set(held))
        assert list(at_once._ghost_recent) == list(one_by_one._ghost_recent)
        assert list(at_once._ghost_frequent) == list(one_by_one._ghost_frequent)


def test_free_slots_leave_in_ascending_order() -> None:
    slots = FreeSlots(6)
    assert slots.take(6) == [0, 1, 2, 3, 4, 5]
    slots.put([5, 2, 4])
    slots._check(used=[0, 1, 3])
    assert slots.take(2) == [2, 4]
    slots.put([4])
    slots._check(used=[0, 1, 2, 3])
    assert slots.take(1) == [4]
    slots.reset()
    slots._check(used=[])
    assert slots.take(4) == [0, 1, 2, 3]
    slots._check(used=[0, 1, 2, 3])
    slots.put([1])
    assert slots.take(3) == [1, 4, 5]


@dataclass
class Model:
    """What the manager should know of one chunk, in sets of blocks."""

    slot: int
    written: int = 0
    storing: int = 0
    loads: int = 0

    @property
    def busy(self) -> bool:
        return bool(self.loads or self.storing)


KEYS = [bytes([i]) for i in range(7)]
key_lists = st.lists(st.sampled_from(KEYS), min_size=1, max_size=4, unique=True)
masks = st.lists(st.integers(1, 7), min_size=5, max_size=5)


class ManagerMachine(RuleBasedStateMachine):
    """Every operation in any order; the manager's answers are compared with the model's."""

    @initialize(num_chunks=st.integers(2, 5), policy=st.sampled_from(["lru", "arc", SIEVEPolicy]))
    def start(self, num_chunks: int, policy: PolicyChoice) -> None:
        self.manager = CPUOffloadingManager(num_chunks, policy, 3, enable_events=True)
        self.lru = policy == "lru"
        self.live: dict[bytes, Model] = {}
        self.old: dict[bytes, list[Model]] = defaultdict(list)
        self.order: list[bytes] = []  # by last use, least recent first (exact for LRU)
        self.loads: list[list[bytes]] = []
        self.stores: list[list[bytes]] = []
        self.events: list[OffloadingEvent] = []

    def recent(self, keys: list[bytes]) -> None:
        for key in reversed(keys):
            if key in self.order:
                self.order.remove(key)
            if key in self.live:
                self.order.append(key)

    def record(self, keys: list[bytes], removed: bool) -> None:
        if keys:
            self.events.append(OffloadingEvent(tuple(keys), removed))

    def everything(self) -> list[Model]:
        return [*self.live.values(), *(m for ms in self.old.values() for m in ms if m.busy)]

    @rule(keys=key_lists, blocks=masks)
    def look_up(self, keys: list[bytes], blocks: list[int]) -> None:
        written = [self.live[key].written if key in self.live else 0 for key in keys]
        found = [bool(mask) for mask in written]
        assert self.manager.lookup(keys) == [*found, False].index(False)
        wanted = blocks[: len(keys)]
        covered = [w & mask == w for w, mask in zip(wanted, written, strict=True)]
        assert self.manager.lookup(keys, wanted) == [*covered, False].index(False)

    @rule(keys=key_lists)
    def touch(self, keys: list[bytes]) -> None:
        self.manager.touch(keys)
        self.recent(keys)

    @rule(keys=key_lists, blocks=masks, whole=st.booleans())
    def store_at_once(self, keys: list[bytes], blocks: list[int], whole: bool) -> None:
        before = len(self.stores)
        self.prepare_store(keys, blocks, whole)
        if len(self.stores) > before:
            self.end_store(self.stores.pop(), success=True)

    @rule(keys=key_lists, blocks=masks, whole=st.booleans())
    def prepare_store(self, keys: list[bytes], blocks: list[int], whole: bool) -> None:
        offered = dict(zip(keys, [7] * 5 if whole else blocks, strict=False))
        output = self.manager.prepare_store(keys, None if whole else list(offered.values()))
        new = [key for key in keys if key not in self.live]
        free = self.manager.num_chunks - len(self.everything())
        idle = [key for key in self.order if not self.live[key].busy]
        candidates = [key for key in idle if key not in keys]
        num_evicted = max(0, len(new) - free)
        if num_evicted > len(candidates):
            assert output is None
            return
        assert output is not None
        assert len(set(output.evicted_keys)) == num_evicted
        assert set(output.evicted_keys) <= set(candidates)
        if self.lru:
            assert list(output.evicted_keys) == candidates[:num_evicted]
        for key in output.evicted_keys:
            del self.live[key]
            self.order.remove(key)
        self.record(list(output.evicted_keys), removed=True)

        fresh = output.store_spec.fresh
        assert fresh is not None
        slots = output.store_spec.slot_ids.tolist()
        answers = {
            key: (mask, slot, bool(flag))
            for key, mask, slot, flag in zip(
                output.keys_to_store, output.blocks, slots, fresh, strict=True
            )
        }
        assert list(answers) == [key for key in keys if key in answers]
        for key in keys:
            chunk = self.live.get(key)
            missing = offered[key] & ~(chunk.written if chunk else 0)
            waits = bool(missing and chunk and chunk.storing)
            assert (key in output.pending_keys) == waits
            assert (key in answers) == (bool(missing) and not waits)
            if key in answers:
                mask, slot, flag = answers[key]
                assert (mask, flag) == (missing, chunk is None)
                if chunk is None:
                    assert slot not in {m.slot for m in self.everything()}, "slot in use"
                    chunk = self.live[key] = Model(slot)
                assert slot == chunk.slot
                chunk.storing = mask
        self.recent(keys)
        if answers:
            self.stores.append(list(answers))

    @precondition(lambda self: self.stores)
    @rule(data=st.data(), success=st.booleans())
    def complete_store(self, data: st.DataObject, success: bool) -> None:
        job = self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1)))
        self.end_store(job, success)

    def end_store(self, job: list[bytes], success: bool) -> None:
        self.manager.complete_store(job, success)
        stored = []
        for key in job:
            old = [m for m in self.old[key] if m.storing]
            if old:
                old[0].storing = 0
                continue
            chunk = self.live[key]
            mask, chunk.storing = chunk.storing, 0
            if not chunk.written and success:
                stored.append(key)
            elif not chunk.written:
                del self.live[key]
                self.order.remove(key)
            chunk.written |= mask if success else 0
        self.record(stored, removed=False)

    @precondition(lambda self: any(chunk.written for chunk in self.live.values()))
    @rule(data=st.data())
    def load_written(self, data: st.DataObject) -> None:
        ready = [key for key, chunk in self.live.items() if chunk.written]
        keys = data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=3))
        self.prepare_load(keys, [self.live[key].written for key in keys], False)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=3), blocks=masks, whole=st.booleans())
    def prepare_load(self, keys: list[bytes], blocks: list[int], whole: bool) -> None:
        wanted = [7] * len(keys) if whole else blocks[: len(keys)]
        expected: type[Exception] | None = None
        for key, mask in zip(keys, wanted, strict=True):
            if key not in self.live:
                expected = UnknownKeyError
            elif not self.live[key].written:
                expected = PendingKeyError
            elif mask & ~self.live[key].written:
                expected = UnwrittenBlocksError
            if expected:
                break
        if expected:
            with pytest.raises(expected):
                self.manager.prepare_load(keys, None if whole else wanted)
            return
        spec = self.manager.prepare_load(keys, None if whole else wanted)
        assert spec.slot_ids.tolist() == [self.live[key].slot for key in keys]
        for key in keys:
            self.live[key].loads += 1
        if keys:
            self.loads.append(keys)

    @precondition(lambda self: self.loads)
    @rule(data=st.data())
    def complete_load(self, data: st.DataObject) -> None:
        job = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        self.manager.complete_load(job)
        for key in job:
            old = [m for m in self.old[key] if m.loads]
            chunk = old[0] if old else self.live[key]
            chunk.loads -= 1

    @rule(key=st.sampled_from(KEYS))
    def complete_what_was_not_prepared(self, key: bytes) -> None:
        chunks = [*self.old[key], *([self.live[key]] if key in self.live else [])]
        if not any(m.loads for m in chunks):
            with pytest.raises(ValueError, match="being loaded"):
                self.manager.complete_load([*(self.loads[0] if self.loads else []), key])
        if not any(m.storing for m in chunks):
            with pytest.raises(ValueError, match="being stored"):
                self.manager.complete_store([*(self.stores[0] if self.stores else []), key])

    @rule(dice=st.integers(0, 5))
    def reset(self, dice: int) -> None:
        if dice != 1:  # rarely, or nothing would ever be evicted
            return
        self.manager.reset()
        self.record([key for key, m in self.live.items() if m.written], removed=True)
        for key, chunk in self.live.items():
            self.old[key].append(chunk)
        self.live.clear()
        self.order.clear()

    @rule()
    def take_events(self) -> None:
        assert [(set(e.keys), e.removed) for e in self.manager.take_events()] == [
            (set(e.keys), e.removed) for e in self.events
        ]
        self.events.clear()

    @invariant()
    def agrees(self) -> None:
        self.manager._check()
        assert self.manager.num_used == len(self.everything())
        assert self.manager.num_pinned == sum(m.busy for m in self.everything())
        for key in KEYS:
            state = self.manager.lookup_state(key)
            chunk = self.live.get(key)
            if chunk is None:
                assert state is ChunkState.MISSING
            else:
                assert state is (ChunkState.READY if chunk.written else ChunkState.PENDING)


class TestManagerAgainstItsModel(ManagerMachine.TestCase):
    settings = settings(
        max_examples=2 * settings.default.max_examples, stateful_step_count=60, deadline=None
    )


def landed(policy: ARCPolicy, key: bytes) -> None:
    policy.admit([key])
    policy.land([key])


def evicted(policy: ARCPolicy) -> list[bytes]:
    return policy.evict(1, frozenset(), ())


def test_arc_knows_a_key_as_a_ghost_or_as_a_chunk() -> None:
    policy = ARCPolicy(2)
    landed(policy, b"a")
    policy.touch([b"a"], ())
    assert evicted(policy) == [b"a"]
    assert b"a" in policy._ghost_frequent
    landed(policy, b"a")
    assert b"a" not in policy._ghost_frequent
    policy._check({b"a"}, set())


def test_arc_learns_no_target_beyond_its_capacity() -> None:
    policy = ARCPolicy(2)
    for key in (b"a", b"b", b"c", b"d"):
        landed(policy, key)
        assert evicted(policy) == [key]  # a ghost of what was used once
        landed(policy, key)
        assert evicted(policy) == [key]  # of what was used again: no lesson
        assert policy._target <= 2
    assert policy._target == 2
