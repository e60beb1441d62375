"""KVOffloader: the first program, the hard cases of chunks and keys, wrong use, threads."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from gated import GatedDevice

import triton_offload.offloader as offloader_module
from triton_offload import KVOffloader
from triton_offload.calibration import Path
from triton_offload.errors import (
    PendingKeyError,
    PoolFullError,
    TransferFailedError,
    UnknownKeyError,
    UnwrittenBlocksError,
)
from triton_offload.sizes import format_bytes, parse_bytes
from triton_offload.specs import TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.pipeline import PipelineOptions


def caches(num_blocks: int = 64, layers: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer.{i}": torch.randn(num_blocks, 2, 8, 4, generator=generator) for i in range(layers)
    }


def copies(kv: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in kv.items()}


def poison(kv: dict[str, torch.Tensor]) -> None:
    for tensor in kv.values():
        tensor.view(torch.uint8).fill_(0xA5)


def keys_of(name: str, count: int) -> list[bytes]:
    return [f"{name}{i}".encode() for i in range(count)]


@pytest.fixture
def device(monkeypatch):
    """What every offloader of the test runs on: its kernels can be held and made to fail."""
    device = GatedDevice()
    monkeypatch.setattr(offloader_module, "device_for", lambda _, calibration: device)
    yield device
    device.gate.set()


@pytest.mark.parametrize("path", ["auto", *(path.value for path in Path)])
@pytest.mark.parametrize("as_list", [False, True], ids=["dict", "list"])
def test_the_first_program(path, as_list):
    kv = caches()
    before = copies(kv)
    keys = keys_of("k", 5)
    block_ids, other_block_ids = list(range(10, 28)), list(range(40, 58))
    tensors = list(kv.values()) if as_list else kv
    with KVOffloader(tensors, host_bytes="64KiB", blocks_per_chunk=4, path=path) as offloader:
        job = offloader.store(keys, block_ids)
        job.wait()
        assert [r.job_id for r in offloader.get_finished()] == [job.job_id]
        poison(kv)
        n = offloader.lookup(keys)
        assert n == 5
        offloader.load(keys[:n], other_block_ids).wait()
        for name, tensor in kv.items():
            assert torch.equal(tensor[40:58], before[name][10:28])
            rest = torch.cat([tensor[:40], tensor[58:]]).view(torch.uint8)
            assert bool((rest == 0xA5).all())
        stats = offloader.stats()
        moved = 18 * sum(tensor[0].nbytes for tensor in kv.values())
        assert (stats.store.num_bytes, stats.load.num_bytes) == (moved, moved)
        assert (stats.lookups, stats.hits, stats.num_used, stats.num_pinned) == (5, 5, 5, 0)


def test_lookup_counts_the_leading_chunks_that_are_there():
    with KVOffloader(caches(), "64KiB") as offloader:
        offloader.store([b"a", b"c"], [1, 3]).wait()
        assert offloader.lookup([b"a", b"b", b"c"]) == 1
        assert offloader.lookup([b"b", b"c"]) == 0
        assert offloader.lookup([]) == 0


def test_what_a_partial_chunk_left_unwritten_is_not_loadable_until_it_is_stored():
    kv = caches()
    before = copies(kv)
    with KVOffloader(kv, "64KiB", blocks_per_chunk=4) as offloader:
        offloader.store([b"k"], [1, 2], first_block=1).wait()  # positions 1 and 2
        assert offloader.lookup([b"k"]) == 1
        assert offloader.lookup([b"k"], num_blocks=4) == 0
        assert offloader.lookup([b"k"], num_blocks=2, first_block=1) == 1
        with pytest.raises(UnwrittenBlocksError):
            offloader.load([b"k"], [30, 31, 32, 33])
        # Both ends are missing: positions 0 and 3, around blocks that stay as they were stored.
        job = offloader.store([b"k"], [10, 11, 12, 13])
        assert job.wait().num_bytes == 2 * sum(t[0].nbytes for t in kv.values())
        offloader.load([b"k"], [30, 31, 32, 33]).wait()
        for name, tensor in kv.items():
            assert torch.equal(tensor[30:34], before[name][[10, 1, 2, 13]])


def test_chunks_that_are_stored_already_are_not_moved_again():
    kv = caches()
    with KVOffloader(kv, "64KiB", blocks_per_chunk=2) as offloader:
        offloader.store([b"b"], [4, 5]).wait()
        before = copies(kv)
        for tensor in kv.values():
            tensor[4:6] += 1
        job = offloader.store([b"a", b"b", b"c"], [2, 3, 4, 5, 6, 7])
        assert job.wait().num_bytes == 4 * sum(t[0].nbytes for t in kv.values())
        offloader.load([b"a", b"b", b"c"], range(20, 26)).wait()
        for name, tensor in kv.items():
            assert torch.equal(tensor[20:26], before[name][2:8])


def test_a_store_of_keys_that_another_job_stores_waits_for_that_job(device):
    kv = caches()
    with KVOffloader(kv, "64KiB") as offloader:
        device.gate.clear()
        first = offloader.store([b"a"], [1])
        second = offloader.store([b"a"], [1])
        with pytest.raises(TimeoutError):
            second.wait(0.05)
        with pytest.raises(PendingKeyError):
            offloader.load([b"a"], [2])
        device.gate.set()
        assert second.wait(60).num_bytes == 0
        assert offloader.lookup([b"a"]) == 1
        finished = {result.job_id for result in offloader.get_finished()}
        assert finished == {first.job_id, second.job_id}


def test_a_failed_store_leaves_nothing_behind(device):
    kv = caches()
    with KVOffloader(kv, "64KiB") as offloader:
        offloader.store([b"old"], [9]).wait()
        device.fail_running = {"gather"}
        job = offloader.store([b"a"], [1])
        other = offloader.store([b"a"], [1])
        with pytest.raises(TransferFailedError, match="gather failed") as caught:
            job.wait(60)
        assert caught.value.result.status is TransferStatus.FAILED
        with pytest.raises(TransferFailedError):
            other.wait(60)
        device.fail_running = set()
        assert offloader.lookup([b"a"]) == 0
        assert offloader.stats().num_used == 1
        assert offloader.stats().store.failed == 2
        offloader.store([b"a"], [1]).wait(60)
        assert offloader.lookup([b"a", b"old"]) == 2


def test_a_failed_extension_keeps_what_was_stored(device):
    kv = caches()
    before = copies(kv)
    with KVOffloader(kv, "64KiB", blocks_per_chunk=2) as offloader:
        offloader.store([b"k"], [5]).wait(60)
        device.fail_running = {"gather"}
        with pytest.raises(TransferFailedError):
            offloader.store([b"k"], [5, 6]).wait(60)
        device.fail_running = set()
        with pytest.raises(UnwrittenBlocksError):
            offloader.load([b"k"], [20, 21])
        offloader.load([b"k"], [20]).wait(60)
        for name, tensor in kv.items():
            assert torch.equal(tensor[20], before[name][5])


def test_a_failed_load_fails_alone_and_unpins(device):
    with KVOffloader(caches(), "64KiB") as offloader:
        offloader.store([b"a"], [1]).wait(60)
        device.fail_running = {"scatter"}
        with pytest.raises(TransferFailedError, match="scatter failed"):
            offloader.load([b"a"], [2]).wait(60)
        device.fail_running = set()
        assert offloader.stats().num_pinned == 0
        offloader.load([b"a"], [2]).wait(60)


def test_a_full_pool_evicts_the_least_recently_used():
    kv = caches()
    size = 4 * sum(t[0].nbytes for t in kv.values())
    with KVOffloader(kv, size, enable_events=True) as offloader:
        assert offloader.num_chunks == 4
        offloader.store(keys_of("a", 4), [0, 1, 2, 3]).wait()
        offloader.touch([b"a0"])
        offloader.store([b"b"], [5]).wait()
        assert offloader.lookup([b"a0"]) == 1
        assert offloader.stats().evictions == 1
        removed = [key for e in offloader.take_events() if e.removed for key in e.keys]
        assert len(removed) == 1
        assert removed[0] != b"a0"


def test_a_pool_full_of_pinned_chunks_refuses_a_store_and_loses_nothing(device):
    kv = caches()
    size = 2 * sum(t[0].nbytes for t in kv.values())
    with KVOffloader(kv, size) as offloader:
        offloader.store([b"a", b"b"], [0, 1]).wait(60)
        device.gate.clear()
        load = offloader.load([b"a", b"b"], [10, 11])
        with pytest.raises(PoolFullError, match="room for 1 chunks, got a pool of 2 and 2 chunks"):
            offloader.store([b"c"], [2])
        device.gate.set()
        load.wait(60)
        assert offloader.lookup([b"a", b"b"]) == 2
        offloader.store([b"c"], [2]).wait(60)


def test_cancel(device):
    with KVOffloader(caches(), "1MiB", path="staged") as offloader:
        device.gate.clear()
        jobs = [offloader.store([b"%d" % i], [i % 64]) for i in range(300)]
        last = offloader.store([b"last"], [1])
        assert offloader.cancel(last)
        assert not offloader.cancel(jobs[0])
        device.gate.set()
        with pytest.raises(TransferFailedError, match="cancelled"):
            last.wait(60)
        for job in jobs:
            job.wait(60)
        assert offloader.lookup([b"last"]) == 0
        assert len(offloader.get_finished()) == 301


def test_pages_are_released_before_the_bytes_have_landed(device, monkeypatch):
    """A store gives its pages back when the gather has read them; streams can wait for that."""
    kv = caches()
    before = copies(kv)
    landing = threading.Event()
    copy = GatedDevice.copy

    def slow_copy(self, dst, src, stream):
        stream.put(lambda: landing.wait(60))
        copy(self, dst, src, stream)

    with KVOffloader(kv, "64KiB", path="staged") as offloader:
        monkeypatch.setattr(GatedDevice, "copy", slow_copy)
        device.gate.clear()
        job = offloader.store([b"a", b"b"], [1, 2])
        assert not job.source_released
        engine = device.new_stream("engine")
        job.wait_on(engine)
        engine.put(lambda: [tensor[1:3].zero_() for tensor in kv.values()])
        reached = device.new_event()
        device.record(reached, engine)
        assert not device.query(reached)
        device.gate.set()
        device.synchronize(reached, 60)  # the engine wrote over the pages ...
        assert job.source_released
        assert not job.done  # ... while their bytes were still on the way
        landing.set()
        job.wait(60)
        monkeypatch.undo()
        offloader.load([b"a", b"b"], [11, 12]).wait(60)
        for name, tensor in kv.items():
            assert torch.equal(tensor[11:13], before[name][1:3])
            assert not tensor[1:3].any()
        device.close_stream(engine)


def test_groups_have_keys_and_pages_of_their_own():
    kv = caches(layers=4)
    before = copies(kv)
    groups = [["layer.0", "layer.2"], ["layer.1", "layer.3"]]
    with KVOffloader(kv, "64KiB", blocks_per_chunk=2, groups=groups) as offloader:
        offloader.store([b"k", b"l"], [1, 2, 3], group=0).wait()
        assert offloader.lookup([b"k"], group=0) == 1
        assert offloader.lookup([b"k"], group=1) == 0
        offloader.store([b"k", b"l"], [5, 6, 7], group=1).wait()
        poison(kv)
        offloader.load([b"k", b"l"], [11, 12, 13], group=0).wait()
        offloader.load([b"k", b"l"], [11, 12, 13], group=1).wait()
        for name, tensor in kv.items():
            source = [1, 2, 3] if name in groups[0] else [5, 6, 7]
            assert torch.equal(tensor[11:14], before[name][source])


def test_reset_forgets_every_key_while_transfers_run(device):
    kv = caches()
    before = copies(kv)
    size = 4 * sum(t[0].nbytes for t in kv.values())
    with KVOffloader(kv, size) as offloader:
        offloader.store([b"a", b"b"], [1, 2]).wait(60)
        device.gate.clear()
        load = offloader.load([b"a", b"b"], [11, 12])
        store = offloader.store([b"c"], [3])
        offloader.reset()
        assert offloader.lookup([b"a"]) == 0
        again = offloader.store([b"a"], [4])
        device.gate.set()
        load.wait(60)
        store.wait(60)
        again.wait(60)
        assert offloader.lookup([b"a", b"c"]) == 1
        offloader.load([b"a"], [20]).wait(60)
        for name, tensor in kv.items():
            assert torch.equal(tensor[11:13], before[name][1:3])
            assert torch.equal(tensor[20], before[name][4])


def test_a_store_after_a_reset_that_cannot_be_submitted_is_never_taken_for_the_one_before():
    for seed in range(10):
        with SimulatedDevice(seed) as device:
            pages = device.empty(8 * 16).view(8, 16)
            options = PipelineOptions(buffer_bytes=16, max_indices=1)
            with KVOffloader([pages], 2 * 16, device=device, options=options) as offloader:
                first = offloader.store([b"a"], [1])
                offloader.reset()
                device.faults.in_call("current_stream")
                with pytest.raises(InjectedError):
                    offloader.store([b"a"], [1])
                offloader._check()
                first.wait()
                assert offloader.lookup([b"a"]) == 0  # its slot was never written
                offloader._check()


def test_wrong_use_is_refused_and_changes_nothing():
    kv = caches()
    size = 3 * sum(t[0].nbytes for t in kv.values())
    with KVOffloader(kv, size) as offloader:
        offloader.store(keys_of("a", 3), [0, 1, 2]).wait()
        for call, error, message in [
            (lambda: offloader.store([b"x"], [64]), ValueError, r"block_ids: .*\[0, 64\), got 64"),
            (lambda: offloader.store([b"x"], [-1]), ValueError, "block_ids: .*got -1"),
            (lambda: offloader.store([b"x"], [1, 2]), ValueError, "keys: expected 2 .*got 1"),
            (lambda: offloader.store(["x"], [1]), ValueError, "keys: expected bytes, got str"),
            (lambda: offloader.store([b"x", b"x"], [1, 2]), ValueError, "keys"),
            (lambda: offloader.store([b"x"], [1], group=1), ValueError, "group: expected 0 to 0"),
            (lambda: offloader.store([b"x"], [1.5]), ValueError, "block_ids"),
            (lambda: offloader.store([b"x"], [1], first_block=-1), ValueError, "first_block"),
            (lambda: offloader.load([b"a0", b"a1"], [5, 5]), ValueError, "block_ids: .*5"),
            (lambda: offloader.load([b"x"], [5]), UnknownKeyError, "x"),
            (lambda: offloader.load([b"a0", b"x"], [5, 6]), UnknownKeyError, "x"),
        ]:
            with pytest.raises(error, match=message):
                call()
        assert offloader.lookup(keys_of("a", 3)) == 3
        assert offloader.stats().num_pinned == 0
        assert offloader.get_finished()[0].success
        assert offloader.get_finished() == []
    with pytest.raises(RuntimeError, match="closed"):
        offloader.store([b"x"], [1])
    with pytest.raises(RuntimeError, match="closed"):
        offloader.lookup([b"a0"])
    offloader.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"host_bytes": 100}, "host_bytes: expected room for at least one chunk of 768 bytes"),
        ({"host_bytes": "much"}, 'host_bytes: expected a number of bytes, .*"8GiB", got'),
        ({"host_bytes": -1}, "host_bytes"),
        ({"blocks_per_chunk": 0}, "blocks_per_chunk: expected .* at least 1, got 0"),
        ({"path": "teleport"}, "path: expected one of .*teleport"),
        ({"policy": "fifo"}, "policy"),
        ({"groups": [["layer.9"]]}, r"groups\[0\]: .*'layer.9'"),
        ({"groups": []}, "groups: expected at least one"),
        ({"kv_caches": torch.zeros(3, 3)}, "kv_caches: expected a list or dict"),
        ({"kv_caches": []}, "kv_caches: expected at least one"),
        ({"kv_caches": [torch.zeros(4, 4, 4).transpose(1, 2)]}, r"kv_caches\[0\]: .*contiguous"),
        ({"kv_caches": [torch.zeros(3), torch.zeros(3, device="meta")]}, r"kv_caches\[1\]: .*cpu"),
    ],
)
def test_an_offloader_that_cannot_work_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KVOffloader(**{"kv_caches": caches(), "host_bytes": "1MiB", **kwargs})


def test_close_under_load_ends_every_job_and_every_thread(device):
    threads = threading.active_count()
    offloader = KVOffloader(caches(), "1MiB", path="staged")
    device.gate.clear()
    jobs = [offloader.store([b"%d" % i], [i % 64]) for i in range(300)]
    threading.Timer(0.1, device.gate.set).start()
    offloader.close(60)
    results = [job.result for job in jobs]
    assert all(result is not None for result in results)
    assert {r.status for r in results} <= {TransferStatus.SUCCESS, TransferStatus.CANCELLED}
    assert results[0].success
    names = [t.name for t in threading.enumerate() if t.name.startswith("triton-offload")]
    assert names == []
    assert threading.active_count() <= threads


def test_close_that_timed_out_can_be_tried_again(device):
    threads = threading.active_count()
    offloader = KVOffloader(caches(), "64KiB")
    device.gate.clear()
    job = offloader.store([b"a"], [1])
    with pytest.raises(TimeoutError):
        offloader.close(0.05)
    with pytest.raises(RuntimeError, match="closed"):
        offloader.store([b"b"], [2])
    device.gate.set()
    offloader.close(60)
    assert job.wait().success
    names = [t.name for t in threading.enumerate() if t.name.startswith("triton-offload")]
    assert names == []
    assert threading.active_count() <= threads


def test_several_threads_serve_requests_of_their_own():
    kv = caches(num_blocks=64)
    before = copies(kv)
    errors: list[BaseException] = []
    with KVOffloader(kv, "48KiB", blocks_per_chunk=2) as offloader:

        def serve(number: int) -> None:
            rng = random.Random(number)
            home = list(range(8 * number, 8 * number + 8))
            try:
                for step in range(40):
                    keys = [b"%d-%d-%d" % (number, step // 4, i) for i in range(4)]
                    offloader.store(keys, home).wait(60)
                    n = offloader.lookup(keys)
                    if n and rng.random() < 0.5:
                        try:
                            offloader.load(keys[:n], home[: 2 * n]).wait(60)
                        except UnknownKeyError:
                            continue  # evicted by another thread meanwhile, and said so
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=serve, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert offloader.stats().num_pinned == 0
    for name, tensor in kv.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500 MB", 500_000_000), ("16k", 16384), ("1.5KiB", 1536), (7, 7)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes("size", text) == size


def test_sizes_are_written_in_the_largest_unit():
    assert [format_bytes(n) for n in (5, 2048, 3 << 30)] == ["5 B", "2.0 KiB", "3.0 GiB"]
