"""A medium of one's own: what its worker is handed, what pins it, and how its jobs end."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from triton_offload.errors import PoolFullError
from triton_offload.job import OffloadJob, TransferFailedError
from triton_offload.kernels.table import PageTable
from triton_offload.medium import ChunkSpec
from triton_offload.offloader import KVOffloader
from triton_offload.scheduler.manager import PendingKeyError, UnknownKeyError, UnwrittenBlocksError
from triton_offload.specs import CPULoadStoreSpec, LoadStoreSpec, TransferResult, TransferStatus
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.transfer.worker import OffloadingWorker

BLOCKS, PER_CHUNK = 24, 2
POISON = 0xA5
SIZES = (64, 8, 24)  # bytes of a page in each tensor


@dataclass(frozen=True)
class Shelf(LoadStoreSpec):
    """A place in a medium made of dicts."""

    kept: dict[tuple[int, bytes], tuple[int, bytes]]


class Medium:
    """Functions that a test can hold back, and what they were called with."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.calls: list[ChunkSpec] = []

    def write_out(self, src: ChunkSpec, dst: Shelf) -> int:
        self.enter(src)
        for chunk in src.chunks:
            dst.kept[src.group, chunk.key] = chunk.blocks, bytes(chunk.data)
        return sum(len(chunk.data) for chunk in src.chunks)

    def read_in(self, src: Shelf, dst: ChunkSpec) -> int:
        self.enter(dst)
        for chunk in dst.chunks:
            chunk.write(src.kept[dst.group, chunk.key][1])
        return 7

    def enter(self, spec: ChunkSpec) -> None:
        self.calls.append(spec)
        self.entered.set()
        assert self.gate.wait(60)


def caches(seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(256, (BLOCKS, size), dtype=torch.uint8, generator=generator) for size in SIZES
    ]


@contextmanager
def offloader_of(
    kv: list[torch.Tensor], num_chunks: int = 8, medium: Medium | None = None, **kwargs
) -> Iterator[KVOffloader]:
    size = num_chunks * PER_CHUNK * sum(SIZES)
    with KVOffloader(kv, size, PER_CHUNK, calibration="off", **kwargs) as offloader:
        if medium is not None:
            offloader.register_worker(ChunkSpec, Shelf, medium.write_out)
            offloader.register_worker(Shelf, ChunkSpec, medium.read_in)
        try:
            yield offloader
        finally:
            if medium is not None:
                medium.gate.set()
    offloader._check()


def poisoned_load(offloader, kv, keys, blocks, **kwargs) -> list[torch.Tensor]:
    """What a load brings, into pages that were poisoned; no other page changes."""
    for tensor in kv:
        tensor.fill_(POISON)
    offloader.load(keys, blocks, **kwargs).wait(60)
    others = [block for block in range(BLOCKS) if block not in blocks]
    assert all((tensor[others] == POISON).all() for tensor in kv)
    return [tensor[list(blocks)].clone() for tensor in kv]


@pytest.mark.parametrize("group", [None, 0, 1])
def test_what_was_exported_is_imported_by_another_offloader_byte_by_byte(group):
    kv, medium, shelf = caches(), Medium(), Shelf({})
    keys, blocks = [b"a", b"b", b"c"], [3, 9, 4, 0, 17, 5]
    groups = None if group is None else [[0, 2], [1]]
    mine = range(3) if groups is None else groups[group]
    before = [kv[i][blocks].clone() for i in mine]
    with offloader_of(kv, medium=medium, groups=groups) as offloader:
        offloader.store(keys, blocks, group=group or 0).wait(60)
        job = offloader.export_chunks(keys, shelf, group=group or 0)
        assert job.wait(60).num_bytes == 3 * PER_CHUNK * sum(SIZES[i] for i in mine)
    assert [key for _, key in shelf.kept] == keys
    assert {mask for mask, _ in shelf.kept.values()} == {0b11}
    kv = caches(seed=4)
    with offloader_of(kv, medium=Medium(), groups=groups) as offloader:
        # What other groups' chunks leave in the slots shows nowhere.
        offloader.store([b"x", b"y"], [1, 2, 3, 4], group=0).wait(60)
        offloader.reset()
        assert offloader.import_chunks(keys, shelf, group=group or 0).wait(60).num_bytes == 7
        assert offloader.lookup(keys, group=group or 0) == 3
        into = [8, 2, 11, 20, 1, 6]
        for tensor in kv:
            tensor.fill_(POISON)
        offloader.load(keys, into, group=group or 0).wait(60)
        for i, was in zip(mine, before, strict=True):
            assert torch.equal(kv[i][into], was)
        again = Shelf({})
        offloader.export_chunks(keys, again, group=group or 0).wait(60)
        assert again.kept == shelf.kept


def test_a_partial_chunk_stays_partial_and_its_other_bytes_are_zeros():
    kv, shelf = caches(), Shelf({})
    want = [tensor[[5, 6, 7]].clone() for tensor in kv]
    with offloader_of(kv, medium=Medium()) as offloader:
        offloader.store([b"old", b"stale"], [0, 1, 2, 3]).wait(60)
        offloader.reset()
        offloader.store([b"a", b"b"], [5, 6, 7], first_block=1).wait(60)
        offloader.export_chunks([b"a", b"b"], shelf).wait(60)
    assert [blocks for blocks, _ in shelf.kept.values()] == [0b10, 0b11]
    rows = np.frombuffer(shelf.kept[0, b"a"][1], np.uint8)
    at = 0
    for tensor, size in zip(want, SIZES, strict=True):
        assert (rows[at : at + size] == 0).all()
        assert bytes(rows[at + size : at + 2 * size]) == bytes(tensor[0].numpy())
        at += 2 * size
    with offloader_of(kv, medium=Medium()) as offloader:
        offloader.import_chunks([b"a", b"b"], shelf, blocks=[0b10, 0b11]).wait(60)
        assert offloader.lookup([b"a", b"b"]) == 2
        assert offloader.lookup([b"a", b"b"], num_blocks=4) == 0
        with pytest.raises(UnwrittenBlocksError):
            offloader.load([b"a"], [1, 2])
        loaded = poisoned_load(offloader, kv, [b"a", b"b"], [9, 8, 12], first_block=1)
        assert all(map(torch.equal, loaded, want))


def test_an_import_adds_the_blocks_that_the_pool_lacks_and_keeps_the_others():
    kv, shelf = caches(), Shelf({})
    with offloader_of(kv, medium=Medium()) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        offloader.export_chunks([b"a"], shelf).wait(60)
    own = [tensor[[4]].clone() for tensor in kv]
    filed = [tensor[[1]].clone() for tensor in kv]
    medium = Medium()
    with offloader_of(kv, medium=medium) as offloader:
        offloader.store([b"a"], [4]).wait(60)  # other bytes under the key, to tell them apart
        medium.gate.clear()
        job = offloader.import_chunks([b"a"], shelf)
        assert medium.entered.wait(60)
        assert medium.calls[0].chunks[0].blocks == 0b10
        assert all(map(torch.equal, poisoned_load(offloader, kv, [b"a"], [7]), own))
        medium.gate.set()
        job.wait(60)
        first, second = 3, 2
        loaded = poisoned_load(offloader, kv, [b"a"], [first, second])
        assert all(torch.equal(x[:1], y) for x, y in zip(loaded, own, strict=True))
        assert all(torch.equal(x[1:], y) for x, y in zip(loaded, filed, strict=True))


def test_a_store_that_adds_blocks_does_not_disturb_an_export():
    kv, shelf, medium = caches(), Shelf({}), Medium()
    with offloader_of(kv, medium=medium) as offloader:
        offloader.store([b"a"], [0]).wait(60)
        medium.gate.clear()
        job = offloader.export_chunks([b"a"], shelf)
        offloader.store([b"a"], [0, 1]).wait(60)  # neither refused nor held up
        medium.gate.set()
        job.wait(60)
        blocks, data = shelf.kept[0, b"a"]
        assert blocks == 0b01
        at = 0
        for size in SIZES:
            assert not any(data[at + size : at + 2 * size])
            at += 2 * size


def test_nothing_is_handed_over_that_the_pool_holds_or_another_job_stores():
    kv, shelf, medium = caches(), Shelf({}), Medium()
    with offloader_of(kv, medium=medium) as offloader:
        offloader.store([b"a", b"b"], [0, 1, 2, 3]).wait(60)
        offloader.export_chunks([b"a", b"b"], shelf).wait(60)
        medium.calls.clear()
        assert offloader.import_chunks([b"a", b"b"], shelf).wait(60).num_bytes == 0
        assert offloader.export_chunks([], shelf).wait(60).num_bytes == 0
        assert medium.calls == []
        offloader.reset()
        medium.gate.clear()
        first = offloader.import_chunks([b"a"], shelf)
        second = offloader.import_chunks([b"a", b"b"], shelf)
        third = offloader.import_chunks([b"a"], shelf)  # which moves nothing itself
        stored = offloader.store([b"a"], [0, 1])
        assert not second.done
        assert not third.done
        assert not stored.done
        with pytest.raises(PendingKeyError):
            offloader.export_chunks([b"a"], shelf)
        with pytest.raises(PendingKeyError):
            offloader.load([b"a"], [0, 1])
        medium.gate.set()
        for job in (first, second, third, stored):
            job.wait(60)
        assert [[chunk.key for chunk in spec.chunks] for spec in medium.calls] == [[b"a"], [b"b"]]


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (OSError("disk is full"), "disk is full"),
        (False, "returned False"),
        ("much", "expected a function that returns"),
        (None, "expected it to write every chunk"),
    ],
)
def test_an_import_that_fails_leaves_nothing_that_could_be_loaded(outcome, message):
    kv = caches()

    def some(src: Shelf, dst: ChunkSpec) -> object:
        if outcome is not None:
            for chunk in dst.chunks:
                chunk.write(bytes(PER_CHUNK * sum(SIZES)))
        else:
            dst.chunks[0].write(bytes(PER_CHUNK * sum(SIZES)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with offloader_of(kv) as offloader:
        offloader.register_worker(Shelf, ChunkSpec, some)
        job = offloader.import_chunks([b"a", b"b"], Shelf({}))
        with pytest.raises(TransferFailedError, match=message):
            job.wait(60)
        assert offloader.lookup([b"a"]) == offloader.lookup([b"b"]) == 0
        stats = offloader.stats()
        assert (stats.imported.jobs, stats.imported.failed, stats.num_used) == (1, 1, 0)
        offloader.store([b"a"], [0, 1]).wait(60)  # the thread and the keys are fit for use
        assert offloader.lookup([b"a"]) == 1


def test_an_import_that_fails_keeps_the_blocks_that_were_there():
    kv = caches()
    want = [tensor[[2]].clone() for tensor in kv]
    with offloader_of(kv) as offloader:
        offloader.register_worker(Shelf, ChunkSpec, lambda src, dst: False)
        offloader.store([b"a"], [2]).wait(60)
        offloader.import_chunks([b"a"], Shelf({})).block(60)
        assert offloader.lookup([b"a"], num_blocks=2) == 0
        assert all(map(torch.equal, poisoned_load(offloader, kv, [b"a"], [5]), want))


def test_an_export_that_fails_leaves_the_chunks_loadable_and_evictable():
    kv = caches()
    with offloader_of(kv, num_chunks=2) as offloader:
        offloader.register_worker(ChunkSpec, Shelf, lambda src, dst: False)
        offloader.store([b"a", b"b"], [0, 1, 2, 3]).wait(60)
        job = offloader.export_chunks([b"a"], Shelf({}))
        with pytest.raises(TransferFailedError, match="False"):
            job.wait(60)
        assert offloader.lookup([b"a", b"b"]) == 2
        offloader.store([b"c", b"d"], [4, 5, 6, 7]).wait(60)


def test_eviction_takes_no_chunk_that_is_exported_and_none_that_is_imported():
    kv, shelf, medium = caches(), Shelf({}), Medium()
    with offloader_of(kv, num_chunks=3, medium=medium) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        offloader.store([b"b"], [2, 3]).wait(60)
        medium.gate.clear()
        slow = offloader.export_chunks([b"a"], shelf)  # the oldest, which would leave first
        with pytest.raises(TimeoutError):
            slow.wait(0.01)
        imported = offloader.import_chunks([b"z"], Shelf({(0, b"z"): (3, bytes(192))}))
        assert offloader.stats().num_pinned == 2
        offloader.store([b"c"], [4, 5]).wait(60)
        assert [offloader.lookup([key]) for key in (b"a", b"b", b"c")] == [1, 0, 1]
        with pytest.raises(PoolFullError):
            offloader.store([b"d", b"e"], [4, 5, 6, 7])
        with pytest.raises(PoolFullError):
            offloader.import_chunks([b"d", b"e"], shelf)
        medium.gate.set()
        slow.wait(60)
        imported.wait(60)
        assert offloader.stats().num_pinned == 0
        offloader.store([b"d", b"e"], [4, 5, 6, 7]).wait(60)


def test_an_export_is_no_use_of_its_chunks():
    kv, shelf = caches(), Shelf({})
    with offloader_of(kv, num_chunks=2, medium=Medium()) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        offloader.store([b"b"], [2, 3]).wait(60)
        offloader.export_chunks([b"a"], shelf).wait(60)
        offloader.store([b"c"], [4, 5]).wait(60)
        assert [offloader.lookup([key]) for key in (b"a", b"b")] == [0, 1]


def test_a_slot_is_not_reused_while_a_function_from_before_a_reset_has_it():
    kv, shelf, medium = caches(), Shelf({}), Medium()
    with offloader_of(kv, num_chunks=2, medium=medium) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        want = b"".join(bytes(tensor[:2].numpy().tobytes()) for tensor in kv)
        medium.gate.clear()
        exported = offloader.export_chunks([b"a"], shelf)
        imported = offloader.import_chunks([b"b"], Shelf({(0, b"b"): (3, bytes(192))}))
        offloader.reset()
        assert offloader.lookup([b"a"]) == 0
        with pytest.raises(PoolFullError):
            offloader.store([b"a"], [4, 5])
        medium.gate.set()
        exported.wait(60)
        imported.wait(60)
        assert shelf.kept[0, b"a"] == (3, want)
        assert offloader.lookup([b"b"]) == 0, "what a reset dropped came back"
        offloader.store([b"a", b"b"], [4, 5, 6, 7]).wait(60)
        offloader._check()


def test_a_job_is_reported_and_counted_as_others_are():
    kv, shelf = caches(), Shelf({})
    with offloader_of(kv, medium=Medium()) as offloader:
        stored = offloader.store([b"a"], [0, 1])
        stored.wait(60)
        out = offloader.export_chunks([b"a"], shelf)
        out.wait(60)
        offloader.reset()
        back = offloader.import_chunks([b"a"], shelf)
        back.wait(60)
        numbers = [result.job_id for result in offloader.get_finished()]
        assert numbers == [stored.job_id, out.job_id, back.job_id]
        stats = offloader.stats()
        assert (stats.store.jobs, stats.load.jobs) == (1, 0)
        assert (stats.exported.jobs, stats.exported.num_bytes) == (1, 192)
        assert (stats.imported.jobs, stats.imported.num_bytes) == (1, 7)
        assert out.source_released


def test_a_job_that_has_not_started_is_cancelled():
    kv, shelf, medium = caches(), Shelf({}), Medium()
    with offloader_of(kv, medium=medium) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        medium.gate.clear()
        running = offloader.export_chunks([b"a"], shelf)
        assert medium.entered.wait(60)
        waiting = offloader.export_chunks([b"a"], shelf)
        assert offloader.cancel(waiting)
        assert not offloader.cancel(running)
        assert waiting.result.status is TransferStatus.CANCELLED
        medium.gate.set()
        running.wait(60)
        assert offloader.stats().num_pinned == 0


def test_a_closing_offloader_waits_for_the_function_and_frees_the_pool_then():
    kv, shelf, medium = caches(), Shelf({}), Medium()
    with offloader_of(kv, medium=medium) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        medium.gate.clear()
        running = offloader.export_chunks([b"a"], shelf)
        assert medium.entered.wait(60)
        queued = offloader.import_chunks([b"b"], Shelf({(0, b"b"): (3, bytes(192))}))
        with pytest.raises(TimeoutError):
            offloader.close(0.01)
        assert not running.done
        medium.gate.set()
        offloader.close(60)
        assert running.result.success
        assert queued.result.success or queued.result.status is TransferStatus.CANCELLED
        for call in (
            lambda: offloader.export_chunks([b"a"], shelf),
            lambda: offloader.import_chunks([b"a"], shelf),
            lambda: offloader.register_worker(ChunkSpec, Shelf, medium.write_out),
        ):
            with pytest.raises(RuntimeError, match="closed"):
                call()


def test_a_function_that_closes_its_offloader_or_waits_for_itself_is_told():
    kv, jobs, go = caches(), [], threading.Event()
    errors: list[str] = []

    def wrong(src: ChunkSpec, dst: Shelf) -> None:
        assert go.wait(60)
        for call in (jobs[0].wait, offloader.close):
            with pytest.raises(RuntimeError) as caught:
                call(1)
            errors.append(str(caught.value))

    with offloader_of(kv) as offloader:
        offloader.register_worker(ChunkSpec, Shelf, wrong)
        offloader.store([b"a"], [0, 1]).wait(60)
        jobs.append(offloader.export_chunks([b"a"], Shelf({})))
        go.set()
        jobs[0].wait(60)
        assert all("can't wait for its own job" in error for error in errors)
        assert len(errors) == 2


def test_chunks_are_nobodys_after_their_job_and_each_is_for_one_way():
    kv, kept = caches(), []

    def out(src: ChunkSpec, dst: Shelf) -> None:
        kept.extend(src.chunks)
        assert src.chunks[0].data.readonly
        with pytest.raises(RuntimeError, match="export_chunks"):
            src.chunks[0].write(bytes(192))

    def back(src: Shelf, dst: ChunkSpec) -> None:
        (chunk,) = dst.chunks
        kept.append(chunk)
        with pytest.raises(RuntimeError, match="import_chunks"):
            _ = chunk.data
        with pytest.raises(ValueError, match="data: expected 192 bytes, got 191"):
            chunk.write(bytes(191))
        with pytest.raises(TypeError, match="data: expected a contiguous buffer of 192 bytes"):
            chunk.write("text")
        assert not chunk.written
        chunk.write(memoryview(bytes(192)))

    with offloader_of(kv) as offloader:
        offloader.register_worker(ChunkSpec, Shelf, out)
        offloader.register_worker(Shelf, ChunkSpec, back)
        offloader.store([b"a"], [0, 1]).wait(60)
        offloader.export_chunks([b"a"], Shelf({})).wait(60)
        offloader.import_chunks([b"b"], Shelf({})).wait(60)
        with pytest.raises(RuntimeError, match="the job of chunk b'a' has ended"):
            _ = kept[0].data
        with pytest.raises(RuntimeError, match="the job of chunk b'b' has ended"):
            kept[1].write(bytes(192))


def test_wrong_arguments_change_nothing():
    kv, shelf = caches(), Shelf({})
    with offloader_of(kv, num_chunks=1, medium=Medium()) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        before = offloader.stats()
        for kinds, error in [
            ((ChunkSpec, ChunkSpec), ValueError),
            ((Shelf, Shelf), ValueError),
            ((CPULoadStoreSpec, Shelf), ValueError),
            ((ChunkSpec, int), TypeError),
            ((ChunkSpec, Shelf), ValueError),  # a second
        ]:
            with pytest.raises(error, match="expected"):
                offloader.register_worker(*kinds, lambda src, dst: None)
        with pytest.raises(TypeError, match="worker"):
            offloader.register_worker(ChunkSpec, LoadStoreSpec, 3)
        with pytest.raises(ValueError, match="num_threads"):
            offloader.register_worker(ChunkSpec, LoadStoreSpec, lambda src, dst: None, 0)
        with pytest.raises(UnknownKeyError, match="nowhere"):
            offloader.export_chunks([b"a", b"nowhere"], shelf)
        for spec in (None, "file", Shelf, CPULoadStoreSpec([0])):
            error = ValueError if isinstance(spec, CPULoadStoreSpec) else TypeError
            with pytest.raises(error, match="expected"):
                offloader.export_chunks([b"a"], spec)
            with pytest.raises(error, match="expected"):
                offloader.import_chunks([b"b"], spec)
        for keys in (b"a", "a", ["a"], 3):
            with pytest.raises(ValueError, match="keys"):
                offloader.export_chunks(keys, shelf)
            with pytest.raises(ValueError, match="keys"):
                offloader.import_chunks(keys, shelf)
        for blocks in ([0], [4], ["1"], [1, 1]):
            with pytest.raises(ValueError, match="blocks"):
                offloader.import_chunks([b"b"], shelf, blocks=blocks)
        with pytest.raises(ValueError, match="group"):
            offloader.export_chunks([b"a"], shelf, group=1)
        with pytest.raises(ValueError, match="keys"):
            offloader.import_chunks([b"b", b"b"], shelf)
        after = offloader.stats()
        assert (after.num_pinned, after.evictions) == (0, before.evictions)
        assert offloader.lookup([b"a"]) == 1, "a call that was refused has evicted"


def test_an_import_without_a_worker_evicts_nothing():
    kv = caches()
    with offloader_of(kv, num_chunks=1) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        with pytest.raises(ValueError, match="registered worker"):
            offloader.import_chunks([b"b"], Shelf({}))
        assert offloader.lookup([b"a"]) == 1


def test_padding_of_pages_is_not_handed_over():
    """Pages of a table that gives each more room than it has bytes, as groups of others do."""
    table = PageTable([torch.zeros(4, 8, dtype=torch.uint8)], 2).group([(0, 5)])
    slots = torch.full((1, 16), POISON, dtype=torch.uint8)
    data = bytes(range(16))
    spec = ChunkSpec.of([b"a"], [0b11], slots, np.array([0]), table, 0, writing=True)
    spec.chunks[0].write(data)
    want = [*data[:5], *[POISON] * 3, *data[8:13], *[POISON] * 3]
    assert slots[0].tolist() == want
    spec = ChunkSpec.of([b"a"], [0b11], slots, np.array([0]), table, 0, writing=False)
    assert [*spec.chunks[0].data] == [0 if byte == POISON else byte for byte in want]


def test_a_fork_is_told_at_once():
    kv = caches()
    with offloader_of(kv, medium=Medium()) as offloader:
        offloader.store([b"a"], [0, 1]).wait(60)
        child = os.fork()
        if not child:
            refused = 0
            for call in (
                lambda: offloader.export_chunks([b"a"], Shelf({})),
                lambda: offloader.import_chunks([b"b"], Shelf({})),
                lambda: offloader.register_worker(Shelf, Shelf, lambda src, dst: None),
            ):
                try:
                    call()
                except RuntimeError:
                    refused += 1
            os._exit(0 if refused == 3 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_threads_that_store_load_export_import_and_reset_see_no_wrong_byte():
    """A small pool, a content for each key, callers that do not wait for each other; then closed
    while jobs are under way."""
    kv, shelf = caches(), Shelf({})
    want = [tensor.clone() for tensor in kv]
    errors: list[BaseException] = []

    def serve(offloader: KVOffloader, number: int) -> None:
        rng, own = random.Random(number), [18 + 2 * number, 19 + 2 * number]
        jobs: list[OffloadJob] = []
        for _ in range(150):
            i = rng.randrange(8)
            key, blocks = b"%d" % i, [2 * i, 2 * i + 1]
            with suppress(UnknownKeyError, PendingKeyError, PoolFullError):
                match rng.choice(["store", "load", "export", "import", "import", "reset"]):
                    case "store":
                        jobs.append(offloader.store([key], blocks))
                    case "load":
                        offloader.load([key], own).wait(60)
                        for tensor, right in zip(kv, want, strict=True):
                            assert torch.equal(tensor[own], right[blocks])
                    case "export":
                        jobs.append(offloader.export_chunks([key], shelf))
                    case "import" if (0, key) in shelf.kept:
                        jobs.append(offloader.import_chunks([key], shelf))
                    case "reset" if rng.random() < 0.2:
                        offloader.reset()
            if jobs and rng.random() < 0.5:
                jobs.pop(rng.randrange(len(jobs))).wait(60)

    def run(offloader: KVOffloader, number: int) -> None:
        try:
            serve(offloader, number)
        except BaseException as error:
            errors.append(error)

    with offloader_of(kv, num_chunks=4, medium=Medium()) as offloader:
        threads = [threading.Thread(target=run, args=(offloader, i)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not errors
        offloader._check()
    stats = offloader.stats()
    assert min(stats.exported.jobs, stats.imported.jobs, stats.load.jobs) > 0
    for (_, key), (_, data) in shelf.kept.items():
        blocks = [2 * int(key), 2 * int(key) + 1]
        assert data == b"".join(right[blocks].numpy().tobytes() for right in want)


class Refusing(OffloadingWorker):
    """Takes no job, and says so only when it is given one."""

    def transfer_async(self, job_id, src, dst, *, expedited=False, stream=None) -> None:
        raise OSError("no such disk")

    def get_finished(self) -> list[TransferResult]:
        return []

    def wait(self, job_ids, timeout=None) -> None: ...

    def cancel(self, job_ids) -> set[int]:
        return set()

    def shutdown(self, timeout=None) -> None: ...


def test_a_job_that_its_worker_refuses_pins_and_keeps_nothing():
    kv = caches()
    with offloader_of(kv) as offloader:
        refusing = Refusing()
        offloader.register_worker(ChunkSpec, Shelf, refusing)
        offloader.register_worker(Shelf, ChunkSpec, refusing)
        offloader.store([b"a"], [0, 1]).wait(60)
        with pytest.raises(OSError, match="disk"):
            offloader.export_chunks([b"a"], Shelf({}))
        with pytest.raises(OSError, match="disk"):
            offloader.import_chunks([b"b"], Shelf({}))
        stats = offloader.stats()
        assert (stats.num_pinned, stats.num_used) == (0, 1)
        offloader._check()
        assert offloader.lookup([b"a"]) == 1


@pytest.mark.parametrize("seed", range(12))
def test_on_the_simulated_device_whatever_it_runs_next(seed):
    """The chunks of many rounds come back out of the medium, in a pool with room for few."""
    shelf, medium = Shelf({}), Medium()
    with SimulatedDevice(seed) as device:
        rng = np.random.default_rng(seed)
        kv = [device.empty(BLOCKS * size).view(BLOCKS, size) for size in (16, 32)]
        content = torch.from_numpy(rng.integers(256, size=(BLOCKS, 48), dtype=np.uint8))
        compute = device.current_stream()

        def write() -> None:
            kv[0].copy_(content[:, :16])
            kv[1].copy_(content[:, 16:])

        device.launch("fill", compute, writes=kv, run=write)
        options = PipelineOptions(buffer_bytes=96)
        with KVOffloader(kv, 3 * 96, 2, device=device, options=options) as offloader:
            offloader.register_worker(ChunkSpec, Shelf, medium.write_out)
            offloader.register_worker(Shelf, ChunkSpec, medium.read_in)
            keys = [b"%d" % i for i in range(6)]
            for i, key in enumerate(keys):
                offloader.store([key], [2 * i, 2 * i + 1]).wait()
                offloader.export_chunks([key], shelf).wait()
            into = list(rng.permutation(BLOCKS))
            for i in rng.permutation(6).tolist():
                if not offloader.lookup([keys[i]]):
                    offloader.import_chunks([keys[i]], shelf).wait()
                where = [int(into.pop()), int(into.pop())]
                job = offloader.load([keys[i]], where)
                job.wait()
                want = content[2 * i : 2 * i + 2]
                assert torch.equal(torch.cat([tensor[where] for tensor in kv], 1), want)
            offloader._check()
        device.check()
