"""No call of the scheduler side does more than its keys ask for: steps at n and 2n, not seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from steps import CountedKey, count_steps

from triton_offload.scheduler.chunks import ChunkSpan, runs_to_store
from triton_offload.scheduler.manager import CPUOffloadingManager

A = CountedKey(b"a")


def new_keys(number: int, name: str = "key") -> list[bytes]:
    return [CountedKey(f"{name}{i}".encode()) for i in range(number)]


def store(manager: CPUOffloadingManager, keys: list[bytes]) -> None:
    output = manager.prepare_store(keys)
    assert output is not None
    manager.complete_store(output.keys_to_store)


def full(number: int, policy: str) -> tuple[CPUOffloadingManager, list[bytes]]:
    manager, keys = CPUOffloadingManager(number, policy, 2, enable_events=True), new_keys(number)
    store(manager, keys)
    return manager, keys


def a_life(number: int, policy: str) -> Callable[[], None]:
    """Every call, with all keys at once and one by one."""
    manager, keys = full(number, policy)

    def live() -> None:
        manager.touch(keys)
        manager.prepare_load(keys)
        manager.complete_load(keys)
        for key in keys:
            manager.prepare_load([key])
            manager.touch([key])
        for key in keys:
            manager.complete_load([key])
        for key in new_keys(number, "new"):
            store(manager, [key])
        manager.take_events()
        manager.reset()

    return live


def the_same_key_in_many_loads(number: int, policy: str) -> Callable[[], None]:
    manager, keys = full(1, policy)

    def live() -> None:
        manager.prepare_load(keys * number)
        manager.complete_load(keys * number)
        for _ in range(number):
            manager.prepare_load(keys)
        manager.reset()
        for _ in range(number):
            manager.complete_load(keys)

    return live


def a_key_named_twice(number: int, policy: str) -> Callable[[], None]:
    manager, keys = full(number, policy)

    def live() -> None:
        for call in (manager.prepare_store, manager.complete_store):
            with pytest.raises(ValueError, match="twice"):
                call([*keys, keys[-1]])

    return live


def what_was_not_prepared(number: int, policy: str) -> Callable[[], None]:
    manager, keys = full(number, policy)

    def live() -> None:
        manager.prepare_load(keys)
        with pytest.raises(ValueError, match="being loaded"):
            manager.complete_load([*keys, A])
        with pytest.raises(ValueError, match="being stored"):
            manager.complete_store([*keys, A])

    return live


def a_key_that_many_resets_dropped(number: int, policy: str) -> Callable[[], None]:
    """Its stores are older than its loads, and the loads end first."""
    manager = CPUOffloadingManager(2 * number, policy)

    def live() -> None:
        for _ in range(number):
            manager.prepare_store([A])
            manager.reset()
        for _ in range(number):
            store_latest(manager)
            manager.prepare_load([A])
            manager.reset()
        for _ in range(number):
            manager.complete_load([A])
        manager.complete_store([A])
        for _ in range(number - 1):
            manager.complete_store([A])
        assert manager.num_used == 0

    return live


def store_latest(manager: CPUOffloadingManager) -> None:
    output = manager.prepare_store([A])
    assert output is not None
    manager.complete_store([A], slots=output.store_spec.slot_ids.tolist())


def resets_with_loads_under_way(number: int, policy: str) -> Callable[[], None]:
    manager, keys = full(number, policy)

    def live() -> None:
        manager.prepare_load(keys)
        manager.reset()
        for _ in range(number):
            manager.reset()
        manager.complete_load(keys)

    return live


def stores_while_others_are_under_way(number: int, policy: str) -> Callable[[], None]:
    """Half of the pool is being loaded, and the oldest of it."""
    manager, keys = full(2 * number, policy)
    manager.prepare_load(keys[number:])

    def live() -> None:
        for key in new_keys(number, "new"):
            store(manager, [key])
            manager.touch([key])
        manager.complete_load(keys[number:])
        for key in new_keys(number, "newer"):
            store(manager, [key])

    return live


def partial_chunks_of_others(number: int, policy: str) -> Callable[[], None]:
    """All chunks are partial and being extended, but for one."""
    manager = CPUOffloadingManager(number + 1, policy, 2)
    keys = new_keys(number)
    manager.prepare_store(keys, [1] * number)
    manager.complete_store(keys)
    manager.prepare_store(keys)
    manager.prepare_store([A])

    def live() -> None:
        for _ in range(number):
            manager.touch([A])
            manager.lookup([A])

    return live


def the_runs_of_a_store(number: int, policy: str) -> Callable[[], None]:
    def live() -> None:
        span = ChunkSpan.of(1, 3 * number, 3)
        assert len(runs_to_store(span, range(number), [0b101] * number)) == number + 1

    return live


@pytest.mark.parametrize("policy", ["lru", "arc"])
@pytest.mark.parametrize(
    "make",
    [
        a_life,
        the_same_key_in_many_loads,
        a_key_named_twice,
        what_was_not_prepared,
        a_key_that_many_resets_dropped,
        resets_with_loads_under_way,
        stores_while_others_are_under_way,
        partial_chunks_of_others,
        the_runs_of_a_store,
    ],
)
def test_twice_as_many_are_twice_the_steps(
    make: Callable[[int, str], Callable[[], None]], policy: str
) -> None:
    few, many = (count_steps(make(number, policy)) for number in (60, 120))
    assert many < 2.25 * few
