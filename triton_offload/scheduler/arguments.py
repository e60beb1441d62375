"""Numbers that users give."""

from __future__ import annotations

import operator
from typing import SupportsIndex


def whole_number(name: str, value: SupportsIndex, at_least: int) -> int:
    """`value` as an int; numpy's integers are integers. Raises ValueError that names the argument
    on anything else, a bool included, and on less than `at_least`."""
    if not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            pass
        else:
            if number >= at_least:
                return number
    raise ValueError(f"{name}: expected an integer of at least {at_least}, got {value!r}")
