"""vLLM's own worker as a peer, as far as it runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from triton_offload.specs import Ids


def vllm_planner(
    caches: list[torch.Tensor], slots: torch.Tensor
) -> Callable[[Ids, Ids], tuple[int, int]]:
    """vLLM's planning of a store of whole chunks of one block: a descriptor for every page.

    `caches`: int8 [num_blocks, page_bytes] each; `slots`: int8 [num_slots, sum of page bytes]. The
    function returned takes block ids and slot ids, and returns the number of descriptors and of
    bytes. vLLM's handler asserts tensors on a GPU when it is built, so that its planning code runs
    here on an object with the fields that it reads.
    """
    worker = pytest.importorskip("vllm.v1.kv_offload.cpu.gpu_worker", reason="vLLM is not here")
    pages = [cache.shape[1] for cache in caches]
    offsets = np.cumsum([0, *pages])
    handler = SimpleNamespace(
        src_tensors=caches,
        dst_tensors=[
            slots[:, offset : offset + page]
            for offset, page in zip(offsets.tolist(), pages, strict=False)
        ],
        src_blocks_per_chunk=1,
        dst_blocks_per_chunk=1,
        layer_refs_per_group=[
            [SimpleNamespace(tensor_idx=i, page_size_bytes=page) for i, page in enumerate(pages)]
        ],
    )
    fill = worker.SingleDirectionOffloadingHandler._fill_direct_ops

    def plan(block_ids: Ids, slot_ids: Ids) -> tuple[int, int]:
        count = len(block_ids) * len(caches)
        # vLLM reuses pinned buffers; np.empty costs it no more.
        src, dst, sizes = (np.empty(count, dtype=np.int64) for _ in range(3))
        return fill(
            handler,
            0,
            group_src=block_ids,
            group_dst=slot_ids,
            group_size=len(block_ids),
            src_skip_count=0,
            dst_skip_count=0,
            all_src=src,
            all_dst=dst,
            all_sizes=sizes,
            op_idx=0,
        )

    return plan
