"""tests/test_cuda.py without a GPU: what it runs calls torch.cuda and cuda-bindings as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py runs on the GPU that is here")
def test_the_tests_of_a_gpu_pass_where_cuda_is_imitated() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "imitation_cuda", "-q", "-rs"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(TESTS / "test_cuda.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
