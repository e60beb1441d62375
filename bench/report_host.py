"""Sections of the report on what a job costs the host."""

from __future__ import annotations

from collections.abc import Iterable

from results import Record, Results, size_name, slope, time_name
from tables import heading, image, table


def host(results: Results, drawn: dict[str, str]) -> str:
    """Planning, submission, launches, polling, pools."""
    parts = [_planning(results, drawn), _submission(results), _checksums(results)]
    small = [
        [f"`get_finished`, {r['jobs']} jobs in flight", time_name(r.seconds)]
        for r in results.of("polling")
    ]
    small += [
        [f"launch of a gather, {r['name']}", time_name(r.seconds)] for r in results.of("launch")
    ]
    if small:
        parts.append(heading("Polling and launching", 3) + table(["call", "time"], small))
    pools = [
        [
            size_name(r["bytes"]),
            time_name(r["usable_seconds"]),
            f"{time_name(r.seconds)} ({r.seconds / r['bytes'] * 1e9:.2f} s a GB)",
            time_name(r["close_seconds"]),
            time_name(r["torch_seconds"]),
        ]
        for r in results.of("pool")
    ]
    if pools:
        pinned = results.of("pool")[0]["pinned"]
        columns = ["size", "usable after", f"touched{' and pinned' * pinned} after", "closed in"]
        parts.append(
            heading("Starting a host pool", 3)
            + table([*columns, f"torch, filled{' and pinned' * pinned}"], pools)
        )
    body = "\n".join(part for part in parts if part)
    return heading("The host's part") + body if body else ""


def _planning(results: Results, drawn: dict[str, str]) -> str:
    rows = []
    for r in results.of("planning"):
        peer = r.get("peer_seconds")
        theirs = [time_name(peer), f"{r['ratio']:.1f}"] if peer else ["-", "-"]
        rows.append([f"{r['blocks']:,}", str(r["tensors"]), time_name(r.seconds), *theirs])
    if not rows:
        return ""
    return "\n".join(
        [
            heading("Planning a job", 3),
            "Ids checked, runs cut into segments; vLLM's fills a descriptor for each page.\n",
            image(drawn, "planning"),
            table(["blocks", "tensors", "ours", "vLLM's", "times ours"], rows),
        ]
    )


def _submission(results: Results) -> str:
    records = results.of("submission")
    if not records:
        return ""
    rows = [
        [
            f"{r['blocks']:,}",
            str(r["tensors"]),
            r["path"],
            r["slots"],
            f"{r['segments']:,}",
            time_name(r.seconds),
        ]
        for r in records
    ]
    # Jobs of one tensor count, so that planning is the same but for the blocks.
    segments = _slope_of(records, "segments", slots="adjacent", path="staged")
    chunks = _slope_of(records, "blocks", slots="scattered", path="staged")
    fitted = ""
    if segments is not None:
        fitted += f"By a line through these: {time_name(segments)} for each further segment"
        fitted += "" if chunks is None else f", {time_name(chunks)} for each further scattered slot"
        fitted += " (staged; a lane queues a bounded number of operations, the rest follows).\n"
    if not results.on_gpu:
        fitted += "No device takes part: what its driver or its threads take comes on top.\n"
    columns = ["blocks", "tensors", "path", "slots", "segments", "`transfer_async`"]
    return heading("Submitting a job", 3) + table(columns, rows) + "\n" + fitted


def _checksums(results: Results) -> str:
    rows = [
        [
            r["direction"],
            size_name(r["page_bytes"]),
            size_name(r["bytes"]),
            time_name(r["with_seconds"]),
            time_name(r["without_seconds"]),
            f"{r['times']:.2f}",
        ]
        for r in results.of("checksums")
    ]
    if not rows:
        return ""
    return (
        heading("Checksums in CPU memory", 3)
        + 'The least of rounds in turn, with `verify="load"` and without; *times*: of processor '
        "time, of which other programs take none.\n\n"
        + table(["job", "pages", "bytes", "with", "without", "times"], rows)
    )


def _slope_of(records: Iterable[Record], units: str, **facts: str) -> float | None:
    """Of jobs that a lane queues at once: more than 512 scattered slots are not."""
    chosen = [
        record
        for record in records
        if all(record.get(name) == value for name, value in facts.items())
        and (facts["slots"] == "adjacent" or record["blocks"] <= 512)
    ]
    return slope([(record[units], record.seconds) for record in chosen])
