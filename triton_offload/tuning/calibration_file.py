"""Calibrations kept as JSON, each with the machine that it was measured on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import pathlib

from triton_offload.cache_files import cache_folder, whole
from triton_offload.calibration import (
    Calibration,
    Launches,
    LaunchShape,
    Path,
    PathRule,
    PathTable,
)
from triton_offload.specs import Direction

FORMAT = 2

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """What a calibration holds for: where one of these differs, it does not."""

    card: str
    driver: str
    link: str
    version: str  # of this package


def cache_file(machine: Machine) -> pathlib.Path:
    """Where the machine's calibration is kept."""
    key = hashlib.sha256(json.dumps(dataclasses.astuple(machine)).encode()).hexdigest()
    return cache_folder() / f"calibration-{key[:16]}.json"


def dump(machine: Machine, calibration: Calibration) -> str:
    data = {
        "format": FORMAT,
        "machine": dataclasses.asdict(machine),
        "calibration": dataclasses.asdict(calibration),
    }
    return json.dumps(data, indent=2, default=lambda choice: choice.value) + "\n"


def parse(text: str) -> tuple[Machine, Calibration]:
    """What `dump` wrote. Raises ValueError where it is anything else."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT}, got {data['format']!r}")
        values = dict(data["calibration"])
        table = values.pop("paths")
        rules = [
            PathRule(
                Direction(rule["direction"]),
                rule["min_page_bytes"],
                rule["min_pages"],
                Path(rule["path"]),
            )
            for rule in table["rules"]
        ]
        for name in ("staged", "zero_copy"):
            values[name] = Launches(
                **{
                    way: None if shape is None else LaunchShape(**shape)
                    for way, shape in dict(values[name]).items()
                }
            )
        paths = PathTable(Path(table["default"]), tuple(rules))
        return Machine(**data["machine"]), Calibration(paths, **values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected a calibration in format {FORMAT}, got {error!r}") from error


def load(file: pathlib.Path, machine: Machine) -> Calibration | None:
    """The calibration in `file`; None where there is none, and, with a warning in the log, where
    the file is broken or of another machine."""
    try:
        return read(file, machine)
    except ValueError as error:
        _log.warning(
            "%s; published figures or a new measurement take its place: `triton-offload calibrate` "
            "makes a new one, `triton-offload doctor` says which one is used",
            error,
        )
        return None


def read(file: pathlib.Path, machine: Machine) -> Calibration | None:
    """The calibration in `file`; None where there is none. Raises ValueError where the file is
    broken or of another machine."""
    try:
        found, calibration = parse(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"calibration ignored, {file} is broken: {error}") from error
    if found != machine:
        ours, theirs = dataclasses.asdict(machine), dataclasses.asdict(found)
        name = next(name for name in ours if ours[name] != theirs[name])
        raise ValueError(
            f"calibration ignored, {file} is of another machine: expected {name} {ours[name]!r}, "
            f"got {theirs[name]!r}"
        )
    return calibration


def save(file: pathlib.Path, machine: Machine, calibration: Calibration) -> None:
    """Write in one step: whoever reads meanwhile sees the old file or the new. Raises OSError."""
    with whole(file) as new:
        new.write_text(dump(machine, calibration), encoding="utf-8")
