"""Bytes that prove themselves: what is added up, kept, compared, and what becomes of wrong ones."""

from __future__ import annotations

import pickle
import random
import threading

import numpy as np
import pytest
import scenarios
import torch
from gated import GatedDevice
from oracle import World
from prometheus_client import CollectorRegistry

from triton_offload import (
    ChecksumError,
    ChunkSpec,
    KVOffloader,
    LoadStoreSpec,
    PipelineOptions,
    TransferFailedError,
)
from triton_offload.calibration import Path, PathTable
from triton_offload.device import host_pages, host_torch, native
from triton_offload.kernels.sums import multipliers, slot_sums, sum_pages
from triton_offload.kernels.table import ROW_BYTES, PageTable
from triton_offload.metrics import OffloaderCollector
from triton_offload.specs import CPULoadStoreSpec, GPULoadStoreSpec, TransferStatus
from triton_offload.testing import SimulatedDevice
from triton_offload.testing.work import flip_bit
from triton_offload.transfer import layers

POISON = 0xA5
WORD = 1 << 64


def random_caches(*page_bytes, num_blocks=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (num_blocks, size), dtype=torch.uint8, generator=generator)
        for size in page_bytes
    ]


# -- what is added up --


def said_by_the_byte(page: bytes, first_row: int) -> int:
    total = 0
    for i, byte in enumerate(page):
        mixed = (first_row + i // ROW_BYTES + 1) * 0x9E3779B97F4A7C15 % WORD
        multiplier = (mixed ^ mixed >> 32) | 1
        total += byte * 256 ** (i % 8) * multiplier
    return total % WORD


@pytest.mark.parametrize("page_bytes", [1, 7, 8, 100, 1023, 1024, 1025, 3000])
def test_a_sum_is_that_of_weighted_bytes(page_bytes):
    (pages,) = random_caches(page_bytes, num_blocks=3)
    found = sum_pages(pages.numpy(), 5).view(np.uint64).tolist()
    assert found == [said_by_the_byte(bytes(page.tolist()), 5) for page in pages]


def test_multipliers_are_odd_and_differ():
    found = multipliers(0, 1 << 16).view(np.uint64)
    assert (found % 2 == 1).all()
    assert len(np.unique(found)) == len(found)
    assert np.array_equal(multipliers(7, 9), multipliers(0, 16)[7:])


def test_every_bit_counts():
    """A flip of bit b of a word adds 2**b times an odd number, of which no multiple is 0."""
    (page,) = random_caches(1032, num_blocks=1)
    before = sum_pages(page.numpy(), 0)
    for bit in range(8):
        flipped = page.repeat(1032, 1)
        flipped.diagonal()[:] ^= 1 << bit
        assert (sum_pages(flipped.numpy(), 0) != before).all()


def test_rows_pages_and_tensors_that_change_places_are_noticed():
    a, b = random_caches(2048, 2048, num_blocks=1)
    table = PageTable([a, b])
    slot = torch.cat([a[0], b[0]]).numpy()
    (sum_of_both,) = slot_sums(table, slot)
    for first, second in ((0, 2048), (0, 1024), (1024, 3072)):
        moved = slot.copy()
        moved[first : first + 1024] = slot[second : second + 1024]
        moved[second : second + 1024] = slot[first : first + 1024]
        assert slot_sums(table, moved)[0] != sum_of_both


def test_rows_are_numbered_through_the_cache_for_every_table_of_its_pages():
    table = PageTable(random_caches(1024, 1025, 8, 3), 2).group([(0, 1024), (1, 1025), (3, 3)])
    for each in (table, table.packed()):
        assert [page.first_row for page in each.pages] == [0, 1, 4]


# -- on the host device --


def test_what_passes_in_parts_adds_up_to_the_whole():
    """Of tensors 0 and 3, and of 1 and 2: in neither do the rows' numbers follow each other."""
    sizes = (1024, 3000, 8, 2048)
    table = PageTable(random_caches(*sizes, num_blocks=8), 1)
    blocks, slots = torch.arange(4), torch.zeros((4, table.slot_bytes), dtype=torch.uint8)

    def passed(part: PageTable) -> torch.Tensor:
        sums = torch.zeros(4, dtype=torch.int64)
        host_pages.gather(part, blocks, slots, blocks, 0, sums=sums)
        return sums

    whole = passed(table)
    parts = [table.group([(i, sizes[i]) for i in members]) for members in ((0, 3), (1, 2))]
    assert torch.equal(sum(map(passed, parts)), whole)
    assert whole.tolist() == [int(slot_sums(table, slot)[0]) for slot in slots.numpy()]


@pytest.fixture(params=["C", "C, by threads", "numpy", "torch"])
def by(request, monkeypatch):
    if request.param == "C, by threads":
        monkeypatch.setattr(host_pages, "_CALL_BYTES", 10_000)
        monkeypatch.setattr(host_pages, "_THREAD_BYTES", 1)
        monkeypatch.setattr(host_pages, "_TAKE_BYTES", ROW_BYTES)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    elif request.param != "C":
        monkeypatch.setattr(native, "load", lambda: native.Native(None, "switched off"))
    if request.param == "torch":
        monkeypatch.setattr(host_torch, "_SMALL_BYTES", 0)
        monkeypatch.setattr(host_torch, "_SUMMED_BYTES", 4096)


@pytest.mark.parametrize("pages", [(1024,), (16, 8), (2048, 1536), (3, 1031), (4104, 12)])
@pytest.mark.parametrize("in_order", [(False, False), (True, False), (False, True), (True, True)])
def test_what_passes_is_added_up(pages, in_order, by):
    rng = random.Random(0)
    for span, first, count in [(1, 0, 9), (3, 2, 11), (4, 1, 2)]:
        caches = random_caches(*pages, num_blocks=32)
        table = PageTable(caches, span)
        blocks = list(range(4, 4 + count)) if in_order[0] else rng.sample(range(32), count)
        num_chunks = -(-(first + count) // span)
        chunks = list(range(num_chunks)) if in_order[1] else rng.sample(range(16), num_chunks)
        slots = torch.full((16, table.slot_bytes + 8), POISON, dtype=torch.uint8)
        ids = torch.tensor(blocks), slots, torch.tensor(chunks), first
        expected = np.full(count, 3)
        for cache, page in zip(caches, table.pages, strict=True):
            expected += sum_pages(cache[blocks].numpy(), page.first_row)
        plain = slots.clone()
        host_pages.gather(table, ids[0], plain, ids[2], first)
        sums = torch.full((count,), 3)
        host_pages.gather(table, *ids, sums=sums)
        assert sums.tolist() == expected.tolist()  # added, not put there
        assert torch.equal(slots, plain)
        before = [cache.clone() for cache in caches]
        for cache in caches:
            cache.fill_(POISON)
        sums.fill_(3)
        host_pages.scatter(table, *ids, sums=sums)
        assert sums.tolist() == expected.tolist()
        for cache, was in zip(caches, before, strict=True):
            wanted = torch.full_like(cache, POISON)
            wanted[blocks] = was[blocks]
            assert torch.equal(cache, wanted)


# -- a flipped bit --


def flip(slots: torch.Tensor, slot: int, place: int, bit: int) -> None:
    slots[slot, place] ^= 1 << bit


def find_flips(path: str, trials: int, seed: int) -> int:
    """How many of so many flipped bits, anywhere in the slots of a load, made it fail."""
    rng, found = random.Random(seed), 0
    caches = random_caches(2048, 48, 5, num_blocks=8, seed=seed)
    keys = [b"a", b"b"]
    with KVOffloader(caches, "16KiB", 2, path=path, verify="load") as offloader:
        slots = offloader._pool.slots
        for _ in range(trials):
            offloader.store(keys, [0, 1, 2, 3]).wait()
            key = rng.choice(keys)
            slot = offloader._manager._slot_of[offloader._reader.keys([key], 0)[0]]
            flip(slots, slot, rng.randrange(2 * (2048 + 48 + 5)), rng.randrange(8))
            job = offloader.load(keys, [4, 5, 6, 7])
            job.block()
            error = job.result.error
            found += isinstance(error, ChecksumError) and error.slot_ids == (slot,)
            assert offloader.lookup([key]) == 0  # dropped, so that it is stored anew
        assert offloader.stats().load.wrong_chunks == found
        assert offloader.lookup([*keys]) == int(key == b"b")
    return found


@pytest.mark.parametrize("path", ["zero_copy", "staged"])
def test_a_flipped_bit_anywhere_in_a_slot_is_found(path):
    assert find_flips(path, 150, 0) == 150


@pytest.mark.deep
@pytest.mark.parametrize("path", ["zero_copy", "staged"])
def test_ten_thousand_flipped_bits_are_found(path):
    assert find_flips(path, 10_000, 1) == 10_000


@pytest.mark.parametrize("path", ["zero_copy", "staged"])
def test_a_load_by_layers_is_proved_as_a_whole(path, monkeypatch):
    """In several bands, none of which is all that was stored of a block."""
    monkeypatch.setattr(layers, "LEAST_BYTES", 1)
    caches = [torch.randint(0, 256, (16, 512), dtype=torch.uint8) for _ in range(6)]
    with KVOffloader(caches, "64KiB", 2, path=path, verify="load") as offloader:
        offloader.store([b"a", b"b"], [0, 1, 2, 3]).wait()
        job = offloader.load([b"a", b"b"], [4, 5, 6, 7], layers=6)
        assert job.wait().success
        assert all(torch.equal(cache[4:8], cache[:4]) for cache in caches)
        flip_bit(offloader._pool.slots[1], random.Random(0))
        job = offloader.load([b"a", b"b"], [8, 9, 10, 11], layers=6)
        with pytest.raises(TransferFailedError) as failed:
            job.wait()
        assert isinstance(failed.value.__cause__, ChecksumError)
        assert offloader.lookup([b"a", b"b"]) == 1


SMALL = PipelineOptions(path=Path.STAGED, buffer_bytes=128, max_indices=32, verify="load")


def finds_a_flip_on_the_way(seed: int) -> bool:
    """Of a store and a load of the same chunks, one copy of one of the two."""
    with SimulatedDevice(seed) as device:
        pages = device.empty(8 * 16).view(8, 16)
        pages.random_(generator=torch.Generator().manual_seed(seed))
        with KVOffloader([pages], "1KiB", 2, device=device, options=SMALL) as offloader:
            stores = seed % 2 == 0
            if stores:
                device.faults.flip_bit("copy")
            stored = offloader.store([b"a", b"b"], [0, 1, 2, 3])
            stored.wait()
            if not stores:
                device.faults.flip_bit("copy")
            job = offloader.load([b"a", b"b"], [4, 5, 6, 7])
            job.block()
            assert device.faults.num_struck == 1
            return isinstance(job.result.error, ChecksumError)


def test_a_bit_that_flips_during_a_copy_is_found():
    assert all(map(finds_a_flip_on_the_way, range(100)))


@pytest.mark.deep
def test_ten_thousand_bits_that_flip_during_a_copy_are_found():
    assert sum(map(finds_a_flip_on_the_way, range(10_000))) == 10_000


# -- what is kept, and compared --


@pytest.fixture
def offloader():
    caches = random_caches(1024, 24)
    with KVOffloader(caches, "64KiB", 4, verify="load") as offloader:
        yield offloader


def slot_of(offloader: KVOffloader, key: bytes) -> int:
    return int(offloader._manager._slot_of[offloader._reader.keys([key], 0)[0]])


def test_what_is_whole_loads(offloader):
    keys = [b"a", b"b", b"c"]
    offloader.store(keys, list(range(10))).wait()
    offloader.load(keys, list(range(10))).wait()
    assert offloader.stats().load.wrong_chunks == 0


def test_chunks_may_be_partial_extended_and_loaded_in_part(offloader):
    offloader.store([b"a"], [1, 2], first_block=1).wait()
    offloader.store([b"a", b"b"], [0, 1, 2, 3, 4, 5]).wait()
    offloader.load([b"a"], [9, 8], first_block=2).wait()
    flip(offloader._pool.slots, slot_of(offloader, b"a"), 3 * 1024, 0)  # of its last block
    offloader.load([b"a"], [9, 8, 7], first_block=0).wait()
    with pytest.raises(TransferFailedError) as caught:
        offloader.load([b"a"], [9], first_block=3).wait()
    assert isinstance(caught.value.__cause__, ChecksumError)


def test_only_the_wrong_chunk_is_dropped(offloader):
    keys = [b"a", b"b", b"c"]
    offloader.store(keys, list(range(12))).wait()
    wrong = slot_of(offloader, b"b")
    flip(offloader._pool.slots, wrong, 5, 5)
    result = offloader.load(keys, list(range(12)))
    result.block()
    assert result.result.status is TransferStatus.FAILED
    assert result.result.error.slot_ids == (wrong,)
    assert [offloader.lookup([key]) for key in keys] == [1, 0, 1]
    offloader._check()
    offloader.store(keys, list(range(12))).wait()
    offloader.load(keys, list(range(12))).wait()


def test_a_wrong_chunk_that_others_load_goes_with_the_last_of_them():
    device = GatedDevice()
    options = PipelineOptions(verify="load")
    with KVOffloader(random_caches(64), "4KiB", 1, device=device, options=options) as offloader:
        offloader.store([b"a"], [0]).wait()
        flip(offloader._pool.slots, 0, 3, 3)
        device.gate.clear()
        jobs = [offloader.load([b"a"], [block]) for block in (1, 2, 3)]
        device.gate.set()
        for job in jobs:
            job.block()
        assert all(isinstance(job.result.error, ChecksumError) for job in jobs)
        assert offloader.lookup([b"a"]) == 0
        assert offloader.stats().num_used == 0
        offloader._check()


def test_wrong_chunks_are_counted(offloader):
    offloader.store([b"a", b"b"], list(range(8))).wait()
    for key in (b"a", b"b"):
        flip(offloader._pool.slots, slot_of(offloader, key), 0, 0)
    offloader.load([b"a", b"b"], list(range(8))).block()
    stats = offloader.stats()
    assert (stats.load.wrong_chunks, stats.load.failures) == (2, {"ChecksumError": 1})
    registry = CollectorRegistry()
    registry.register(OffloaderCollector(offloader))
    labels = {"offloader": "default", "direction": "load"}
    name = "wrong_chunks_total"
    assert registry.get_sample_value(f"triton_offload_{name}", labels) == 2


def test_sums_that_are_only_kept_fail_no_load():
    caches = random_caches(64)
    with KVOffloader(caches, "4KiB", 1, verify="store") as offloader:
        offloader.store([b"a"], [0]).wait()
        flip(offloader._pool.slots, 0, 0, 0)
        offloader.load([b"a"], [1]).wait()
        assert caches[0][1, 0] == caches[0][0, 0] ^ 1


def test_a_slot_that_is_stored_anew_is_proved_by_its_new_sums():
    """Two groups over one pool of one chunk: each evicts the other's."""
    caches = random_caches(64, 32)
    groups = [[0], [0, 1]]
    with KVOffloader(caches, 96, 1, groups=groups, verify="load") as offloader:
        assert offloader.num_chunks == 1
        for turn in range(6):
            offloader.store([b"a"], [turn], group=turn % 2).wait()
            offloader.load([b"a"], [15], group=turn % 2).wait()


class Kept(LoadStoreSpec):
    """A medium that is a list."""

    def __init__(self) -> None:
        self.chunks: list[tuple[bytes, dict[int, int]]] = []


def write_out(src: ChunkSpec, dst: Kept) -> None:
    dst.chunks = [(bytes(chunk.data), dict(chunk.sums)) for chunk in src.chunks]


def read_in(src: Kept, dst: ChunkSpec) -> None:
    for chunk, (data, _) in zip(dst.chunks, src.chunks, strict=True):
        chunk.write(data)


def test_an_export_has_the_sums_and_what_is_imported_is_proved_too():
    caches = random_caches(1024, 24)
    with KVOffloader(caches, "64KiB", 4, verify="load") as offloader:
        offloader.register_worker(ChunkSpec, Kept, write_out)
        offloader.register_worker(Kept, ChunkSpec, read_in)
        offloader.store([b"a"], [3, 1, 2]).wait()
        medium = Kept()
        offloader.export_chunks([b"a"], medium).wait()
        ((data, sums),) = medium.chunks
        table = PageTable(caches, 4)
        found = slot_sums(table, np.frombuffer(data, np.uint8))
        assert sums == dict(enumerate(found[:3].tolist()))
        offloader.reset()
        offloader.import_chunks([b"a"], medium, blocks=[0b111]).wait()
        offloader.load([b"a"], [8, 9, 10]).wait()
        assert torch.equal(caches[0][8:11], caches[0][[3, 1, 2]])
        flip(offloader._pool.slots, slot_of(offloader, b"a"), 1024, 1)
        job = offloader.load([b"a"], [8, 9, 10])
        job.block()
        assert isinstance(job.result.error, ChecksumError)


def test_what_is_imported_stays_proved_when_its_slab_is_stored_to():
    """In slots of a group's own size, of which a slab holds several."""
    caches = random_caches(1024, 64)
    with KVOffloader(caches, "64KiB", 4, groups=[[0], [1]], verify="load") as offloader:
        offloader.register_worker(ChunkSpec, Kept, write_out)
        offloader.register_worker(Kept, ChunkSpec, read_in)
        offloader.store([b"a"], [0, 1, 2, 3], group=1).wait()
        medium = Kept()
        offloader.export_chunks([b"a"], medium, group=1).wait()
    with KVOffloader(caches, "64KiB", 4, groups=[[0], [1]], verify="load") as offloader:
        offloader.register_worker(Kept, ChunkSpec, read_in)
        offloader.import_chunks([b"a"], medium, group=1).wait()
        offloader.store([b"b"], [4, 5, 6, 7], group=1).wait()
        slots = offloader._pool.slots_of(offloader._layout.groups[1].size)
        keys = offloader._manager._slot_of
        assert len(keys) == 2
        slots[:, 5] ^= 4  # in every row that may be a slot of either
        job = offloader.load([b"a"], [8, 9, 10, 11], group=1)
        job.block()
        assert isinstance(job.result.error, ChecksumError)


def test_where_kernels_fail_copies_stand_in_and_are_not_proved():
    """Bytes land all the same; of what no kernel saw there is no sum to compare."""
    device = GatedDevice()
    caches = random_caches(64)
    options = PipelineOptions(path=Path.STAGED, verify="load")
    with KVOffloader(caches, "4KiB", 1, device=device, options=options) as offloader:
        offloader.store([b"a"], [0]).wait()
        offloader.store([b"b"], [1]).wait()
        device.fail_submission = {"gather", "scatter"}
        offloader.store([b"c"], [2]).wait()
        for key, block in ((b"a", 0), (b"c", 2)):
            offloader.load([key], [15]).wait()
            assert torch.equal(caches[0][15], caches[0][block])
        assert offloader.stats().broken_paths == ("staged",)


def test_what_no_kernel_saw_has_no_sum_and_is_not_compared():
    """A slot is stored by a kernel, and then by a copy that stands in for one that failed."""
    device = GatedDevice()
    options = PipelineOptions(path=Path.STAGED, verify="load")
    world = World.build(random_caches(64), options=options, device=device)
    slot = CPULoadStoreSpec([3])
    for block in (1, 2):
        job = world.queue.transfer_async(GPULoadStoreSpec([block]), slot)
        world.queue.wait([job])
        device.fail_submission = {"gather"}
    job = world.queue.transfer_async(slot, GPULoadStoreSpec([9]))
    world.queue.wait([job])
    results = world.queue.get_finished()
    assert [result.success for result in results] == [True] * 3
    assert torch.equal(world.tensors[0][9], world.tensors[0][2])
    world.queue.shutdown()
    world.pool.close()


def test_a_path_by_rule_that_no_kernel_takes_part_in_is_not_taken():
    caches = random_caches(64)
    options = PipelineOptions(paths=PathTable(Path.COPY_ENGINE), verify="load")
    with KVOffloader(caches, "4KiB", 1, options=options) as offloader:
        offloader.store([b"a"], [0]).wait()
        assert list(offloader.stats().store.paths) == ["staged"]


@pytest.mark.parametrize("verify", ["on", True, None, "LOAD"])
def test_what_is_no_choice_is_refused(verify):
    with pytest.raises(ValueError, match=r"verify: expected one of \['off', 'store', 'load'\]"):
        KVOffloader(random_caches(64), "4KiB", verify=verify)


def test_a_path_that_no_kernel_takes_part_in_is_refused():
    with pytest.raises(ValueError, match="path: expected one whose kernels see the bytes"):
        KVOffloader(random_caches(64), "4KiB", path="copy_engine", verify="load")


def test_an_error_survives_its_way_to_another_process():
    error = ChecksumError(tuple(range(10)))
    again = pickle.loads(pickle.dumps(error))
    assert again.slot_ids == error.slot_ids
    assert str(again) == str(error)
    assert "10 chunks" in str(error)
    assert ", ..." in str(error)


# -- in which order --


@pytest.mark.parametrize("seed", range(12))
def test_jobs_on_one_slot_are_proved_in_their_order(seed):
    scenarios.slot_stored_again(seed)


def test_a_load_from_another_thread_is_proved(offloader):
    offloader.store([b"a"], [0, 1, 2, 3]).wait()
    flip(offloader._pool.slots, slot_of(offloader, b"a"), 9, 1)
    errors = []

    def load():
        job = offloader.load([b"a"], [4, 5, 6, 7])
        job.block()
        errors.append(job.result.error)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join(60)
    assert isinstance(errors[0], ChecksumError)


def test_segments_have_sums_of_their_own():
    """Several jobs under way, several segments each, in a ring of ids that is gone round."""
    caches = random_caches(64, num_blocks=64)
    options = PipelineOptions(path=Path.STAGED, buffer_bytes=256, max_indices=24, verify="load")
    keys = [bytes([i]) for i in range(30)]
    with KVOffloader(caches, "8KiB", 1, options=options) as offloader:
        offloader.store(keys, list(range(30))).wait()
        jobs = [offloader.load(keys, list(range(30, 60))) for _ in range(3)]
        for job in jobs:
            job.wait()
        flip(offloader._pool.slots, slot_of(offloader, keys[17]), 1, 1)
        job = offloader.load(keys, list(range(30, 60)))
        job.block()
        assert isinstance(job.result.error, ChecksumError)
        assert [key for key in keys if not offloader.lookup([key])] == [keys[17]]


def test_a_slot_that_two_groups_share_is_proved_for_the_last_of_them():
    """A scheduler of one's own may put chunks of two groups, of other tensors each, into a slot."""
    world = World.build(
        random_caches(64, 32),
        groups=[[(0, 64)], [(1, 32)]],
        options=PipelineOptions(verify="load"),
    )
    slot = CPULoadStoreSpec([3])
    pages = [GPULoadStoreSpec([1], (1, 0)), GPULoadStoreSpec([2], (0, 1))]
    jobs = [world.queue.transfer_async(spec, slot) for spec in pages]
    jobs += [world.queue.transfer_async(slot, spec) for spec in pages]
    world.queue.wait(jobs)
    results = world.queue.get_finished()
    while len(results) < len(jobs):
        results += world.queue.get_finished()
    assert all(result.success for result in results)
    world.queue.shutdown()
    world.pool.close()
