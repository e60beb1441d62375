"""The report of a run: Markdown tables and the plots beside them.

    python bench/run.py --report-only        # from the JSON of an earlier run

Every figure is a median of this run. What was not measured is listed, with why.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from hardware import Card
from predictions import beside, predicted, predicted_limit
from promises import promises
from report_gpu import gpu_sections
from report_host import host
from results import (
    OURS,
    Record,
    Results,
    contenders_in,
    crossover,
    size_name,
    time_name,
)
from tables import heading, image, table


def build(results: Results, plots: Sequence[Path]) -> str:
    """The whole report. `plots`: PNG files that lie beside it."""
    drawn = {path.stem: path.name for path in plots}
    parts = [
        "# Benchmarks of triton-offload\n",
        what_this_is(results),
        steps(results),
        machine(results),
        promises(results),
        transfers(results, drawn),
        *gpu_sections(results, drawn),
        interference(results, drawn),
        layers(results),
        host(results, drawn),
        static(results),
        executed(results),
        managers(results),
        not_measured(results),
    ]
    text = "\n".join(part for part in parts if part)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def what_this_is(results: Results) -> str:
    if results.on_gpu:
        return (
            f"Measured on {results.facts.get('GPU', 'a GPU')}, in {results.seconds:.0f} s. "
            "Times of transfers run from submission to the last byte, with cold caches, in turn "
            "with one pinned copy of the same bytes: *limit* is what that copy reached.\n"
        )
    return (
        f"**No GPU was here: what moved, moved in CPU memory (the host device).** No figure below "
        f"says how fast a GPU's link is used. Measured in {results.seconds:.0f} s. Times of "
        "transfers run from submission to the last byte, with cold caches, in turn with one plain "
        "copy of the same bytes: *limit* is what that copy reached.\n"
    )


def steps(results: Results) -> str:
    """What was run, in order, and whether the bytes were right."""
    if not results.steps:
        return ""
    rows = [[name, outcome, f"{seconds:.0f} s"] for name, outcome, seconds in results.steps]
    failed = (
        ""
        if results.steps[0][1] == "passed"
        else (
            "**Correctness failed, and nothing was measured: no figure of speed means anything "
            "here.**\n"
        )
    )
    words = f"{results.passed} tests of kernels and paths passed on this card.\n"
    return "\n".join([heading("Steps"), failed, words, table(["step", "", "took"], rows)])


def machine(results: Results) -> str:
    load = results.facts.get("load average at the end", "").split()
    cores = float(results.facts.get("cores", 0) or 0)
    busy = ""
    if not results.on_gpu and load and cores and float(load[1]) > 1.2 * cores:
        busy = (
            f"\nOther programs were running: the load average was {load[1]} on {cores:.0f} cores. "
            "Times and ratios carry that, those of small jobs most: run it again when it is idle.\n"
        )
    return heading("Machine") + table(["", ""], results.facts.items()) + busy


def transfers(results: Results, drawn: dict[str, str]) -> str:
    records = results.of("transfer")
    if not records:
        return ""
    limit = "one pinned copy" if results.on_gpu else "one plain copy"
    parts = [
        heading("Transfers"),
        f"GB/s, and in brackets the share of {limit} of the same bytes. Blocks are scattered, "
        "slots adjacent."
        + _beside_words(results)
        + ("" if results.on_gpu else " On the CPU the copy engine is a memmove for every page.")
        + "\n",
        image(drawn, "bandwidth"),
        image(drawn, "crossover"),
    ]
    for direction in ("store", "load"):
        mine = [record for record in records if record["direction"] == direction]
        parts.append(heading(f"{direction}, alone", 3) + _grid(mine, results.card))
        rows = [
            [
                size_name(size),
                f"{pages:,}",
                winner.path,
                f"{winner.gb_per_s:.3g}",
                "-" if winner.gain is None else f"{winner.gain:.2f}",
            ]
            for (size, pages), winner in crossover(mine).items()
        ]
        parts.append(
            table(["page", "pages", "fastest of our paths", "GB/s", "over the next"], rows)
        )
    parts += [_peers_ahead(records), _more_transfers(results)]
    return "\n".join(parts)


def _peers_ahead(records: Sequence[Record]) -> str:
    """The jobs that somebody else moves faster than all of our paths."""
    rows = []
    for direction, size, pages in sorted(
        {(r["direction"], r["page_bytes"], r["pages"]) for r in records}
    ):
        facts = {"direction": direction, "page_bytes": size, "pages": pages}
        here = [r for r in records if all(r[name] == value for name, value in facts.items())]
        speeds = {r["contender"]: r["gb_per_s"] for r in here}
        ours = max((speed for name, speed in speeds.items() if name in OURS), default=None)
        peers = {name: speed for name, speed in speeds.items() if name not in OURS}
        if ours is None or not peers:
            continue
        first = max(peers, key=peers.__getitem__)
        if peers[first] > ours:
            times = f"{peers[first] / ours:.2f}"
            rows.append([direction, size_name(size), f"{pages:,}", first, times])
    title = heading("Where a peer is ahead", 3)
    if not rows:
        return title + "Nowhere in this run.\n"
    columns = ["direction", "page", "pages", "peer", "times our fastest path"]
    return title + table(columns, rows)


def _more_transfers(results: Results) -> str:
    parts = []
    both = results.of("both at once")
    if both:
        parts += [
            heading("Both directions at once", 3),
            "GB/s of both together; the limit is two plain copies, one each way.\n",
            _grid(both, results.card),
        ]
    slots = results.of("slots")
    for name, words in (
        ("recycled", "Slots as a list of free ones hands them out: last in, first out"),
        ("ranks", "The same in rows that four ranks share"),
    ):
        mine = [record for record in slots if record["slots"] == name]
        for direction in ("store", "load"):
            chosen = [record for record in mine if record["direction"] == direction]
            if chosen:
                parts += [heading(f"{words}, {direction}", 3), _grid(chosen)]
    groups = results.of("groups")
    for direction in ("store", "load"):
        chosen = [record for record in groups if record["direction"] == direction]
        if chosen:
            parts += [
                heading(f"A group that covers an eighth of its slots, {direction}", 3),
                "Page bytes of the group a second. *whole slots*: one plain copy of all slots, "
                "eight times the bytes, counted as the group's.\n",
                _grid(chosen),
            ]
    return "\n".join(parts)


def _beside_words(results: Results) -> str:
    if results.card is None:
        return ""
    return (
        f" In square brackets, what the model predicts for this card ({results.card.name}, "
        f"{results.card.link.name}), and by how much the measurement is off that."
    )


def _grid(records: Sequence[Record], card: Card | None = None) -> str:
    """A row for each job. The limit is the median over all that were timed beside it."""
    names = contenders_in(records)
    points = sorted({(record["page_bytes"], record["pages"]) for record in records})
    rows = []
    for size, pages in points:
        here = [r for r in records if (r["page_bytes"], r["pages"]) == (size, pages)]
        limit = statistics.median(record["limit_gb_per_s"] for record in here)
        found = {record["contender"]: record for record in here}
        cells = []
        for name in names:
            if name not in found:
                cells.append("-")
                continue
            speed = found[name]["gb_per_s"]
            expected = predicted(found[name], card)
            cells.append(f"{speed:.3g} ({speed / limit:.2f}){beside(speed, expected)}")
        most = f"{limit:.3g}{beside(limit, predicted_limit(here[0], card))}"
        rows.append([size_name(size), f"{pages:,}", most, *cells])
    return table(["page", "pages", "limit", *names], rows)


def interference(results: Results, drawn: dict[str, str]) -> str:
    records = results.of("interference")
    if not records:
        return ""
    where = "GPU" if results.on_gpu else "CPU's cores and memory"
    rows = [
        [
            record["model"],
            record["direction"],
            record["contender"],
            time_name(record["alone_seconds"]),
            time_name(record["beside_seconds"]),
            f"{record['slowdown']:.2f}",
            f"{100 * record['share']:.0f} %",
            f"{record['transfer_alone_gb_per_s']:.3g} -> {record['transfer_gb_per_s']:.3g}",
        ]
        for record in sorted(records, key=lambda r: (r["model"], r["direction"]))
    ]
    columns = ["model", "beside", "by", "alone", "beside it", "slowdown", "share", "GB/s"]
    return "\n".join(
        [
            heading("A model beside transfers"),
            f"Both share the {where}. *share*: of the model's speed, what the transfers take. "
            "*GB/s*: of the transfers, alone and beside the model.\n",
            image(drawn, "interference"),
            table(columns, rows),
        ]
    )


def layers(results: Results) -> str:
    records = results.of("layers")
    if not records:
        return ""
    rows = [
        [
            size_name(record["bytes"]),
            record["path"],
            time_name(record["load_seconds"]),
            f"{100 * record['first_share']:.1f} %",
            f"{record['over']:.2f}",
            f"{record['over_without']:.2f}",
        ]
        for record in records
    ]
    columns = ["load", "path", "load alone", "first layer", "step", "step, whole load"]
    return "\n".join(
        [
            heading("A model behind a load by layers (predicted)"),
            "In virtual time, of an H100 on PCIe Gen5 x16, and 80 layers that compute as long as "
            "the load takes. *first layer*: when it starts, of the load's time. *step*: its end, "
            "over the longer of load and compute; then where it waits for the whole load.\n",
            table(columns, rows),
        ]
    )


def static(results: Results) -> str:
    records = results.of("static")
    if not records:
        return ""
    targets = list(dict.fromkeys(record["target"] for record in records))
    rows = []
    for kernel, name in dict.fromkeys((r["kernel"], r["name"]) for r in records):
        row = [kernel, name]
        for target in targets:
            found = [
                r for r in results.of("static", kernel=kernel, name=name) if r["target"] == target
            ]
            row.append(_code(found[0]) if found else "-")
        rows.append(row)
    return "\n".join(
        [
            heading("Kernels, compiled ahead of time"),
            "Bytes of an access / KiB in flight a CTA / registers of a thread / bytes of stack.\n",
            table(["kernel", "configuration", *targets], rows),
        ]
    )


def _code(record: Record) -> str:
    flight = record["in_flight_bytes"] / 1024
    return (
        f"{record['access_bytes']} / {flight:.0f} / {record['registers']} / {record['stack_bytes']}"
    )


def executed(results: Results) -> str:
    """Counts of an imitated card, and so called."""
    rows = []
    for record in results.of("executed"):
        widths = ", ".join(f"{n:,} of {width} B" for width, n in record["accesses"].items())
        rows.append(
            [
                record["kernel"],
                record["direction"],
                size_name(record["page_bytes"]),
                str(record["programs"]),
                widths,
                f"{record['lines_of_access']:.1f}",
                f"{record['in_flight_bytes'] / 1024:.1f}",
                str(record["host_round_trips"]),
                f"{record['instructions']:.1f}",
            ]
        )
    if not rows:
        return ""
    targets = ", ".join(dict.fromkeys(record["target"] for record in results.of("executed")))
    columns = ["kernel", "direction", "pages", "CTAs", "accesses of threads"]
    columns += ["lines of a warp's access", "KiB in flight a CTA", "waits for the host"]
    columns += ["instructions per 16 B"]
    return "\n".join(
        [
            heading("Kernels, executed by an imitated card"),
            f"One launch that moves 1 MiB, compiled for {targets}: counts of an imitated card that "
            "runs the PTX, no times. Waits for the host: round trips that a CTA makes one after "
            "the other. vLLM launches its kernel for loads (scatter) of pages below 28 KiB; its "
            "other rows are what it would come to.\n",
            table(columns, rows),
        ]
    )


def managers(results: Results) -> str:
    """Ours and vLLM's in turn on the same requests."""
    rows = []
    for record in results.of("manager"):
        theirs = ["-", "-"]
        if record.get("ratio"):
            theirs = [f"{record['peer_speed'] / 1e6:.2f} M", f"{record['ratio']:.1f}"]
        speed = f"{record['operations_per_second'] / 1e6:.2f} M"
        rows.append([record["policy"].upper(), f"{record['chunks']:,}", speed, *theirs])
    if not rows:
        return ""
    columns = ["policy", "chunks", "ours", "vLLM's", "times vLLM's"]
    title = "Manager: operations a second on an hour of real requests"
    return heading(title) + table(columns, rows)


def not_measured(results: Results) -> str:
    """What was skipped and why, what failed, and what no run of this kind can say."""
    rows = [
        [suite, reason, str(count)]
        for suite, reasons in results.skipped.items()
        for reason, count in reasons.most_common()
    ]
    parts = [heading("Not measured in this run")]
    if not results.on_gpu:
        parts.append(
            "Everything that needs a GPU: the kernels' bandwidth, transfers over the link by "
            "every path, vLLM's worker, batched copies, what transfers cost a model on the GPU, "
            "how the copy engine arbitrates, launches, and pinning. `make gpu` measures "
            "them on a machine that has one.\n"
        )
    if rows:
        parts.append(table(["suite", "reason", "benchmarks"], rows))
    if results.failed:
        parts.append("**Failed:**\n\n" + "".join(f"- `{name}`\n" for name in results.failed))
    return "\n".join(parts)


def write_report(out: Path, *, plots: bool = True) -> Path:
    """`report.md` and its plots, from the JSON files in `out`."""
    results = Results.load(out)
    drawn: list[Path] = []
    if plots:
        try:
            from plots import draw_all

            drawn = draw_all(results, out)
        except ImportError as error:
            print(f"no plots: {error}")
    report = out / "report.md"
    report.write_text(build(results, drawn))
    return report
