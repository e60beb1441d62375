"""A process on the imitated card that runs kernels, and ends without closing anything."""

from __future__ import annotations

import atexit

import imitation_cuda
import torch


def tell() -> None:
    """How many modules were unloaded by now: after this, Triton is taken apart."""
    calls = [call.name for call in imitation_cuda.card.calls()]
    print(calls.count("cuModuleLoadData"), calls.count("cuModuleUnload"))


atexit.register(tell)  # first, so that it is called last

from triton_offload.kernels import pages  # noqa: E402
from triton_offload.kernels.table import PageTable  # noqa: E402

cache = torch.zeros(8, 4096, dtype=torch.uint8).cuda()
table = PageTable([cache], 1)
slots = torch.zeros(8, table.slot_bytes, dtype=torch.uint8).cuda()
pages.gather_pages(table, [1, 2], slots)
torch.cuda.synchronize()
