"""What `kv_connector_extra_config` may say: every key is known, and every value is one."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, get_args

from triton_offload.calibration import Path
from triton_offload.kernels.arguments import shown
from triton_offload.sizes import parse_bytes
from triton_offload.transfer.options import Verify

_OURS = {"path", "calibration", "staging_bytes", "load_by_layers", "group_slots", "verify"}
# What vLLM's connector and CPUOffloadingSpec read; 0.32 and 0.33 alike, but for the last line.
_VLLMS = {
    *("spec_name", "spec_module_path", "cpu_bytes_to_use", "block_size", "blocks_per_chunk"),
    *("eviction_policy", "cache_policy_module_path", "store_threshold", "max_tracker_size"),
    *("offload_prompt_only", "self_describing_kv_events", "canonical_layout", "secondary_tiers"),
}
_SINCE_0_33 = {"sync_load_budget_bytes"}
# And of TieringOffloadingSpec.
_TIERING = {"backpressure"}
_TIERING_SINCE_0_33 = {"tier_poll_interval_s"}
_FLAGS = (
    *("offload_prompt_only", "self_describing_kv_events", "canonical_layout"),
    *("load_by_layers", "group_slots"),
)
_NUMBERS = ("block_size", "blocks_per_chunk", "store_threshold", "max_tracker_size")


def read_options(
    extra: Mapping[str, Any], version: str, policies: Collection[str], *, tiering: bool = False
) -> dict[str, Any]:
    """The options with sizes in bytes. `extra` stays as it is.

    `policies`: the eviction policies that vLLM `version` knows by name. `tiering`: of the spec that
    has tiers; what they say of themselves is not looked at. Raises ValueError that names the option
    and, where one is like it, the key or value that was probably meant.
    """
    options = dict(extra)
    known = _OURS | _VLLMS | (_TIERING if tiering else set())
    if not version.startswith("0.32"):
        known |= _SINCE_0_33 | (_TIERING_SINCE_0_33 if tiering else set())
    check_keys("kv_connector_extra_config", options, known, f" (vLLM {version})")
    check_choice(options, "path", ["auto", *(path.value for path in Path)])
    check_choice(options, "verify", get_args(Verify))
    if options.get("verify", "off") != "off":
        _check_beside_verify(options, tiering)
    if not options.get("cache_policy_module_path"):  # else it is a class of the user's
        check_choice(options, "eviction_policy", policies)
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


def _check_beside_verify(options: Mapping[str, Any], tiering: bool) -> None:
    if options.get("path") == Path.COPY_ENGINE.value:
        raise ValueError(f"path: expected another beside verify, got {options['path']!r}")
    if tiering:
        raise ValueError(
            'verify: expected "off" beside tiers, which bring chunks that nobody has added up, '
            f"got {options['verify']!r}"
        )


def check_keys(name: str, given: Iterable[Any], known: Collection[str], note: str = "") -> None:
    """Raise ValueError where a key of `name` is not known."""
    for key in given:
        if key not in known:
            near = _meant(key, known)
            raise ValueError(
                f"{name}: expected one of {sorted(known)}{note}, got {shown(key)}{near}"
            )


def check_choice(options: Mapping[str, Any], name: str, choices: Collection[str]) -> None:
    """Raise ValueError where `name` is none of `choices`, of which the first is what it is unless
    given."""
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
