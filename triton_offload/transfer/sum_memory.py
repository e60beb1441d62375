"""Memory that a lane's sums pass through, from the kernels that add up to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from triton_offload.device.base import Device
from triton_offload.kernels.sums import Sums


class SegmentSums(NamedTuple):
    """The sums of one segment's blocks: where kernels add them up, int64 `[blocks]`, and where the
    host finds them; both as bytes too, for those who clear and copy them."""

    on_device: torch.Tensor
    device_bytes: torch.Tensor
    host: Sums
    host_bytes: torch.Tensor


class SumMemory:
    """As many sums as a lane has memory for ids: a segment's lie where its block ids do in the ring
    of those (`IndexRing`), and are as long its own."""

    def __init__(self, device: Device, capacity: int) -> None:
        self._device_bytes = device.empty(8 * capacity)
        host = device.empty_indices(capacity)
        self._host: Sums = host.numpy()
        self._host_bytes = host.view(torch.uint8)

    def of(self, begin: int, count: int) -> SegmentSums:
        """Those of a segment whose block ids lie at `[begin, begin + count)`."""
        part, in_bytes = slice(begin, begin + count), slice(8 * begin, 8 * (begin + count))
        on_device = self._device_bytes[in_bytes]
        return SegmentSums(
            on_device.view(torch.int64), on_device, self._host[part], self._host_bytes[in_bytes]
        )
