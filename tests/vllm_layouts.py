"""KV caches of model families, grouped, placed and allocated by vLLM's own code without an engine.

Imports vllm: for the tests of the plug-in alone.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import vllm
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (
    build_offloading_config,
    get_offloading_group_ids,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import (
    OffloadingConnectorWorker,
)
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.worker.utils import allocate_kv_cache

from triton_offload.vllm import TritonOffloadingConnector, TritonOffloadingSpec

_PLANNING = "kv_cache_utils" if vllm.__version__.startswith("0.32") else "kv_cache_planning"
_planning = importlib.import_module(f"vllm.v1.core.{_PLANNING}")

BLOCKS = 32
CHUNKS = 34  # at least: one chunk has one block or several
BLOCKS_EACH = 4  # of each group, in a test
POISON, STALE = 0x7E, 0x77  # no byte of the pages is one of these


@dataclass(frozen=True)
class Family:
    """The layers of a model, and how vLLM lays them out.

    `layout`: which of layer, block, head, token, content lies outside of which. `whole_blocks`: a
    block of all layers moves as one. `kernel_tokens`: of the blocks that a kernel sees, if smaller.
    """

    layout: str
    make_layers: Callable[[], dict[str, Any]]
    whole_blocks: bool = False
    kernel_tokens: int | None = None


class LaidOut:
    """A family's caches in memory of their own, and vLLM's connector over our worker."""

    def __init__(self, family: Family, blocks_per_chunk: int) -> None:
        self.engine_config = _engine_config(family.layout)
        groups = _planning.get_kv_cache_groups(self.engine_config, family.make_layers())
        self.placed = _planning.get_kv_cache_config_from_groups(self.engine_config, groups, 1 << 40)
        assert self.placed.num_blocks == BLOCKS
        chunk_bytes = self.placed.kv_cache_tensors[0].size // BLOCKS * blocks_per_chunk
        self.engine_config.kv_transfer_config.kv_connector_extra_config = {
            "cpu_bytes_to_use": CHUNKS * (chunk_bytes + 4096),  # vLLM rounds up to pages
            "blocks_per_chunk": blocks_per_chunk,
        }
        cache_config = self.engine_config.cache_config
        kernel_tokens = family.kernel_tokens and [family.kernel_tokens] * len(groups)
        self.caches = allocate_kv_cache(
            self.placed,
            torch.device("cpu"),
            cache_config.get_resolved_kv_cache_layout(),
            kernel_tokens,
        )
        storage = next(iter(self.caches.values())).untyped_storage()
        self.memory = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
        #: the scheduler's copy of what was placed
        self.schedulers = generate_scheduler_kv_cache_config([self.placed])
        #: which groups are offloaded, and the layers of each
        self.group_ids = get_offloading_group_ids(self.placed)
        self.groups = [tuple(groups[i].layer_names) for i in self.group_ids]
        #: whether a block of all layers is one piece
        self.is_packed = family.whole_blocks

    def connect(self) -> Any:
        """Hand the caches to our worker, which is returned, as an engine does."""
        config = build_offloading_config(self.engine_config, self.placed)
        spec = TritonOffloadingSpec(config)
        connector = OffloadingConnectorWorker(spec, self.engine_config, self.placed)
        connector.register_kv_caches(self.caches)
        return connector.worker

    def connector(self, role: Any, **options: Any) -> Any:
        """Our connector, as an engine makes it: a scheduler's, or a rank's with the caches."""
        transfer = self.engine_config.kv_transfer_config
        extra = {**transfer.kv_connector_extra_config, **options}
        ours = KVTransferConfig(
            kv_connector="TritonOffloadingConnector",
            kv_connector_module_path="triton_offload.vllm",
            kv_load_failure_policy="recompute",
            kv_role="kv_both",
            kv_connector_extra_config=extra,
        )
        config = copy.copy(self.engine_config)
        config.kv_transfer_config = ours
        if role is KVConnectorRole.SCHEDULER:
            return TritonOffloadingConnector(config, role, self.schedulers)
        connector = TritonOffloadingConnector(config, role, self.placed)
        connector.register_kv_caches(self.caches)
        return connector

    def places(self, layer: str) -> torch.Tensor:
        """`[num_blocks, n]`: where in the memory the bytes lie that the model has of each block."""
        cache = self.caches[layer].view(torch.int8)
        everywhere = torch.arange(self.memory.numel())
        seen = everywhere.as_strided(cache.shape, cache.stride(), cache.storage_offset())
        return specs.group_kernel_blocks(seen, BLOCKS).reshape(BLOCKS, -1)

    def drawn(self, seed: int) -> list[list[int]]:
        """For each group blocks of its own, for a block belongs to one group at a time."""
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randperm(BLOCKS, generator=generator).tolist()
        assert len(self.groups) * BLOCKS_EACH <= BLOCKS
        return [blocks[i * BLOCKS_EACH :][:BLOCKS_EACH] for i in range(len(self.groups))]


def finish(worker: Any, job_id: int) -> Any:
    """vLLM's TransferResult of a job, the only one under way."""
    worker.wait({job_id})
    deadline = time.monotonic() + 30
    while not (finished := worker.get_finished()):
        assert time.monotonic() < deadline, "the job was not reported"
    (result,) = finished
    assert (result.job_id, result.success) == (job_id, True)
    return result


def plan(family: Family) -> Any:
    """vLLM's KVCacheConfig of a family, of which nothing is allocated."""
    config = _engine_config(family.layout)
    groups = _planning.get_kv_cache_groups(config, family.make_layers())
    return _planning.get_kv_cache_config_from_groups(config, groups, 1 << 50)


def _engine_config(layout: str) -> Any:
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        cache_config=CacheConfig(block_size=32),
        kv_transfer_config=KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both"),
    )
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks_override = BLOCKS
    config.model_config = SimpleNamespace(
        model="model",
        dtype=torch.float32,
        use_mla=False,
        max_model_len=1024,
        get_total_num_kv_heads=lambda: 2,
    )
    return config


def _full(**changes: Any) -> Any:
    values = {"block_size": 32, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
    return specs.FullAttentionSpec(**{**values, **changes})


def _plain() -> dict[str, Any]:
    return {f"layer.{i}": _full() for i in range(3)}


def _aligned() -> dict[str, Any]:
    """Kernels that want each block to begin at a multiple of something."""
    return {f"layer.{i}": _full(block_stride_alignment=5000) for i in range(2)}


def _fp8() -> dict[str, Any]:
    quantized = _full(dtype=torch.uint8, kv_quant_mode=specs.KVQuantMode.FP8_PER_TENSOR)
    return {f"layer.{i}": quantized for i in range(3)}


def _windows() -> dict[str, Any]:
    """As Gemma 3's: five layers with a window to one without, and one left over."""
    window = specs.SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=16, dtype=torch.float32, sliding_window=64
    )
    return {f"layer.{i}": _full() if i % 6 == 5 else window for i in range(13)}


def _mamba(padded: int | None) -> Any:
    shapes = ((3, 40), (4, 8, 16))  # the states of the convolution and of the scan
    dtypes = (torch.float32, torch.float32)
    return specs.MambaSpec(block_size=32, shapes=shapes, dtypes=dtypes, page_size_padded=padded)


def _mamba_hybrid() -> dict[str, Any]:
    """As Falcon-H1's: states padded to the page of attention, which is the larger."""
    page = _full().page_size_bytes
    states = {f"mamba.{i}": _mamba(page) for i in range(4)}
    return {**states, **{f"attention.{i}": _full() for i in range(2)}}


def _padded_attention() -> dict[str, Any]:
    """The other way round: attention's pages padded to the state."""
    state = _mamba(None)
    attention = _full(head_size=4, page_size_padded=state.page_size_bytes)
    return {**{f"mamba.{i}": state for i in range(3)}, "attention.0": attention}


def _indexed_mla() -> dict[str, Any]:
    """As DeepSeek V3.2's: latents and the keys of an indexer, one group of two page sizes."""
    values = {"block_size": 64, "num_kv_heads": 1}
    layers: dict[str, Any] = {}
    for i in range(2):
        layers[f"latent.{i}"] = specs.MLAAttentionSpec(
            head_size=576, dtype=torch.bfloat16, **values
        )
        layers[f"indexer.{i}"] = specs.MLAAttentionSpec(head_size=132, dtype=torch.uint8, **values)
    return layers


def deepseek_v4(replayed: bool = False, num_layers: int = 4) -> dict[str, Any]:
    """As vllm/models/deepseek_v4 has them for the cache type fp8_ds_mla.

    `replayed`: windows are computed anew after a hit, and not offloaded.
    """
    one_head = {"num_kv_heads": 1, "alignment": 576}
    packed = {
        "head_size": 512,
        "dtype": torch.uint8,
        "cache_dtype_str": "fp8_ds_mla",
        "model_version": "deepseek_v4",
        "state_content_bytes": 584,
    }
    layers: dict[str, Any] = {}
    for i in range(num_layers):
        tokens_per_state = 128 if i % 2 else 4
        layers[f"{i}.window"] = specs.SlidingWindowMLASpec(
            block_size=64, sliding_window=128, bounded_replay=replayed, **packed, **one_head
        )
        layers[f"{i}.compressed"] = specs.MLAAttentionSpec(
            block_size=256, tokens_per_state=tokens_per_state, **packed, **one_head
        )
        layers[f"{i}.compressor"] = specs.SlidingWindowMLASpec(
            block_size=4 if tokens_per_state == 4 else 8,
            head_size=1024,
            dtype=torch.float32,
            sliding_window=tokens_per_state,
            **one_head,
        )
        if tokens_per_state == 4:
            layers[f"{i}.indexer"] = specs.MLAAttentionSpec(
                block_size=256,
                head_size=132,
                dtype=torch.uint8,
                tokens_per_state=tokens_per_state,
                **one_head,
            )
    return layers


def _gemma3_27b() -> dict[str, Any]:
    """62 layers, of which every sixth has no window."""
    values = {"block_size": 16, "num_kv_heads": 16, "head_size": 128, "dtype": torch.bfloat16}
    window = specs.SlidingWindowSpec(sliding_window=1024, **values)
    return {f"layer.{i}": _full(**values) if i % 6 == 5 else window for i in range(62)}


def _mamba_27_and_4() -> dict[str, Any]:
    """27 layers of Mamba 2 and 4 of attention, whose blocks are as long as a state is large."""
    attention = _full(block_size=672, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    state = specs.MambaSpec(
        block_size=672,
        shapes=((3, 12288), (128, 80, 128)),
        dtypes=(torch.bfloat16, torch.bfloat16),
        page_size_padded=attention.page_size_bytes,
    )
    return {
        **{f"mamba.{i}": state for i in range(27)},
        **{f"attention.{i}": attention for i in range(4)},
    }


# Of the size of real models: to be planned, not to be allocated.
LARGE = {
    "DeepSeek V4, 61 layers": Family("BLHNC", lambda: deepseek_v4(num_layers=61)),
    "DeepSeek V4, 61 layers, windows replayed": Family(
        "BLHNC", lambda: deepseek_v4(replayed=True, num_layers=61)
    ),
    "Gemma 3 27B": Family("LBHNC", _gemma3_27b),
    "Mamba 2, 27 layers and 4 of attention": Family("LBHNC", _mamba_27_and_4),
}
FAMILIES = {
    "one group": Family("LBHNC", _plain),
    "tokens outside heads": Family("LBNHC", _plain),
    "blocks of several kernel blocks": Family("LBHNC", _plain, kernel_tokens=16),
    "cross-layer blocks": Family("BLHNC", _plain, whole_blocks=True),
    "cross-layer blocks, tokens outside heads": Family("BLNHC", _plain, whole_blocks=True),
    "cross-layer blocks, heads outside layers": Family("BHLNC", _plain, whole_blocks=True),
    "fp8": Family("LBHNC", _fp8),
    "fp8, cross-layer blocks": Family("BLHNC", _fp8, whole_blocks=True),
    "sliding windows": Family("LBHNC", _windows),
    "sliding windows, cross-layer blocks": Family("BLHNC", _windows, whole_blocks=True),
    "Mamba states padded to attention": Family("LBHNC", _mamba_hybrid),
    "Mamba states in cross-layer blocks": Family("BLHNC", _mamba_hybrid, whole_blocks=True),
    "attention padded to Mamba states": Family("LBHNC", _padded_attention),
    "MLA with an indexer": Family("LBHNC", _indexed_mla),
    "MLA with an indexer, cross-layer blocks": Family("BLHNC", _indexed_mla, whole_blocks=True),
    "pages of an alignment, cross-layer blocks": Family("BLHNC", _aligned, whole_blocks=True),
    "DeepSeek V4": Family("BLHNC", deepseek_v4, whole_blocks=True),
    "DeepSeek V4, windows replayed": Family(
        "BLHNC", lambda: deepseek_v4(replayed=True), whole_blocks=True
    ),
}
# What vLLM takes for whole blocks, and is not: of each block it would move one page's worth.
LOST = {
    "heads outside blocks": Family("LHBNC", _plain),
    "heads outside blocks, one layer": Family("LHBNC", lambda: {"layer.0": _full()}),
    "pages that are padded to an alignment": Family("LBHNC", _aligned),
}
