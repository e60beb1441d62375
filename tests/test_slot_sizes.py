"""A KVOffloader whose groups have slots of their own sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triton_offload import KVOffloader, PoolFullError

KIB, MIB = 1 << 10, 1 << 20
PATHS = ["staged", "zero_copy", "copy_engine"]
POISON = 0xEE

# Two small tensors and three large ones; a chunk has two blocks.
PAGES = (16, 24, 96, 128, 96)
GROUPS = [[0, 1], [2, 3, 4]]
SMALL_BYTES, LARGE_BYTES = 2 * 40, 2 * 320
BLOCKS = 48


def test_a_model_of_ten_small_and_thirty_large_tensors_keeps_sixteen_hundred_small_chunks():
    small = [torch.zeros(1640, 16 * KIB, dtype=torch.uint8) for _ in range(10)]
    large = [torch.zeros(2, 64 * KIB, dtype=torch.uint8) for _ in range(30)]
    groups = [list(range(10)), list(range(10, 40))]
    for tensor in small:  # each chunk's first bytes are its own
        tensor[:, :2] = torch.from_numpy(np.arange(1640, dtype=np.uint16).view(np.uint8)).view(
            -1, 2
        )
    with KVOffloader([*small, *large], 256 * MIB, groups=groups, calibration="off") as offloader:
        assert offloader.num_chunks_of(0) == 1632
        assert offloader.num_chunks_of(1) == 136
        assert offloader.num_chunks == 1632
        keys = [b"%d" % i for i in range(1632)]
        for begin in range(0, 1632, 102):
            end = begin + 102
            offloader.store(keys[begin:end], range(begin, end), group=0).wait(60)
        stats = offloader.stats()
        assert (stats.evictions, stats.num_used) == (0, 1632)
        assert stats.used_bytes == 1632 * 160 * KIB > 0.99 * 256 * MIB
        assert offloader.lookup(keys, group=0) == 1632
        offloader.load(keys[-2:], [0, 1], group=0).wait(60)
        assert all(bytes(tensor[1, :2]) == bytes(tensor[1631, :2]) for tensor in small)


def caches(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (BLOCKS, size), dtype=torch.uint8, generator=generator) for size in PAGES
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pool", [3 * LARGE_BYTES, 3 * LARGE_BYTES + 50, 7 * LARGE_BYTES])
def test_bytes_come_back_whatever_slab_was_cut_for_what(path, pool):
    kv = caches(1)
    want = [tensor.clone() for tensor in kv]
    rng = np.random.default_rng(2)
    found = 0
    with KVOffloader(
        kv, pool, 2, groups=GROUPS, path=path, calibration="off", enable_events=True
    ) as offloader:
        for step in range(60):
            group = int(rng.integers(2))
            first = int(rng.integers(0, BLOCKS - 6))
            count = int(rng.integers(1, 6)) if group == 0 else 2
            first -= first % 2
            blocks = np.arange(first, first + count)
            keys = [b"%d" % (block // 2) for block in range(first, first + count, 2)]
            offloader.store(keys, blocks, first_block=first, group=group).wait(60)
            offloader._check()
            assert offloader.lookup(keys, num_blocks=count, first_block=first, group=group) == len(
                keys
            )
            for tensor in kv:
                tensor.fill_(POISON)
            into = rng.permutation(BLOCKS)[:count]
            offloader.load(keys, into, first_block=first, group=group).wait(60)
            for i, tensor in enumerate(kv):
                if i in GROUPS[group]:
                    assert torch.equal(tensor[into], want[i][blocks]), step
                    others = np.setdiff1d(np.arange(BLOCKS), into)
                    assert (tensor[others] == POISON).all()
                else:
                    assert (tensor == POISON).all()
            for tensor, was in zip(kv, want, strict=True):
                tensor.copy_(was)
            found += sum(len(event.keys) for event in offloader.take_events() if event.removed)
    assert found > 5  # slabs have changed hands


def test_of_a_partial_chunk_in_another_sizes_slab_the_rest_is_cleared():
    kv = caches(3)
    with KVOffloader(kv, 2 * LARGE_BYTES, 2, groups=GROUPS, calibration="off") as offloader:
        offloader.store([b"a", b"b"], [0, 1, 2, 3], group=1).wait(60)
        offloader.reset()
        offloader.store([b"c"], [5], group=0).wait(60)
        slot = offloader._pool.slots_of(0)[
            int(
                offloader._pool.slabs.sizes[0].rows(
                    np.array([offloader._manager._slot_of[b"c" + bytes(4)]])
                )[0]
            )
        ]
        own = torch.cat([kv[0][5], torch.zeros(16), kv[1][5], torch.zeros(24)]).byte()
        assert torch.equal(slot, own)


def test_stats_tell_the_sizes_apart():
    kv = caches(4)
    with KVOffloader(kv, 10 * LARGE_BYTES, 2, groups=[[0, 1], [2, 3], [3, 4]]) as offloader:
        slot_bytes = [80, 2 * 224]  # of the second group and of the third
        assert [size.slot_bytes for size in offloader.stats().sizes] == slot_bytes
        slab = offloader._pool.slot_bytes
        offloader.store([b"a"], [0, 1], group=0).wait(60)
        offloader.store([b"a"], [0, 1], group=1).wait(60)
        offloader.store([b"a"], [2, 3], group=2).wait(60)
        stats = offloader.stats()
        assert [size.num_used for size in stats.sizes] == [1, 2]
        assert [size.used_bytes for size in stats.sizes] == [80, 2 * 448]
        assert (stats.num_used, stats.used_bytes) == (3, 80 + 896)
        large_slabs = -(-2 // (slab // 448))
        assert stats.wasted_bytes == slab % 80 + large_slabs * (slab % 448)
        assert stats.host_bytes == offloader._pool.slabs.num_bytes <= 10 * LARGE_BYTES
    closed = offloader.stats()
    assert (closed.host_bytes, closed.used_bytes, closed.wasted_bytes) == (0, 0, 0)


def test_a_pool_that_is_full_of_what_is_in_use_says_so_and_keeps_it():
    kv = caches(6)
    with KVOffloader(kv, 2 * LARGE_BYTES, 2, groups=GROUPS, calibration="off") as offloader:
        offloader.store([b"a"], [0, 1], group=1).wait(60)
        offloader.store([b"b"], [0, 1], group=0).wait(60)
        in_use = [b"a" + bytes([0, 0, 0, 1]), b"b" + bytes(4)]
        offloader._manager.prepare_load(in_use)
        with pytest.raises(PoolFullError, match="room for 1 chunks, got a pool of 2 and 2 chunks"):
            offloader.store([b"c"], [4, 5], group=1)
        offloader._manager.complete_load(in_use)
        assert offloader.lookup([b"a"], group=1) == offloader.lookup([b"b"], group=0) == 1
        offloader.store([b"c"], [4, 5], group=1).wait(60)
        assert offloader.lookup([b"c"], group=1) == 1


def test_groups_are_asked_for_by_their_numbers():
    with KVOffloader(caches(5), 4 * LARGE_BYTES, 2, groups=GROUPS) as offloader:
        for group in (2, -1, True):
            with pytest.raises(ValueError, match="group"):
                offloader.num_chunks_of(group)
        with pytest.raises(ValueError, match=r"host_bytes: .* 640 bytes, got 639"):
            KVOffloader(caches(5), LARGE_BYTES - 1, 2, groups=GROUPS)
