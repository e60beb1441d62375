"""Writes docs/performance.md and its plot: the model in words, its checks, and its predictions.

python bench/performance.py               # writes both anew
python bench/performance.py --print       # the page, and writes nothing
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import verifying
from compiled import TARGET, compiler
from hardware import ISSUES_PER_SECOND, PREDICTED, Card
from model import (
    NO_HOST,
    RING_KERNEL,
    STAGED_KERNEL,
    ZERO_COPY_KERNEL,
    Host,
    both_ways_seconds,
    link_rate,
    memory_share,
    path_seconds,
    plain_copy_seconds,
    ramped,
    room_beside,
    segments_of,
    small_copy_wait,
    staged_seconds,
    zero_copy_seconds,
)
from published import WITHIN, Figure, Role, figures
from results import size_name, time_name
from tables import heading, table
from units import GB, GIB, KIB, MIB

from triton_offload.calibration import Path
from triton_offload.specs import Direction
from triton_offload.transfer.ranges import SLICE_BYTES

DOCS = FilePath(__file__).resolve().parent.parent / "docs"
PAGE, PLOT = DOCS / "performance.md", DOCS / "performance.svg"

PAGE_BYTES = (512, 2 * KIB, 4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, MIB)
JOB_BYTES = (4 * KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB)
RAMPED = (16 * MIB, 64 * MIB, 512 * MIB)
ONE_JOB = 256 * MIB
WAYS = tuple(Direction)
HOST = Host()

INTRODUCTION = """\
# Performance: a model, and what it predicts

**Every figure of this project on this page is a prediction.** None was measured on a card. They
come out of formulas (`bench/model.py`) and of what others published of cards, links and drivers
(`bench/hardware.py`), and are held against further figures of others (`bench/published.py`). This
page is written by `make performance`; a test sees to it that it says what the program says.
`make gpu` measures on a card, and shows beside each figure what was predicted and how far off that
was.

GB are 1e9 bytes. A store goes from device to host, a load from host to device.
"""

FORMULAS = """\
**The limit** is one copy of contiguous memory: `start + bytes / link`, with 5 us for the start of
an operation that follows another (assumed).

**A kernel on host memory** (zero copy) has so many bytes under way as its CTAs hold between load
and store. By Little's law a CTA moves `bytes in flight / round trip`, and all of them at most what
the link carries. More than 64 KiB in flight per CTA brings nothing for loads, more than 32 KiB
nothing for stores: so TensorRT-LLM and SGLang found. A ring in shared memory (`cp.async`, 128 KiB
in flight) is therefore no faster than registers by this model. It leaves the model's own kernels
more room: {ring:.0%} of the SM's registers and threads beside a CTA, where 128 KiB in registers
leave {registers:.0%}, and a staged kernel {staged:.0%}.

**A kernel in device memory** (gather, scatter) reads and writes every byte: `CTAs * bytes in flight
/ round trip`, at most half of the memory's speed. Sixteen CTAs with 32 KiB and 1.1 us (assumed)
move {gather:.0f} GB/s, several times what PCIe carries.

**Staged** is a pipeline of two stages, kernel and copy, over a ring of three buffers: a stage of a
segment begins when it is queued, when the same stage of the segment before is over, and when its
buffer is free, or the first stage is over. Of a long job the link is what counts. What is lost is
one gather (or scatter) while the link idles: with ramped segments (2, 4, 8, 16, 16, ... MiB for
stores, the other way round for loads) that of a small segment.

**A batch of copies** costs the caller {enqueue:.2f} us per descriptor. Some {depth:,} of them are
queued before the engine begins, the rest beside it:
`max(enqueue * min(n, depth) + n * page / link, enqueue * n)`. Loads of less than {small} go another
way in the driver, at {rate:.1f} GB/s: `n * max(enqueue, page / rate)` up to that many descriptors,
`n * (enqueue + page / rate)` beyond.

**The host** queues a job's first segment {first:.0f} us after it was asked to, and each further one
{segment:.0f} us later: as measured here on two slow cores with a device that does nothing. What the
driver takes comes on top, and a server's processor takes less. Where a segment crosses in less than
that, the host is the limit, and small segments make it worse.

Least certain are the knees. They were found over NVLink-C2C, where a round trip takes 0.8 to 1.3
us. Over PCIe it takes two to three, and more in flight per CTA may well bring more there: then two
CTAs with 128 KiB, in registers or in a ring, would fill the link both in and out.

What the model does not know: the rules by which a driver chooses between copy engine, kernels and
its own buffers; host memory on another NUMA node; what the model's own kernels take away; slots
that are not adjacent; pages that are no power of two (kernels have half as much in flight then).
"""

CHECKS = """\
Two constants are fitted, both to vLLM's table: the rate of small loads, to the four figures below
28 KiB with 100,000 descriptors, and the depth, to 64 KiB x 10,000. The edge at 28 KiB, the cost of
a descriptor, round trips and links are taken from one published figure each. *Fitted* and *taken*
show nothing; the {checks} checks do: {reached} of them are within {within:.0%}. What is published
of a GH200 are shares (94 % and 97 %) of what its host sustains.
"""


def page() -> str:
    parts = [
        INTRODUCTION,
        heading("The model"),
        formulas(),
        heading("Checksums"),
        verifying.text(compiler(), TARGET, ISSUES_PER_SECOND),
        heading("Beside the figures of others"),
        checks(),
        heading("Predictions"),
        "![predicted GB/s by page size](performance.svg)\n",
        *predictions(),
    ]
    text = "\n".join(part.strip("\n") + "\n" for part in parts)
    return re.sub(r"\n{3,}", "\n\n", text)


def formulas() -> str:
    card = PREDICTED[0]
    driver = card.driver
    first = 1e6 * (HOST.job_seconds + HOST.segment_seconds)
    gather = STAGED_KERNEL.ctas * STAGED_KERNEL.flight_bytes / card.memory_seconds / GB
    return FORMULAS.format(
        ring=room_beside(card, RING_KERNEL),
        registers=room_beside(card, ZERO_COPY_KERNEL),
        staged=room_beside(card, STAGED_KERNEL),
        gather=gather,
        enqueue=1e6 * driver.enqueue_seconds,
        depth=driver.depth,
        small=size_name(driver.small_bytes),
        rate=driver.small_rate / GB,
        first=first,
        segment=1e6 * HOST.segment_seconds,
    )


def checks() -> str:
    found = figures()
    counted = [figure for figure in found if figure.role is Role.CHECK]
    reached = sum(figure.reached for figure in counted)
    parts = [CHECKS.format(checks=len(counted), reached=reached, within=WITHIN)]
    for source in dict.fromkeys(figure.source for figure in found):
        rows = [_row(figure) for figure in found if figure.source == source]
        columns = ["what", "published, GB/s", "the model", "off by", ""]
        parts += [f"{source}:\n", table(columns, rows)]
    parts.append("Not reached, and what is thought of it:\n")
    parts.append(
        "\n".join(
            f"- {figure.source.partition(':')[0]}, {figure.what}: {figure.why}."
            for figure in found
            if not figure.reached
        )
    )
    return "\n".join(parts)


def _row(figure: Figure) -> list[str]:
    word = figure.role.value if figure.role is not Role.CHECK else ""
    verdict = word or ("" if figure.reached else "**not reached**")
    numbers = [f"{figure.published:.1f}", f"{figure.predicted:.1f}", f"{figure.error:+.0%}"]
    return [figure.what, *numbers, verdict]


def predictions() -> Iterator[str]:
    """A section for each card; where tables are alike, they are shown once."""
    told: dict[str, str] = {}
    for card in PREDICTED:
        link = card.link
        yield heading(card.name, 3)
        yield (
            f"Predicted for {link.name}, {link.to_device / GB:.1f} GB/s in, "
            f"{link.to_host / GB:.1f} out, {link.both / GB:.1f} both ways; {card.sms} SMs, "
            f"{card.memory / 1e12:.2f} TB/s.\n"
        )
        tables = _tables(card)
        if tables in told:
            yield f"Predicted tables: those of the {told[tables]}, for the link is the limit.\n"
        else:
            told[tables] = card.name
            yield tables
        yield _beside(card)


def _tables(card: Card) -> str:
    return "\n".join(
        [
            f"Predicted GB/s of a job of {size_name(ONE_JOB)} by page size, host included; in "
            "brackets the share of one plain copy:\n",
            by_page(card),
            "Predicted GB/s by size of the job, pages of 4 KiB; after the stroke without the "
            "host's part:\n",
            by_job(card),
            "Predicted share of one plain copy, staged, with equal segments of 16 MiB and with "
            "ramped ones; after the stroke without the host's part:\n",
            by_ramp(card),
        ]
    )


def _columns() -> list[str]:
    return [f"{way.value}, {path.value}" for way in WAYS for path in Path]


def by_page(card: Card) -> str:
    rows = []
    for size in PAGE_BYTES:
        row = [size_name(size)]
        for way in WAYS:
            limit = plain_copy_seconds(card, way, ONE_JOB)
            for path in Path:
                seconds = path_seconds(card, path, way, size, ONE_JOB // size, HOST)
                row.append(f"{ONE_JOB / seconds / GB:.3g} ({limit / seconds:.2f})")
        rows.append(row)
    return table(["page", *_columns()], rows)


def by_job(card: Card) -> str:
    rows = []
    for num_bytes in JOB_BYTES:
        row = [size_name(num_bytes)]
        for way in WAYS:
            for path in Path:
                speeds = [
                    num_bytes / path_seconds(card, path, way, 4 * KIB, num_bytes // (4 * KIB), host)
                    for host in (HOST, NO_HOST)
                ]
                row.append(" / ".join(f"{speed / GB:.3g}" for speed in speeds))
        rows.append(row)
    return table(["job", *_columns()], rows)


def by_ramp(card: Card) -> str:
    rows = []
    for num_bytes in RAMPED:
        row = [size_name(num_bytes)]
        for way in WAYS:
            limit = plain_copy_seconds(card, way, num_bytes)
            for segments in (segments_of(num_bytes), ramped(num_bytes, way)):
                shares = [
                    limit / staged_seconds(card, way, segments, host) for host in (HOST, NO_HOST)
                ]
                row.append(" / ".join(f"{share:.2f}" for share in shares))
        rows.append(row)
    columns = [f"{way.value}, {kind}" for way in WAYS for kind in ("equal", "ramped")]
    return table(["job", *columns], rows)


def _beside(card: Card) -> str:
    """Both ways, more CTAs, and what the model's kernels notice."""
    pages = ONE_JOB // (4 * KIB)
    both = 2 * ONE_JOB / both_ways_seconds(card, Path.STAGED, 4 * KIB, pages, HOST) / GB
    one_way = sum(
        ONE_JOB / path_seconds(card, Path.STAGED, way, 4 * KIB, pages, HOST) for way in WAYS
    )
    shape = ZERO_COPY_KERNEL
    speeds = []
    for way in WAYS:
        for ctas in (shape.ctas, 4 * shape.ctas):
            kernel = type(shape)(ctas, shape.flight_bytes, shape.threads, shape.registers)
            speeds.append(ONE_JOB / zero_copy_seconds(card, way, ONE_JOB, kernel) / GB)
    staged, plain = (
        max(memory_share(card, path, way) for way in WAYS)
        for path in (Path.STAGED, Path.COPY_ENGINE)
    )
    return (
        f"Also predicted: both ways at once, staged, {both:.3g} GB/s, "
        f"{both / (one_way / 2 / GB):.2f} of one way. Zero copy with {shape.ctas} and "
        f"{4 * shape.ctas} CTAs: {speeds[0]:.3g} and {speeds[1]:.3g} GB/s out, {speeds[2]:.3g} and "
        f"{speeds[3]:.3g} in. Of device memory's speed, staging takes {100 * staged:.1f} % unless "
        f"the L2 cache holds its buffers, one plain copy {100 * plain:.1f} %. A small copy during "
        f"a load waits {time_name(small_copy_wait(card, SLICE_BYTES))} where the engine serves "
        "streams in turn.\n"
    )


# -- the plot --


def curves() -> Iterator[tuple[str, str, str, list[float]]]:
    """(card, direction, path or link, GB/s by page size) of what is drawn."""
    for card in PREDICTED:
        for way in WAYS:
            for path in Path:
                seconds = [
                    path_seconds(card, path, way, size, ONE_JOB // size, HOST)
                    for size in PAGE_BYTES
                ]
                speeds = [round(ONE_JOB / each / GB, 3) for each in seconds]
                yield card.name, way.value, path.value, speeds
            limit = round(link_rate(card, way) / GB, 3)
            yield card.name, way.value, "link", [limit] * len(PAGE_BYTES)


def digest() -> str:
    """Of what is drawn; the plot carries it, so that a test sees whether it is of this model."""
    return hashlib.sha256(json.dumps(list(curves())).encode()).hexdigest()[:16]


def draw(file: FilePath) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from plots import COLORS

    style: Any = {"svg.hashsalt": "performance", "svg.fonttype": "none", "font.size": 9}
    with plt.rc_context(style):
        shape: Any = {"sharex": True, "sharey": "col", "figsize": (16, 6.2)}
        figure, axes = plt.subplots(len(WAYS), len(PREDICTED), **shape)
        columns = {card.name: i for i, card in enumerate(PREDICTED)}
        rows = {way.value: i for i, way in enumerate(WAYS)}
        for card, way, name, speeds in curves():
            ax: Any = axes[rows[way]][columns[card]]
            if name == "link":
                ax.plot(PAGE_BYTES, speeds, ":", color="black", label="one plain copy")
            else:
                ax.plot(PAGE_BYTES, speeds, "-o", color=COLORS[name], markersize=3, label=name)
            ax.set_xscale("log", base=2)
            ticks = PAGE_BYTES[::2]
            ax.set_xticks(ticks, [size_name(size) for size in ticks], rotation=30)
            ax.grid(True, alpha=0.3)
            ax.set_title(f"{card}, {way}")
        for ax in axes.flat:
            ax.set_ylim(bottom=0)
        for ax in axes[:, 0]:
            ax.set_ylabel("predicted GB/s")
        figure.suptitle(f"Predictions: GB/s by page size, jobs of {size_name(ONE_JOB)}")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
        figure.subplots_adjust(
            left=0.05, right=0.99, top=0.88, bottom=0.15, hspace=0.25, wspace=0.25
        )
        figure.savefig(file, metadata={"Date": None, "Description": f"model {digest()}"})
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the page, write nothing")
    if parser.parse_args().print:
        print(page(), end="")
        return 0
    PAGE.write_text(page())
    draw(PLOT)
    print(f"written: {PAGE} and {PLOT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
