"""Wrong arguments of every public call: one line that names the argument, and nothing changed.

A program of a user's is right or gets such a line; what is refused has queued, pinned and evicted
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from triton_offload import Calibration, KVOffloader, PipelineOptions
from triton_offload.calibration import Path as Path_
from triton_offload.calibration import PathTable
from triton_offload.testing import SimulatedDevice

KEYS = [b"a", b"b"]


def caches(number: int = 2) -> list[torch.Tensor]:
    return [torch.arange(8 * 16, dtype=torch.uint8).reshape(8, 16) for _ in range(number)]


class Shouting:
    """What is shown in several lines, and long."""

    def __repr__(self) -> str:
        return "first line\nsecond line" * 100


LONG = torch.zeros(40, 40)
BAD_SIZES = [None, True, 1.5, float("nan"), -1, 0, "", "8 GiBs", "-1", [], np.float64(9e9), LONG]
BAD_COUNTS = [None, True, 1.0, -1, 0, "2", [2], np.float64(2), np.zeros(3), LONG, Shouting()]
BAD_NUMBERS = [None, True, 1.0, -1, "0", [0], np.float64(0), np.zeros(3), LONG, Shouting()]

CONSTRUCTION: list[tuple[str, dict[str, Any]]] = [
    *(
        ("kv_caches", {"kv_caches": wrong})
        for wrong in (
            None,
            5,
            "cache",
            [],
            {},
            iter([]),
            torch.zeros(8, 16),
            np.zeros((8, 16)),
            [np.zeros((8, 16))],
            [None],
            {"k": None},
            [torch.zeros(8, 16), "v"],
            [torch.empty(8, 16, device="meta")],
            [torch.zeros(8, 16), torch.empty(8, 16, device="meta")],
            [torch.zeros(8, 16).to_sparse()],
            [torch.zeros(())],
            [torch.zeros(0, 16)],
            [torch.zeros(8, 0)],
            [torch.zeros(8, 16, 2).transpose(1, 2)],
            [torch.zeros(1, 16).expand(8, 16)],
            [Shouting()],
            {Shouting(): None},
        )
    ),
    *(("host_bytes", {"host_bytes": wrong}) for wrong in BAD_SIZES),
    *(("host_bytes", {"host_bytes": wrong}) for wrong in (500 * 10**12, "500 TB", 1 << 70)),
    ("host_bytes", {"host_bytes": 31}),  # a chunk is 32 bytes
    *(("blocks_per_chunk", {"blocks_per_chunk": wrong}) for wrong in BAD_COUNTS),
    *(
        ("groups", {"groups": wrong})
        for wrong in (
            5,
            "01",
            [],
            [[]],
            [0, 1],
            [[0], [2]],
            [[0], [-1]],
            [[0, 0]],
            [[True]],
            [[0.0]],
            [["k"]],
            [[None]],
            [[[0]]],
            {"a": [0]},
            LONG,
            [LONG],
            Shouting(),
            [[Shouting()]],
        )
    ),
    ("groups", {"kv_caches": {"k": caches(1)[0]}, "groups": [["v"]]}),
    ("groups", {"kv_caches": {"k": caches(1)[0]}, "groups": [[0]]}),
    *(
        ("path", {"path": wrong})
        for wrong in (None, "fast", "", 1, True, ["staged"], LONG, Shouting())
    ),
    ("path", {"path": "staged", "options": PipelineOptions()}),
    *(
        ("policy", {"policy": wrong})
        for wrong in (None, "fifo", "", 1, True, ["lru"], LONG, Shouting(), dict, lambda n: None)
    ),
    *(
        ("calibration", {"calibration": wrong})
        for wrong in (None, 5, True, "no such file", Path("no such file"), [], LONG, Shouting())
    ),
    *(
        ("options", {"options": wrong})
        for wrong in (5, "staged", {"num_buffers": 2}, PipelineOptions, LONG, Shouting())
    ),
    *(
        ("device", {"device": wrong})
        for wrong in (
            5,
            "cpu",
            torch.device("cpu"),
            LONG,
            Shouting(),
            object(),
            SimulatedDevice,
        )
    ),
]

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("path", {"path": wrong}) for wrong in ("auto", "fast", 5, True, LONG, Shouting())),
    *(("paths", {"paths": wrong}) for wrong in ("staged", 5, {}, PathTable, LONG, Shouting())),
    *(
        (name, {name: wrong})
        for name in ("buffer_bytes", "num_buffers", "max_indices", "window_bytes")
        for wrong in (0, -1, 1.0, True, "8", [8], np.float64(8), LONG, Shouting())
    ),
    *((n, {n: None}) for n in ("buffer_bytes", "num_buffers", "max_indices")),
]

BAD_KEYS = [
    None,
    5,
    b"a",
    "a",
    [None, b"b"],
    ["a", "b"],
    [b"a", bytearray(b"b")],
    [b"a", 1],
    [LONG, b"b"],
]
BAD_IDS = [
    None,
    5,
    "01",
    b"01",
    [0.0, 1.0],
    [True, False],
    [None, 1],
    ["0", "1"],
    [[0, 1]],
    [0, [1]],
    {0, 1},
    [0, 8],
    [-1, 0],
    [0, 1 << 64],
    [0, 1 << 63],
    np.array([0.0, 1.0]),
    np.array([[0, 1]]),
    np.array([0, 1], object),
    np.array([0, 1 << 63], np.uint64),
    torch.tensor([0.0, 1.0]),
    torch.tensor([[0, 1]]),
    torch.tensor([True, False]),
    torch.tensor([0, 8]),
    torch.empty(2, dtype=torch.int64, device="meta"),
    Shouting(),
]
BAD_STREAMS = [5, "stream", True, object(), LONG, Shouting()]
BAD_TIMEOUTS = ["1", True, math.nan, [1], LONG, Shouting()]

CALLS: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    *(
        (name, call, (KEYS, [0, 1]), {name: wrong})
        for call in ("store", "load")
        for name, values in (("group", [*BAD_NUMBERS, 1, 1 << 70]), ("first_block", BAD_NUMBERS))
        for wrong in values
    ),
    *(("keys", call, (wrong, [0, 1]), {}) for call in ("store", "load") for wrong in BAD_KEYS),
    *(("keys", call, (KEYS[:1], [0, 1]), {}) for call in ("store", "load")),
    *(("keys", call, (KEYS, [0]), {}) for call in ("store", "load")),
    *(("keys", call, (KEYS, []), {}) for call in ("store", "load")),
    ("keys", "store", ([b"a", b"a"], [0, 1]), {}),
    *(("block_ids", call, (KEYS, wrong), {}) for call in ("store", "load") for wrong in BAD_IDS),
    ("block_ids", "load", (KEYS, [1, 1]), {}),
    *(
        ("stream", call, (KEYS, [0, 1]), {"stream": wrong})
        for call in ("store", "load")
        for wrong in BAD_STREAMS
    ),
    *(("keys", call, (wrong,), {}) for call in ("lookup", "touch") for wrong in BAD_KEYS),
    *(
        ("group", call, (KEYS,), {"group": wrong})
        for call in ("lookup", "touch")
        for wrong in [*BAD_NUMBERS, 1, 1 << 70]
    ),
    *(
        ("num_blocks", "lookup", (KEYS,), {"num_blocks": wrong})
        for wrong in BAD_NUMBERS
        if wrong is not None
    ),
    ("keys", "lookup", (KEYS,), {"num_blocks": 3}),
    ("keys", "lookup", (KEYS,), {"num_blocks": 0}),
    *(
        ("first_block", "lookup", (KEYS,), {"num_blocks": 2, "first_block": wrong})
        for wrong in BAD_NUMBERS
    ),
    *(("job", "cancel", (wrong,), {}) for wrong in (None, 1, "1", LONG, Shouting())),
    *(("timeout", "close", (wrong,), {}) for wrong in BAD_TIMEOUTS),
]


def numbered(cases: list[Any]) -> list[str]:
    """Names that are the same in every process."""
    return [f"{case[0]} {i}" for i, case in enumerate(cases)]


def refused(name: str, call: Any, *arguments: Any, **named: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message.partition(":")[0].partition("[")[0].split(",")[0] == name, message
    assert "\n" not in message
    assert len(message) < 400, message
    assert "expected" in message


@pytest.mark.parametrize(("name", "arguments"), CONSTRUCTION, ids=numbered(CONSTRUCTION))
def test_what_no_offloader_is_made_of_is_named_in_one_line(name, arguments):
    given = {"kv_caches": caches(), "host_bytes": 1 << 20} | arguments
    refused(name, KVOffloader, **given)


@pytest.mark.parametrize(("name", "arguments"), OPTIONS, ids=numbered(OPTIONS))
def test_what_is_no_option_is_named_in_one_line(name, arguments):
    refused(name, PipelineOptions, **arguments)


@pytest.fixture(scope="module")
def offloader() -> Iterator[KVOffloader]:
    with KVOffloader(caches(), 1 << 12) as made:
        made.store(KEYS, [0, 1]).wait()
        made.get_finished()
        yield made


@pytest.mark.parametrize(
    ("name", "call", "arguments", "named"),
    CALLS,
    ids=[f"{call} {each}" for each, (_, call, *_) in zip(numbered(CALLS), CALLS, strict=True)],
)
def test_a_wrong_argument_of_a_call_is_named_in_one_line(offloader, name, call, arguments, named):
    before = offloader.stats()
    refused(name, getattr(offloader, call), *arguments, **named)
    assert offloader.stats() == before
    assert offloader.get_finished() == []
    offloader._check()


@pytest.mark.parametrize("wrong", BAD_TIMEOUTS, ids=range(len(BAD_TIMEOUTS)))
@pytest.mark.parametrize("call", ["wait", "block"])
def test_a_wrong_timeout_of_a_job_is_named_whether_or_not_it_has_ended(offloader, call, wrong):
    job = offloader.load(KEYS, [4, 5])
    refused("timeout", getattr(job, call), wrong)
    job.wait()
    refused("timeout", getattr(job, call), wrong)
    offloader.get_finished()


@pytest.mark.parametrize("timeout", [0, 5, 1.5, np.float32(5), np.int64(5), math.inf, 1e12])
def test_any_number_of_seconds_is_a_timeout(timeout):
    with KVOffloader(caches(), 1 << 12) as made:
        job = made.store(KEYS, [0, 1])
        job.wait()
        job.wait(timeout)
        made.close(timeout or 5)


def test_integers_of_numpy_are_integers_in_every_call():
    with KVOffloader(caches(), np.int64(1 << 12), np.int32(2), groups=[[np.int64(0)], [1]]) as made:
        where = {"first_block": np.int64(2), "group": np.uint8(1)}
        made.store(KEYS, np.arange(3, dtype=np.uint16), **where).wait()
        assert made.lookup(KEYS, num_blocks=np.int16(3), **where) == 2
        made.touch(KEYS, group=np.int64(1))
        made.load(KEYS, torch.tensor([5, 6, 7], dtype=torch.int32), **where).wait()


def moves_bytes(**more: Any) -> None:
    """The way of a small program; tensors named to lie on the CPU."""
    tensors = [torch.arange(128, dtype=torch.uint8, device="cpu").reshape(8, 16)]
    with KVOffloader(tensors, "4KiB", 2, **more) as made:
        made.store(KEYS, torch.tensor([0, 1, 2], device="cpu")).wait()
        assert made.lookup(KEYS) == 2
        tensors[0][4:] = 0
        made.load(KEYS, [5, 6, 7]).wait()
        assert torch.equal(tensors[0][5:8], tensors[0][:3])
        made.touch(KEYS)
        made.reset()
        assert made.lookup(KEYS) == 0


@pytest.mark.parametrize("path", ["auto", "staged", "zero_copy", "copy_engine"])
def test_it_is_made_and_used_in_inference_mode(path):
    with torch.inference_mode():
        moves_bytes(path=path)


@pytest.mark.parametrize("path", ["auto", "staged", "zero_copy", "copy_engine"])
def test_it_is_made_and_used_where_tensors_are_made_elsewhere_by_default(path):
    torch.set_default_device("meta")
    try:
        moves_bytes(path=path)
    finally:
        torch.set_default_device(None)


def test_a_calibration_is_taken_as_it_is():
    moves_bytes(calibration=Calibration(PathTable(Path_.STAGED), buffer_bytes=1 << 10))


def test_a_tensor_is_named_in_full():
    name = "model.language_model.layers.17.self_attn.attn"
    with pytest.raises(ValueError, match=rf"^kv_caches\['{name}'\]: expected a torch.Tensor, got"):
        KVOffloader({name: None}, 1 << 20)  # type: ignore[dict-item]
