"""Policies of the user's: what is taken for one, what may go wrong with one, and SIEVE."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from sieve_policy import SIEVEPolicy, hit_rate

from triton_offload import KVOffloader, PoolFullError
from triton_offload.scheduler.guarded_policy import GuardedPolicy
from triton_offload.scheduler.manager import CPUOffloadingManager
from triton_offload.scheduler.policies import EvictionPolicy, LRUPolicy

A, B, C, D, E = b"a", b"b", b"c", b"d", b"e"


def store(manager: CPUOffloadingManager, keys: Sequence[bytes]) -> tuple[bytes, ...]:
    output = manager.prepare_store(keys)
    assert output is not None
    manager.complete_store(output.keys_to_store)
    manager._check()
    return output.evicted_keys


def state_of(manager: CPUOffloadingManager) -> Any:
    """All that a manager knows, its policy's own apart."""
    free = manager._room._free
    return (
        dict(manager._slot_of),
        dict(manager._partial),
        dict(manager._storing),
        dict(manager._loading),
        manager.num_pinned,
        (free._unused, list(free._returned)),
        list(manager._events or []),
    )


def wrong(method: str, answer: Callable[..., Any]) -> type[SIEVEPolicy]:
    """A SIEVE of which one method does as `answer(policy, *arguments)` does."""
    return type("Wrong", (SIEVEPolicy,), {method: answer})


def raises(policy: SIEVEPolicy, *arguments: Any) -> None:
    raise KeyError("of the policy's own")


# -- what is taken for a policy --


@pytest.mark.parametrize(
    "policy",
    [SIEVEPolicy, lambda capacity: SIEVEPolicy(capacity), partial(SIEVEPolicy)],
    ids=["class", "function", "partial"],
)
def test_a_class_or_a_function_makes_a_policy_of_the_number_of_chunks(policy):
    manager = CPUOffloadingManager(2, policy)
    assert manager._policy._policy._num_chunks == 2
    assert store(manager, [A, B]) == ()
    assert store(manager, [C]) == (B,)


class NoPolicy:
    def __init__(self, capacity: int) -> None:
        pass

    def admit(self, keys: Sequence[bytes]) -> None:
        pass

    def __repr__(self) -> str:
        return "<no policy>"


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        ("fifo", ValueError, "or 'arc', got 'fifo'"),
        (None, TypeError, "of the number of chunks, got an instance of NoneType"),
        (3, TypeError, "of the number of chunks, got an instance of int"),
        (LRUPolicy(4), TypeError, "of the number of chunks, got an instance of LRUPolicy"),
        (SIEVEPolicy(4), TypeError, "of the number of chunks, got an instance of SIEVEPolicy"),
        (NoPolicy, TypeError, "got NoPolicy, which made <no policy> without land, remove, refresh"),
        (lambda: None, TypeError, "got .*<lambda>, which raised TypeError"),
        (lambda capacity: None, TypeError, "got .*<lambda>, which made None without admit, land"),
    ],
    ids=["unknown", "None", "3", "an LRU", "a SIEVE", "no policy", "no argument", "makes None"],
)
def test_what_makes_no_policy_is_refused_in_one_line(policy, error, message):
    with pytest.raises(error, match=f"^policy: expected .*{message}") as caught:
        CPUOffloadingManager(4, policy)
    assert "\n" not in str(caught.value)


def test_what_an_offloader_is_given_is_checked_before_anything_is_allocated():
    with pytest.raises(ZeroDivisionError):
        KVOffloader([torch.zeros(4, 8)], 1 << 20, policy=lambda capacity: 1 // 0)


def test_a_policy_needs_no_check_of_its_own():
    class Plain(SIEVEPolicy):
        _check = None  # type: ignore[assignment]

    manager = CPUOffloadingManager(2, Plain)
    store(manager, [A, B])  # calls the manager's


# -- a policy that misbehaves --


def short(policy: SIEVEPolicy, count: int, protected: Any, busy: Any = ()) -> list[bytes]:
    return SIEVEPolicy.evict(policy, count, protected, busy)[1:]


ANSWERS = {
    "too few": short,
    "too many": lambda policy, count, protected, busy=(): [A, B, C],
    "nothing": lambda policy, count, protected, busy=(): None,
    "a number": lambda policy, count, protected, busy=(): 2,
    "unknown": lambda policy, count, protected, busy=(): [A, b"unknown"],
    "twice": lambda policy, count, protected, busy=(): [A, A],
    "no keys": lambda policy, count, protected, busy=(): [A, []],
    "protected": lambda policy, count, protected, busy=(): [A, D],
    "being loaded": lambda policy, count, protected, busy=(): [A, B],
    "being stored": lambda policy, count, protected, busy=(): [A, E],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_may_not_be_evicted_is_refused_and_nothing_has_changed(name):
    manager = CPUOffloadingManager(6, wrong("evict", ANSWERS[name]), enable_events=True)
    store(manager, [A, b"f", C])
    store(manager, [B, D])
    manager.prepare_load([B])
    manager.prepare_store([E])
    before = state_of(manager)
    expected = r"^policy Wrong: evict: expected 2 different keys that are in the pool, neither "
    for _ in range(2):  # and is asked no more
        with pytest.raises(RuntimeError, match=expected) as caught:
            manager.prepare_store([D, b"x", b"y"])
        assert "\n" not in str(caught.value)
        assert state_of(manager) == before
        manager._check()


METHODS = ["admit", "land", "remove", "refresh", "touch", "evict", "release"]


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_raises_loses_nothing_and_is_named_when_room_is_needed(method):
    manager = CPUOffloadingManager(4, wrong(method, raises))
    store(manager, [A, B])
    manager.prepare_store([C])
    manager.complete_store([C], success=False)
    store(manager, [B, C])
    manager.touch([A])
    manager.prepare_load([A])
    manager.complete_load([A])
    store(manager, [D])
    before = state_of(manager)
    assert manager.lookup([A, B, C, D]) == 4
    with pytest.raises(RuntimeError, match=f"policy Wrong: {method} raised KeyError") as caught:
        manager.prepare_store([E])
    assert isinstance(caught.value.__cause__, KeyError)
    assert state_of(manager) == before
    manager._check()


def test_a_policy_that_failed_is_asked_no_more_until_a_reset_makes_a_new_one():
    asked = []

    class Once(LRUPolicy):
        def touch(self, keys: Sequence[bytes], pending: Any = ()) -> None:
            asked.append("touch")
            raise ZeroDivisionError

    made: list[EvictionPolicy] = []

    def make(capacity: int) -> EvictionPolicy:
        made.append(LRUPolicy(capacity) if made else Once(capacity))
        return made[-1]

    manager = CPUOffloadingManager(2, make)
    store(manager, [A, B])
    manager.touch([A])
    manager.touch([A])
    assert asked == ["touch"]
    with pytest.raises(RuntimeError, match="touch raised ZeroDivisionError"):
        manager.prepare_store([C])
    manager.reset()
    assert len(made) == 2
    store(manager, [A, B])
    assert store(manager, [C]) == (B,)


def test_a_reset_clears_a_policy_and_one_that_cannot_be_cleared_is_made_anew():
    made: list[EvictionPolicy] = []

    class Uncleared(SIEVEPolicy):
        def clear(self) -> None:
            raises(self)

    def make(capacity: int) -> EvictionPolicy:
        made.append(SIEVEPolicy(capacity) if not made else Uncleared(capacity))
        return made[-1]

    for number_made in (1, 3):
        manager = CPUOffloadingManager(2, make)
        store(manager, [A, B])
        manager.reset()
        manager._check()
        assert len(made) == number_made
        store(manager, [A, B])
        assert store(manager, [C]) == (B,)


def test_a_reset_survives_a_policy_that_can_be_made_no_more(monkeypatch):
    made = []

    def make(capacity: int) -> EvictionPolicy:
        made.append(capacity)
        if len(made) > 1:
            raise OSError("no more")
        return LRUPolicy(capacity)

    monkeypatch.setattr(LRUPolicy, "refresh", raises)
    manager = CPUOffloadingManager(2, make)
    store(manager, [A])
    store(manager, [A, B])
    manager.reset()
    assert made == [2, 2]
    store(manager, [A, B])
    with pytest.raises(RuntimeError, match="made raised OSError"):
        manager.prepare_store([C])
    assert manager.lookup([A, B]) == 2


def test_a_policy_gets_copies_of_what_the_manager_goes_on_with():
    class Greedy(LRUPolicy):
        def admit(self, keys: Any) -> None:
            super().admit(keys)
            keys.clear()

        def evict(self, count: int, protected: Any, busy: Any = ()) -> list[bytes]:
            protected.clear()
            return super().evict(count, protected, busy)

    manager = CPUOffloadingManager(2, Greedy)
    assert store(manager, [A, B]) == ()
    assert manager.lookup([A, B]) == 2
    with pytest.raises(RuntimeError, match="admit raised AttributeError"):
        manager.prepare_store([C])


def test_what_is_evicted_is_a_list_of_the_managers_own():
    class Keeps(LRUPolicy):
        def evict(self, *arguments: Any) -> list[bytes]:
            self.kept = super().evict(*arguments)
            return self.kept

    held = {A: 0, B: 1}
    policy = GuardedPolicy(Keeps, 2, held)
    policy.admit([A, B])
    evicted = policy.evict(1, set())
    policy._policy.kept.clear()
    assert evicted == [B]


@pytest.mark.parametrize("method", ["touch", "refresh", "land", "release", "evict"])
def test_an_offloader_survives_its_policy(method):
    """Loads and stores under way end as they would have, no chunk is pinned for ever."""
    caches = [torch.arange(64, dtype=torch.uint8).reshape(8, 8)]
    with KVOffloader(caches, 4 * 8, policy=wrong(method, raises)) as offloader:
        offloader.store([A, B], [0, 1]).wait()
        offloader.store([A, B, C, D], [0, 1, 2, 3]).wait()
        offloader.load([A, B], [4, 5]).wait()
        with pytest.raises(RuntimeError, match=f"^policy Wrong: {method} raised KeyError"):
            offloader.store([E], [6])
        offloader._check()
        assert offloader.stats().num_pinned == 0
        assert offloader.lookup([A, B, C, D]) == 4
        caches[0][4:] = 0
        offloader.load([A, B, C, D], [4, 5, 6, 7]).wait()
        assert torch.equal(caches[0][4:], caches[0][:4])
        with pytest.raises(PoolFullError):
            offloader.store([b"%d" % i for i in range(5)], range(5))
        offloader.reset()
        offloader.store([E], [6]).wait()
        assert offloader.lookup([E]) == 1


# -- SIEVE --


def test_sieve_evicts_what_was_not_used_since_the_hand_came_by():
    policy = SIEVEPolicy(6)
    policy.admit([E, D, C, B, A])  # A is the oldest
    policy.touch([A, C])
    assert policy.evict(2, set()) == [B, D]  # the bits of A and C are cleared, the hand is at E
    policy.touch([A])
    assert policy.evict(1, set()) == [E]
    assert policy.evict(1, set()) == [C]  # and A's once more
    assert policy.evict(1, set()) == [A]


def test_sieve_agrees_with_a_plain_queue_and_its_hand():
    """One key at a time; the queue is a list from the newest to the oldest."""
    dice = random.Random(1)
    policy = SIEVEPolicy(8)
    queue: list[bytes] = []
    used: set[bytes] = set()
    hand = -1
    for _ in range(5000):
        key = b"%d" % int(dice.paretovariate(0.6))
        if key in queue:
            policy.touch([key])
            used.add(key)
            continue
        if len(queue) == 8:
            hand = hand if hand >= 0 else len(queue) - 1
            while queue[hand] in used:
                used.remove(queue[hand])
                hand = hand - 1 if hand else len(queue) - 1
            evicted = queue.pop(hand)
            hand -= 1
            assert policy.evict(1, set()) == [evicted]
        policy.admit([key])
        queue.insert(0, key)
        hand += hand >= 0
        policy._check(queue, set())


def test_sieve_of_chunks_that_one_call_stored_the_last_leaves_first():
    manager = CPUOffloadingManager(4, SIEVEPolicy)
    store(manager, [A, B, C, D])
    assert [store(manager, [b"%d" % i]) for i in range(3)] == [(D,), (C,), (B,)]


def test_sieve_finds_more_than_lru_where_most_is_asked_for_once(monkeypatch):
    monkeypatch.setattr("sieve_policy.NUM_REQUESTS", 200)
    assert hit_rate(SIEVEPolicy) > hit_rate(None)
