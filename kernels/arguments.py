"""What callers pass, checked, and copied where it is kept: theirs again when a call returns.

Needs numpy alone: the side that schedules uses it without torch.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

IdArray = npt.NDArray[np.int64]
_INT64 = np.dtype(np.int64)
Scalar = TypeVar("Scalar", bound=np.generic)


def as_integer(name: str, value: Any, least: int = 0) -> int:
    """``value``, of Python, numpy or a tensor of one element, as an int; no bool is one.

    Raises:
        ValueError: Names the argument: not an integer, or less than ``least``.
    """
    if type(value) is int and value >= least:
        return value
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"{name}: expected an integer of at least {least}, got {shown(value)}"
        ) from None
    if number < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {number}")
    return number


def as_seconds(name: str, value: Any) -> float | None:
    """``value``, any real number of Python or numpy, as a float; None is for ever.

    Raises:
        ValueError: Names the argument: not a number, or not one at all (nan).
    """
    if value is None:
        return None
    # A bool is a number by its class, and a string is made one by `float`.
    wrong = isinstance(value, bool | np.bool_) or not isinstance(value, Real)
    if wrong or math.isnan(value):
        raise ValueError(f"{name}: expected seconds or None, got {shown(value)}")
    return float(value)


def shown(value: object) -> str:
    """``value`` as errors show it: shortened, in one line."""
    return " ".join(reprlib.repr(value).split())


def as_ids(name: str, ids: Sequence[int] | npt.NDArray[np.integer] | Any) -> IdArray:
    """A copy of ``ids`` that nobody can write to: int64 ``[n]``, contiguous.

    Args:
        ids: A list, a tuple, a numpy array of integers, or a tensor of integers; a device's
            tensor is waited for. What this function made is passed on as it is, slices too, so
            that ids are copied once however many hands they pass through.

    Raises:
        ValueError: Names the argument: not one-dimensional, not integers, or beyond int64.
    """
    array: npt.NDArray[Any] = ids  # type: ignore[assignment]
    if type(ids) is not np.ndarray:
        try:
            # A tensor, known by its methods: torch is not loaded for it.
            array = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)
        except (NotImplementedError, TypeError, ValueError) as error:
            # No memory (meta), a dtype of torch's own, a ragged list. Errors of a device pass.
            raise ValueError(_refusal(name, ids)) from error
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(_refusal(name, ids, array))
    if array.dtype != _INT64:
        if array.dtype.kind == "u" and array.size and int(array.max()) >= 1 << 63:
            raise ValueError(f"{name}: expected ids below 2**63, got {int(array.max())}")
        array = array.astype(_INT64)
    return unwritable(array)


def unwritable(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """The values of an array in memory that nobody can write to.

    The memory is that of a ``bytes`` object: the owner of an array that is only marked read-only
    could mark it writable again. An array over such memory is returned as it is.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, bytes) and array.flags.c_contiguous:
        return array
    return np.ndarray(array.shape, array.dtype, array.tobytes())


def _refusal(name: str, ids: Any, array: npt.NDArray[Any] | None = None) -> str:
    """Lists are shown, shortened; arrays and tensors are described."""
    shape = getattr(ids, "shape", None)
    if shape is not None:
        got = f"shape {tuple(shape)} of {ids.dtype} on {getattr(ids, 'device', 'cpu')}"
    else:
        got = shown(ids)
        if array is not None and array.dtype != object and array.ndim:
            got += f", an array of {array.dtype}"
    return f"{name}: expected a one-dimensional sequence of integers, got {got}"
