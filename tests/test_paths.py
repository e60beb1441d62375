"""What is said of each path, and which one a lane takes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from triton_offload.calibration import Calibration, Path, PathRule, PathTable
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.testing import SimulatedDevice
from triton_offload.transfer.endings import Endings
from triton_offload.transfer.job import Job
from triton_offload.transfer.lane_paths import LanePaths
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.paths.table import CROSSINGS
from triton_offload.transfer.segment import Queued


def paths_of_a_lane(
    table: PathTable, *, reaches_pool: bool = True, takes_batches: bool = True
) -> LanePaths:
    streams = SimpleNamespace(
        direction=Direction.LOAD, reaches_pool=reaches_pool, takes_batches=takes_batches
    )
    return LanePaths("load", streams, table)


def test_every_path_is_described():
    kinds = {path: type(crossing).__name__ for path, crossing in CROSSINGS.items()}
    assert kinds == {
        Path.STAGED: "Staged",
        Path.ZERO_COPY: "ZeroCopy",
        Path.COPY_ENGINE: "CopyEngine",
    }


@pytest.mark.parametrize("path", list(Path), ids=lambda path: path.value)
def test_whatever_fails_first_one_of_two_paths_is_left(path):
    """Following what stands in leads to two that stand in for each other, and they need no map."""
    for _ in Path:
        path = CROSSINGS[path].stands_in
    other = CROSSINGS[path].stands_in
    assert CROSSINGS[other].stands_in is path is not other
    assert CROSSINGS[path].where_unmapped is CROSSINGS[other].where_unmapped is None


@pytest.mark.parametrize("path", list(Path), ids=lambda path: path.value)
def test_launches_are_tried_for_what_a_calibration_has(path):
    if CROSSINGS[path].launch_shapes:
        assert path.value in Calibration.__dataclass_fields__


def test_no_kernel_is_sent_to_a_pool_that_it_cannot_reach():
    table = PathTable(Path.ZERO_COPY)
    assert paths_of_a_lane(table).usable(Path.ZERO_COPY) is Path.ZERO_COPY
    unmapped = paths_of_a_lane(table, reaches_pool=False)
    assert [unmapped.usable(path) for path in Path] == [Path.STAGED, Path.STAGED, Path.COPY_ENGINE]


def test_big_pages_are_staged_where_there_are_no_batches():
    lane = paths_of_a_lane(PathTable(Path.COPY_ENGINE), takes_batches=False)
    expected = {Path.COPY_ENGINE: Path.STAGED}
    assert [lane.usable(path) for path in Path] == [expected.get(path, path) for path in Path]
    # Where that can't be queued either, they are copied one by one.
    assert lane.give_up(Path.STAGED, RuntimeError("injected")) is Path.COPY_ENGINE
    assert lane.usable(Path.COPY_ENGINE) is Path.COPY_ENGINE


def test_the_rule_is_asked_for_the_mean_page_and_all_pages():
    layout = CacheLayout([torch.zeros(8, 4, dtype=torch.uint8), torch.zeros(8, 8).byte()])
    specs = GPULoadStoreSpec([0, 1, 2]), CPULoadStoreSpec(np.arange(3))
    (run,) = layout.plan(Direction.LOAD, *specs, 3)
    for page_bytes, pages, expected in ((6, 6, Path.COPY_ENGINE), (7, 6, None), (6, 7, None)):
        rule = PathRule(Direction.LOAD, page_bytes, pages, Path.COPY_ENGINE)
        lane = paths_of_a_lane(PathTable(Path.STAGED, (rule,)))
        assert lane.choose(run) is (expected or Path.STAGED)


def test_pages_are_released_with_the_last_segment_or_where_there_is_none_with_the_end():
    job = Job(1, Direction.STORE, "store", 1, 0, [], None, [], 0.0)
    job.end = "end"
    assert job.released == "end"
    job.last = Queued("gathered", "copied", ("gathered", "copied"), 2)
    assert job.released == "gathered"
    job.error = RuntimeError("of what came after that segment")
    assert job.released == "end"


def test_a_lane_that_was_lost_says_why():
    class Streams:
        closed = 0

        def close_streams(self):
            self.closed += 1

    streams, error = Streams(), RuntimeError("no event can be recorded")
    endings = Endings(SimulatedDevice(), streams)
    endings.lose(error)
    assert endings.lost.__cause__ is error
    assert streams.closed == 1
