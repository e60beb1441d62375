"""The commands about this machine: `triton-offload calibrate`, `triton-offload doctor`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

from triton_offload.calibration import Calibration
from triton_offload.calibration import Path as TransferPath
from triton_offload.cli.output import in_options, table
from triton_offload.doctor import checks
from triton_offload.doctor.checks import Finding, Status
from triton_offload.doctor.facts import Facts, Speed, gather
from triton_offload.sizes import format_bytes, parse_bytes
from triton_offload.specs import Direction
from triton_offload.tuning.calibrate import PAGE_BYTES, PAGES, Progress
from triton_offload.tuning.calibrate import calibrate as run_calibration
from triton_offload.tuning.calibration_file import cache_file, dump, save
from triton_offload.tuning.machine import identify

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_DEVICE = Annotated[
    str, typer.Option(help='"cuda:1", "cpu", ...; else the GPU, where there is one.')
]
_STYLES = {Status.OK: "green", Status.NOTE: "yellow", Status.PROBLEM: "bold red"}


def calibrate(
    device: _DEVICE = "",
    output: Annotated[
        Path | None, typer.Option(help="Write here instead of to the user's cache.")
    ] = None,
    json_output: _JSON = False,
) -> None:
    """Measure the paths for some seconds, and keep which is the fastest when.

    Exits with 1 where the device can't be measured or the file can't be written.
    """
    target = _device(device, "calibrate")
    machine = identify(target)
    file = output or cache_file(machine)
    try:
        with _progress("calibrate") as progress:
            calibration = run_calibration(target, progress)
        save(file, machine, calibration)
    except (OSError, MemoryError, RuntimeError) as error:
        typer.echo(f"triton-offload calibrate: {error}", err=True)
        raise typer.Exit(1) from error
    if json_output:
        typer.echo(json.dumps({"file": str(file), **json.loads(dump(machine, calibration))}))
        return
    console = Console()
    console.print(_calibration_table(f"{machine.card}, {machine.driver}", calibration))
    console.print(f"kept in {file}", soft_wrap=True, highlight=False, markup=False)


def doctor(
    host_bytes: Annotated[
        str, typer.Option(help="The size of the host pool that is to fit.")
    ] = "1GiB",
    device: _DEVICE = "",
    json_output: _JSON = False,
) -> None:
    """Say what this machine can do, what stands in its way, and what to do about it.

    Exits with 1 where something is wrong.
    """
    target = _device(device, "doctor")
    try:
        size = parse_bytes("host_bytes", host_bytes)
    except ValueError as error:
        raise _usage("doctor", error) from error
    try:
        with _progress("doctor") as progress:
            facts = gather(target, size, progress)
    except RuntimeError as error:  # the card is there, and torch can't even name it
        typer.echo(f"triton-offload doctor: {error}", err=True)
        raise typer.Exit(1) from error
    findings = checks.examine(facts)
    ok = checks.sound(findings)
    if json_output:
        typer.echo(json.dumps(_as_json(ok, findings, facts)))
    else:
        console = Console()
        console.print(_findings_table(findings))
        if facts.speeds:
            console.print(_speeds_table(facts.speeds))
    raise typer.Exit(0 if ok else 1)


def _device(name: str, command: str) -> torch.device:
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _usage(command, f"device: expected one of torch's, got {name!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < count):
        return device
    raise _usage(command, f"device: expected cpu or one of {count} CUDA devices, got {name!r}")


def _usage(command: str, error: object) -> typer.Exit:
    message = in_options(str(error), {"device": "--device", "host_bytes": "--host-bytes"})
    typer.echo(f"triton-offload {command}: {message}", err=True)
    return typer.Exit(2)


@contextmanager
def _progress(name: str) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{name}: measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _calibration_table(title: str, calibration: Calibration) -> Table:
    jobs = (f"a job of {count}" for count in PAGES)
    shown = table("direction", "pages of", *jobs, title=title, right=(1,))
    for way, size in itertools.product(Direction, PAGE_BYTES):
        chosen = (calibration.paths.choose(way, size, count).value for count in PAGES)
        shown.add_row(way.value, format_bytes(size), *chosen)
    details = [f"staging buffers of {format_bytes(calibration.buffer_bytes)}"]
    for name, way in itertools.product(("staged", "zero_copy"), Direction):
        shape = getattr(calibration, name).of(way)
        if shape is not None:
            shown_shape = f"{shape.programs} CTAs of {shape.warps} warps"
            details.append(f"{name}, {way.value}: {shown_shape}")
    shown.caption = "; ".join(details)
    return shown


def _findings_table(findings: list[Finding]) -> Table:
    shown = table("", "", "", show_header=False)
    for finding in findings:
        style = _STYLES[finding.status]
        advice = f"\n-> {finding.advice}" if finding.advice else ""
        status = Text(finding.status.value, style)
        # Not as markup: what the system says may have brackets.
        shown.add_row(status, finding.name, Text(finding.what + advice))
    return shown


def _speeds_table(speeds: tuple[Speed, ...]) -> Table:
    names = [*(path.value for path in TransferPath), "plain copy"]
    title = "GB/s, scattered pages to adjacent slots"
    numbers = tuple(range(1, 2 + len(names)))
    shown = table("direction", "pages of", *names, title=title, right=numbers)
    shown.caption = "*: the path of auto"
    for way, size in dict.fromkeys((s.direction, s.page_bytes) for s in speeds):
        cells = {
            s.path.value if s.path else "plain copy": f"{s.gb_per_s:.2f}" + "*" * s.chosen
            for s in speeds
            if (s.direction, s.page_bytes) == (way, size)
        }
        shown.add_row(way.value, format_bytes(size), *(cells.get(name, "-") for name in names))
    return shown


def _as_json(ok: bool, findings: list[Finding], facts: Facts) -> dict[str, Any]:
    return {
        "ok": ok,
        "findings": [{**asdict(finding), "status": finding.status.value} for finding in findings],
        "speeds": [
            {
                **asdict(speed),
                "direction": speed.direction.value,
                "path": speed.path.value if speed.path else "plain_copy",
            }
            for speed in facts.speeds
        ],
        "machine": asdict(facts.identity),
        "versions": dict(facts.versions),
    }
