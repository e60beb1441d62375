"""Calibration: what is fitted to made-up measurements, how it is kept, and who follows it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
import typer
from gated import GatedDevice
from logs import logged, warned
from terminal import columns
from typer.testing import CliRunner

from triton_offload import KVOffloader, cache_files
from triton_offload.calibration import (
    CUDA_PATHS,
    HOST_PATHS,
    Calibration,
    Launches,
    LaunchShape,
    Path,
    PathRule,
    PathTable,
    default_calibration,
)
from triton_offload.cli import machine as cli_machine
from triton_offload.cli.main import app
from triton_offload.device.cuda import launch_config
from triton_offload.kernels.tiling import choose_config, ring_config
from triton_offload.pool.host_pool import HostPool
from triton_offload.specs import CPULoadStoreSpec, Direction, GPULoadStoreSpec
from triton_offload.transfer import queue_manager
from triton_offload.transfer.layout import CacheLayout
from triton_offload.transfer.paths.table import CROSSINGS
from triton_offload.transfer.pipeline import Pipeline, PipelineOptions
from triton_offload.transfer.queue_manager import transfer_queue
from triton_offload.tuning import calibrate, fitting
from triton_offload.tuning import rig as rig_module
from triton_offload.tuning.calibration_file import Machine, cache_file, dump, load, parse, save
from triton_offload.tuning.fitting import (
    MARGIN,
    LaunchMeasurement,
    Measurement,
    Measurements,
    fit,
    fit_launches,
    fit_paths,
    pick,
)
from triton_offload.tuning.machine import identify
from triton_offload.tuning.rig import Rig

SIZES = (4 << 10, 64 << 10, 1 << 20)
COUNTS = (16, 256, 4096)
MACHINE = Machine("NVIDIA H100", "580.65", "Gen5 x16", "0.1.0")
CPU = torch.device("cpu")
MEASURED = Calibration(
    PathTable(Path.STAGED, (PathRule(Direction.LOAD, 4096, 16, Path.ZERO_COPY),)),
    buffer_bytes=4 << 20,
    staged=Launches(LaunchShape(8, 4), LaunchShape(4, 4)),
)


def measured(fastest, seconds=0.8):
    """Every path takes a second, but `fastest(direction, size, count)` takes `seconds`."""
    return [
        Measurement(way, size, count, path, seconds if path is fastest(way, size, count) else 1.0)
        for way in Direction
        for size in SIZES
        for count in COUNTS
        for path in Path
    ]


# -- fitting --


@pytest.mark.parametrize(
    "fastest",
    [
        lambda way, size, count: Path.COPY_ENGINE if size >= 64 << 10 else Path.STAGED,
        lambda way, size, count: Path.ZERO_COPY if count < 256 else Path.STAGED,
        lambda way, size, count: Path.ZERO_COPY if way is Direction.LOAD else Path.COPY_ENGINE,
        lambda way, size, count: Path.COPY_ENGINE if size == 64 << 10 else Path.ZERO_COPY,
        lambda way, size, count: list(Path)[(size.bit_length() + count.bit_length()) % 3],
    ],
    ids=["by page size", "by pages", "by direction", "a middle size alone", "no order at all"],
)
@pytest.mark.parametrize("default", [HOST_PATHS, CUDA_PATHS], ids=["host", "cuda"])
def test_the_choice_follows_the_fastest(fastest, default):
    table = fit_paths(measured(fastest), default)
    for way in Direction:
        for size in SIZES:
            for count in COUNTS:
                assert table.choose(way, size, count) is fastest(way, size, count)


def test_between_and_beyond_the_points_the_nearest_decides():
    table = fit_paths(
        measured(lambda way, size, count: Path.COPY_ENGINE if size >= 64 << 10 else Path.STAGED),
        PathTable(Path.STAGED),
    )
    # 4 KiB and 64 KiB are equally far from 16 KiB
    choices = [table.choose(Direction.LOAD, size, 99) for size in (1, 16383, 16384, 1 << 30)]
    assert choices == [Path.STAGED, Path.STAGED, Path.COPY_ENGINE, Path.COPY_ENGINE]


def test_a_size_with_fewer_counts_measured_has_the_nearest_of_its_own():
    points = [
        Measurement(Direction.LOAD, size, count, path, 1.0 if path is other else 2.0)
        for size, count, other in [
            (4096, 16, Path.STAGED),
            (4096, 4096, Path.COPY_ENGINE),
            (1 << 20, 16, Path.ZERO_COPY),
        ]
        for path in Path
    ]
    table = fit_paths(points, HOST_PATHS)
    assert table.choose(Direction.LOAD, 4096, 4096) is Path.COPY_ENGINE
    assert table.choose(Direction.LOAD, 1 << 20, 4096) is Path.ZERO_COPY
    assert table.choose(Direction.STORE, 4096, 4096) is HOST_PATHS.default  # not measured


def test_directions_that_were_measured_at_other_counts_do_not_mix():
    points = [
        Measurement(way, 4096, count, path, 0.5 if path is other else 1.0)
        for way, count, other in [
            (Direction.STORE, 16, Path.ZERO_COPY),
            (Direction.STORE, 4096, Path.STAGED),
            (Direction.LOAD, 256, Path.COPY_ENGINE),
        ]
        for path in Path
    ]
    table = fit_paths(points, PathTable(Path.STAGED))
    store = [table.choose(Direction.STORE, 4096, count) for count in (16, 255, 256, 4096)]
    assert store == [Path.ZERO_COPY, Path.ZERO_COPY, Path.STAGED, Path.STAGED]
    assert table.choose(Direction.LOAD, 4096, 1) is Path.COPY_ENGINE


def test_the_last_rule_that_applies_wins():
    table = PathTable(
        Path.STAGED,
        (
            PathRule(Direction.LOAD, 4096, 16, Path.ZERO_COPY),
            PathRule(Direction.LOAD, 8192, 16, Path.COPY_ENGINE),
        ),
    )
    for size, pages, path in [
        (4095, 16, Path.STAGED),
        (4096, 15, Path.STAGED),
        (4096, 16, Path.ZERO_COPY),
        (8191, 99, Path.ZERO_COPY),
        (8192, 16, Path.COPY_ENGINE),
        (8192, 15, Path.STAGED),
    ]:
        assert table.choose(Direction.LOAD, size, pages) is path
        assert table.choose(Direction.STORE, size, pages) is Path.STAGED


def test_warps_are_a_power_of_two_up_to_32():
    for warps in (1, 2, 4, 8, 16, 32):
        assert LaunchShape(1, warps).warps == warps
    for warps in (0, 3, 6, 12, 24, 33, 64, True, 8.0):
        with pytest.raises(ValueError, match=f"warps: expected .* got {warps}"):
            LaunchShape(1, warps)
    with pytest.raises(ValueError, match="ring: expected a bool, got 1"):
        LaunchShape(1, 4, ring=1)


def test_cpu_memory_follows_its_own_figures():
    assert default_calibration("cpu").paths is HOST_PATHS
    assert default_calibration("cuda").paths is CUDA_PATHS


def test_a_choice_that_is_the_same_everywhere_needs_one_rule_a_direction():
    table = fit_paths(measured(lambda *point: Path.COPY_ENGINE), HOST_PATHS)
    assert len(table.rules) == 2
    assert fit_paths(measured(lambda *point: Path.ZERO_COPY), HOST_PATHS) == HOST_PATHS


@pytest.mark.parametrize("default", Path)
@pytest.mark.parametrize("seconds", [0.98, 1.0])
def test_within_the_noise_the_default_stays(default, seconds):
    for other in Path:
        table = fit_paths(measured(lambda *point, o=other: o, seconds), PathTable(default))
        assert table == PathTable(default)


def test_the_default_is_that_of_each_point():
    table = fit_paths(measured(lambda *point: Path.ZERO_COPY, 0.98), CUDA_PATHS)
    for size in SIZES:
        assert table.choose(Direction.LOAD, size, 16) is CUDA_PATHS.choose(Direction.LOAD, size, 16)


def test_a_default_that_failed_gives_way_to_the_fastest_of_the_rest():
    took = [one for one in measured(lambda *point: Path.STAGED) if one.path is not Path.ZERO_COPY]
    assert fit_paths(took, HOST_PATHS).choose(Direction.LOAD, 4096, 16) is Path.STAGED


def test_a_direction_that_was_not_measured_keeps_its_rules():
    took = [one for one in measured(lambda *point: Path.ZERO_COPY) if one.direction.value == "load"]
    table = fit_paths(took, CUDA_PATHS)
    for size in SIZES:
        assert table.choose(Direction.LOAD, size, 16) is Path.ZERO_COPY
        ours, theirs = (t.choose(Direction.STORE, size, 16) for t in (table, CUDA_PATHS))
        assert ours is theirs


def test_of_several_about_as_fast_the_cheapest_replaces_the_default():
    took = [("cheap", 1.02), ("default", MARGIN * 1.01), ("fastest", 1.0), ("slow", 9.0)]
    assert pick("default", took) == "cheap"
    assert pick("default", [("cheap", 1.2), ("default", 1.06), ("fastest", 1.0)]) == "fastest"
    assert pick("default", [("cheap", 1.0), ("default", 1.02)]) == "default"
    assert pick("default", []) == "default"


def test_fit_replaces_what_was_measured_and_nothing_else():
    default = default_calibration("cuda")
    took = Measurements(
        tuple(measured(lambda *point: Path.ZERO_COPY)),
        buffer_bytes=((4 << 20, 1.0), (16 << 20, 2.0)),
        launches=tuple(launched(Path.STAGED, Direction.LOAD, LaunchShape(8, 8))),
    )
    fitted = fit(took, default)
    assert fitted.buffer_bytes == 4 << 20
    assert fitted.staged == Launches(None, LaunchShape(8, 8))
    assert fitted.zero_copy == default.zero_copy
    assert fitted.paths.choose(Direction.STORE, 4096, 16) is Path.ZERO_COPY
    assert fit(Measurements(()), default) == default


def test_stores_and_loads_have_launches_of_their_own():
    small, big = LaunchShape(4, 16), LaunchShape(8, 32)
    took = [
        *launched(Path.ZERO_COPY, Direction.STORE, big),
        *launched(Path.ZERO_COPY, Direction.LOAD, small),
        *launched(Path.STAGED, Direction.STORE, small),
    ]
    fitted = fit_launches(took, default_calibration("cuda"))
    assert fitted.zero_copy == Launches(store=big, load=small)
    assert fitted.staged == Launches(store=small)


def test_a_launch_that_failed_leaves_the_default_of_its_path():
    default = default_calibration("cuda")
    took = [LaunchMeasurement(Direction.LOAD, Path.ZERO_COPY, LaunchShape(8, 32), 1.0)]
    fitted = fit_launches(took, default)
    assert fitted.zero_copy == Launches(default.zero_copy.store, LaunchShape(8, 32))


def test_without_a_measurement_stores_by_zero_copy_have_more_ctas_than_the_kernels_own():
    own = choose_config(zero_copy=True)
    launches = default_calibration("cuda").zero_copy
    assert launches.of(Direction.LOAD) is None
    store = launch_config(launches.of(Direction.STORE), zero_copy=True)
    assert (store.warps, store.tile_bytes) == (own.warps, own.tile_bytes)
    assert store.programs == 2 * own.programs
    assert default_calibration("cpu").zero_copy == Launches()


def launched(path, direction, fastest, seconds=0.8):
    """Every shape takes a second, but one."""
    shapes = CROSSINGS[path].launch_shapes
    return [
        LaunchMeasurement(direction, path, shape, seconds if shape == fastest else 1.0)
        for shape in (*shapes, fastest)
    ]


# -- keeping --


@pytest.mark.parametrize("calibration", [MEASURED, default_calibration("cuda")])
def test_a_kept_calibration_reads_back(tmp_path, calibration):
    file = tmp_path / "deep" / "kept.json"
    save(file, MACHINE, calibration)
    save(file, MACHINE, calibration)  # over the old one
    assert load(file, MACHINE) == calibration
    assert [path.name for path in file.parent.iterdir()] == ["kept.json"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "kept.json"
    save(file, MACHINE, MEASURED)

    def fail(*args, **kwargs):
        raise OSError("injected")

    for broken in ("replace", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(cache_files.os, broken, fail)
            with pytest.raises(OSError, match="injected"):
                save(file, MACHINE, default_calibration("cpu"))
        assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
        assert load(file, MACHINE) == MEASURED
    with pytest.raises(AttributeError):  # what can not be written
        save(file, MACHINE, dataclasses.replace(MEASURED, buffer_bytes=1, paths=object()))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_where_there_is_no_file_there_is_no_warning(tmp_path):
    with logged() as records:
        assert load(tmp_path / "none.json", MACHINE) is None
    assert records == []


def edited(**changes) -> str:
    data = json.loads(dump(MACHINE, MEASURED))
    data["calibration"].update(changes)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"format": 2}',
        dump(MACHINE, MEASURED).replace('"format": 2', '"format": 1'),
        dump(MACHINE, MEASURED).replace('"zero_copy"', '"teleport"', 1),
        edited(buffer_bytes="16"),
        edited(buffer_bytes=0),
        edited(buffer_bytes=1 << 40),
        edited(buffer_bytes=True),
        edited(unknown=1),
        edited(staged={"store": {"programs": 0, "warps": 8}}),
        edited(staged={"store": {"programs": 8, "warps": 3}}),
        edited(staged={"load": {"programs": 8}}),
        edited(staged={"up": None}),
        edited(staged=None),
        edited(paths={"default": "staged", "rules": [{"direction": "up"}]}),
        edited(
            paths={
                "default": "staged",
                "rules": [
                    {
                        "direction": "load",
                        "min_page_bytes": -1,
                        "min_pages": 0,
                        "path": "staged",
                    }
                ],
            }
        ),
    ],
)
def test_a_broken_file_is_ignored_with_a_warning(tmp_path, text):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with warned("tuning.calibration_file", r"ignored, .*broken\.json is broken"):
        assert load(file, MACHINE) is None


def test_a_file_that_is_no_text_or_no_file_is_ignored_with_a_warning(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "binary.json", tmp_path):
        with warned("tuning.calibration_file", "is broken"):
            assert load(file, MACHINE) is None


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Machine)])
def test_a_file_of_another_machine_is_ignored_with_a_warning(tmp_path, field):
    other = dataclasses.replace(MACHINE, **{field: "another"})
    assert cache_file(other) != cache_file(MACHINE)
    file = tmp_path / "foreign.json"
    save(file, other, MEASURED)
    with warned("tuning.calibration_file", f"another machine: expected {field} .* got 'another'"):
        assert load(file, MACHINE) is None


def test_the_cache_is_where_the_user_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file(MACHINE).parent == tmp_path / "triton-offload"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file(MACHINE).parent == pathlib.Path.home() / ".cache" / "triton-offload"


# -- choosing --


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch, own_cache):
    """A made-up GPU; how often it was measured is in the list."""
    times: list[torch.device] = []
    monkeypatch.setattr(calibrate, "identify", lambda device: MACHINE)
    monkeypatch.setattr(calibrate, "calibrate", lambda device: times.append(device) or MEASURED)
    return times


CUDA = torch.device("cuda", 0)


def test_a_gpu_is_measured_once(gpu):
    assert calibrate.calibration_for(CUDA) == MEASURED
    assert calibrate.calibration_for(CUDA) == MEASURED
    assert gpu == [CUDA]


def test_of_several_ranks_that_start_at_once_one_measures(gpu, monkeypatch):
    all_here = threading.Barrier(4)

    def lookup(file, machine):
        found = load(file, machine)
        if found is None and not all_here.broken:
            with suppress(threading.BrokenBarrierError):  # the one that holds the lock
                all_here.wait(0.2)
        return found

    monkeypatch.setattr(calibrate, "load", lookup)
    with ThreadPoolExecutor(4) as ranks:
        found = list(ranks.map(calibrate.calibration_for, [CUDA] * 4))
    assert found == [MEASURED] * 4
    assert gpu == [CUDA]


def test_off_measures_and_reads_nothing(gpu):
    save(cache_file(MACHINE), MACHINE, MEASURED)
    assert calibrate.calibration_for(CUDA, "off").paths == CUDA_PATHS
    assert gpu == []


def test_a_broken_file_in_the_cache_is_measured_anew(gpu):
    cache_file(MACHINE).parent.mkdir(parents=True)
    cache_file(MACHINE).write_text("{")
    with warned("tuning.calibration_file", "is broken"):
        assert calibrate.calibration_for(CUDA) == MEASURED
    assert parse(cache_file(MACHINE).read_text()) == (MACHINE, MEASURED)


def test_a_gpu_that_can_not_be_measured_has_the_defaults_with_a_warning(gpu, monkeypatch):
    def fail(device):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(calibrate, "calibrate", fail)
    with warned("tuning.calibrate", "could not be calibrated.*no room"):
        assert calibrate.calibration_for(CUDA).paths == CUDA_PATHS


def test_a_cache_that_can_not_be_written_is_no_reason_not_to_start(gpu, own_cache):
    own_cache.write_text("a file where a directory should be")
    with warned("tuning.calibrate", "could not be calibrated"):
        assert calibrate.calibration_for(CUDA).paths == CUDA_PATHS


def test_cpu_memory_is_not_measured_on_first_use(gpu):
    assert calibrate.calibration_for(CPU) == default_calibration("cpu")
    assert gpu == []
    save(cache_file(MACHINE), MACHINE, MEASURED)
    assert calibrate.calibration_for(CPU) == MEASURED


def test_a_chosen_file_is_read_and_never_replaced(gpu, tmp_path):
    file = tmp_path / "mine.json"
    save(file, MACHINE, MEASURED)
    assert calibrate.calibration_for(CUDA, file) == MEASURED
    assert calibrate.calibration_for(CUDA, str(file)) == MEASURED
    file.write_text("{")
    with warned("tuning.calibration_file", "is broken"):
        assert calibrate.calibration_for(CUDA, file).paths == CUDA_PATHS
    assert (gpu, file.read_text()) == ([], "{")


@pytest.mark.parametrize("choice", ["of", "", 3, None])
def test_a_choice_that_is_none_is_an_error(choice):
    with pytest.raises(ValueError, match='calibration: expected "auto", "off" or a file, got'):
        calibrate.calibration_for(CPU, choice)


# -- following --


class CountingDevice(GatedDevice):
    """Notes which paths work is queued by."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: set[Path] = set()

    def gather(self, *args, zero_copy):
        self.paths.add(Path.ZERO_COPY if zero_copy else Path.STAGED)
        super().gather(*args, zero_copy=zero_copy)

    def copy_batch(self, dst, src, sizes, stream):
        self.paths.add(Path.COPY_ENGINE)
        super().copy_batch(dst, src, sizes, stream)


def stored_by(calibration=None, *, path="auto", options=None) -> set[Path]:
    device = CountingDevice()
    layout = CacheLayout([torch.zeros((8, 64), dtype=torch.uint8)])
    pool = HostPool.allocate(device, 8, layout.slot_bytes)
    pool.wait_ready(60)
    queue = transfer_queue(layout, pool, path, options, calibration)
    try:
        queue.wait([queue.transfer_async(GPULoadStoreSpec([1, 2]), CPULoadStoreSpec([3, 4]))], 60)
        assert all(result.success for result in queue.get_finished())
    finally:
        queue.shutdown(60)
        pool.close()
    return device.paths


@pytest.mark.parametrize("winner", Path)
def test_a_transfer_takes_the_path_that_won(winner):
    fitted = fit(Measurements(tuple(measured(lambda *point: winner))), default_calibration("cpu"))
    assert stored_by(fitted) == {winner}


def test_what_is_said_wins_over_what_was_measured():
    fitted = Calibration(PathTable(Path.STAGED))
    assert stored_by(fitted, path="copy_engine") == {Path.COPY_ENGINE}
    options = PipelineOptions(paths=PathTable(Path.COPY_ENGINE))
    assert stored_by(fitted, options=options) == {Path.COPY_ENGINE}
    assert stored_by(fitted, options=PipelineOptions()) == {Path.STAGED}
    assert stored_by() == {HOST_PATHS.default}


def test_an_offloader_follows_what_is_kept_for_this_machine(own_cache, monkeypatch):
    seen: list[PipelineOptions] = []

    def pipeline(layout, pool, options):
        seen.append(options)
        return Pipeline(layout, pool, options)

    monkeypatch.setattr(queue_manager, "Pipeline", pipeline)
    save(cache_file(identify(CPU)), identify(CPU), MEASURED)
    caches = [torch.zeros((8, 64), dtype=torch.uint8)]
    for choice, table, size in [
        ("auto", MEASURED.paths, MEASURED.buffer_bytes),
        ("off", HOST_PATHS, PipelineOptions().buffer_bytes),
        (cache_file(identify(CPU)), MEASURED.paths, MEASURED.buffer_bytes),
        (Calibration(CUDA_PATHS, 1 << 20), CUDA_PATHS, 1 << 20),
    ]:
        KVOffloader(caches, 4096, calibration=choice).close()
        assert (seen[-1].paths, seen[-1].buffer_bytes) == (table, size)


def test_launches_have_the_shape_that_won():
    assert launch_config(None, zero_copy=True) == choose_config(zero_copy=True)
    config = launch_config(LaunchShape(24, 4), zero_copy=False)
    own = choose_config(zero_copy=False)
    assert (config.programs, config.warps) == (24, 4)
    assert config.tile_bytes / config.warps == own.tile_bytes / own.warps
    assert launch_config(LaunchShape(3, 4, ring=True), zero_copy=True) == ring_config(3)


# -- measuring --


def test_every_path_is_measured_at_every_point():
    steps = []
    took = calibrate.measure(CPU, lambda done, total: steps.append((done, total)), 8 << 20)
    points = {(one.direction, one.page_bytes, one.pages) for one in took.paths}
    assert {(way, size) for way, size, _ in points} == {
        (way, size) for way in Direction for size in calibrate.PAGE_BYTES[:-1]
    }
    assert all(
        {one.path for one in took.paths if (one.direction, one.page_bytes, one.pages) == point}
        == set(Path)
        for point in points
    )
    assert all(one.seconds > 0 for one in took.paths)
    assert 16 << 20 in dict(took.buffer_bytes)
    assert steps == [(i, steps[-1][1]) for i in range(1, steps[-1][1] + 1)]


def test_on_a_gpu_launches_are_measured_too_and_paths_with_those_that_won(monkeypatch):
    built: list[Calibration] = []

    def device_for(device, calibration=None):
        built.append(calibration or default_calibration("cuda"))
        return GatedDevice()

    monkeypatch.setattr(calibrate, "device_for", device_for)
    monkeypatch.setattr(calibrate, "PAGE_BYTES", (4096,))
    monkeypatch.setattr(fitting, "pick", lambda default, took: took[-1][0])
    took = calibrate.measure(torch.device("cuda"), lambda done, total: None, 1 << 20)
    for path in (Path.STAGED, Path.ZERO_COPY):
        shapes = CROSSINGS[path].launch_shapes
        assert None in shapes
        for way in Direction:
            found = [one.shape for one in took.launches if (one.path, one.direction) == (path, way)]
            assert found == list(shapes)
            tried = {getattr(calibration, path.value).of(way) for calibration in built}
            assert tried >= set(shapes)
        for tuned in built[-2:]:  # for the paths, and for the sizes of the buffers
            assert getattr(tuned, path.value) == Launches(shapes[-1], shapes[-1])
    assert {one.path for one in took.paths} == set(Path)


def test_a_job_of_all_pages_is_measured(monkeypatch):
    monkeypatch.setattr(calibrate, "PAGES", (16, 256, 257))
    took = calibrate._by_path(GatedDevice(), 4096, 1 << 20)
    assert {one.pages for one in took} == {16, 256}


def test_the_first_turn_of_a_rig_does_not_count(monkeypatch):
    turns = iter([99.0, *[1.0] * 9])
    monkeypatch.setattr(Rig, "_job", lambda *args: next(turns))
    monkeypatch.setattr(rig_module, "_typical", max)
    with Rig(GatedDevice(), 4096, 1 << 20) as rig:
        assert rig.seconds({"one": None}, Direction.STORE, 64) == {"one": 1.0}
    assert next(turns, None) is None


def test_the_lower_quartile_is_what_a_job_takes():
    assert rig_module._typical([9.0, 3.0, 1.0, 7.0, 2.0, 8.0, 5.0, 4.0, 6.0]) == 3.0


def test_a_path_that_fails_or_that_another_stands_in_for_is_not_measured():
    device = GatedDevice()
    device.fail_submission.add("copy_batch")
    device.fail_running.add("gather")
    with Rig(device, 4096, 1 << 20) as rig:
        stores = rig.pipelines(Direction.STORE, 1 << 20)
        assert set(rig.seconds(stores, Direction.STORE, 64)) == set()
        loads = rig.pipelines(Direction.LOAD, 1 << 20)
        assert set(rig.seconds(loads, Direction.LOAD, 64)) == {Path.STAGED, Path.ZERO_COPY}


def test_zero_copy_is_not_measured_where_memory_is_not_pinned():
    device = GatedDevice()
    device.register = lambda host: False
    with Rig(device, 4096, 1 << 20) as rig:
        assert not rig.takes(Path.ZERO_COPY)
        assert set(rig.pipelines(Direction.STORE, 1 << 20)) == {Path.STAGED, Path.COPY_ENGINE}


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, lambda: torch.device("meta")],
    ids=["inference mode", "another default device"],
)
def test_measuring_works_wherever_the_engine_asks_for_it(mode):
    with mode():
        took = calibrate.measure(CPU, lambda done, total: None, 8 << 20)
    assert {one.path for one in took.paths} == set(Path)
    assert len(took.buffer_bytes) == 4


class Closings:
    """What was closed, and what of it fails a number of times."""

    def __init__(self, monkeypatch, **failures):
        self.failures = failures
        self.closed = []
        for owner, name in [(Pipeline, "shutdown"), (HostPool, "close")]:
            monkeypatch.setattr(owner, name, self.noting(getattr(owner, name), name))

    def noting(self, original, name):
        def close(*args):
            self.closed.append(name)
            original(*args)
            if self.failures.get(name, 0) > 0:
                self.failures[name] -= 1
                raise OSError(f"injected: {name}")

        return close


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("triton-offload")]


@pytest.mark.parametrize("failing", ["shutdown", "close"])
def test_a_rig_closes_all_it_has_and_tries_again_what_raised(monkeypatch, failing):
    closings = Closings(monkeypatch, **{failing: 1})
    rig = Rig(GatedDevice(), 4096, 1 << 20)
    rig.pipelines(Direction.STORE, 1 << 20)
    with pytest.raises(OSError, match=f"injected: {failing}"), rig:
        pass
    assert closings.closed == ["shutdown"] * 3 + ["close"]
    rig.close()
    assert closings.closed == ["shutdown"] * 3 + ["close", failing]
    rig.close()
    assert len(closings.closed) == 5
    assert own_threads() == []


@pytest.mark.parametrize("step", ["empty", "allocate", "wait_ready"])
def test_a_rig_that_can_not_be_made_leaves_nothing(monkeypatch, step):
    def fail(*args):
        raise MemoryError(f"injected: {step}")

    device = GatedDevice()
    owner = device if step == "empty" else HostPool
    closings = Closings(monkeypatch)
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(MemoryError, match=f"injected: {step}"):
        Rig(device, 4096, 1 << 20)
    assert closings.closed == (["close"] if step == "wait_ready" else [])
    assert own_threads() == []


def test_a_rig_needs_room_for_its_pages():
    with pytest.raises(ValueError, match="num_bytes: expected at least 8 pages of 4096, got 4096"):
        Rig(GatedDevice(), 4096, 4096)


# -- the command --


@pytest.fixture
def quick(monkeypatch):
    """The command without what takes seconds."""

    def run(device, progress):
        progress(1, 1)
        return MEASURED

    monkeypatch.setattr("triton_offload.cli.machine.run_calibration", run)


def test_the_command_keeps_what_it_found(quick, own_cache):
    done = CliRunner().invoke(app, ["calibrate", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    file = cache_file(identify(CPU))
    assert str(file) in done.stdout
    assert "zero_copy" in done.stdout
    assert load(file, identify(CPU)) == MEASURED


def test_a_narrow_terminal_cuts_nothing(quick, own_cache):
    arguments = ["calibrate", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "40"})
    table = done.stdout.partition("kept in")[0]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 40
    ((ways, sizes, *jobs),) = columns(table)
    count = len(calibrate.PAGE_BYTES)
    assert ways == "direction" + "store" * count + "load" * count
    assert sizes == "pagesof" + "4.0KiB16.0KiB64.0KiB256.0KiB1.0MiB" * 2
    assert jobs == [
        f"ajobof{pages}" + "staged" * count + "zero_copy" * count for pages in calibrate.PAGES
    ]
    launches = "staged, store: 8 CTAs of 4 warps; staged, load: 4 CTAs of 4 warps"
    assert f"staging buffers of 4.0 MiB; {launches}" in " ".join(table.split())


def test_the_command_writes_where_it_is_told_and_prints_json(quick, own_cache, tmp_path):
    file = tmp_path / "mine.json"
    done = CliRunner().invoke(
        app, ["calibrate", "--device", "cpu", "--output", str(file), "--json"]
    )
    facts = json.loads(done.stdout)
    assert facts["file"] == str(file)
    assert parse(file.read_text()) == (identify(CPU), MEASURED)
    assert facts["calibration"]["buffer_bytes"] == 4 << 20
    assert not own_cache.exists()


def test_the_command_exits_with_1_where_the_file_can_not_be_written(quick, tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "mine.json"
    done = CliRunner().invoke(app, ["calibrate", "--device", "cpu", "--output", str(target)])
    assert done.exit_code == 1
    assert "triton-offload calibrate: " in done.stderr


@pytest.mark.parametrize("command", ["calibrate", "doctor"])
@pytest.mark.parametrize("device", ["teapot", "cuda:99", "meta"])
def test_a_device_that_is_none_exits_with_2(command, device):
    done = CliRunner().invoke(app, [command, "--device", device])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"triton-offload {command}: --device: expected")
    assert done.stdout == ""


@pytest.mark.parametrize(("name", "known"), [("cuda", True), ("cuda:1", True), ("cuda:2", False)])
def test_a_card_is_one_of_those_that_are_there(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if known:
        assert cli_machine._device(name, "doctor") == torch.device(name)
    else:
        with pytest.raises(typer.Exit):
            cli_machine._device(name, "doctor")
