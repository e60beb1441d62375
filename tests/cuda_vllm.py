"""vLLM's worker on the CUDA device while the engine captures a graph: a poll harms neither (run by
tests/test_cuda_imitation.py, on the imitated card)."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
from cards import Transfers, use
from cuda_captures import PATHS, capture_elsewhere

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what vllm's own imports warn about
    from vllm.v1.kv_offload.base import GPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    from triton_offload.closing import Closing
    from triton_offload.vllm.tolerant_worker import TolerantWorker
    from triton_offload.vllm.worker import TritonOffloadingWorker

BLOCKS, SLOTS = [3, 1, 7, 5], [2, 9, 4, 0]


def _pages() -> GPULoadStoreSpec:
    return GPULoadStoreSpec(BLOCKS, group_sizes=(len(BLOCKS),), block_indices=(0,))


def _poll(worker: TolerantWorker, jobs: set[int]) -> None:
    deadline = time.monotonic() + 60
    while jobs:
        assert time.monotonic() < deadline, f"jobs {jobs} did not end"
        jobs -= {result.job_id for result in worker.get_finished()}
    assert worker.take_failed() == []


@pytest.mark.parametrize("path", PATHS)
def test_vllms_jobs_are_submitted_polled_and_waited_for_while_another_thread_captures(path):
    card = use("12.8")
    with Transfers(path) as transfers:
        offloader = transfers.offloader
        worker = TolerantWorker(
            TritonOffloadingWorker(offloader._queue, offloader._pool, offloader._layout, Closing())
        )
        before = transfers.cache.cpu()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            worker.submit_store(1, _pages(), CPULoadStoreSpec(SLOTS))
            with capture_elsewhere():  # of a job that was submitted before, and of others
                _poll(worker, {1})
            transfers.cache[BLOCKS] = 0
            with capture_elsewhere():
                worker.submit_load(2, CPULoadStoreSpec(SLOTS), _pages())
                worker.wait({2})
                _poll(worker, {2})
        torch.cuda.synchronize()
        assert torch.equal(transfers.cache.cpu(), before)
    assert card.complaints() == []
