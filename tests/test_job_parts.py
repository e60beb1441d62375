"""Jobs of several transfers (a hole in a chunk), and what else of keys and pins is rarely drawn.

A chunk of three blocks whose middle one is stored lacks two runs: a store of the whole chunk is two
transfers then, and a job for all that. On the simulated device, where nothing runs too early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from triton_offload import KVOffloader
from triton_offload.calibration import Path
from triton_offload.errors import PendingKeyError, TransferFailedError, UnknownKeyError
from triton_offload.job import OffloadJob
from triton_offload.specs import TransferStatus
from triton_offload.testing import InjectedError, SimulatedDevice
from triton_offload.transfer.pipeline import PipelineOptions

SEEDS = range(12)
CHUNK = 3
NUM_BLOCKS = 24
KEY = b"the chunk with a hole"


class Engine:
    """Pages of 8 bytes, each its block's number plus one, and an offloader."""

    def __init__(
        self, device: SimulatedDevice, *, num_chunks: int = 4, window_bytes: int | None = 1
    ) -> None:
        self.device = device
        self.pages = device.empty(NUM_BLOCKS * 8).view(NUM_BLOCKS, 8)
        self.write(range(NUM_BLOCKS))
        options = PipelineOptions(
            path=Path.STAGED, buffer_bytes=8 * CHUNK, max_indices=1, window_bytes=window_bytes
        )
        size = num_chunks * 8 * CHUNK
        self.offloader = KVOffloader([self.pages], size, CHUNK, options=options, device=device)
        self.offloader._pool.wait_ready(60)  # until then copies are slower

    def write(self, blocks: range, value: int | None = None) -> None:
        """A kernel of the engine's writes the blocks' pages."""
        pages = self.pages

        def run() -> None:
            for block in blocks:
                pages[block].fill_(block + 1 if value is None else value)

        writes = [pages[block] for block in blocks]
        self.device.launch("engine writes", self.device.compute_stream, writes=writes, run=run)

    def store_around_a_hole(self) -> OffloadJob:
        """Blocks 0 to 2 under `KEY`, the middle one stored before."""
        self.offloader.store([KEY], [1], first_block=1).wait()
        self.offloader.get_finished()
        return self.offloader.store([KEY], range(3))

    def loaded(self, count: int = CHUNK, first: int = 0) -> list[int]:
        """What a load of blocks of `KEY` brings: a number per block."""
        blocks = range(12, 12 + count)
        self.write(blocks, 0xEE)
        self.offloader.load([KEY], blocks, first_block=first).wait()
        self.device.touch(reads=[self.pages[block] for block in blocks])
        assert (self.pages[12 : 12 + count] == self.pages[12 : 12 + count, :1]).all()
        return self.pages[12 : 12 + count, 0].tolist()

    def num_loadable(self) -> int:
        """How many blocks of the chunk can be loaded from its first on."""
        lookup = self.offloader.lookup
        return max((n for n in range(1, CHUNK + 1) if lookup([KEY], num_blocks=n)), default=0)


@contextmanager
def engine(seed: int, **options: int | None) -> Iterator[Engine]:
    with SimulatedDevice(seed) as device:
        made = Engine(device, **options)
        with made.offloader:
            yield made
            made.offloader._check()


def count_of(check: Callable[[int], bool]) -> int:
    return sum(check(seed) for seed in SEEDS)


def test_a_store_in_two_runs_stores_both():
    for seed in SEEDS:
        with engine(seed) as e:
            e.store_around_a_hole().wait()
            assert e.loaded() == [1, 2, 3]


def test_cancel_takes_back_all_of_a_job_in_two_runs_or_none_of_it():
    def taken_back(seed: int) -> bool:
        with engine(seed) as e:
            job = e.store_around_a_hole()
            taken = e.offloader.cancel(job)
            job.block()
            assert job.result is not None
            expected = TransferStatus.CANCELLED if taken else TransferStatus.SUCCESS
            assert job.result.status is expected
            assert e.num_loadable() == (0 if taken else CHUNK)
            assert e.loaded(1, first=1) == [2]  # the middle one, which is another job's
            return taken

    assert count_of(taken_back) < len(SEEDS), "its first run is queued at once"


def test_cancel_takes_back_none_of_a_job_in_three_runs_of_which_one_is_queued():
    """One is queued, one is next, and one could be taken back alone."""
    for seed in SEEDS:
        with engine(seed) as e:
            keys = [KEY, b"another"]
            e.offloader.store([KEY], [1], first_block=1).wait()
            e.offloader.store([keys[1]], [4], first_block=1).wait()
            job = e.offloader.store(keys, range(6))
            assert not e.offloader.cancel(job), "its first run is queued"
            job.block()
            assert job.result.status is TransferStatus.SUCCESS
            assert e.offloader.lookup(keys, num_blocks=6) == 2


def test_a_job_of_the_backlog_is_taken_back_whole():
    for seed in SEEDS:
        with engine(seed) as e:
            e.offloader.store([KEY], [1], first_block=1).wait()
            e.device.faults.never_ends("copy")
            ahead = e.offloader.store([b"ahead"], range(3, 6))  # fills the window
            job = e.offloader.store([KEY], range(3))
            assert e.offloader.cancel(job)
            e.device.end_hung()
            ahead.wait()
            job.block()
            assert job.result.status is TransferStatus.CANCELLED
            assert e.num_loadable() == 0
            e.offloader.store([KEY], range(3)).wait()  # which the first one does not hinder
            assert e.loaded() == [1, 2, 3]


def test_a_store_in_two_runs_of_which_one_failed_is_not_loadable():
    for nth in (1, 2):
        for seed in SEEDS:
            with engine(seed) as e:
                e.offloader.store([KEY], [1], first_block=1).wait()
                e.device.faults.in_run("gather", nth)
                job = e.offloader.store([KEY], range(3))
                with pytest.raises(TransferFailedError, match="gather failed"):
                    job.wait()
                assert isinstance(job.result.error, InjectedError)
                assert e.num_loadable() == 0
                assert e.loaded(1, first=1) == [2]


def test_pages_are_the_engines_when_both_runs_have_released_them():
    """On the host, and on a stream that was told to wait: what is written then is not stored."""
    for on_stream in (False, True):
        for seed in SEEDS:
            with engine(seed) as e:
                job = e.store_around_a_hole()
                if on_stream:
                    job.wait_on(e.device.compute_stream)
                else:
                    while not job.source_released:
                        e.device.sleep(1e-4)
                e.write(range(3), 0x77)
                job.wait()
                assert e.loaded() == [1, 2, 3]


def test_a_wait_ends_when_both_runs_have_landed():
    for seed in SEEDS:
        with engine(seed) as e:
            job = e.store_around_a_hole()
            assert job.wait().num_bytes == 2 * 8
            e.device.touch(reads=[e.offloader._pool.slots])
            assert [result.job_id for result in e.offloader.get_finished()] == [job.job_id]


def test_a_lookup_alone_makes_a_landed_store_visible():
    for seed in SEEDS:
        with engine(seed) as e:
            e.offloader.store([KEY], range(3))
            e.device.drain()
            while not e.offloader.lookup([KEY], num_blocks=3):
                e.device.sleep(1e-4)
                e.device.drain()
            assert e.loaded() == [1, 2, 3]


def test_a_load_that_is_refused_after_a_reset_unpins_nothing_of_an_older_one():
    """The older one reads its slot until it ends, whatever was refused meanwhile."""
    for seed in SEEDS:
        with engine(seed, num_chunks=1, window_bytes=None) as e:
            e.offloader.store([KEY], range(3)).wait()
            e.device.faults.never_ends("copy")
            older = e.offloader.load([KEY], range(12, 15))
            e.offloader.reset()
            with pytest.raises(UnknownKeyError):
                e.offloader.load([KEY], range(15, 18))
            e.device.faults.in_call("current_stream")
            assert e.offloader.stats().num_pinned == 1
            e.device.faults.clear()
            e.device.end_hung()
            older.wait()
            assert e.offloader.stats().num_pinned == 0
            assert e.pages[12:15, 0].tolist() == [1, 2, 3]


def test_a_load_whose_submission_fails_after_a_reset_unpins_itself_and_not_an_older_one():
    for seed in SEEDS:
        with engine(seed, num_chunks=2, window_bytes=None) as e:
            e.offloader.store([KEY], range(3)).wait()
            e.device.faults.never_ends("copy")
            older = e.offloader.load([KEY], range(12, 15))
            e.offloader.reset()
            e.offloader.store([KEY], range(3, 6)).wait()
            e.device.faults.in_call("current_stream")
            with pytest.raises(InjectedError):
                e.offloader.load([KEY], range(15, 18))
            assert not e.offloader._manager._loading, "a load that was refused holds its chunk"
            assert e.offloader.stats().num_pinned == 1, "the older load's slot is not held"
            e.device.faults.clear()
            e.device.end_hung()
            older.wait()
            assert e.pages[12:15, 0].tolist() == [1, 2, 3]
            assert e.loaded() == [4, 5, 6]


def test_a_store_of_known_keys_is_a_use_of_them():
    with engine(0, num_chunks=3) as e:
        for i, key in enumerate((b"a", b"b", b"c")):
            e.offloader.store([key], range(3 * i, 3 * i + 3)).wait()
        again = e.offloader.store([b"a"], range(3))  # nothing is moved
        assert again.done
        e.offloader.store([b"d"], range(9, 12)).wait()
        assert [e.offloader.lookup([key]) for key in (b"a", b"b", b"c", b"d")] == [1, 0, 1, 1]


def test_a_key_that_is_being_stored_is_pending_and_its_second_store_waits_for_the_first():
    for seed in SEEDS:
        with engine(seed) as e:
            e.device.faults.never_ends("copy")
            first = e.offloader.store([KEY], range(3))
            second = e.offloader.store([KEY], range(6, 9))
            with pytest.raises(PendingKeyError):
                e.offloader.load([KEY], range(12, 15))
            assert not second.done
            e.device.end_hung()
            assert second.wait().num_bytes == 0
            assert first.done
            assert e.loaded() == [1, 2, 3]


def test_what_is_taken_back_after_a_reset_is_the_newer_job_and_not_the_older():
    """Both are of one key, each of a chunk of its own: the older one's end stores nothing."""
    for seed in SEEDS:
        with engine(seed) as e:
            e.device.faults.never_ends("copy")
            older = e.offloader.store([KEY], range(3))
            e.offloader.reset()
            newer = e.offloader.store([KEY], range(3, 6))
            assert e.offloader.cancel(newer)
            e.offloader._check()
            assert e.offloader.stats().num_pinned == 1, "the older one's slot is not held"
            e.device.end_hung()
            older.wait()
            assert e.num_loadable() == 0, "bytes that nobody wrote"
            assert e.offloader.stats().num_used == 0


def test_a_load_that_is_taken_back_after_a_reset_unpins_itself_and_not_an_older_one():
    for seed in SEEDS:
        with engine(seed) as e:
            e.offloader.store([KEY], range(3)).wait()
            e.device.faults.never_ends("copy")
            older = e.offloader.load([KEY], range(12, 15))
            e.offloader.reset()
            e.offloader.store([KEY], range(3, 6)).wait()
            newer = e.offloader.load([KEY], range(15, 18))
            assert e.offloader.cancel(newer)
            manager = e.offloader._manager
            assert not manager._loading, "a load that will never end holds its chunk"
            assert manager.num_pinned == 1, "the older one's slot is not held"
            e.device.end_hung()
            older.wait()
            assert manager.num_pinned == 0
            assert e.pages[12:15, 0].tolist() == [1, 2, 3]
