"""What needs a GPU, without one: on the imitated card, with the real launcher and bindings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from card import build

TESTS = Path(__file__).parent
TRITON_36 = Path(os.environ.get("TRITON_36_PATH", TESTS.parent / ".venv" / "triton-3.6"))

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
    pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER),
]


def run(*files: str, card: str = "12.8", other_triton: Path | None = None) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "imitation_cuda", "-q", "-rs"]
    paths = [*([other_triton] if other_triton else []), TESTS, TESTS.parent]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *(str(TESTS / file) for file in files)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "IMITATED_CARD": card,
        },
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def test_the_tests_of_a_gpu_pass_on_the_card() -> None:
    run("test_cuda.py")
    run("test_cuda_kernels.py")


@pytest.mark.deep
@pytest.mark.skipif(not (TRITON_36 / "triton").is_dir(), reason=f"no triton in {TRITON_36}")
@pytest.mark.skipif(triton.__version__.startswith("3.6."), reason="this is triton 3.6")
def test_they_pass_with_an_older_triton_on_a_newer_driver() -> None:
    run("test_cuda.py", card="13.0", other_triton=TRITON_36)


def test_what_the_device_asks_of_the_driver() -> None:
    # All in one process: most of the time of one alone goes into its imports.
    run(*sorted(file.name for file in TESTS.glob("cuda_*.py")))
