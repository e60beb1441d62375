"""A model that computes behind a load, layer by layer and not: in virtual time, so predictions.

    python bench/run.py layers

An H100 on PCIe Gen5 x16, 80 layers, compute that takes as long as the load.
"""

from __future__ import annotations

from typing import Any

import pytest
from timing import note
from units import MIB

from triton_offload.calibration import Path
from triton_offload.testing.prefill import Prefill


@pytest.mark.parametrize("path", Path, ids=lambda path: path.value)
@pytest.mark.parametrize("mebibytes", [16, 64, 256, 1024])
def test_a_prefill_behind_a_load(benchmark: Any, mebibytes: int, path: Path) -> None:
    prefill = Prefill(mebibytes * MIB, path)
    whole = prefill.step(by_layers=False)
    layered = benchmark.pedantic(lambda: prefill.step(by_layers=True), rounds=1)
    prefill.close()
    note(
        benchmark,
        "layers",
        path=path.value,
        bytes=mebibytes * MIB,
        load_seconds=layered.load,
        first_share=layered.first_share,
        over=layered.over,
        over_without=whole.over,
    )
