"""Which vLLM the plug-in supports."""

from __future__ import annotations

SUPPORTED_VERSIONS = ("0.32", "0.33")
SUPPORT = (
    f"triton_offload.vllm supports vLLM {' and '.join(SUPPORTED_VERSIONS)} "
    "on CUDA and on vLLM's CPU platform"
)


def require_version(version: str) -> None:
    """Raise ImportError unless `version` is a vLLM that this plug-in was tested with.

    Names and meanings in vLLM's offloading moved in each of its releases.
    """
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ImportError(f"{SUPPORT}; got vLLM {version}")
