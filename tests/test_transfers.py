"""Every path moves exactly the bytes that the slot format says, and no others."""

from __future__ import annotations

import random

import pytest
import torch
from gated import GatedDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import POISON, World, load_specs, random_pages, sample, storage_of, store_specs

from triton_offload.calibration import Path
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec, TransferStatus
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.ranges import ChunkRanges, whole_chunks

NUM_BLOCKS = 24
NUM_SLOTS = 12


@st.composite
def shapes(draw):
    """(page bytes, stride, offset) of one to four tensors: from byte- to 16-byte-aligned."""
    unit = draw(st.sampled_from([1, 2, 4, 8, 16]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        page = unit * draw(st.integers(1, 9))
        rows.append((page, page + unit * draw(st.integers(0, 3)), unit * draw(st.integers(0, 3))))
    return rows


@pytest.mark.parametrize("path", Path)
@settings(max_examples=60, deadline=None)
@given(
    shapes=shapes(),
    blocks_per_chunk=st.integers(1, 4),
    row_gap=st.sampled_from([0, 0, 5, 16]),
    seed=st.integers(0, 2**32),
)
def test_random_jobs_move_exactly_their_bytes(path, shapes, blocks_per_chunk, row_gap, seed):
    rng = random.Random(seed)
    tensors = [random_pages(NUM_BLOCKS, *shape, seed + i) for i, shape in enumerate(shapes)]
    groups = [[(i, shape[0]) for i, shape in enumerate(shapes)]]
    if len(shapes) > 1:  # two more groups overlay the same tensors, one with smaller pages
        groups.append([(len(shapes) - 1, shapes[-1][0])])
        groups.append([(i, max(1, shape[0] - 1)) for i, shape in enumerate(shapes[:-1])])
    slot_bytes = blocks_per_chunk * sum(shape[0] for shape in shapes)
    world = World.build(
        tensors,
        blocks_per_chunk=blocks_per_chunk,
        groups=groups,
        num_slots=NUM_SLOTS,
        # two chunks per segment, so that rings wrap; ids for few segments, so that they wait
        options=PipelineOptions(path=path, buffer_bytes=2 * slot_bytes, max_indices=64),
        row_gap=row_gap,
    )
    pool = world.pool.slots
    try:
        for _ in range(6):
            group = rng.randrange(len(groups))
            first = rng.randrange(2 * blocks_per_chunk)
            count = rng.randrange(NUM_BLOCKS // 2)
            inside = first % blocks_per_chunk
            chunks = min(NUM_SLOTS, -(-(inside + count) // blocks_per_chunk) if count else 0)
            count = min(count, max(0, chunks * blocks_per_chunk - inside))
            blocks = sample(rng, NUM_BLOCKS, count, rng.random() < 0.5)
            slots = sample(rng, NUM_SLOTS, chunks, rng.random() < 0.5)
            sources = [storage_of(t).clone() for t in tensors]
            if rng.random() < 0.6:
                fresh = [rng.random() < 0.7 for _ in slots]
                expected = world.after_store(pool, group, blocks, slots, first, fresh)
                job = world.queue.transfer_async(
                    *store_specs(world, group, blocks, slots, first, fresh)
                )
                (result,) = world.finish(job)
                assert torch.equal(pool, expected)
                for tensor, source in zip(tensors, sources, strict=True):
                    assert torch.equal(storage_of(tensor), source)
            else:
                before = pool.clone()
                expected = world.expect_load(group, blocks, slots, first)
                job = world.queue.transfer_async(
                    *load_specs(world, group, blocks, slots, first), expedited=rng.random() < 0.3
                )
                (result,) = world.finish(job)
                for tensor, wanted in zip(tensors, expected, strict=True):
                    assert torch.equal(storage_of(tensor), wanted)
                assert torch.equal(pool, before)
            assert result.status is TransferStatus.SUCCESS, result.error
            table = world.layout.groups[group].table
            assert result.num_bytes == count * table.bytes_per_block
    finally:
        world.close()


@pytest.mark.parametrize("path", Path)
def test_one_job_moves_several_groups_with_a_partial_chunk_each(path):
    tensors = [random_pages(20, 48, 48, 0, 1), random_pages(20, 32, 40, 8, 2)]
    world = World.build(
        tensors,
        blocks_per_chunk=3,
        groups=[[(0, 48)], [(1, 32), (0, 16)]],
        options=PipelineOptions(path=path),
    )
    blocks = [5, 6, 9, 1, 14, 15, 16, 17]
    slots = [7, 2, 11, 3, 0]
    spec = GPULoadStoreSpec(blocks, [4, 4], [2, 4])
    expected = world.pool.slots.clone()
    fresh = [True] * 2
    expected = world.after_store(expected, 0, blocks[:4], slots[:2], 2, fresh)
    expected = world.after_store(expected, 1, blocks[4:], slots[2:4], 4, fresh)
    job = world.queue.transfer_async(spec, CPULoadStoreSpec(slots[:4], fresh=True))
    (result,) = world.finish(job)
    assert result.success
    assert torch.equal(world.pool.slots, expected)
    world.close()


@pytest.mark.parametrize("path", Path)
def test_a_fresh_slot_keeps_no_byte_of_the_chunk_before(path):
    tensors = [random_pages(8, 64, 64, 0, 3), random_pages(8, 32, 32, 0, 4)]
    world = World.build(
        tensors,
        blocks_per_chunk=2,
        groups=[[(0, 64), (1, 32)], [(1, 20)]],
        options=PipelineOptions(path=path),
    )
    full = store_specs(world, 0, [0, 1], [5], 0, True)
    partial = store_specs(world, 1, [3], [5], 1, True)
    world.finish(world.queue.transfer_async(*full), world.queue.transfer_async(*partial))
    expected = torch.zeros_like(world.pool.slots)
    expected = world.after_store(expected, 1, [3], [5], 1, [True])
    assert torch.equal(world.pool.slots, expected)
    world.close()


@pytest.mark.parametrize("path", Path)
def test_a_store_that_failed_leaves_the_clearing_to_the_next(path):
    device = GatedDevice()
    world = World.build(
        [random_pages(8, 64, 64, 0, 3), random_pages(8, 32, 32, 0, 4)],
        groups=[[(0, 64), (1, 32)], [(1, 32)]],
        options=PipelineOptions(path=path),
        device=device,
    )
    world.finish(world.queue.transfer_async(*store_specs(world, 0, [0], [5], 0, True)))
    device.fail_submission = {"gather", "copy_batch", "copy"}
    again = store_specs(world, 1, [3], [5], 0, True)
    (failed,) = world.finish(world.queue.transfer_async(*again))
    assert failed.status is TransferStatus.FAILED
    device.fail_submission = set()
    world.finish(world.queue.transfer_async(*again))
    expected = torch.zeros_like(world.pool.slots)
    expected = world.after_store(expected, 1, [3], [5], 0, [True])
    assert torch.equal(world.pool.slots, expected)
    world.close()


def test_dtypes_and_shapes_do_not_matter():
    tensors = [
        torch.randn(10, 2, 3, dtype=torch.bfloat16),
        torch.randn(10, 5, dtype=torch.float64),
        torch.randint(0, 2, (10, 7)).bool(),
    ]
    before = [t.clone() for t in tensors]
    world = World.build(tensors)
    world.finish(
        world.queue.transfer_async(GPULoadStoreSpec([1, 8, 4]), CPULoadStoreSpec([0, 1, 2]))
    )
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(POISON & 1)
    world.finish(world.queue.transfer_async(CPULoadStoreSpec([2, 0]), GPULoadStoreSpec([9, 3])))
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor[[9, 3]].view(torch.uint8), old[[4, 1]].view(torch.uint8))
    world.close()


def test_a_burst_of_jobs_ends_in_order_with_every_ring_wrapped():
    tensors = [random_pages(NUM_BLOCKS, 64, 64, 0, 5)]
    world = World.build(
        tensors,
        num_slots=NUM_BLOCKS,
        options=PipelineOptions(path=Path.STAGED, buffer_bytes=128, num_buffers=2, max_indices=32),
    )
    expected = tensors[0].clone()
    stores = [
        world.queue.transfer_async(GPULoadStoreSpec([b]), CPULoadStoreSpec([b], fresh=True))
        for b in range(NUM_BLOCKS)
        for _ in range(10)
    ]
    loads = [
        world.queue.transfer_async(CPULoadStoreSpec([b]), GPULoadStoreSpec([b]))
        for b in range(NUM_BLOCKS)
    ]
    results = world.finish(*stores, *loads)
    assert [r.job_id for r in results] == stores + loads
    assert all(r.success for r in results)
    assert torch.equal(tensors[0], expected)
    assert torch.equal(world.pool.slots, expected)
    world.close()


def test_a_load_submitted_behind_a_store_of_the_same_slots_reads_what_it_wrote():
    tensors = [random_pages(64, 4096, 4096, 0, 6)]
    world = World.build(tensors, num_slots=32)
    for _ in range(20):
        source = tensors[0][:32].clone()
        world.queue.transfer_async(
            GPULoadStoreSpec(range(32)), CPULoadStoreSpec(range(32), fresh=True)
        )
        load = world.queue.transfer_async(
            CPULoadStoreSpec(range(32)), GPULoadStoreSpec(range(32, 64)), expedited=True
        )
        world.finish(load)
        assert torch.equal(tensors[0][32:], source)
        tensors[0].add_(1)
        world.finish()
    world.close()


@pytest.mark.parametrize("adjacent", [True, False])
def test_many_scattered_chunks_leave_in_batches_of_a_slice(monkeypatch, adjacent):
    slot_bytes = 64 + 32
    monkeypatch.setattr("triton_offload.transfer.ranges.SLICE_BYTES", 5 * slot_bytes)
    world = World.build(
        [random_pages(64, 64, 64, 0, 5), random_pages(64, 32, 48, 8, 6)],
        num_slots=64,
        options=PipelineOptions(path=Path.STAGED, buffer_bytes=32 * slot_bytes),
    )
    batches: list[list[int]] = []
    copy_batch = world.pool.device.copy_batch

    def watched(dst, src, sizes, stream):
        batches.append(sizes.tolist())
        copy_batch(dst, src, sizes, stream)

    monkeypatch.setattr(world.pool.device, "copy_batch", watched)
    blocks = list(range(40))
    slots = list(range(40)) if adjacent else sample(random.Random(0), 64, 40, False)
    expected = world.after_store(world.pool.slots, 0, blocks, slots, 0, [True] * 40)
    world.finish(world.queue.transfer_async(*store_specs(world, 0, blocks, slots, 0, True)))
    assert torch.equal(world.pool.slots, expected)
    loaded = world.expect_load(0, blocks[::-1], slots, 0)
    world.finish(world.queue.transfer_async(*load_specs(world, 0, blocks[::-1], slots, 0)))
    for tensor, wanted in zip(world.tensors, loaded, strict=True):
        assert torch.equal(storage_of(tensor), wanted)
    if adjacent:
        assert batches == []
    else:
        assert sum(map(sum, batches)) == 2 * 40 * slot_bytes
        assert max(map(sum, batches)) == 5 * slot_bytes
    world.close()


def test_batches_leave_alone_what_the_slots_of_partial_chunks_hold(monkeypatch):
    world = World.build(
        [random_pages(32, 16, 16, 0, 5), random_pages(32, 8, 12, 4, 6)],
        blocks_per_chunk=2,
        num_slots=32,
        options=PipelineOptions(path=Path.STAGED, buffer_bytes=16 * 48),
    )
    batches: list[int] = []
    copy_batch = world.pool.device.copy_batch

    def watched(dst, src, sizes, stream):
        batches.append(len(sizes))
        copy_batch(dst, src, sizes, stream)

    monkeypatch.setattr(world.pool.device, "copy_batch", watched)
    world.pool.slots.fill_(POISON)
    # The first and the last of eight chunks lack a block each; no slot is fresh.
    blocks, slots = list(range(3, 17)), [9, 1, 20, 4, 30, 12, 6, 15]
    expected = world.after_store(world.pool.slots, 0, blocks, slots, 1, [False] * 8)
    (result,) = world.finish(
        world.queue.transfer_async(*store_specs(world, 0, blocks, slots, 1, False))
    )
    assert result.success
    assert torch.equal(world.pool.slots, expected)
    assert batches == [6]
    world.close()


def test_no_copy_crosses_a_piece_that_is_pinned_on_its_own():
    world = World.build([random_pages(NUM_BLOCKS, 64, 64, 0, 5)], num_slots=16)
    world.pool.piece_slots = 4
    slots = [2, 3, 4, 5, 6, 7, 8, 12, 13]
    spec = GPULoadStoreSpec(range(9)), CPULoadStoreSpec(slots)
    (run,) = world.layout.plan(Direction.STORE, *spec, 16)
    staging = torch.zeros(9, 64, dtype=torch.uint8)
    start = world.pool.slots.data_ptr()
    copied = []
    for there, _ in whole_chunks(run, world.pool, staging, ChunkRanges.of(run, world.pool)):
        first = (there.data_ptr() - start) // 64
        copied.append(list(range(first, first + len(there))))
    assert copied == [[2, 3], [4, 5, 6, 7], [8], [12, 13]]
    world.close()


# -- past the sizes at which copies are cut, and slots cleared, in parts --

MIB = 1 << 20


def check_store_and_load(world: World, group: int, blocks, slots, first=0, fresh=True) -> None:
    """Nothing but the bytes of these pages is other than before, in the pool and in the cache."""
    flags = [fresh] * len(slots)
    expected = world.after_store(world.pool.slots, group, blocks, slots, first, flags)
    stored = world.queue.transfer_async(*store_specs(world, group, blocks, slots, first, fresh))
    (result,) = world.finish(stored)
    assert result.success, result.error
    assert torch.equal(world.pool.slots, expected)
    back = list(reversed(blocks))
    loaded = world.expect_load(group, back, slots, first)
    (result,) = world.finish(
        world.queue.transfer_async(*load_specs(world, group, back, slots, first))
    )
    assert result.success, result.error
    for tensor, wanted in zip(world.tensors, loaded, strict=True):
        assert torch.equal(storage_of(tensor), wanted)
    assert torch.equal(world.pool.slots, expected)


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize(
    ("page_bytes", "num_chunks"),
    [(8 * MIB + 1, 2), (8 * MIB, 1), (MIB, 9), (MIB, 8)],
    ids=["a column more than a slice", "a slice", "a row more than a slice", "rows of a slice"],
)
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "apart"])
def test_jobs_of_more_than_a_slice_move_exactly_their_bytes(path, page_bytes, num_chunks, adjacent):
    world = World.build(
        [random_pages(num_chunks, page_bytes, page_bytes, 0, 1)],
        num_slots=2 * num_chunks,
        options=PipelineOptions(path=path, buffer_bytes=num_chunks * page_bytes, num_buffers=1),
    )
    world.pool.slots.fill_(POISON)
    slots = range(1, num_chunks + 1) if adjacent else range(0, 2 * num_chunks, 2)
    check_store_and_load(world, 0, list(range(num_chunks)), list(slots))
    world.close()


@pytest.mark.parametrize("path", Path)
@pytest.mark.parametrize("more", [-3, 0, 1], ids=["less", "two", "more"])
def test_a_fresh_slot_of_more_than_a_mebibyte_is_cleared_to_its_end(path, more):
    """A small chunk follows a big one there; then a part of a big one."""
    page_bytes = MIB + more - 8
    world = World.build(
        [random_pages(4, page_bytes, page_bytes, 0, 1), random_pages(4, 8, 8, 0, 2)],
        blocks_per_chunk=2,
        groups=[[(0, page_bytes), (1, 8)], [(1, 8)], [(0, 5)]],
        num_slots=3,
        options=PipelineOptions(path=path, buffer_bytes=1, num_buffers=1),
    )
    whole = store_specs(world, 0, [0, 1], [1], 0, True)
    for group, blocks, first in ((1, [2, 3], 0), (2, [1], 1), (0, [2], 1), (0, [3], 0)):
        world.finish(world.queue.transfer_async(*whole))
        check_store_and_load(world, group, blocks, [1], first)
    assert not world.pool.slots[0].any()
    assert not world.pool.slots[2].any()
    world.close()


def test_scattered_slots_of_more_than_a_slice_are_cut(monkeypatch):
    for module in ("ranges", "lane_streams"):
        monkeypatch.setattr(f"triton_offload.transfer.{module}.SLICE_BYTES", 100)
    world = World.build(
        [random_pages(8, 64, 64, 0, 5), random_pages(8, 48, 48, 0, 6)],
        num_slots=16,
        options=PipelineOptions(path=Path.STAGED, buffer_bytes=8 * 112),
    )
    widths: list[int] = []
    copy = world.pool.device.copy

    def watched(dst, src, stream):
        widths.append(dst.numel())
        copy(dst, src, stream)

    monkeypatch.setattr(world.pool.device, "copy", watched)
    monkeypatch.setattr(world.pool.device, "copy_batch", None)  # never called
    check_store_and_load(world, 0, list(range(8)), list(range(0, 16, 2)))
    assert max(widths) == 100
    world.close()
