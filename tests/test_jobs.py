"""Jobs of KVOffloader: whom they wait for, what cancelling takes back, what a handle keeps."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gated import GatedDevice
from steps import count_calls

import triton_offload.jobs as jobs_module
from triton_offload import KVOffloader, ledger
from triton_offload.errors import TransferFailedError
from triton_offload.specs import TransferResult, TransferStatus
from triton_offload.transfer.pipeline import PipelineOptions

BLOCK = 64
# One segment at a time is queued; what comes after it waits in the backlog.
NARROW = PipelineOptions(window_bytes=1)


@pytest.fixture
def device():
    device = GatedDevice()
    yield device
    device.gate.set()


def pages(num_blocks: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(256, (num_blocks, BLOCK), dtype=torch.uint8, generator=generator)


@contextmanager
def offloader_on(device, kv, num_chunks: int = 64, **kwargs) -> Iterator[KVOffloader]:
    size = num_chunks * BLOCK * kwargs.get("blocks_per_chunk", 1)
    kwargs = {"options": NARROW, **kwargs}
    with KVOffloader([kv], size, device=device, **kwargs) as offloader:
        try:
            yield offloader
        finally:
            device.gate.set()  # a test that failed ends too


def keys_of(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count)]


def loaded(offloader: KVOffloader, kv: torch.Tensor, keys: list[bytes], into: int) -> torch.Tensor:
    kv[into : into + len(keys)] = 0xA5
    offloader.load(keys, range(into, into + len(keys))).wait(60)
    return kv[into : into + len(keys)].clone()


def chunked_prefill(device, steps: int) -> tuple[int, int]:
    """Calls of the last wait, and of a poll, after a prefix was stored step by step."""
    keys = keys_of(4 * steps)
    device.gate.clear()
    with offloader_on(device, pages(4 * steps), 4 * steps, options=None) as offloader:
        jobs = [offloader.store(keys[: 4 * s], range(4 * s)) for s in range(1, steps + 1)]
        polling = count_calls(offloader.get_finished)
        device.gate.set()
        for entry in offloader._ledger.entries:
            offloader._queue.wait(entry.transfers, 60)
        waiting = count_calls(lambda: jobs[-1].wait(60))
        offloader._check()
        assert all(job.wait(60).success for job in jobs)
        assert offloader.lookup(keys) == len(keys)
    return waiting, polling


def test_the_wait_for_a_prefix_that_is_stored_step_by_step_grows_with_its_steps(device):
    waiting, polling = chunked_prefill(device, 6)
    waiting_twice, polling_twice = chunked_prefill(device, 12)
    assert waiting_twice < 2.5 * waiting
    assert polling_twice < 2.5 * polling


def test_a_job_that_follows_another_ends_with_it_and_fails_with_it(device):
    kv = pages()
    with offloader_on(device, kv) as offloader:
        device.gate.clear()
        device.fail_running.add("gather")
        first = offloader.store([b"a"], [1])
        device.fail_running.clear()
        second = offloader.store([b"a", b"b"], [1, 2])
        third = offloader.store([b"b", b"c"], [2, 3])
        alone = offloader.store([b"a"], [1])  # moves nothing itself
        assert not alone.done
        with pytest.raises(TimeoutError):
            second.wait(0.05)
        device.gate.set()
        with pytest.raises(TransferFailedError, match="injected"):
            first.wait(60)
        for job in (second, alone):
            with pytest.raises(TransferFailedError, match="injected"):
                job.wait(60)
        # Of the second job it needs what that one moved itself, and that has landed.
        assert third.wait(60).success
        assert [offloader.lookup([key]) for key in (b"a", b"b", b"c")] == [0, 1, 1]
        assert sorted(r.job_id for r in offloader.get_finished()) == [1, 2, 3, 4]
        offloader._check()


def test_one_deadline_holds_for_all_that_a_wait_waits_for(device, monkeypatch):
    kv = pages()
    now = [0.0]
    with offloader_on(device, kv) as offloader:
        device.gate.clear()
        for i in range(3):
            last = offloader.store(keys_of(i + 1), range(i + 1))
        asked = []

        def wait(job_ids, timeout=None):
            asked.append((len(list(job_ids)), timeout))
            now[0] += 1.0

        clock = SimpleNamespace(monotonic=lambda: now[0])
        monkeypatch.setattr(jobs_module, "time", clock)
        monkeypatch.setattr(offloader._queue, "wait", wait)
        device.gate.set()
        last.block(5.0)
        monkeypatch.undo()
        # Its own transfer and those that it follows in one call, each time with what is left.
        assert asked[0] == (3, 5.0)
        assert [timeout for _, timeout in asked] == [max(0.0, 5.0 - i) for i in range(len(asked))]


def test_a_cancelled_store_can_be_offered_again_at_once(device):
    kv = pages()
    with offloader_on(device, kv) as offloader:
        device.gate.clear()
        held = offloader.store([b"held"], [0])
        job = offloader.store([b"a", b"b"], [1, 2])
        assert offloader.cancel(job)
        assert job.result.status is TransferStatus.CANCELLED
        assert not offloader.cancel(job)
        again = offloader.store([b"a", b"b"], [3, 4])
        offloader._check()
        device.gate.set()
        assert held.wait(60).success
        assert again.wait(60).success
        assert torch.equal(loaded(offloader, kv, [b"a", b"b"], 10), kv[3:5])
        assert sorted(r.job_id for r in offloader.get_finished()) == [1, 2, 3, 4]


def test_a_store_that_another_waits_for_is_not_cancelled(device):
    kv = pages()
    with offloader_on(device, kv) as offloader:
        device.gate.clear()
        held = offloader.store([b"held"], [0])
        first = offloader.store([b"a"], [1])
        second = offloader.store([b"a"], [1])  # moves nothing itself
        assert not offloader.cancel(first)
        assert offloader.cancel(second)
        assert second.result.status is TransferStatus.CANCELLED
        assert offloader.cancel(first)  # nobody waits any more
        device.gate.set()
        held.wait(60)
        assert offloader.lookup([b"a"]) == 0
        offloader._check()


def test_all_of_a_store_in_two_runs_is_cancelled_or_none(device):
    kv = pages()
    with offloader_on(device, kv, 8, blocks_per_chunk=3) as offloader:
        offloader.store([b"a"], [11], first_block=1).wait(60)  # the middle of the chunk
        device.gate.clear()
        offloader.store([b"held"], [0])
        job = offloader.store([b"a"], [10, 11, 12])  # what lies before it, and behind
        assert len(offloader._ledger.entry_of(job).transfers) == 2
        assert offloader.cancel(job)
        job = offloader.store([b"a"], [10, 11, 12])
        first, _ = offloader._ledger.entry_of(job).transfers
        device.gate.set()
        offloader._queue.wait([first], 60)
        device.gate.clear()
        if not offloader.cancel(job):
            device.gate.set()
            assert job.wait(60).success
            assert offloader.lookup([b"a"], num_blocks=3) == 1
        device.gate.set()
        assert offloader.lookup([b"a"], num_blocks=1, first_block=1) == 1
        offloader._check()


def test_a_store_in_two_runs_of_which_one_has_started_is_not_cancelled(device):
    kv = pages()
    with offloader_on(device, kv, 8, blocks_per_chunk=3) as offloader:
        offloader.store([b"a"], [11], first_block=1).wait(60)
        device.gate.clear()
        job = offloader.store([b"a"], [10, 11, 12])  # its first run is queued at once
        assert not offloader.cancel(job)
        device.gate.set()
        assert job.wait(60).success
        kv[20:23] = 0xA5
        offloader.load([b"a"], [20, 21, 22]).wait(60)
        assert torch.equal(kv[20:23], kv[10:13])


def test_a_store_in_two_runs_of_which_one_failed_is_not_loadable(device):
    kv = pages()
    with offloader_on(device, kv, 8, blocks_per_chunk=3, path="auto") as offloader:
        offloader.store([b"a"], [11], first_block=1).wait(60)
        device.gate.clear()
        job = offloader.store([b"a"], [10, 11, 12])  # its first run is queued, and will succeed
        device.fail_running |= {"gather", "copy_batch"}
        device.gate.set()
        with pytest.raises(TransferFailedError, match="injected"):
            job.wait(60)
        device.fail_running.clear()
        assert offloader.lookup([b"a"], num_blocks=3) == 0
        assert offloader.lookup([b"a"], num_blocks=1, first_block=0) == 0
        assert offloader.lookup([b"a"], num_blocks=1, first_block=1) == 1


def test_a_store_whose_second_run_is_refused_fails_when_its_first_has_ended(device):
    kv = pages()
    with offloader_on(device, kv, 8, blocks_per_chunk=3) as offloader:
        offloader.store([b"a"], [11], first_block=1).wait(60)
        submit, calls = offloader._queue.transfer_async, itertools.count(1)

        def refuse_the_second(*args, **kwargs):
            if next(calls) == 2:
                raise RuntimeError("refused")
            return submit(*args, **kwargs)

        device.gate.clear()
        offloader._queue.transfer_async = refuse_the_second
        job = offloader.store([b"a"], [10, 11, 12])
        offloader._queue.transfer_async = submit
        assert not job.done
        assert offloader.stats().num_pinned == 1
        offloader._check()
        device.gate.set()
        with pytest.raises(TransferFailedError, match="refused"):
            job.wait(60)
        assert offloader.lookup([b"a"], num_blocks=3) == 0
        assert offloader.lookup([b"a"], num_blocks=1, first_block=1) == 1
        assert offloader.stats().num_pinned == 0
        offloader._check()


def test_a_stream_waits_for_both_runs_of_a_store(device):
    kv = pages()
    before = kv.clone()
    with offloader_on(device, kv, 8, blocks_per_chunk=3, options=None) as offloader:
        offloader.store([b"a"], [11], first_block=1).wait(60)
        device.gate.clear()
        job = offloader.store([b"a"], [10, 11, 12])
        assert not job.source_released
        engine = device.new_stream("engine")
        followed, wait_on = [], offloader._queue.wait_on
        offloader._queue.wait_on = lambda *args: followed.append(args[0]) or wait_on(*args)
        job.wait_on(engine)
        assert set(followed) == offloader._ledger.entry_of(job).transfers
        assert len(followed) == 2
        engine.put(lambda: kv[10:13].fill_(0xEE))
        overwritten = device.new_event()
        device.record(overwritten, engine)
        with pytest.raises(TimeoutError):
            device.synchronize(overwritten, 0.1)
        device.gate.set()
        device.synchronize(overwritten, 60)
        assert job.source_released
        job.wait(60)
        offloader.load([b"a"], [20, 21, 22]).wait(60)
        assert torch.equal(kv[20:23], before[10:13])
        device.close_stream(engine)


def test_a_job_of_another_offloader_is_refused(device):
    with offloader_on(device, pages()) as one, offloader_on(device, pages()) as other:
        device.gate.clear()
        held = [one.store([b"held"], [0]), other.store([b"held"], [0])]
        job, same_number = one.store([b"a"], [1]), other.store([b"a"], [1])
        assert job.job_id == same_number.job_id
        with pytest.raises(ValueError, match="job: expected one of this offloader"):
            one.cancel(same_number)
        device.gate.set()
        for each in (*held, job, same_number):
            assert each.wait(60).success


def test_cancelling_after_a_reset_never_takes_one_store_for_another(device):
    kv = pages()
    with offloader_on(device, kv) as offloader:
        device.gate.clear()
        old = offloader.store([b"a"], [1])
        offloader.reset()
        middle = offloader.store([b"a"], [2])
        offloader.reset()
        new = offloader.store([b"a"], [3])
        assert offloader.cancel(middle)
        offloader._check()
        device.gate.set()
        assert old.wait(60).success
        assert new.wait(60).success
        assert torch.equal(loaded(offloader, kv, [b"a"], 10), kv[3:4])
        device.gate.clear()
        old = offloader.store([b"b"], [4])
        offloader.reset()
        new = offloader.store([b"b"], [5])
        assert offloader.cancel(new)
        device.gate.set()
        assert old.wait(60).success
        assert offloader.lookup([b"b"]) == 0  # its slot was never written
        offloader._check()


def test_a_handle_keeps_its_result_and_nothing_else(device):
    kv = pages()
    offloader = KVOffloader([kv], 64 * BLOCK, device=device)
    jobs = [offloader.store([b"a"], [1]), offloader.store([b"a", b"b"], [1, 2])]
    jobs[0].wait(60)
    jobs.append(offloader.load([b"a"], [3]))
    for job in jobs:
        job.wait(60)
    gone = [weakref.ref(offloader), weakref.ref(offloader._pool), weakref.ref(offloader._queue)]
    offloader.close()
    del offloader
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    for job in jobs:
        assert job.done
        assert job.source_released
        assert job.wait().success
        job.wait_on(None)  # nothing is left to wait for


def test_results_that_nobody_takes_are_bounded(device, monkeypatch):
    monkeypatch.setattr(ledger, "_MAX_UNREAD", 8)
    with offloader_on(device, pages()) as offloader:
        for i in range(20):
            offloader.store([b"%d" % i], [i]).wait(60)
        assert [r.job_id for r in offloader.get_finished()] == list(range(13, 21))
        assert offloader.get_finished() == []
        assert offloader.stats().store.jobs == 20


def store_in_two_runs(offloader: KVOffloader):
    """A store of one chunk of three blocks whose middle is there already."""
    offloader.store([b"a"], [11], first_block=1).wait(60)
    offloader._pool.device.gate.clear()
    return offloader.store([b"a"], [10, 11, 12])


def test_pages_are_released_when_both_runs_have_read_them(device):
    with offloader_on(device, pages(), 8, blocks_per_chunk=3) as offloader:
        job = store_in_two_runs(offloader)
        assert not job.source_released
        device.gate.set()
        job.wait(60)
        assert job.source_released
    with offloader_on(device, pages(), 8, blocks_per_chunk=3, options=None) as offloader:
        job = store_in_two_runs(offloader)
        first, second = sorted(offloader._ledger.entry_of(job).transfers)
        released = offloader._queue.source_released
        offloader._queue.source_released = lambda transfer: transfer == first
        assert not job.source_released
        offloader._queue.source_released = lambda transfer: transfer == second
        assert not job.source_released
        offloader._queue.source_released = released


def test_a_store_in_two_runs_counts_the_bytes_of_both(device):
    with offloader_on(device, pages(), 8, blocks_per_chunk=3) as offloader:
        job = store_in_two_runs(offloader)
        device.gate.set()
        assert job.wait(60).num_bytes == 2 * BLOCK


def test_a_store_of_which_a_part_has_ended_is_not_cancelled(device):
    with offloader_on(device, pages(), 8, blocks_per_chunk=3) as offloader:
        offloader.store([b"a"], [11], first_block=1).wait(60)
        device.gate.clear()
        job = offloader.store([b"a"], [10, 11, 12])
        entry = offloader._ledger.entry_of(job)
        first, second = sorted(entry.transfers)
        # As where the first run has ended and the second waits behind others in the backlog.
        entry.parts.append(TransferResult(first, TransferStatus.SUCCESS, BLOCK))
        offloader._queue.cancel_together = lambda ids: True
        assert not offloader.cancel(job)
        entry.parts.clear()
        del offloader._queue.cancel_together
        assert second in entry.transfers
        device.gate.set()
        assert job.wait(60).success


def test_cancelled_means_that_nothing_had_started():
    success = TransferResult(1, TransferStatus.SUCCESS, 5)
    cancelled = TransferResult(2, TransferStatus.CANCELLED)
    failed = TransferResult(3, TransferStatus.FAILED, error=OSError())
    assert ledger.failure([success]) is None
    assert ledger.failure([cancelled, cancelled]).status is TransferStatus.CANCELLED
    assert ledger.failure([cancelled, failed, success]) is failed
    half = ledger.failure([success, cancelled])
    assert half.status is TransferStatus.FAILED
    assert "a part of the job was cancelled" in str(half.error)


def test_a_job_is_not_reported_before_its_own_bytes_have_landed(device):
    with offloader_on(device, pages()) as offloader:
        device.gate.clear()
        first = offloader.store([b"a"], [1])
        second = offloader.store([b"a", b"b"], [1, 2])
        (transfer,) = offloader._ledger.entry_of(second).transfers
        with offloader._lock:  # the first ends, and the second has not
            entry = offloader._ledger.entry_of(first)
            ended = TransferResult(min(entry.transfers), TransferStatus.SUCCESS, BLOCK)
            assert offloader._ledger.take(ended) is entry
            offloader._complete(entry)
            offloader._ledger._cancelled.add(ended.job_id)  # its real result is for nobody
        assert first.done
        assert not second.done
        assert transfer in offloader._ledger.entry_of(second).transfers
        device.gate.set()
        assert second.wait(60).success


def test_a_handle_learns_of_its_end_when_it_is_asked(device):
    with offloader_on(device, pages()) as offloader:
        job = offloader.store([b"a"], [1])
        offloader._queue.wait(offloader._ledger.entry_of(job).transfers, 60)
        assert job.done


def test_a_wait_that_times_out_says_so_and_can_be_tried_again(device):
    with offloader_on(device, pages()) as offloader:
        device.gate.clear()
        job = offloader.store([b"a"], [1])
        opened = threading.Timer(5.0, device.gate.set)
        opened.start()
        with pytest.raises(TimeoutError):
            job.wait(0.01)
        opened.cancel()
        device.gate.set()
        assert job.wait(60).success


def test_a_lookup_alone_makes_what_has_landed_visible(device):
    with offloader_on(device, pages()) as offloader:
        job = offloader.store([b"a"], [1])
        offloader._queue.wait(offloader._ledger.entry_of(job).transfers, 60)
        assert offloader.lookup([b"a"]) == 1


def test_a_store_of_known_keys_counts_as_a_use(device):
    with offloader_on(device, pages(), 2) as offloader:
        for i, key in enumerate((b"a", b"b")):
            offloader.store([key], [i]).wait(60)
        assert offloader.store([b"a"], [0]).wait(60).num_bytes == 0
        offloader.store([b"c"], [2]).wait(60)
        assert [offloader.lookup([key]) for key in (b"a", b"b", b"c")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.lookup([b"a"], group=5), "group: expected 0 to 1, got 5"),
        (lambda o: o.touch([b"a"], group=-3), "group: expected .* 0, got -3"),
        (lambda o: o.lookup([b"a"], group=-1), "group: expected .* 0, got -1"),
        (
            lambda o: o.load([b"a"], [1], group=True),
            "group: expected .* 0, got True",
        ),
        (
            lambda o: o.store([b"a"], [1], group=None),
            "group: expected .* 0, got None",
        ),
        (
            lambda o: o.store([b"a"], [1], group=1.0),
            "group: expected .* 0, got 1.0",
        ),
        (lambda o: o.store(b"a", [1]), "keys: expected one key .* got bytes"),
        (lambda o: o.lookup("a"), "keys: expected one key .* got str"),
        (lambda o: o.touch(None), "keys: expected one key .* got NoneType"),
        (lambda o: o.lookup([b"a", 1]), "keys: expected bytes, got int"),
        (lambda o: o.store([b"a"], [1], first_block=1.0), "first_block.*1.0"),
        (lambda o: o.lookup([b"a"], num_blocks=1, first_block=1.5), "first_block.*1.5"),
        (lambda o: o.lookup([b"a"], num_blocks=2), "keys: expected 2 for 2 blocks"),
    ],
)
def test_a_wrong_group_key_or_position_is_named(device, call, message):
    kv = [pages(), pages()]
    with KVOffloader(kv, 4096, groups=[[0], [1]], device=device) as offloader:
        for group in (0, 1):
            offloader.store([b"a"], [group], group=group).wait(60)
        with pytest.raises(ValueError, match=message):
            call(offloader)
        assert [offloader.lookup([b"a"], group=group) for group in (0, 1)] == [1, 1]
        assert offloader.stats().num_pinned == 0


def test_numpy_integers_are_integers(device):
    kv = [pages(), pages()]
    with KVOffloader(
        kv, np.int64(4096), np.int64(2), groups=[[0], [1]], device=device
    ) as offloader:
        job = offloader.store([b"a"], [3], first_block=np.int64(1), group=np.int8(1))
        assert job.wait(60).success
        found = offloader.lookup(
            [b"a"], num_blocks=np.int32(1), first_block=np.uint8(1), group=np.int64(1)
        )
        assert found == 1
        offloader.load([b"a"], [9], first_block=np.int64(1), group=np.int8(1)).wait(60)
        assert torch.equal(kv[1][9], kv[1][3])
