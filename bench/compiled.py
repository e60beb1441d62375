"""What the kernels for NVIDIA are made of, with sums and without, as compiled for one target.

    python bench/compiled.py      # writes compiled.json anew

`model.py` reckons with it, and docs/performance.md shows it; a test compiles the same and compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = Path(__file__).with_name("compiled.json")
TARGET = "sm_90"
#: of `kernel_code.CLASSES`
NAMES = (
    "zero copy, pages of 512 bytes",
    "zero copy, pages of 4 KiB",
    "zero copy, pages of 64 KiB",
    "zero copy, pages of 1152 bytes",
    "staged, pages of 512 bytes",
    "staged, pages of 64 KiB",
    "staged, pages of 1152 bytes",
)


@dataclass(frozen=True, slots=True)
class Code:
    """`flight_bytes`: of a CTA. `instructions`: of a thread for each 16 bytes, the loop over tiles
    with all that is in it."""

    threads: int
    flight_bytes: int
    registers: int
    stack_bytes: int
    instructions: float


def compiled(name: str, direction: str, *, sums: bool) -> Code:
    """Compiles, some seconds each."""
    # Of the tests; whoever reads the file does without, and without triton.
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from kernel_code import (
        CLASSES,
        KERNELS,
        TARGETS,
        nvidia_loop_instructions,
        nvidia_registers_and_stack,
        spec_of,
    )

    from triton_offload.kernels.compiling import compile_kernel

    zero_copy, page_bytes, alignment, *_ = CLASSES[name]
    spec = spec_of(page_bytes, alignment, zero_copy, "cuda", sums=sums)
    handle = compile_kernel(KERNELS[direction], spec, TARGETS[TARGET])
    registers, stack = nvidia_registers_and_stack(handle)
    threads = 32 * spec.warps
    instructions = nvidia_loop_instructions(handle) * threads * 16 / spec.tile_bytes
    return Code(threads, spec.tile_bytes, registers, stack, round(instructions, 1))


def keys() -> Iterator[tuple[str, str, bool]]:
    for name in NAMES:
        for direction in ("gather", "scatter"):
            for sums in (False, True):
                yield name, direction, sums


def key_of(name: str, direction: str, sums: bool) -> str:
    return f"{name}, {direction}{', sums' * sums}"


def read() -> dict[str, Code]:
    """By `key_of`."""
    return {key: Code(**code) for key, code in json.loads(FILE.read_text())["code"].items()}


def compiler() -> str:
    """The version of triton that the file is of."""
    return str(json.loads(FILE.read_text())["triton"])


def main() -> None:
    import triton

    code = {
        key_of(name, direction, sums): asdict(compiled(name, direction, sums=sums))
        for name, direction, sums in keys()
    }
    found = {"triton": triton.__version__, "target": TARGET, "code": code}
    FILE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
