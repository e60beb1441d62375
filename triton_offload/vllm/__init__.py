"""The plug-in for vLLM's OffloadingConnector: vLLM decides what to offload, this moves the bytes.

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_connector_extra_config": {"spec_name": "TritonOffloadingSpec",
      "spec_module_path": "triton_offload.vllm", "cpu_bytes_to_use": 8589934592}}'

Every option of vLLM's `CPUOffloadingSpec` applies; `path` ("auto", "staged", "zero_copy" or
"copy_engine"), `calibration` ("auto", "off" or a file) and `staging_bytes` are ours.
`TritonTieringOffloadingSpec` takes vLLM's `secondary_tiers`, too. With vLLM's connector a failed
transfer ends the engine, with `TritonOffloadingConnector` it does not: docs/vllm.md. The only part
of this package that imports vllm at its top.
"""

from triton_offload.vllm.versions import SUPPORT, require_version

try:
    import vllm

    from triton_offload.vllm.connector import TritonOffloadingConnector
    from triton_offload.vllm.spec import TritonOffloadingSpec
    from triton_offload.vllm.tiering_spec import TritonTieringOffloadingSpec
    from triton_offload.vllm.worker import TritonOffloadingWorker
except ImportError as _error:
    raise ImportError(f"{SUPPORT}; this one lacks what they have: {_error}") from _error

require_version(vllm.__version__)

__all__ = [
    "TritonOffloadingConnector",
    "TritonOffloadingSpec",
    "TritonOffloadingWorker",
    "TritonTieringOffloadingSpec",
    "require_version",
]
