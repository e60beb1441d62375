"""How the imitation of torch asks the driver: through NVIDIA's own bindings."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from cuda.bindings import driver


def ask(result: tuple[Any, ...]) -> Any:
    """What a call of the bindings returned beside its error; raises as torch does."""
    error, *values = result
    if int(error) != 0:
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA error: {text.decode()}")
    return values[0] if len(values) == 1 else values or None


def use(index: int) -> None:
    """cudaSetDevice: makes the device's context, and makes it current to this thread."""
    ask(driver.cuInit(0))
    retained = _retained.get(index)
    if retained is None:
        retained = _retained.setdefault(index, ask(driver.cuDevicePrimaryCtxRetain(index)))
    ask(driver.cuCtxSetCurrent(retained))


_retained: dict[int, Any] = {}
_cards = itertools.count()
_card = next(_cards)


def forget() -> None:
    """There is another card."""
    global _card
    _retained.clear()
    _card = next(_cards)


def card_number() -> int:
    """Which card it is, of those that the process has had."""
    return _card


def current_index() -> int:
    """The thread's device. Where it never set one the runtime takes the first, and makes a context
    there."""
    ask(driver.cuInit(0))
    if int(ask(driver.cuCtxGetCurrent())) == 0:
        use(0)
    return int(ask(driver.cuCtxGetDevice()))


def index_of(device: torch.device | int | str | None) -> int:
    if device is None:
        return current_index()
    if isinstance(device, int):
        return device
    device = torch.device(device)
    assert device.type == "cuda"
    return current_index() if device.index is None else device.index


class OnDevice:
    """`torch.cuda.device`."""

    def __init__(self, device: torch.device | int | None) -> None:
        self._index = None if device is None else index_of(device)
        self._before = 0

    def __enter__(self) -> None:
        self._before = current_index()
        if self._index is not None:
            use(self._index)

    def __exit__(self, *exception: object) -> None:
        use(self._before)
