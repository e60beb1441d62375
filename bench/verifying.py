"""What sums of the bytes that pass cost a card, by the model: `verify` of an offloader.

Pure functions. What the kernels are made of comes from `compiled.json`; all else is predicted.
The host's calls are not in it: two more for each segment, beside some ten.
"""

from __future__ import annotations

from collections.abc import Iterator

from compiled import NAMES, Code, key_of, read
from hardware import PREDICTED, Card
from model import (
    SMALL_SECONDS,
    STAGED_KERNEL,
    ZERO_COPY_KERNEL,
    Kernel,
    segments_of,
    staged_seconds,
    zero_copy_seconds,
)
from results import size_name
from tables import table
from units import KIB, MIB

from triton_offload.specs import Direction

KERNEL_OF = {Direction.STORE: "gather", Direction.LOAD: "scatter"}
JOBS = (MIB, 16 * MIB, 256 * MIB)

TEXT = """\
With `verify` the kernels add up what they move (`kernels/sums.py`), in registers. What they are
made of then is compiled, not predicted (triton {triton}, {target}; the loop over tiles with all
that is in it); after the arrow with sums:

{kernels}
Instructions are issued while nothing comes: {issues:.1f} of a warp per ns and SM (four schedulers
at 1.6 GHz, assumed). What sums add, for all the bytes that a CTA has in flight, makes a round trip
of a staged kernel longer. Over host memory it lowers what is in flight in the mean, by round trip /
(round trip + added): of 128 KiB more than the knees of 64 and 32 KiB is left, and nothing is lost;
pages with 64 KiB in flight are at the knee of loads. Beside the kernels stand a memset for the sums
and a copy of 8 bytes per block to the host, {small:.1f} us each per segment (published for small
copies).

Predicted: what `verify="load"` adds to a job's time, pages of 64 KiB, and of 1152 bytes after the
stroke. The host's part is not in it: two calls more for each segment, which a link hides but in a
short job.

{costs}"""


def kernel_of(name: str, direction: Direction, *, sums: bool) -> Kernel:
    """The launch for pages of a class of `compiled.NAMES`, with what sums add."""
    code = read()
    plain = code[key_of(name, KERNEL_OF[direction], False)]
    found = code[key_of(name, KERNEL_OF[direction], sums)]
    own = STAGED_KERNEL if name.startswith("staged") else ZERO_COPY_KERNEL
    added = max(0.0, found.instructions - plain.instructions)
    return Kernel(own.ctas, found.flight_bytes, found.threads, found.registers, added=added)


def job_seconds(
    card: Card, name: str, direction: Direction, num_bytes: int, *, sums: bool
) -> float:
    kernel = kernel_of(name, direction, sums=sums)
    if name.startswith("staged"):
        return staged_seconds(card, direction, segments_of(num_bytes), kernel=kernel, sums=sums)
    seconds = zero_copy_seconds(card, direction, num_bytes, kernel)
    return seconds + 2 * SMALL_SECONDS * sums


def cost(card: Card, name: str, direction: Direction, num_bytes: int) -> float:
    """Of a job's time without sums, what they add."""
    plain, summed = (
        job_seconds(card, name, direction, num_bytes, sums=sums) for sums in (False, True)
    )
    return summed / plain - 1


def text(triton: str, target: str, issues_per_second: float) -> str:
    return TEXT.format(
        triton=triton,
        target=target,
        kernels=kernels(),
        issues=issues_per_second / 1e9,
        small=1e6 * SMALL_SECONDS,
        costs=costs(),
    )


def kernels() -> str:
    code = read()
    rows = []
    for name in NAMES:
        for direction in KERNEL_OF.values():
            pair = [code[key_of(name, direction, sums)] for sums in (False, True)]
            rows.append([name, direction, *_columns(*pair)])
    columns = ["pages", "kernel", "threads of a CTA", "registers", "bytes of stack"]
    return table([*columns, "KiB in flight per CTA", "instructions per 16 bytes"], rows)


def _columns(plain: Code, summed: Code) -> Iterator[str]:
    yield f"{plain.threads} -> {summed.threads}"
    yield f"{plain.registers} -> {summed.registers}"
    yield f"{plain.stack_bytes} -> {summed.stack_bytes}"
    yield f"{plain.flight_bytes // KIB} -> {summed.flight_bytes // KIB}"
    yield f"{plain.instructions:.1f} -> {summed.instructions:.1f}"


def costs() -> str:
    rows = []
    for card in PREDICTED:
        for size in JOBS:
            row = [card.name, size_name(size)]
            for direction in Direction:
                for path in ("staged", "zero copy"):
                    both = [
                        f"{100 * cost(card, f'{path}, pages of {pages}', direction, size):.1f}"
                        for pages in ("64 KiB", "1152 bytes")
                    ]
                    row.append(" / ".join(both) + " %")
            rows.append(row)
    ways = [f"{way.value}, {path}" for way in Direction for path in ("staged", "zero copy")]
    return table(["card", "job", *ways], rows)
