"""The names at the door: all there, seen by type checkers, loaded when they are used."""

from __future__ import annotations

import ast
import builtins
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import triton_offload
from triton_offload import TransferFailedError, TransferResult, TransferStatus

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
DOOR = ROOT / "triton_offload" / "__init__.py"

PROGRAM = '''
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from triton_offload import (
    Calibration,
    ChecksumError,
    ChunkSpec,
    DeviceLostError,
    Direction,
    EvictionPolicy,
    KVOffloader,
    LoadStoreSpec,
    OffloadingEvent,
    OffloadingStats,
    OffloadJob,
    PendingKeyError,
    PipelineOptions,
    PoolFullError,
    TransferFailedError,
    TransferResult,
    TransferStatus,
    UnknownKeyError,
    UnwrittenBlocksError,
    __version__,
)


class Fifo:
    """A policy needs no base class, and no `_check`."""

    def __init__(self, num_chunks: int) -> None:
        self.keys: dict[bytes, None] = {}

    def admit(self, keys: Sequence[bytes]) -> None:
        self.keys.update(dict.fromkeys(keys))

    def land(self, keys: Sequence[bytes]) -> None: ...

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            del self.keys[key]

    def refresh(self, keys: Sequence[bytes]) -> None: ...

    def touch(self, keys: Sequence[bytes], pending: Collection[bytes] = ()) -> None: ...

    def evict(
        self, count: int, protected: AbstractSet[bytes], busy: Sequence[AbstractSet[bytes]] = ()
    ) -> list[bytes]:
        spared = set(protected).union(*busy)
        found = [key for key in self.keys if key not in spared][:count]
        self.remove(found)
        return found

    def release(self, keys: Sequence[bytes]) -> None: ...

    def clear(self) -> None:
        self.keys.clear()


class Nowhere(LoadStoreSpec): ...


def drop(src: ChunkSpec, dst: Nowhere) -> int:
    return sum(len(chunk.data) for chunk in src.chunks)


def main() -> None:
    caches = {"k": torch.zeros(8, 16), "v": torch.zeros(8, 16)}
    options = PipelineOptions(path="staged", num_buffers=2)
    offloaders: list[KVOffloader] = [
        KVOffloader(caches, "4KiB", policy=Fifo, enable_events=True),
        KVOffloader(list(caches.values()), 1 << 12, policy="arc", path="zero_copy"),
        KVOffloader(caches, 1 << 12, policy=lambda n: Fifo(n), calibration="off", options=options),
    ]
    for offloader in offloaders:
        with offloader:
            offloader.register_worker(ChunkSpec, Nowhere, drop)
            job: OffloadJob = offloader.store([b"a", b"b"], torch.tensor([0, 1]))
            result: TransferResult = job.wait(5)
            assert result.status is TransferStatus.SUCCESS
            assert job.direction is Direction.STORE
            offloader.load([b"a"], np.array([2])).wait()
            offloader.load([b"b"], [3]).wait()
            events: list[OffloadingEvent] = offloader.take_events()
            assert not events or not events[0].removed
            stats: OffloadingStats = offloader.stats()
            assert stats.load.jobs == 2
            try:
                offloader.load([b"c"], [0])
            except (UnknownKeyError, PendingKeyError, UnwrittenBlocksError) as error:
                print(type(error).__name__)
    errors: list[type[Exception]] = [
        PoolFullError, TransferFailedError, DeviceLostError, ChecksumError
    ]
    policies: list[type[EvictionPolicy]] = [Fifo]
    kept: Calibration | None = None
    print(errors, policies, kept, __version__)


main()
'''


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", triton_offload.__all__)
def test_every_name_is_there(name):
    found = getattr(triton_offload, name)
    assert name == "__version__" or found.__name__ == name


def test_the_names_are_listed_and_no_others_found():
    assert sorted(triton_offload.__all__) == sorted([*triton_offload._MODULE_OF, "__version__"])
    assert set(triton_offload.__all__) <= set(dir(triton_offload))
    with pytest.raises(AttributeError, match="module 'triton_offload' has no attribute 'KVLoader'"):
        _ = triton_offload.KVLoader  # type: ignore[attr-defined]


def test_type_checkers_are_told_the_modules_that_names_come_from():
    (block,) = [node for node in ast.parse(DOOR.read_text()).body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {n: f"triton_offload.{m}" for n, m in triton_offload._MODULE_OF.items()}


def test_nothing_is_loaded_before_it_is_used():
    """The listing included; errors and stats need no torch."""
    run(
        "-c",
        "import sys, importlib\n"
        "before = set(sys.modules)\n"
        "import triton_offload\n"
        "assert 'KVOffloader' in dir(triton_offload) and 'PoolFullError' in dir(triton_offload)\n"
        "loaded = set(sys.modules) - before\n"
        "assert loaded == {'triton_offload', 'triton_offload.version'}, loaded\n"
        "from triton_offload import PoolFullError, UnknownKeyError, TransferFailedError\n"
        "assert 'numpy' not in sys.modules\n"
        "from triton_offload import OffloadingStats, EvictionPolicy, Calibration, PipelineOptions\n"
        "assert 'torch' not in sys.modules\n"
        "assert vars(triton_offload)['PoolFullError'] is PoolFullError  # kept",
    )


def test_a_program_with_all_the_names_passes_the_type_checker_and_runs(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    used = {node.id for node in ast.walk(ast.parse(PROGRAM)) if isinstance(node, ast.Name)}
    assert set(triton_offload.__all__) <= used
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import torch\n"
        "from triton_offload import KVOffloader, PipelineOptions\n"
        'KVOffloader([torch.zeros(1)], 1, path="fast")\n'
        'KVOffloader([torch.zeros(1)], 1, policy="fifo")\n'
        "KVOffloader([torch.zeros(1)], 1, policy=dict)\n"
        'PipelineOptions(path="auto")\n'
    )
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", program, wrong],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in checked.stdout.splitlines() if ": error: " in line]
    places = [line.rpartition("wrong.py:")[2].partition(":")[0] for line in lines]
    assert places == ["3", "4", "5", "6"], checked.stdout + checked.stderr
    assert run(program).count("UnknownKeyError") == 3


def test_each_error_is_what_the_page_says():
    """Whoever catches a KeyError or RuntimeError goes on catching these."""
    rows = re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {n for n in triton_offload.__all__ if n.endswith("Error")}
    for name, base in rows:
        assert getattr(triton_offload, name).__bases__ == (getattr(builtins, base),)


def test_a_failed_transfer_says_which_job_how_it_ended_and_why():
    result = TransferResult(7, TransferStatus.FAILED, error=OSError("no link"))
    error = TransferFailedError(result)
    assert str(error) == "job 7 failed: no link"
    assert error.result is result


def test_an_error_goes_from_process_to_process_with_its_result():
    result = TransferResult(7, TransferStatus.FAILED)
    copied = pickle.loads(pickle.dumps(TransferFailedError(result)))
    assert copied.result == result
    assert str(copied) == "job 7 failed: None"
