"""On a GPU, where there is one: kernels, paths, order, and what a graph capture refuses."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from triton_offload import ChecksumError, KVOffloader
from triton_offload.calibration import Path
from triton_offload.device import device_for
from triton_offload.kernels import pages, reference
from triton_offload.kernels.table import PageTable
from triton_offload.transfer.pipeline import PipelineOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NUM_BLOCKS = 64


def caches(*page_bytes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (NUM_BLOCKS, size), dtype=torch.uint8, generator=generator).cuda()
        for size in page_bytes
    ]


@pytest.mark.parametrize("page_bytes", [1, 24, 577, 1152, 4096, 65536])
@pytest.mark.parametrize("mapped", [False, True], ids=["device", "mapped"])
@pytest.mark.parametrize("blocks_per_chunk", [1, 3])
def test_kernels_equal_the_reference(page_bytes, mapped, blocks_per_chunk):
    table = PageTable(caches(page_bytes, 48), blocks_per_chunk)
    blocks = random.Random(0).sample(range(NUM_BLOCKS), 20)
    shape = (24, table.slot_bytes)
    slots = torch.full(shape, 0xA5, dtype=torch.uint8, device=None if mapped else "cuda")
    slots = slots.pin_memory() if mapped else slots
    expected = torch.full(shape, 0xA5, dtype=torch.uint8, device="cuda")
    pages.gather_pages(table, blocks, slots, first_block=1 % blocks_per_chunk)
    reference.gather_pages(table, blocks, expected, first_block=1 % blocks_per_chunk)
    torch.cuda.synchronize()
    assert torch.equal(slots.cpu(), expected.cpu())
    before = [row.view.clone() for row in table.pages]
    target = list(reversed(blocks))
    pages.scatter_pages(table, target, slots, first_block=1 % blocks_per_chunk)
    torch.cuda.synchronize()
    for row, old in zip(table.pages, before, strict=True):
        wanted = old.clone()
        wanted[target] = old[blocks]
        assert torch.equal(row.view, wanted)


@pytest.mark.parametrize("path", Path)
def test_random_chunks_come_back_as_they_were(path):
    tensors = caches(24, 577, 4096)
    options = PipelineOptions(path=path, buffer_bytes=64 << 10, max_indices=256)
    rng = random.Random(0)
    with KVOffloader(tensors, "8MiB", blocks_per_chunk=3, options=options) as offloader:
        offloader._pool.wait_ready(60)
        assert offloader._pool.pinned
        for step in range(30):
            count, first = rng.randint(1, 30), rng.randrange(3)
            blocks = rng.sample(range(NUM_BLOCKS), 2 * count)
            keys = [b"%d-%d" % (step, i) for i in range(-(-(first + count) // 3))]
            before = [tensor.clone() for tensor in tensors]
            offloader.store(keys, blocks[:count], first_block=first).wait(60)
            offloader.load(keys, blocks[count:], first_block=first).wait(60)
            for tensor, old in zip(tensors, before, strict=True):
                old[blocks[count:]] = old[blocks[:count]]
                assert torch.equal(tensor, old)


@pytest.mark.parametrize("path", ["staged", "zero_copy"])
def test_what_is_loaded_must_add_up_to_what_was_stored(path):
    tensors = caches(24, 577, 4096)
    before = [tensor.clone() for tensor in tensors]
    keys = [b"%d" % i for i in range(8)]
    with KVOffloader(tensors, "8MiB", 3, path=path, verify="load") as offloader:
        offloader._pool.wait_ready(60)
        offloader.store(keys, range(2, 24), first_block=2).wait(60)
        offloader.load(keys, range(30, 52), first_block=2).wait(60)
        for tensor, old in zip(tensors, before, strict=True):
            assert torch.equal(tensor[30:52], old[2:24])
        slot = int(offloader._pool.slots.any(1).nonzero()[0])
        offloader._pool.slots[slot, -1] ^= 0x10
        job = offloader.load(keys, range(30, 52), first_block=2)
        job.block(60)
        assert isinstance(job.result.error, ChecksumError)
        assert job.result.error.slot_ids == (slot,)


@pytest.mark.parametrize("path", Path)
def test_transfers_follow_the_compute_stream_and_it_can_follow_them(path):
    tensors = caches(4096)
    with KVOffloader(tensors, "8MiB", path=path.value) as offloader:
        offloader._pool.wait_ready(60)
        assert offloader._pool.pinned
        for step in range(20):
            torch.cuda._sleep(1_000_000)  # the model is still at work when the job is submitted
            tensors[0][:8] = step
            store = offloader.store([b"%d-%d" % (step, i) for i in range(8)], range(8))
            store.wait_on(torch.cuda.current_stream())
            tensors[0][:8] = 0xA5
            store.wait(60)
            load = offloader.load([b"%d-%d" % (step, i) for i in range(8)], range(8, 16))
            load.wait_on(torch.cuda.current_stream())
            assert bool((tensors[0][8:16] == step).all())
            load.wait(60)


def test_copies_of_rows_and_in_batches_move_these_bytes_and_no_other():
    device = device_for(torch.device("cuda", torch.cuda.current_device()))
    stream, done = device.new_stream("copies"), device.new_event()
    (cache,) = caches(96)
    rows = torch.full((NUM_BLOCKS, 128), 0xA5, dtype=torch.uint8).pin_memory()
    expected = rows.clone()
    device.copy(rows[:, 16:80], cache[:, 32:], stream)
    expected[:, 16:80] = cache[:, 32:].cpu()
    lengths = [7, 1, 16, 3]
    starts = [128 * row + 100 for row in range(len(lengths))]
    sources = [96 * row + 5 for row in (9, 2, 4, 3)]
    device.copy_batch(
        np.array([rows.data_ptr() + start for start in starts]),
        np.array([cache.data_ptr() + start for start in sources]),
        np.array(lengths),
        stream,
    )
    for start, source, length in zip(starts, sources, lengths, strict=True):
        piece = cache.flatten()[source : source + length].cpu()
        expected.view(-1)[start : start + length] = piece
    device.record(done, stream)
    device.synchronize(done, 60)
    assert torch.equal(rows, expected)
    device.close_stream(stream)


def test_a_job_tells_its_bytes_and_its_time_on_the_device():
    tensors = caches(4096)
    with KVOffloader(tensors, "8MiB", path="staged") as offloader:
        job = offloader.store([b"%d" % i for i in range(32)], range(32))
        job.wait(60)
        (result,) = offloader.get_finished()
        assert (result.job_id, result.success) == (job.job_id, True)
        assert result.num_bytes == 32 * 4096
        assert 0 < result.seconds < 60


def test_a_transfer_inside_a_graph_capture_is_refused():
    tensors = caches(4096)
    with KVOffloader(tensors, "8MiB") as offloader:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tensors[0].add_(1)
            with pytest.raises(RuntimeError, match="captures a graph"):
                offloader.store([b"a"], [1])
        offloader.store([b"a"], [1]).wait(60)
