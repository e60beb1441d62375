"""What needs a GPU, without one: it calls torch.cuda and cuda-bindings as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def run(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "imitation_cuda", "-q", "-rs"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(TESTS / file)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_the_tests_of_a_gpu_pass_where_cuda_is_imitated() -> None:
    run("test_cuda.py")
    run("test_cuda_kernels.py")


def test_each_call_of_the_seam_asks_for_the_right_thing_on_the_right_stream() -> None:
    run("cuda_calls.py")
