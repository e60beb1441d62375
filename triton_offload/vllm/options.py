"""What `kv_connector_extra_config` may say: every key is known, and every value is one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any, get_args

from triton_offload.calibration import Path
from triton_offload.kernels.arguments import shown
from triton_offload.sizes import parse_bytes
from triton_offload.transfer.options import Verify

_OURS = {"path", "calibration", "staging_bytes", "verify"}
# What vLLM's connector and CPUOffloadingSpec read; 0.32 and 0.33 alike, but for the last line.
_VLLMS = {
    *("spec_name", "spec_module_path", "cpu_bytes_to_use", "block_size", "blocks_per_chunk"),
    *("eviction_policy", "cache_policy_module_path", "store_threshold", "max_tracker_size"),
    *("offload_prompt_only", "self_describing_kv_events", "canonical_layout", "secondary_tiers"),
}
_SINCE_0_33 = {"sync_load_budget_bytes"}
_FLAGS = ("offload_prompt_only", "self_describing_kv_events", "canonical_layout")
_NUMBERS = ("block_size", "blocks_per_chunk", "store_threshold", "max_tracker_size")


def read_options(
    extra: Mapping[str, Any], version: str, policies: Collection[str]
) -> dict[str, Any]:
    """The options with sizes in bytes. `extra` stays as it is.

    `policies`: the eviction policies that vLLM `version` knows by name. Raises ValueError that
    names the option and, where one is like it, the key or value that was probably meant.
    """
    options = dict(extra)
    known = _OURS | _VLLMS | (set() if version.startswith("0.32") else _SINCE_0_33)
    for key in options:
        if key not in known:
            raise ValueError(
                f"kv_connector_extra_config: expected one of {sorted(known)} (vLLM {version}), "
                f"got {shown(key)}{_meant(key, known)}"
            )
    _check_choice(options, "path", ["auto", *(path.value for path in Path)])
    _check_choice(options, "verify", get_args(Verify))
    if options.get("verify", "off") != "off" and options.get("path") == Path.COPY_ENGINE.value:
        raise ValueError(f"path: expected another beside verify, got {options['path']!r}")
    if not options.get("cache_policy_module_path"):  # else it is a class of the user's
        _check_choice(options, "eviction_policy", policies)
    for name in _FLAGS:
        value = options.get(name, False)
        if not isinstance(value, bool):  # vLLM takes "false" for true
            raise ValueError(f"{name}: expected true or false, got {shown(value)}")
    for name in _NUMBERS:
        if name in options and not _is_number(options[name]):
            raise ValueError(f"{name}: expected an integer, got {shown(options[name])}")
    options["cpu_bytes_to_use"] = _parse_pool_size(options.get("cpu_bytes_to_use"))
    for name in ("staging_bytes", "sync_load_budget_bytes"):
        if name in options:
            options[name] = parse_bytes(name, options[name])
    if options.get("staging_bytes") == 0:
        raise ValueError("staging_bytes: expected at least 1, got 0")
    return options


def _check_choice(options: Mapping[str, Any], name: str, choices: Collection[str]) -> None:
    value = options.get(name, next(iter(choices)))
    if value not in choices:
        near = _meant(value, choices)
        raise ValueError(f"{name}: expected one of {[*choices]}, got {shown(value)}{near}")


def _meant(given: Any, choices: Collection[str]) -> str:
    near = difflib.get_close_matches(str(given), choices, n=1)
    return f"; was {near[0]!r} meant?" if near else ""


def _is_number(value: Any) -> bool:
    """As vLLM reads it: an integer, or one in digits."""
    try:
        return not isinstance(value, bool) and int(value) == float(value)
    except (TypeError, ValueError):
        return False


def _parse_pool_size(value: Any) -> int:
    """`cpu_bytes_to_use`; a float is what vLLM makes of its own kv_offloading_size."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value)
    size = parse_bytes("cpu_bytes_to_use", value)
    if size == 0:  # which vLLM takes for nothing said
        raise ValueError("cpu_bytes_to_use: expected at least one chunk, got 0")
    return size
