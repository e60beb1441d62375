"""What the project says of itself, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from predictions import off, predicted, predicted_limit, predicted_points, predicted_wait
from results import ONE_COPY, Record, Results, largest_jobs, size_name, time_name
from tables import heading, table
from units import KIB

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
# Of the processor time without checksums, on the host device: the largest job of pages from this
# size on.
CHECKSUM_TIMES = 1.1
CHECKSUM_PAGE_BYTES = 16 * KIB


@dataclass(frozen=True, slots=True)
class Row:
    """A promise and what became of it; on a card also what the model had predicted."""

    what: str
    wanted: str
    measured: str
    met: bool
    predicted: str = "-"
    off: str = "-"

    @classmethod
    def at_least(
        cls, what: str, wanted: float, measured: float, predicted: float | None = None
    ) -> Row:
        row = what, f">= {wanted:g}", f"{measured:.3g}", measured >= wanted
        if predicted is None:
            return cls(*row)
        return cls(*row, f"{predicted:.3g}", off(measured, predicted))


def promises(results: Results) -> str:
    kinds = (
        *(_transfers, _both_ways, _slowdown, _small_copy),
        *(_planning, _managers, _code, _small_jobs, _checksums),
    )
    rows = [row for kind in kinds for row in kind(results)]
    if not rows:
        return ""
    columns = ["what", "wanted", "measured", ""]
    words = [
        [row.what, row.wanted, row.measured, "met" if row.met else "**not met**"] for row in rows
    ]
    if results.card is not None:
        columns += ["predicted", "off by"]
        words = [[*line, row.predicted, row.off] for line, row in zip(words, rows, strict=True)]
    return heading("Promises") + table(columns, words)


def _planning(results: Results) -> Iterator[Row]:
    blocks, tensors = PLANNING_JOB
    job = f"planning {blocks:,} blocks x {tensors} tensors"
    for record in results.of("planning", blocks=blocks, tensors=tensors):
        met = record.seconds < PLANNING_SECONDS
        yield Row(job, f"< {time_name(PLANNING_SECONDS)}", time_name(record.seconds), met)
        if (ratio := record.get("ratio")) is not None:
            yield Row.at_least(f"{job}: vLLM's time over ours", PLANNING_RATIO, ratio)


def _managers(results: Results) -> Iterator[Row]:
    for record in results.of("manager"):
        if (ratio := record.get("ratio")) is not None:
            pool = f"{record['policy'].upper()} manager, {record['chunks']:,} chunks"
            yield Row.at_least(f"{pool}: over vLLM's", MANAGER_RATIO, ratio)


def _code(results: Results) -> Iterator[Row]:
    ours = [record for record in results.of("static") if record["kernel"] != "vLLM's"]
    if ours:
        stack = max(record["stack_bytes"] for record in ours)
        yield Row("stack of any kernel, any target", "0", f"{stack}", stack == 0)
    wide = [r["access_bytes"] for r in ours if r["name"].startswith("zero copy, pages of 4 KiB")]
    if wide:
        yield Row("access of aligned pages", "16 bytes", f"{min(wide)} bytes", min(wide) == 16)


def _transfers(results: Results) -> Iterator[Row]:
    """By the path that is taken where the user names none, the largest job of each page size; on a
    GPU also by staging, whatever the rule takes."""
    default = results.default_contender
    for name in (default, "staged") if results.on_gpu else (default,):
        for record in largest_jobs(results.of("transfer", contender=name)):
            size = record["page_bytes"]
            wanted = HOST_SHARES.get(size)
            if results.on_gpu:
                wanted = LINK_SHARE if size >= 4 * KIB else None
            if wanted is not None:
                by = "" if name == default else ", staged"
                job = f"{record['direction']}, pages of {size_name(size)}{by}: of one plain copy"
                yield Row.at_least(job, wanted, record["ratio"], _predicted_share(record, results))


def _predicted_share(record: Record, results: Results) -> float | None:
    ours, plain = predicted(record, results.card), predicted_limit(record, results.card)
    return None if ours is None or plain is None else ours / plain


def _small_jobs(results: Results) -> Iterator[Row]:
    for record in results.of("small job"):
        blocks, size = record["blocks"], size_name(record["page_bytes"])
        wanted = next(
            share for least, share in reversed(SMALL_JOB_SHARES.items()) if blocks >= least
        )
        job = f"{record['by']}, {record['direction']} of {blocks} blocks, pages of {size}"
        yield Row.at_least(f"{job}: of torch's indexed copies", wanted, record["ratio"])
    for record in results.of("lookup"):
        times = 1 / record["ratio"]
        job = f"lookup of {record['keys']:,} keys: times the manager's own"
        yield Row(job, f"<= {LOOKUP_TIMES:g}", f"{times:.3g}", times <= LOOKUP_TIMES)


def _checksums(results: Results) -> Iterator[Row]:
    for record in largest_jobs(results.of("checksums")):
        if record["page_bytes"] >= CHECKSUM_PAGE_BYTES:
            size, times = size_name(record["page_bytes"]), record["times"]
            job = f"{record['direction']} of {size_name(record['bytes'])}, pages of {size}"
            row = (
                f"{job}: processor time, times that without checksums",
                f"<= {CHECKSUM_TIMES:g}",
                f"{times:.3g}",
            )
            yield Row(*row, times <= CHECKSUM_TIMES)


def _both_ways(results: Results) -> Iterator[Row]:
    """Cores are what both ways share in CPU memory: nothing is promised there."""
    chosen = {"contender": results.default_contender}
    for record in results.of("both at once", **chosen) if results.on_gpu else ():
        size = record["page_bytes"]
        alone = largest_jobs(results.of("transfer", page_bytes=size, **chosen))
        if alone:
            one_way = sum(r["gb_per_s"] for r in alone) / len(alone)
            job = f"both ways at once, pages of {size_name(size)}: over one way"
            expected = [predicted(r, results.card) for r in (record, *alone)]
            known = [speed for speed in expected if speed is not None]
            ratio = known[0] * len(alone) / sum(known[1:]) if len(known) == len(expected) else None
            yield Row.at_least(job, BOTH_WAYS, record["gb_per_s"] / one_way, ratio)


def _slowdown(results: Results) -> Iterator[Row]:
    for record in results.of("interference", contender=results.default_contender):
        for plain in results.of("interference", contender=ONE_COPY, **_job(record)):
            points = 100 * (record["slowdown"] - plain["slowdown"])
            job = f"{record['model']} beside a {record['direction']}: slower than beside one copy"
            wanted = f"<= {SLOWDOWN_POINTS:.0f} points"
            row = job, wanted, f"{points:.1f} points", points <= SLOWDOWN_POINTS
            expected = predicted_points(record, results.card)
            if expected is None:
                yield Row(*row)
            else:
                yield Row(*row, f"{expected:.1f} points", f"{points - expected:+.1f} points")


def _job(record: Record) -> dict[str, object]:
    return {"model": record["model"], "direction": record["direction"]}


def _small_copy(results: Results) -> Iterator[Row]:
    """Without a window, which is how a user begins."""
    for record in results.of("small copy", window_bytes=None):
        if record["during_seconds"]:
            longest = max(record["during_seconds"])
            wanted = f"<= {time_name(SMALL_COPY_SECONDS)}"
            met = longest <= SMALL_COPY_SECONDS
            row = "longest wait of a 4 KiB copy during a load", wanted, time_name(longest), met
            wait = predicted_wait(results.card)
            yield Row(*row) if wait is None else Row(*row, time_name(wait), off(longest, wait))
