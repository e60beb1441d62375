"""Measures a machine, keeps what was found, and finds it again."""

from __future__ import annotations

import fcntl
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch

from triton_offload.calibration import (
    Calibration,
    Launches,
    LaunchShape,
    Path,
    default_calibration,
)
from triton_offload.device import Device, device_for
from triton_offload.kernels.arguments import shown
from triton_offload.specs import Direction
from triton_offload.transfer.paths.table import CROSSINGS
from triton_offload.transfer.pipeline import PipelineOptions
from triton_offload.tuning.calibration_file import Machine, cache_file, load, read, save
from triton_offload.tuning.fitting import (
    LaunchMeasurement,
    Measurement,
    Measurements,
    fit,
    fit_launches,
)
from triton_offload.tuning.machine import identify
from triton_offload.tuning.rig import RIG_BYTES, Rig

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # steps done, of so many

Name = TypeVar("Name")

PAGE_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
PAGES = (16, 256, 4096)
# Of one job of small pages; cheapest first.
_SMALL_PAGE_BYTES = 16 << 10
_BUFFER_BYTES = (4 << 20, 8 << 20, 16 << 20, 32 << 20)
_STEPS = len(PAGE_BYTES) + 2


def calibration_for(
    device: torch.device, choice: Calibration | str | os.PathLike[str] = "auto"
) -> Calibration:
    """The calibration of `device` that a user chose. May block for seconds, so that it is called
    where things are built, never while a request waits.

    `choice`: "auto" reads what is kept for this machine. Where that is nothing, a GPU is measured
    once, which takes some seconds, and the result is kept; CPU memory, where the default is seldom
    far from the best, is measured by `triton-offload calibrate` only. "off" takes the published
    figures. Else it is a file that `triton-offload calibrate --output` wrote, or the value itself.

    A file that is broken, or of another machine, is ignored with a warning in the log. A failure to
    measure, or to keep the result, is one too. Raises ValueError where the chosen file does not
    exist.
    """
    if isinstance(choice, Calibration):
        return choice
    if not isinstance(choice, str | os.PathLike):
        raise ValueError(f'calibration: expected "auto", "off" or a file, got {shown(choice)}')
    default = default_calibration(device.type)
    if choice == "off":
        return default
    machine = identify(device)
    if choice != "auto":
        file = pathlib.Path(choice)
        if not file.is_file():
            raise ValueError(f'calibration: expected "auto", "off" or a file, got {str(choice)!r}')
        return load(file, machine) or default
    try:
        file = cache_file(machine)
        found = load(file, machine)
        if found is None and device.type != "cpu":
            found = _measure_once(device, machine, file)
    except Exception as error:  # no memory left, no home to write to: no reason not to start
        _log.warning(
            "this machine could not be calibrated: %s; published figures decide, which may be "
            "slower: `triton-offload calibrate` tries again, `triton-offload doctor` says what "
            "stands in the way",
            repr(error),
        )
        return default
    return found or default


def calibrate(
    device: torch.device, progress: Progress | None = None, num_bytes: int = RIG_BYTES
) -> Calibration:
    """Measure `device` for some seconds, and fit. `num_bytes`: of the largest job."""
    measured = measure(device, progress or (lambda done, total: None), num_bytes)
    return fit(measured, default_calibration(device.type))


def measure(device: torch.device, progress: Progress, num_bytes: int) -> Measurements:
    """Time jobs of up to `num_bytes`: by every path at some page sizes and counts, and of small
    pages with several launches of the kernels and sizes of the staging buffers."""
    default = default_calibration(device.type)
    launches = (
        *_by_shape(device, Path.STAGED, num_bytes),
        *_by_shape(device, Path.ZERO_COPY, num_bytes),
    )
    tuned = fit_launches(launches, default)
    progress(1, _STEPS)
    paths: list[Measurement] = []
    for step, page_bytes in enumerate(PAGE_BYTES, 2):
        paths += _by_path(device_for(device, tuned), page_bytes, num_bytes)
        progress(step, _STEPS)
    with Rig(device_for(device, tuned), _SMALL_PAGE_BYTES, num_bytes) as rig:
        sizes = {
            size: (PipelineOptions(path=Path.STAGED, buffer_bytes=size), None)
            for size in _BUFFER_BYTES
        }
        buffer_bytes = _both_ways(rig, sizes)
    progress(_STEPS, _STEPS)
    return Measurements(tuple(paths), buffer_bytes, launches)


def _by_path(device: Device, page_bytes: int, num_bytes: int) -> list[Measurement]:
    with Rig(device, page_bytes, num_bytes) as rig:
        measured: list[Measurement] = []
        for direction in Direction:
            pipelines = rig.pipelines(direction, PipelineOptions().buffer_bytes)
            measured += [
                Measurement(direction, page_bytes, pages, path, seconds)
                for pages in PAGES
                if pages <= rig.num_pages
                for path, seconds in rig.seconds(pipelines, direction, pages).items()
            ]
            rig.end_pipelines()
        return measured


def _by_shape(device: torch.device, path: Path, num_bytes: int) -> list[LaunchMeasurement]:
    """Seconds of a store, and of a load, of all pages."""
    if device.type == "cpu":
        return []
    default = default_calibration(device.type)
    with Rig(device_for(device), _SMALL_PAGE_BYTES, num_bytes) as rig:
        if not rig.takes(path):
            return []
        # All are there at once, and zero copy has no use for staging.
        bytes_staged = PipelineOptions().buffer_bytes if path is Path.STAGED else 1 << 20
        options = PipelineOptions(path=path, buffer_bytes=bytes_staged)
        launched: dict[LaunchShape | None, tuple[PipelineOptions, Device | None]] = {}
        for shape in CROSSINGS[path].launch_shapes:
            launch: dict[str, Any] = {path.value: Launches(shape, shape)}
            launches = replace(default, **launch)
            launched[shape] = (options, device_for(device, launches))
        return [
            LaunchMeasurement(way, path, shape, seconds)
            for way in Direction
            for shape, seconds in _one_way(rig, launched, way).items()
        ]


def _both_ways(
    rig: Rig, choices: Mapping[Name, tuple[PipelineOptions, Device | None]]
) -> tuple[tuple[Name, float], ...]:
    """Seconds of a store and a load of all pages."""
    store, load = (_one_way(rig, choices, way) for way in Direction)
    return tuple((name, store[name] + load[name]) for name in store if name in load)


def _one_way(
    rig: Rig, choices: Mapping[Name, tuple[PipelineOptions, Device | None]], way: Direction
) -> dict[Name, float]:
    """Seconds of a store or a load of all pages."""
    pipelines = {name: rig.pipeline(way, *choice) for name, choice in choices.items()}
    took = rig.seconds(pipelines, way, rig.num_pages)
    rig.end_pipelines()
    return took


def _measure_once(device: torch.device, machine: Machine, file: pathlib.Path) -> Calibration:
    """Measure and keep it; of several processes (ranks of one engine), which would disturb each
    other, the first does so, and the rest wait for what it finds."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = None
        with suppress(ValueError):  # which was told when it was first looked at
            found = read(file, machine)
        if found is None:
            found = calibrate(device)
            save(file, machine, found)
        return found
