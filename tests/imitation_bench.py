"""The benchmarks' GPU branches on the imitated card, with hardly anything to move.

    PYTHONPATH=tests:bench:. python -m pytest -p imitation_bench bench/test_transfers.py

Every line runs, and bytes are checked as always; the figures mean nothing. Added to
`imitation_cuda` is what only benchmarks ask for. vLLM is not looked for.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

sys.modules["vllm"] = None  # type: ignore[assignment]  # an import of it is refused

import imitation_cuda  # noqa: E402
import torch  # noqa: E402
from card import tensors  # noqa: E402


def _empty_like(like: torch.Tensor, device: Any = None) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device or like.device)


def imitate() -> None:
    properties = torch.cuda.get_device_properties

    def of_an_h100(device: Any = None) -> SimpleNamespace:
        found = vars(properties(device)) | {"name": "NVIDIA H100 80GB (imitated)"}
        return SimpleNamespace(**found)

    torch.cuda.get_device_properties = of_an_h100
    torch.randint = tensors._made_on_card(torch.randint)
    torch.randn = tensors._made_on_card(torch.randn)
    torch.empty_like = _empty_like

    import sizes

    assert sizes.HAS_GPU, "imitation_cuda comes first"
    sizes.SIZES = sizes.TINY
    # Small products of bfloat16 take seconds by the library that is made for large ones.
    torch.backends.mkldnn.enabled = False
    torch.set_num_threads(1)


assert imitation_cuda.CARD.type == "cuda"
imitate()
