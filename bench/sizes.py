"""How much each benchmark moves, and for how long: on a GPU, on the host device, and hardly at all.

`SIZES` is what the machine here takes. The benchmarks read it when they are imported.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from units import GIB, KIB, MIB

HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes, seconds and counts.

    Transfers: every page size with up to the most pages that `job_bytes` hold (caches are twice,
    and every contender has host memory of its own). `layout_page_bytes` and `layout_bytes`: slots
    that are not adjacent, groups, and both ways at once. `budget`: seconds of rounds for each.
    `cold_bytes`: what pushes everything out of the caches; larger than the last cache of the
    processor that the CPU's figures come from, 32 MiB.

    Interference: a job of `beside_bytes`, as often as it takes to outlast `outlast` repetitions of
    the model. `product`: the width of a matrix product and how many make a repetition; `weights`:
    that of a decoding step; `kernels`: of a chain of small kernels. `burst_bytes`: of the load
    that a small copy is measured in. `repeats`: of a scatter behind compute; `busy_products`: of
    that width and so many.

    Kernels alone: `ctas` to try, on `swept_bytes`, each for `kernel_budget`. `flush_bytes`: larger
    than any GPU's L2 (an H100 has 50 MB, a B200 126 MB).

    Submission: caches of `num_blocks`, jobs of `planned` and of `submitted` blocks in caches of
    `tensors`, so many rounds; host pools of `pools` bytes.
    """

    page_bytes: tuple[int, ...]
    pages: tuple[int, ...]
    job_bytes: int
    layout_page_bytes: tuple[int, ...]
    layout_bytes: int
    budget: float
    cold_bytes: int

    beside_bytes: int
    outlast: int
    product: tuple[int, int]
    weights: tuple[int, int]
    kernels: int
    burst_bytes: int
    repeats: int
    busy_products: tuple[int, int]

    ctas: tuple[int, ...]
    swept_page_bytes: tuple[int, ...]
    swept_bytes: int
    kernel_budget: float
    flush_bytes: int

    num_blocks: int
    planned: tuple[int, ...]
    submitted: tuple[int, ...]
    tensors: tuple[int, ...]
    plan_rounds: int
    submit_rounds: int
    pools: tuple[int, ...]


GPU = Sizes(
    page_bytes=(512, 2 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 512 * KIB, 2 * MIB),
    pages=(16, 256, 4096, 100_000),
    job_bytes=512 * MIB,
    layout_page_bytes=(4 * KIB, 64 * KIB, 2 * MIB),
    layout_bytes=256 * MIB,
    budget=0.15,
    cold_bytes=512 * MIB,
    beside_bytes=512 * MIB,
    outlast=10,
    product=(4096, 10),
    weights=(16_384, 5),
    kernels=300,
    burst_bytes=4 * GIB,
    repeats=12,
    busy_products=(8192, 100),
    ctas=(1, 2, 4, 8, 16, 32, 64, 132),
    swept_page_bytes=(512, 4 * KIB, 64 * KIB),
    swept_bytes=128 * MIB,
    kernel_budget=0.05,
    flush_bytes=512 * MIB,
    num_blocks=16_384,
    planned=(8, 64, 512, 4096, 8192),
    submitted=(8, 512, 8192),
    tensors=(32, 80),
    plan_rounds=60,
    submit_rounds=15,
    pools=(64 * MIB, 256 * MIB, 1 * GIB, 8 * GIB),
)
HOST = Sizes(
    page_bytes=(512, 4 * KIB, 64 * KIB, 2 * MIB),
    pages=(16, 4096, 100_000),
    job_bytes=64 * MIB,
    layout_page_bytes=(4 * KIB, 64 * KIB, 2 * MIB),
    layout_bytes=32 * MIB,
    budget=0.2,
    cold_bytes=64 * MIB,
    beside_bytes=32 * MIB,
    outlast=5,
    product=(512, 5),
    weights=(4096, 1),
    kernels=300,
    burst_bytes=4 * GIB,
    repeats=12,
    busy_products=(8192, 100),
    ctas=GPU.ctas,
    swept_page_bytes=GPU.swept_page_bytes,
    swept_bytes=128 * MIB,
    kernel_budget=0.05,
    flush_bytes=512 * MIB,
    num_blocks=16_384,
    planned=GPU.planned,
    submitted=GPU.submitted,
    tensors=(32, 80),
    plan_rounds=60,
    submit_rounds=15,
    pools=(64 * MIB, 256 * MIB, 1 * GIB),
)
#: so that every line of a benchmark runs in a test, and no figure means anything
TINY = Sizes(
    page_bytes=(512, 4 * KIB),
    pages=(16, 64),
    job_bytes=256 * KIB,
    layout_page_bytes=(4 * KIB,),
    layout_bytes=512 * KIB,
    budget=0.0,
    cold_bytes=4 * KIB,
    beside_bytes=512 * KIB,
    outlast=1,
    product=(8, 1),
    weights=(8, 1),
    kernels=1,
    burst_bytes=1 * MIB,
    repeats=1,
    busy_products=(8, 1),
    ctas=(1, 2),
    swept_page_bytes=(512,),
    swept_bytes=64 * KIB,
    kernel_budget=0.0,
    flush_bytes=4 * KIB,
    num_blocks=64,
    planned=(8,),
    submitted=(8,),
    tensors=(2,),
    plan_rounds=1,
    submit_rounds=1,
    pools=(1 * MIB,),
)
SIZES = GPU if HAS_GPU else HOST
