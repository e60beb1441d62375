"""What the project says of itself, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from results import ONE_COPY, Record, Results, largest_jobs, size_name, time_name
from tables import heading, table

Row: TypeAlias = tuple[str, str, str, bool]  # what, wanted, measured, whether it was met

KIB = 1 << 10
PLANNING_JOB = (8192, 80)
PLANNING_SECONDS = 0.3e-3
PLANNING_RATIO = 10.0
MANAGER_RATIO = 2.0
# Of one plain copy of the same bytes, by page size. Over a link: from 4 KiB on, all.
HOST_SHARES = {4 * KIB: 0.6, 64 * KIB: 0.9}
LINK_SHARE = 0.95
BOTH_WAYS = 1.6
SLOWDOWN_POINTS = 2.0
SMALL_COPY_SECONDS = 1e-3
# Of torch's indexed copies, by the least number of blocks.
SMALL_JOB_SHARES = {1: 0.5, 64: 0.9}
LOOKUP_TIMES = 1.5


def promises(results: Results) -> str:
    kinds = (
        *(_planning, _managers, _code, _transfers, _small_jobs),
        *(_both_ways, _slowdown, _small_copy),
    )
    rows = [row for kind in kinds for row in kind(results)]
    if not rows:
        return ""
    words = [[*row[:3], "met" if row[3] else "**not met**"] for row in rows]
    return heading("Promises") + table(["what", "wanted", "measured", ""], words)


def _planning(results: Results) -> Iterator[Row]:
    blocks, tensors = PLANNING_JOB
    job = f"planning {blocks:,} blocks x {tensors} tensors"
    for record in results.of("planning", blocks=blocks, tensors=tensors):
        met = record.seconds < PLANNING_SECONDS
        yield job, f"< {time_name(PLANNING_SECONDS)}", time_name(record.seconds), met
        if (ratio := record.get("ratio")) is not None:
            yield f"{job}: vLLM's time over ours", *_at_least(PLANNING_RATIO, ratio)


def _managers(results: Results) -> Iterator[Row]:
    for record in results.of("manager"):
        if (ratio := record.get("ratio")) is not None:
            pool = f"{record['policy'].upper()} manager, {record['chunks']:,} chunks"
            yield f"{pool}: over vLLM's", *_at_least(MANAGER_RATIO, ratio)


def _code(results: Results) -> Iterator[Row]:
    ours = [record for record in results.of("static") if record["kernel"] != "vLLM's"]
    if ours:
        stack = max(record["stack_bytes"] for record in ours)
        yield "stack of any kernel, any target", "0", f"{stack}", stack == 0
    wide = [r["access_bytes"] for r in ours if r["name"].startswith("zero copy, pages of 4 KiB")]
    if wide:
        yield "access of aligned pages", "16 bytes", f"{min(wide)} bytes", min(wide) == 16


def _transfers(results: Results) -> Iterator[Row]:
    """By the path that is taken where the user names none, the largest job of each page size."""
    for record in largest_jobs(results.of("transfer", contender=results.default_contender)):
        size = record["page_bytes"]
        wanted = HOST_SHARES.get(size)
        if results.on_gpu:
            wanted = LINK_SHARE if size >= 4 * KIB else None
        if wanted is not None:
            job = f"{record['direction']}, pages of {size_name(size)}: of one plain copy"
            yield job, *_at_least(wanted, record["ratio"])


def _small_jobs(results: Results) -> Iterator[Row]:
    for record in results.of("small job"):
        blocks, size = record["blocks"], size_name(record["page_bytes"])
        wanted = next(
            share for least, share in reversed(SMALL_JOB_SHARES.items()) if blocks >= least
        )
        job = f"{record['by']}, {record['direction']} of {blocks} blocks, pages of {size}"
        yield f"{job}: of torch's indexed copies", *_at_least(wanted, record["ratio"])
    for record in results.of("lookup"):
        times = 1 / record["ratio"]
        job = f"lookup of {record['keys']:,} keys: times the manager's own"
        yield job, f"<= {LOOKUP_TIMES:g}", f"{times:.3g}", times <= LOOKUP_TIMES


def _both_ways(results: Results) -> Iterator[Row]:
    """Cores are what both ways share in CPU memory: nothing is promised there."""
    chosen = {"contender": results.default_contender}
    for record in results.of("both at once", **chosen) if results.on_gpu else ():
        size = record["page_bytes"]
        alone = largest_jobs(results.of("transfer", page_bytes=size, **chosen))
        if alone:
            one_way = sum(r["gb_per_s"] for r in alone) / len(alone)
            job = f"both ways at once, pages of {size_name(size)}: over one way"
            yield job, *_at_least(BOTH_WAYS, record["gb_per_s"] / one_way)


def _slowdown(results: Results) -> Iterator[Row]:
    for record in results.of("interference", contender=results.default_contender):
        for plain in results.of("interference", contender=ONE_COPY, **_job(record)):
            points = 100 * (record["slowdown"] - plain["slowdown"])
            job = f"{record['model']} beside a {record['direction']}: slower than beside one copy"
            wanted = f"<= {SLOWDOWN_POINTS:.0f} points"
            yield job, wanted, f"{points:.1f} points", points <= SLOWDOWN_POINTS


def _job(record: Record) -> dict[str, object]:
    return {"model": record["model"], "direction": record["direction"]}


def _small_copy(results: Results) -> Iterator[Row]:
    """Without a window, which is how a user begins."""
    for record in results.of("small copy", window_bytes=None):
        if record["during_seconds"]:
            longest = max(record["during_seconds"])
            wanted = f"<= {time_name(SMALL_COPY_SECONDS)}"
            met = longest <= SMALL_COPY_SECONDS
            yield "longest wait of a 4 KiB copy during a load", wanted, time_name(longest), met


def _at_least(wanted: float, measured: float) -> tuple[str, str, bool]:
    return f">= {wanted:g}", f"{measured:.3g}", measured >= wanted
