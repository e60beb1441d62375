"""A process that has run kernels on the imitated card (`card/`), at its end. What the CUDA device
asks of a card, `test_cuda_imitation.py` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from card import build

TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
    pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER),
]


def test_kernels_are_unloaded_before_the_interpreter_takes_triton_apart() -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "exit_on_card.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("1 1\n", "", 0)
