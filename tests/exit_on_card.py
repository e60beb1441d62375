"""A process on the imitated card that runs kernels, and ends without closing anything."""

from __future__ import annotations

import atexit


def tell() -> None:
    """How many modules were loaded, and unloaded by now: after this, Triton is taken apart."""
    calls = [call.name for call in imitation_cuda.card.calls()]
    print(calls.count("cuModuleLoadData"), calls.count("cuModuleUnload"))


atexit.register(tell)  # before anything of the package is imported, so that it is called last

import imitation_cuda  # noqa: E402
import torch  # noqa: E402

from triton_offload.kernels import pages  # noqa: E402
from triton_offload.kernels.table import PageTable  # noqa: E402

cache = torch.zeros(8, 4096, dtype=torch.uint8).cuda()
table = PageTable([cache], 1)
slots = torch.zeros(8, table.slot_bytes, dtype=torch.uint8).cuda()
pages.gather_pages(table, [1, 2], slots)
torch.cuda.synchronize()
