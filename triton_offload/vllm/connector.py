"""The connector: vLLM's OffloadingConnector, which a transfer that fails does not end.

--kv-transfer-config '{"kv_connector": "TritonOffloadingConnector",
  "kv_connector_module_path": "triton_offload.vllm", "kv_load_failure_policy": "recompute",
  "kv_role": "kv_both", "kv_connector_extra_config": {"cpu_bytes_to_use": "64GiB"}}'
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from triton_offload.vllm.connector_scheduler import TritonConnectorScheduler
from triton_offload.vllm.connector_worker import TritonConnectorWorker
from triton_offload.vllm.group_bytes import bytes_of, ranges_of_groups
from triton_offload.vllm.layer_loads import LayerLoads
from triton_offload.vllm.metrics import WorkerMetrics
from triton_offload.vllm.spec import TritonOffloadingSpec
from triton_offload.vllm.tiering_spec import TritonTieringOffloadingSpec


class TritonOffloadingConnector(OffloadingConnector):  # type: ignore[misc]  # vllm is untyped
    """vLLM's connector with this package's spec. What can't be loaded is recomputed.

    `spec_name` and `spec_module_path` need not be given. Raises ValueError for another
    `kv_load_failure_policy` than "recompute", and for a spec that is not this package's.
    """

    connector_scheduler: TritonConnectorScheduler | None
    connector_worker: TritonConnectorWorker | None

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        _check(vllm_config.kv_transfer_config)
        # As in vLLM's, which has no way to be given other halves.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        config = build_offloading_config(vllm_config, kv_cache_config)
        self._canonical_layout = config.canonical_layout
        spec = OffloadingSpecFactory.create_spec(config)
        groups = None
        if _may_differ(spec):
            groups = ranges_of_groups(kv_cache_config, config.kv_cache_layout)
        if groups is not None:
            spec.size_slots([*map(bytes_of, groups)])
        self.connector_scheduler = self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = TritonConnectorScheduler(spec, vllm_config, kv_cache_config)
        else:
            worker = TritonConnectorWorker(spec, vllm_config, kv_cache_config, groups)
            self.connector_worker = worker
            self._metrics = WorkerMetrics(config.parallel.rank)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submit the step's loads. Those that it waits for, it waits for here, or each layer for
        its own pages in `wait_for_layer_load`."""
        layer_loads = self._layer_loads
        if layer_loads is not None:
            layer_loads.begin(forward_context)
        super().start_load_kv(forward_context, **kwargs)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """What vLLM calls before a layer reads its pages."""
        layer_loads = self._layer_loads
        if layer_loads is not None:
            layer_loads.wait_for(layer_name)

    @property
    def _layer_loads(self) -> LayerLoads | None:
        assert self.connector_worker is not None
        return self.connector_worker.layer_loads

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """What ended since the last call; requests whose load failed are in `failed_recving`."""
        assert self.connector_worker is not None
        sending, recving = self.get_finished(finished_req_ids)
        failed = self.connector_worker.take_failed_requests()
        return KVConnectorTransferResults(sending, recving, failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of failed loads that a step waited for; others are told of by their request."""
        assert self.connector_worker is not None
        return self.connector_worker.take_failed_blocks()

    def get_kv_connector_stats(self) -> Any:
        worker = self.connector_worker
        if worker is None:
            return super().get_kv_connector_stats()
        return None if worker.worker is None else self._metrics.collect(worker.worker)

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        _check(vllm_config.kv_transfer_config)
        return super().build_prom_metrics(vllm_config, *args, **kwargs)


def _may_differ(spec: Any) -> bool:
    """Whether slots may be as large as each group needs.

    Tiers read equal ones. The layers of a group are spread unevenly over the stages of a pipeline,
    of which the scheduler knows the first.
    """
    if spec.has_tiers or spec.config.parallel.pp_size > 1:
        return False
    return bool(spec.extra_config.get("group_slots", True))


def _check(config: Any) -> None:
    """Name the spec where the user did not; raises ValueError for what would not survive."""
    if config.kv_load_failure_policy != "recompute":
        raise ValueError(
            'kv_load_failure_policy: expected "recompute" beside TritonOffloadingConnector, which '
            "is there so that what can't be loaded is recomputed, got "
            f"{config.kv_load_failure_policy!r}: add it to the kv_transfer_config"
        )
    extra = config.kv_connector_extra_config
    if "spec_name" not in extra:
        tiers = extra.get("secondary_tiers")
        named = TritonTieringOffloadingSpec if tiers else TritonOffloadingSpec
        extra["spec_name"] = named.__name__
        extra["spec_module_path"] = "triton_offload.vllm"
    spec = OffloadingSpecFactory.get_spec_cls(extra)
    if not issubclass(spec, TritonOffloadingSpec):
        raise ValueError(
            "spec_name: expected TritonOffloadingSpec, TritonTieringOffloadingSpec, or nothing, "
            f"beside TritonOffloadingConnector, got {extra['spec_name']!r}"
        )
