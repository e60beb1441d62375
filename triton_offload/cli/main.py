"""The command line: `triton-offload demo`, `replay TRACE.jsonl`, `calibrate`, `doctor`."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import triton_offload
from triton_offload.cli.machine import calibrate, doctor
from triton_offload.cli.models import MODELS
from triton_offload.cli.output import in_options, table
from triton_offload.cli.replay import (
    ReplayOptions,
    ReplayReport,
    TraceError,
    chunks_in,
    read_trace,
)
from triton_offload.cli.replay import replay as run_replay
from triton_offload.sizes import format_bytes, parse_bytes

app = typer.Typer(
    help="Moves the KV cache of LLM engines between device pages and host memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(calibrate)
app.command()(doctor)
_DEFAULTS = ReplayOptions()
_OPTIONS = {
    name: f"--{name.replace('_', '-')}"
    for name in (field.name for field in dataclasses.fields(ReplayOptions))
}
_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def main() -> None:
    """Entry point of the `triton-offload` script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(triton_offload.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(json_output: _JSON = False) -> None:
    """Answer prompts with a real vLLM engine, recomputed and loaded from the host pool.

    Exits with 1 where an output differs.
    """
    from triton_offload.cli.demo import run_demo

    raise typer.Exit(run_demo(json_output))


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="Requests in Mooncake's format, one JSON a line.")],
    model: Annotated[
        str, typer.Option(help=f"Page geometry: {', '.join(MODELS)}.")
    ] = _DEFAULTS.model,
    chunks: Annotated[
        int | None,
        typer.Option(help=f"Size of the host pool, in chunks (else {_DEFAULTS.num_chunks})."),
    ] = None,
    host_bytes: Annotated[
        str | None,
        typer.Option(help='The same as bytes of the unscaled model ("640GiB").'),
    ] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens of a chunk, as the trace counts them.")
    ] = _DEFAULTS.chunk_tokens,
    block_tokens: Annotated[
        int, typer.Option(help="Tokens of a block of the device cache.")
    ] = _DEFAULTS.block_tokens,
    scale: Annotated[
        int, typer.Option(help="Make pages this many times smaller than the model's.")
    ] = _DEFAULTS.scale,
    policy: Annotated[str, typer.Option(help="Eviction: lru or arc.")] = _DEFAULTS.policy,
    path: Annotated[
        str, typer.Option(help="auto, staged, zero_copy or copy_engine.")
    ] = _DEFAULTS.path,
    in_flight: Annotated[
        int, typer.Option(help="Requests whose transfers may overlap.")
    ] = _DEFAULTS.in_flight,
    limit: Annotated[int | None, typer.Option(help="Replay the first requests only.")] = None,
    json_output: _JSON = False,
) -> None:
    """Drive an offloader with the requests of a trace and verify every loaded byte.

    Runs on CPU memory. Exits with 1 where a byte is wrong or a transfer failed, with 2 on bad
    input, with 130 where Ctrl-C ended it early: the report is of what was served until then.
    """
    try:
        num_chunks = _num_chunks(chunks, host_bytes, model, chunk_tokens)
        options = ReplayOptions(
            model, num_chunks, chunk_tokens, block_tokens, scale, policy, path, in_flight, limit
        )
        requests = read_trace(trace, limit)
        with _interrupts() as interrupted:
            report = _with_progress(requests, options, interrupted)
    except (OSError, MemoryError, TraceError) as error:
        raise _bad_input(str(error)) from error
    except ValueError as error:
        size = "--chunks" if host_bytes is None else "--host-bytes"
        names = {**_OPTIONS, "num_chunks": size, "host_bytes": size}
        raise _bad_input(in_options(str(error), names)) from error
    if json_output:
        facts = {**dataclasses.asdict(options), **dataclasses.asdict(report)}
        for name in ("hit_rate", "store_gb_per_s", "load_gb_per_s", "partial", "ok"):
            facts[name] = getattr(report, name)
        typer.echo(json.dumps(facts))
    else:
        Console().print(_table(options, report))
    if not report.ok:
        raise typer.Exit(1)
    raise typer.Exit(128 + signal.SIGINT if report.partial else 0)


def _bad_input(message: str) -> typer.Exit:
    typer.echo(f"triton-offload replay: {message}", err=True)
    return typer.Exit(2)


def _num_chunks(chunks: int | None, host_bytes: str | None, model: str, chunk_tokens: int) -> int:
    if host_bytes is None:
        return _DEFAULTS.num_chunks if chunks is None else chunks
    if chunks is not None:
        raise ValueError("host_bytes: expected no --chunks beside it, got both")
    return chunks_in(parse_bytes("host_bytes", host_bytes), model, chunk_tokens)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: the first time is only noted, the second interrupts at once."""
    seen = threading.Event()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen.is_set  # ignored in the background, or somebody else's
        return

    def note(number: int, frame: object) -> None:
        seen.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _with_progress(
    requests: list[list[int]], options: ReplayOptions, interrupted: Callable[[], bool]
) -> ReplayReport:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("replay", total=len(requests))

        def advance(done: int, hit_rate: float) -> None:
            progress.update(task, completed=done, description=f"replay, hit rate {hit_rate:.3f}")

        return run_replay(requests, options, advance, interrupted)


def _table(options: ReplayOptions, report: ReplayReport) -> Table:
    served = f"{report.requests} requests"
    if report.partial:
        served = f"partial, interrupted: {report.requests} of {report.requests_asked} requests"
    shown = table(
        "",
        "",
        title=f"{served}, {options.model} at 1/{options.scale} "
        f"({report.page_bytes} B pages), {options.num_chunks} chunks, {options.policy}",
        right=(1,),
        show_header=False,
    )
    for name, value in [
        ("prefix hit rate", f"{report.hit_rate:.4f}"),
        ("chunks referenced / hit", f"{report.references} / {report.hits}"),
        ("chunks evicted", f"{report.evictions}"),
        ("stored", format_bytes(report.stored_bytes)),
        ("loaded", format_bytes(report.loaded_bytes)),
        ("store GB/s", f"{report.store_gb_per_s:.3f}"),
        ("load GB/s", f"{report.load_gb_per_s:.3f}"),
        ("waits for transfers", f"{report.waits}, {report.waited_seconds:.1f} s"),
        ("whole replay", f"{report.seconds:.1f} s"),
        ("verified", format_bytes(report.verified_bytes)),
        ("chunks verified / wrong", f"{report.verified_chunks} / {report.wrong_chunks}"),
        ("transfers failed", f"{report.failed_jobs}"),
        ("pool pinned", "yes" if report.pinned else report.pin_error or "not yet"),
        ("paths replaced", ", ".join(report.broken_paths) or "none"),
    ]:
        shown.add_row(name, value, style="red" if _is_bad(name, report) else None)
    return shown


def _is_bad(name: str, report: ReplayReport) -> bool:
    return ("wrong" in name and report.wrong_chunks > 0) or (
        "failed" in name and report.failed_jobs > 0
    )


if __name__ == "__main__":
    main()
