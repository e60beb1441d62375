"""vLLM's manager over slots of several sizes, against a plain account of bytes.

`tests/test_vllm_spec.py` runs this file on the other supported vLLM too.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from test_slabs import places

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, make_offload_key
    from vllm.v1.kv_offload.cpu.common import CPUOffloadingMetrics
    from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy

    from triton_offload.slabs import Slabs
    from triton_offload.vllm.group_slots import GroupSlotManager
    from triton_offload.vllm.lost_chunks import LostChunks

# vLLM's numbers of groups have gaps; two groups have slots of one size.
SIZE_OF_GROUP = {0: 0, 2: 1, 3: 2, 5: 0}
SLABS = Slabs.of(64, 6, [64, 24, 10])  # one, two or six in a slab


class Miser(LRUCachePolicy):  # type: ignore[misc]  # vllm is untyped
    """A policy of a user's, which lets go of no more than two chunks at all."""

    gone = 0

    def evict(self, n: int, protected: set[Any]) -> Any:
        if type(self).gone + n > 2:
            return None
        evicted = super().evict(n, protected)
        type(self).gone += len(evicted or ())
        return evicted


def make(policy: str = "lru", slabs: Slabs = SLABS, **options: Any) -> Any:
    module = __name__ if policy == "Miser" else None
    return GroupSlotManager(
        slabs, SIZE_OF_GROUP, cache_policy=policy, cache_policy_module_path=module, **options
    )


def named(group: int, first: int, count: int = 1) -> list[Any]:
    return [make_offload_key(b"%d" % i, group) for i in range(first, first + count)]


def store(manager: Any, keys: Sequence[Any]) -> Any:
    context = ReqContext("stored")
    output = manager.prepare_store(keys, context)
    if output is not None:
        manager.complete_store(output.keys_to_store, context)
    manager._slots._check()
    return output


def held(manager: Any, keys: Sequence[Any]) -> list[Any]:
    return [key for key in keys if manager.lookup(key, ReqContext("")) is LookupResult.HIT]


# -- what leaves --


def test_one_call_stores_chunks_of_several_groups_or_none() -> None:
    manager = make()
    output = store(manager, [*named(0, 0, 2), *named(2, 0, 3), *named(3, 0, 7)])
    slots = output.store_spec.block_ids.tolist()
    assert SLABS.sizes_of(output.store_spec.block_ids).tolist() == [0] * 2 + [1] * 3 + [2] * 7
    assert len(set(slots)) == 12
    before = held(manager, [*named(0, 0, 2), *named(2, 0, 3), *named(3, 0, 7)])
    assert len(before) == 12
    # Two of the largest and nine of the smallest: slabs of four remain, and all of six are asked.
    manager.prepare_load(named(3, 0), ReqContext("load"))
    assert manager.prepare_store([*named(0, 10, 5), *named(3, 10, 9)], ReqContext("much")) is None
    assert held(manager, before) == before
    manager._slots._check()
    assert manager.prepare_store([*named(0, 10, 4), *named(3, 10, 9)], ReqContext("r")) is not None


def test_chunks_of_a_call_that_are_there_stay() -> None:
    manager = make()
    store(manager, named(2, 0, 12))
    output = store(manager, [*named(2, 0), *named(0, 0, 5)])
    assert output.keys_to_store == named(0, 0, 5)
    assert held(manager, named(2, 0, 12)) == named(2, 0)
    assert store(manager, [*named(2, 0), *named(0, 10, 6)]) is None
    assert held(manager, named(2, 0)) == named(2, 0)


def test_a_slab_with_a_chunk_of_the_call_is_not_emptied() -> None:
    manager = make()
    keys = named(2, 0, 12)  # two to a slab
    store(manager, keys)
    for key in keys[1::2]:
        manager.touch([key], ReqContext("touch"))
    # The first of each of four slabs leaves, and then what is left in one: in the one that was used
    # least lies a chunk that is offered again.
    output = store(manager, [keys[1], *named(0, 0)])
    assert output.evicted_keys == [*keys[0:8:2], keys[3]]
    assert held(manager, keys[1:2]) == keys[1:2]


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_bytes_leave_evenly_whichever_group_was_used_last(policy: str) -> None:
    manager = make(policy)
    store(manager, named(0, 0, 3))
    store(manager, named(3, 0, 18))
    store(manager, named(3, 50, 6))  # a slab of them, and of all the oldest chunk fills one
    assert held(manager, named(0, 0, 3)) == named(0, 1, 2)
    assert len(held(manager, named(3, 0, 18))) == 18


def test_a_policy_that_lets_go_of_less_than_is_idle_loses_nothing() -> None:
    Miser.gone = 0
    manager = make("Miser", enable_events=True)
    keys = [*named(3, 0, 12), *named(0, 0, 4)]
    store(manager, keys)
    list(manager.take_events())
    # Two of the smallest leave, and six have to.
    assert store(manager, named(0, 10)) is None
    assert Miser.gone == 2
    assert held(manager, keys) == keys
    assert list(manager.take_events()) == []
    Miser.gone = -100
    assert store(manager, named(0, 10)).keys_to_store == named(0, 10)


def test_a_store_that_failed_leaves_its_slots_to_any_size() -> None:
    manager = make()
    context = ReqContext("r")
    output = manager.prepare_store(named(3, 0, 36), context)
    assert manager.lookup(named(3, 0)[0], context) is LookupResult.HIT_PENDING
    manager.complete_store(output.keys_to_store, context, success=False)
    assert store(manager, named(0, 0, 6)).evicted_keys == []


def test_chunks_that_could_not_be_loaded_leave_their_slots() -> None:
    manager = make(enable_events=True)
    store(manager, named(3, 0, 6))
    context = ReqContext("r")
    manager.prepare_load(named(3, 0, 2), context)
    lost = LostChunks(manager)
    lost.add(named(3, 0, 2))
    assert lost.drop_idle() == 0
    manager.complete_load(named(3, 0, 2), context)
    assert lost.drop_idle() == 2
    assert held(manager, named(3, 0, 6)) == named(3, 2, 4)
    manager._slots._check()
    assert store(manager, [*named(0, 0, 5), *named(3, 0, 2)]).evicted_keys == []


def test_the_pool_in_use_is_told_in_bytes() -> None:
    manager = make()
    context = ReqContext("r")
    store(manager, named(0, 0, 2))
    manager.prepare_store(named(2, 0, 3), context)
    manager.prepare_load(named(0, 0), context)
    told, pool = manager.get_stats().data["data"], SLABS.num_bytes
    assert told[CPUOffloadingMetrics.CPU_CACHE_USAGE_PERC] == {(): (64 + 72) / pool}
    assert told[CPUOffloadingMetrics.CPU_CACHE_WRITE_USAGE_PERC] == {(): 72 / pool}
    assert told[CPUOffloadingMetrics.CPU_CACHE_READ_USAGE_PERC] == {(): 64 / pool}


def test_what_was_offered_too_seldom_takes_no_room() -> None:
    manager = make(store_threshold=2)
    assert store(manager, named(0, 0, 6)).keys_to_store == []
    assert store(manager, named(0, 0, 6)).keys_to_store == named(0, 0, 6)
    store(manager, named(0, 10))
    # One leaves for the one that was offered twice, and none for the others.
    output = store(manager, [*named(0, 10), *named(3, 0, 7)])
    assert (output.keys_to_store, output.evicted_keys) == (named(0, 10), named(0, 0))


# -- generated runs --


@dataclass
class Account:
    """What is there by the manager's answers alone: bytes by chunk, and who uses them."""

    slabs: Slabs
    bytes_of: dict[int, tuple[int, int]] = field(default_factory=dict)  # by slot
    slot_of: dict[Any, int] = field(default_factory=dict)
    pins: Counter[Any] = field(default_factory=Counter)
    writing: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        for by_slot in places(self.slabs):
            self.bytes_of.update(by_slot)

    def size_of(self, key: Any) -> int:
        return SIZE_OF_GROUP[int.from_bytes(key[-4:], "big")]

    def is_busy(self, key: Any) -> bool:
        return key in self.writing or self.pins[key] > 0

    def room(self, wanted: Collection[Any], staying: Collection[Any]) -> bool:
        """Whether `wanted` fit beside `staying`, wherever these lie."""
        slab_bytes, whole = self.slabs.slab_bytes, self.slabs.num_slabs
        inside: dict[int, list[int]] = {}
        for key in staying:
            slab = self.bytes_of[self.slot_of[key]][0] // slab_bytes
            inside.setdefault(slab, []).append(self.size_of(key))
        free = Counter[int]()
        for sizes in inside.values():
            assert len(set(sizes)) == 1, "a slab is cut by two sizes"
            free[sizes[0]] += self.slabs.sizes[sizes[0]].per_slab - len(sizes)
        needed = 0
        for size, count in Counter(map(self.size_of, wanted)).items():
            more = max(0, count - free[size])
            needed += -(-more // self.slabs.sizes[size].per_slab)
        return needed <= whole - len(inside)

    def check(self) -> None:
        taken = sorted(self.bytes_of[slot] for slot in self.slot_of.values())
        for (_, end), (begin, _) in itertools.pairwise(taken):
            assert end <= begin, "two chunks have the same bytes"


class Run:
    """Random calls as vLLM's scheduler makes them, each checked against the account."""

    def __init__(self, seed: int, policy: str, threshold: int) -> None:
        self.random = random.Random(seed)
        self.manager = make(policy, enable_events=True, store_threshold=threshold)
        self.account = Account(SLABS)
        self.universe = [key for group in SIZE_OF_GROUP for key in named(group, 0, 20)]
        self.known: set[Any] = set()  # by events
        self.stores: list[tuple[list[Any], Any]] = []
        self.loads: list[tuple[list[Any], Any]] = []
        self.lost = LostChunks(self.manager)
        self.refused = 0

    def step(self) -> None:
        actions = [self.store, self.store, self.store, self.end_store, self.end_store]
        actions += [self.load, self.end_load, self.end_load, self.touch]
        actions += [self.reset] * (self.random.random() < 0.05)
        self.random.choice(actions)()
        self.check()

    def some(self, keys: Sequence[Any], most: int) -> list[Any]:
        return self.random.sample(keys, self.random.randint(0, min(most, len(keys))))

    def store(self) -> None:
        account, keys = self.account, self.some(self.universe, self.random.choice((4, 14)))
        context = ReqContext(str(self.random.random()))
        for i, key in enumerate(keys):
            context.set_offload_key_position(key, i)
        before = dict(account.slot_of)
        output = self.manager.prepare_store(keys, context)
        busy = [key for key in before if account.is_busy(key)]
        staying = {*busy, *(key for key in keys if key in before)}
        new = [key for key in keys if key not in before and self.is_counted(key)]
        assert (output is not None) == account.room(new, staying)
        if output is None:
            self.refused += 1
            return
        assert output.keys_to_store == new
        assert set(output.evicted_keys) <= before.keys() - staying
        assert not output.evicted_keys or not account.room(new, before)
        assert len(set(output.evicted_keys)) == len(output.evicted_keys)
        for key in output.evicted_keys:
            del account.slot_of[key]
        account.slot_of.update(zip(new, output.store_spec.block_ids.tolist(), strict=True))
        sizes = SLABS.sizes_of(output.store_spec.block_ids).tolist()
        assert sizes == [account.size_of(key) for key in new]
        account.writing.update(new)
        if new:
            self.stores.append((new, context))
        self.manager.on_request_finished(context)

    def is_counted(self, key: Any) -> bool:
        counts = self.manager.counts
        return counts is None or counts.get(key, 0) >= self.manager.store_threshold

    def end_store(self) -> None:
        if self.stores:
            keys, context = self.stores.pop(self.random.randrange(len(self.stores)))
            success = self.random.random() < 0.8
            self.manager.complete_store(keys, context, success)
            self.account.writing.difference_update(keys)
            for key in keys if not success else ():
                del self.account.slot_of[key]

    def load(self) -> None:
        account = self.account
        keys = self.some([key for key in account.slot_of if key not in account.writing], 5)
        context = ReqContext(str(self.random.random()))
        spec = self.manager.prepare_load(keys, context)
        assert spec.block_ids.tolist() == [account.slot_of[key] for key in keys]
        account.pins.update(keys)
        self.loads.append((keys, context))

    def end_load(self) -> None:
        if self.loads:
            keys, context = self.loads.pop(self.random.randrange(len(self.loads)))
            self.manager.complete_load(keys, context)
            self.manager.on_request_finished(context)
            self.account.pins.subtract(keys)
            if self.random.random() < 0.2:  # it brought other bytes
                self.lost.add(keys)
                self.lost.drop_idle()
                self.account.slot_of = {
                    key: slot
                    for key, slot in self.account.slot_of.items()
                    if key not in keys or self.account.pins[key] > 0
                }
                self.lost.clear()

    def touch(self) -> None:
        self.manager.touch(self.some(self.universe, 6), ReqContext("touch"))

    def reset(self) -> None:
        """Transfers under way are not heard of again."""
        self.manager.reset_cache()
        list(self.manager.take_events())
        self.account = Account(SLABS)
        self.stores, self.loads, self.known = [], [], set()

    def check(self) -> None:
        self.account.check()
        self.manager._slots._check()
        context = ReqContext("")
        for key in self.universe:
            found = self.manager.lookup(key, context)
            if key not in self.account.slot_of:
                assert found is LookupResult.MISS
            elif key in self.account.writing:
                assert found is LookupResult.HIT_PENDING
            else:
                assert found is LookupResult.HIT
        for event in self.manager.take_events():
            if event.removed:
                self.known.difference_update(event.keys)
            else:
                self.known.update(event.keys)
        assert self.known == self.account.slot_of.keys() - self.account.writing


@pytest.mark.parametrize("threshold", [0, 2])
@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_no_byte_is_two_chunks_and_nothing_in_use_leaves(policy: str, threshold: int) -> None:
    refused = 0
    for seed in range(12):
        run = Run(seed, policy, threshold)
        for _ in range(120):
            run.step()
        refused += run.refused
    assert refused >= 10


def test_nearly_all_bytes_are_in_use_before_anything_leaves() -> None:
    """Groups as DeepSeek V4 has them, of 43 layers and four blocks to a chunk."""
    own = [823616, 786176, 1050048, 367168, 689408]
    slabs = Slabs.fit(2 << 30, [4 * num_bytes for num_bytes in own])
    sizes = {group: group for group in range(5)}
    manager = GroupSlotManager(slabs, sizes, cache_policy="lru")
    generator = random.Random(0)
    used = number = 0
    while True:
        groups = [generator.randrange(5) for _ in range(3)]
        keys = [make_offload_key(b"%d" % (number + i), group) for i, group in enumerate(groups)]
        number += 3
        if store(manager, keys).evicted_keys:
            break
        used += sum(4 * own[group] for group in groups)
    assert slabs.num_bytes >= 0.97 * (2 << 30)
    assert used >= 0.95 * (2 << 30)
