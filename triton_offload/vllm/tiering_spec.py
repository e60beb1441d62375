"""The spec with tiers: vLLM's files, object stores and peers behind this package's transfers."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from vllm.v1.kv_offload.tiering import spec as vllm_tiering
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from triton_offload.kernels.arguments import shown
from triton_offload.transfer.layout import CacheLayout
from triton_offload.vllm.canonical import canonical_layout
from triton_offload.vllm.options import check_choice, check_keys
from triton_offload.vllm.spec import TritonOffloadingSpec
from triton_offload.vllm.stale_regions import region_file

# What vLLM's factory gives to a tier, and what it takes out of what the user says of one.
_GIVEN = {"self", "offloading_spec", "primary_kv_view", "tier_type", "backpressure_detector"}
_OF_EVERY_TIER = {"type", "module_path", "backpressure"}


class TritonTieringOffloadingSpec(TritonOffloadingSpec, vllm_tiering.TieringOffloadingSpec):  # type: ignore[misc]  # vllm is untyped
    """vLLM's tiering with this package's transfers: `secondary_tiers` as vLLM has them.

    The pool is vLLM's shared region on every platform. vLLM's tiers, on the scheduler's side, write
    its slots to a file, an object store or a peer, and read them from there.
    """

    has_tiers = True

    def __init__(self, config: Any) -> None:
        extra = dict(config.extra_config)
        if "secondary_tiers" in extra:
            _check_tiers(extra["secondary_tiers"])
            extra["secondary_tiers"] = [dict(tier) for tier in extra["secondary_tiers"]]  # it adds
        config = dataclasses.replace(config, extra_config=extra)
        if not config.canonical_layout:
            # vLLM takes chunks of one rank after the other for those of any number of ranks. They
            # are not where a model has several layers, and a file of as many bytes would be read.
            parallel = dataclasses.replace(config.parallel, is_parallelism_agnostic=False)
            config = dataclasses.replace(config, parallel=parallel)
        super().__init__(config)
        if int(self.extra_config.get("store_threshold", 0)) >= 2:
            threshold = shown(self.extra_config["store_threshold"])
            raise ValueError(
                f"store_threshold: expected less than 2 beside secondary tiers, got {threshold}"
            )

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """vLLM's metrics by name, those of the tiers, and this package's."""
        _check_tiers(extra_config.get("secondary_tiers", []))
        metrics: dict[str, Any] = super().build_metric_definitions(extra_config)
        return metrics

    def _lay_out(self, kv_caches: Any) -> CacheLayout:
        if not self.config.canonical_layout:
            return super()._lay_out(kv_caches)
        self._validate_canonical_refs(kv_caches)
        layout = canonical_layout(kv_caches, self.blocks_per_chunk)
        if layout.slot_bytes > self.kv_bytes_per_chunk:
            raise ValueError(
                f"kv_caches: expected canonical chunks of at most {self.kv_bytes_per_chunk} bytes "
                f"(kv_bytes_per_chunk), got {layout.slot_bytes}"
            )
        return layout

    def _map_slots(self, region: Any, layout: CacheLayout) -> torch.Tensor:
        if not self.config.canonical_layout:
            return super()._map_slots(region, layout)
        slots: torch.Tensor = region.create_next_canonical_view(layout.slot_bytes)
        return slots

    def get_manager(self) -> Any:
        """vLLM's TieringOffloadingManager, made on the first call."""
        region = None
        try:
            manager = super().get_manager()
            region = self._scheduler_mmap
            return manager
        finally:
            # vLLM makes its scheduler when every rank has its worker. By now all have mapped the
            # region, and without a name it goes with them, however they end.
            if region is None or not region._creator:  # else the ranks are yet to come
                region_file(self.config.engine_id).unlink(missing_ok=True)


def _check_tiers(tiers: Any) -> None:
    """Raise ValueError unless each tier is one that vLLM knows, with options that it takes."""
    if not isinstance(tiers, list):
        raise ValueError(f"secondary_tiers: expected a list of tiers, got {shown(tiers)}")
    for i, tier in enumerate(tiers):
        name = f"secondary_tiers[{i}]"
        if not isinstance(tier, dict) or not isinstance(tier.get("type"), str):
            raise ValueError(f'{name}: expected a tier like {{"type": "fs"}}, got {shown(tier)}')
        if "module_path" not in tier:  # else it is a class of the user's
            check_choice({f"{name}.type": tier["type"]}, f"{name}.type", _known_tiers())
        options = inspect.signature(SecondaryTierFactory.get_tier_class(tier)).parameters
        kinds = {option.kind for option in options.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            check_keys(name, tier, (options.keys() | _OF_EVERY_TIER) - _GIVEN)


def _known_tiers() -> list[str]:
    return list(SecondaryTierFactory._registry)
