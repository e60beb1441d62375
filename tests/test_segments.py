"""How a job is cut into segments: what fills or drains the stages of a path is short."""

from __future__ import annotations

import pytest
import torch
from pipelines import NUM_BLOCKS, PipelineWorld

from triton_offload.calibration import Path
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.paths import staged
from triton_offload.transfer.paths.base import Crossing

CHUNK = 64
BUFFER, SHORT = 16, 4  # in chunks: a segment at most, and a short one


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch):
    monkeypatch.setattr(staged, "SHORT_BYTES", SHORT * CHUNK)


@pytest.fixture
def segments(monkeypatch):
    """Chunks of each segment, in the order in which they are queued."""
    sizes: list[int] = []
    queue = Crossing.queue

    def noting(self, streams, segment, pages, slots):
        sizes.append(len(segment.run.slot_ids))
        return queue(self, streams, segment, pages, slots)

    monkeypatch.setattr(Crossing, "queue", noting)
    return sizes


def build(path: Path = Path.STAGED, *, seed: int = 0, **options) -> PipelineWorld:
    device = SimulatedDevice(seed)
    return PipelineWorld.build(device, path=path, buffer_bytes=BUFFER * CHUNK, **options)


def cut(world: PipelineWorld, direction: str, *counts: int) -> None:
    """One job with a run of so many chunks of each group."""
    blocks = GPULoadStoreSpec(range(sum(counts)), counts, [0] * len(counts))
    slots = CPULoadStoreSpec(range(sum(counts)), True if direction == "store" else None)
    world.finish(world._submit(Direction(direction), blocks, slots))


@pytest.mark.parametrize(
    ("direction", "count", "wanted"),
    [
        ("store", 32, [4, 12, 16]),
        ("store", 17, [4, 12, 1]),
        ("store", 12, [4, 8]),
        ("store", 11, [11]),
        ("store", 1, [1]),
        ("load", 32, [16, 12, 4]),
        ("load", 30, [16, 10, 4]),
        ("load", 28, [16, 8, 4]),
        ("load", 27, [16, 11]),
        ("load", 20, [16, 4]),
        ("load", 12, [8, 4]),
        ("load", 11, [11]),
        ("load", 1, [1]),
    ],
)
def test_a_store_begins_with_a_short_segment_and_a_load_ends_with_one(
    segments, direction, count, wanted
):
    world = build()
    cut(world, direction, count)
    assert segments == wanted
    world.close()


@pytest.mark.parametrize(
    ("direction", "counts", "wanted"),
    [
        ("store", (16, 16), [4, 12, 16]),
        ("store", (2, 30), [2, 16, 14]),
        ("store", (0, 16), [4, 12]),
        ("load", (16, 16), [16, 12, 4]),
        ("load", (30, 2), [16, 14, 2]),
        ("load", (16, 0), [12, 4]),
    ],
)
def test_it_is_the_job_that_has_a_short_segment_not_each_group_of_it(
    segments, direction, counts, wanted
):
    world = build(pages=(CHUNK,), groups=[[(0, CHUNK)], [(0, CHUNK)]])
    cut(world, direction, *counts)
    assert segments == wanted
    world.close()


@pytest.mark.parametrize(("direction", "behind"), [("store", [16]), ("load", [12, 4])])
def test_a_store_behind_another_finds_the_stages_full(segments, direction, behind):
    world = build()
    device, submit = world.device, getattr(world, direction)
    device.faults.never_ends("engine")
    device.launch("engine", device.compute_stream)  # both jobs are under way until this ends
    jobs = submit(range(1), range(1)), submit(range(1, 17), range(1, 17))
    assert segments == [1, *behind]
    device.end_hung()
    world.finish(*jobs)
    segments.clear()
    cut(world, direction, 16)
    assert sorted(segments) == [4, 12]
    world.close()


@pytest.mark.parametrize("direction", ["store", "load"])
def test_paths_of_one_stage_have_no_short_segments(segments, direction):
    for path, wanted in ((Path.COPY_ENGINE, [16, 16]), (Path.ZERO_COPY, [32])):
        world = build(path)
        cut(world, direction, 32)
        assert segments == wanted
        segments.clear()
        world.close()


@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_chunk_of_more_bytes_is_a_short_segment_by_itself(segments, monkeypatch, direction):
    monkeypatch.setattr(staged, "SHORT_BYTES", CHUNK - 1)
    world = build()
    cut(world, direction, 3)
    assert sorted(segments) == [1, 2]
    world.close()


@pytest.mark.parametrize("first", range(2))
@pytest.mark.parametrize("seed", range(5))
def test_what_is_cut_so_moves_the_same_bytes(segments, seed, first):
    count = NUM_BLOCKS - 1 - first  # the last chunk is not whole
    with SimulatedDevice(seed) as device:
        world = PipelineWorld.build(
            device, pages=(16, 5), blocks_per_chunk=2, path=Path.STAGED, buffer_bytes=1 << 9
        )
        wanted = [tensor.clone() for tensor in world.tensors]
        pages = GPULoadStoreSpec(range(count), [count], [first])
        slots = range(-(-(first + count) // 2))
        world.finish(world._submit(Direction.STORE, pages, CPULoadStoreSpec(slots, True)))
        device.touch(writes=world.tensors)
        for tensor in world.tensors:
            tensor[:count].zero_()
        world.finish(world._submit(Direction.LOAD, pages, CPULoadStoreSpec(slots)))
        assert len(segments) == 4
        device.touch(reads=world.tensors)
        for tensor, bytes_ in zip(world.tensors, wanted, strict=True):
            assert torch.equal(tensor, bytes_)
        world.close()
