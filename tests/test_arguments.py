"""Arguments are checked and copied where a call enters: what was passed is the caller's again."""

from __future__ import annotations

import array
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from triton_offload.kernels.arguments import as_ids, as_integer, unwritable

IDS = [5, 0, 3]


def memory_of(kind: str):
    """Ids 5, 0, 3 in memory of their owner, and how the owner overwrites all of it."""
    if kind == "list":
        ids = list(IDS)
        return ids, lambda: ids.__setitem__(slice(None), [9, 9, 9])
    if kind == "array.array":
        ids = array.array("q", IDS)
        return ids, lambda: ids.__setitem__(slice(None), array.array("q", [9, 9, 9]))
    if kind.startswith("torch"):
        tensor = torch.tensor(IDS, dtype=getattr(torch, kind.split(".")[1]))
        return tensor, lambda: tensor.fill_(9)
    if kind == "every second":
        owner = np.array([5, 7, 0, 7, 3, 7])
        return owner[::2], lambda: owner.fill(9)
    if kind == "backwards":
        owner = np.array([3, 0, 5])
        return owner[::-1], lambda: owner.fill(9)
    if kind == "a column":
        owner = np.array([[5, 7], [0, 7], [3, 7]])
        return owner[:, 0], lambda: owner.fill(9)
    if kind == "a read-only view":
        owner = np.array(IDS)
        view = owner.view()
        view.flags.writeable = False
        return view, lambda: owner.fill(9)
    if kind == "marked read-only":
        owner = np.array(IDS)
        owner.flags.writeable = False

        def overwrite():
            owner.flags.writeable = True
            owner.fill(9)

        return owner, overwrite
    if kind == "a view of a bytearray":
        memory = bytearray(np.array(IDS).tobytes())
        return np.frombuffer(memory, np.int64), lambda: memory.__setitem__(
            slice(None), bytes(len(memory))
        )
    owner = np.array(IDS, dtype=kind)
    return owner, lambda: owner.fill(9)


KINDS = [
    "list",
    "array.array",
    "torch.int64",
    "torch.int32",
    "torch.uint8",
    "every second",
    "backwards",
    "a column",
    "a read-only view",
    "marked read-only",
    "a view of a bytearray",
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", ">i8", "<i2"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_a_copy_whatever_memory_they_came_in(kind):
    ids, overwrite = memory_of(kind)
    own = as_ids("ids", ids)
    assert own.dtype == np.int64
    assert own.dtype.isnative
    assert own.flags.c_contiguous
    overwrite()
    assert own.tolist() == IDS


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_can_write_to_ids(kind):
    own = as_ids("ids", memory_of(kind)[0])
    for each in (own, own[1:], own[::2]):
        with pytest.raises(ValueError, match="read-only"):
            each[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            each.flags.writeable = True


def test_ids_are_copied_once():
    own = as_ids("ids", np.arange(8))
    assert as_ids("ids", own) is own
    part = as_ids("ids", own[2:5])
    assert np.shares_memory(part, own)
    assert part.tolist() == [2, 3, 4]
    apart = as_ids("ids", own[::-2])
    assert apart.tolist() == [7, 5, 3, 1]
    assert apart.flags.c_contiguous


def test_views_of_unwritable_memory_as_other_numbers_are_not_taken_for_ids():
    halves = np.frombuffer(np.array([1, 2], np.int64).tobytes(), np.int32)
    assert as_ids("ids", halves).tolist() == [1, 0, 2, 0]
    backwards = np.frombuffer(np.array([1, 2], ">i8").tobytes(), ">i8")
    assert as_ids("ids", backwards).tolist() == [1, 2]


def test_flags_are_copied_alike():
    owner = np.array([True, False])
    own = unwritable(owner)
    owner.fill(False)
    assert own.tolist() == [True, False]
    assert own.dtype == np.bool_
    assert unwritable(own) is own


@pytest.mark.parametrize(
    "ids", [[], (), range(0), np.array([]), np.empty(0, np.int32), torch.empty(0)]
)
def test_no_ids_are_ids(ids):
    own = as_ids("ids", ids)
    assert (own.dtype, own.shape) == (np.int64, (0,))


@pytest.mark.parametrize("ids", [(2, 1), range(2, 0, -1), [np.int8(2), np.int64(1)]])
def test_other_sequences_are_ids(ids):
    assert as_ids("ids", ids).tolist() == [2, 1]


class OnADevice:
    """A tensor that must be fetched to be read."""

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self):
        return torch.tensor([2, 1])


def test_tensors_on_a_device_are_fetched():
    assert as_ids("ids", OnADevice()).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "got None"),
        (5, "got 5"),
        ("12", "got '12'"),
        (b"12", "got b'12'"),
        (["1", "2"], r"got \['1', '2'\], an array of <U1"),
        ([[1, 2], [3, 4]], r"got \[\[1, 2\], \[3, 4\]\]"),
        ([[1], [1, 2]], r"got \[\[1\], \[1, 2\]\]"),
        ([[]], r"got \[\[\]\]"),
        ([1.0], r"got \[1\.0\], an array of float64"),
        ([True, False], r"got \[True, False\], an array of bool"),
        ([None], r"got \[None\]"),
        ([1 << 64], r"got \[18446744073709551616\]"),
        ([*range(100), 0.5], r"got \[0, 1, 2, 3, 4, 5, \.\.\.\]"),
        ({1, 2}, r"got \{1, 2\}"),
        ({1: 2}, r"got \{1: 2\}"),
        (iter([1]), "got <list_it"),
        (np.array([True]), r"got shape \(1,\) of bool"),
        (np.array([1.5]), r"got shape \(1,\) of float64"),
        (np.array([1], object), r"got shape \(1,\) of object"),
        (np.array(5), r"got shape \(\) of int64"),
        (np.array([[1, 2]]), r"got shape \(1, 2\) of int64"),
        (np.empty((0, 2), np.int64), r"got shape \(0, 2\) of int64"),
        (torch.tensor([[1, 2]]), r"got shape \(1, 2\) of torch\.int64 on cpu"),
        (torch.tensor([1.0]), r"got shape \(1,\) of torch\.float32 on cpu"),
        (torch.tensor([1.0], dtype=torch.bfloat16), r".*of torch\.bfloat16 on cpu"),
        (torch.tensor([True]), r".*of torch\.bool on cpu"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), r".*of torch\.int64 on meta"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
def test_what_are_no_ids_is_said_in_one_line(ids, message):
    with pytest.raises(ValueError, match=f"^block_ids: expected a one-dim.* integers, {message}"):
        as_ids("block_ids", ids)


@pytest.mark.parametrize("ids", [np.array([1, 2**63], np.uint64), [2**63, 2**64 - 1]])
def test_ids_beyond_int64_do_not_wrap_around(ids):
    with pytest.raises(ValueError, match=r"^ids: expected ids below 2\*\*63, got (9|18)\d{18,}$"):
        as_ids("ids", ids)
    assert as_ids("ids", np.array([2**63 - 1], np.uint64)).tolist() == [2**63 - 1]


def test_what_a_device_reports_is_no_wrong_argument():
    class Lost(OnADevice):
        def cpu(self):
            raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        as_ids("ids", Lost())


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)], ids=repr
)
def test_integers_of_numpy_are_integers(value):
    number = as_integer("size", value, 3)
    assert (type(number), number) == (int, 3)


@pytest.mark.parametrize(
    "value", [True, np.True_, 3.0, np.float32(3), None, "3", [3], np.array([3, 4])], ids=repr
)
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(ValueError, match=r"^size: expected an integer of at least 1, got "):
        as_integer("size", value, 1)


def test_the_least_integer_is_taken_and_the_one_below_refused():
    assert as_integer("size", 0) == 0
    assert as_integer("size", 4, 4) == 4
    with pytest.raises(ValueError, match=r"^size: expected an integer of at least 4, got 3$"):
        as_integer("size", np.int32(3), 4)
    with pytest.raises(ValueError, match=r"^size: expected an integer of at least 0, got -1$"):
        as_integer("size", -1)


def test_copies_of_ids_may_be_written_to():
    own = as_ids("ids", [1, 2])
    copied = pickle.loads(pickle.dumps(own))
    copied[0] = 7
    assert (own.tolist(), copied.tolist()) == ([1, 2], [7, 2])
    assert not np.shares_memory(as_ids("ids", copied), copied)


def test_needs_no_torch():
    code = (
        "import sys; from triton_offload.kernels.arguments import as_ids; as_ids('x', [1]);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60, check=False)
    assert done.returncode == 0
