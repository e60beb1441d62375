"""Model families in real engines: what they answer when their cache comes from our host pool.

Tiny random models. Before every load all bytes of the device's KV cache are overwritten, so that an
answer can only be right if the load was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

pytestmark = [pytest.mark.engine, pytest.mark.deep]

_SCRIPT = Path(__file__).with_name("family_engine.py")
_RUNNING = [name for name, family in FAMILIES.items() if not family.limit]
_LIMITED = [name for name, family in FAMILIES.items() if family.limit]


def _run(name: str, folder: Path, *more: str) -> dict[str, Any]:
    output = folder / "output.json"
    command = [sys.executable, _SCRIPT, name, folder / "model", output, *more]
    done = subprocess.run(
        command, cwd=_SCRIPT.parent.parent, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    seen: dict[str, Any] = json.loads(output.read_text())
    return seen


@pytest.mark.parametrize("name", _RUNNING)
def test_loaded_outputs_equal_those_without_a_connector(name: str, tmp_path: Path) -> None:
    if name == "fp8" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM's CPU platform has fp8 caches with AVX-512 only")
    family = FAMILIES[name]
    seen = _run(name, tmp_path)
    num_prompts = len(seen["recomputed"])
    assert len(set(map(tuple, seen["recomputed"]))) == num_prompts, "no matter what is asked"
    if family.depends_on_hits:
        assert seen["stored"] == seen["first"]
        assert seen["loaded"] == seen["hit"]
    else:
        assert seen["first"] == seen["hit"] == seen["recomputed"]
        assert seen["stored"] == seen["recomputed"]
        assert seen["loaded"] == seen["recomputed"]
    assert seen["loads"] == num_prompts
    assert seen["stores"] >= num_prompts
    assert seen["loaded_bytes"] > 0
    # And it can fail.
    assert seen["skipped"] == num_prompts
    for wrong in ("without_load", "flipped"):
        same = [a == b for a, b in zip(seen[wrong], seen["loaded"], strict=True)]
        assert not any(same), f"{wrong}: outputs that should differ: {same}"
    if "speculative_config" in family.engine:
        assert seen["drafts"] > num_prompts


@pytest.mark.parametrize("name", _LIMITED)
def test_what_vllm_itself_can_not_run(name: str, tmp_path: Path) -> None:
    """No connector is there. When this fails, the family can be moved to the others."""
    assert FAMILIES[name].limit in _run(name, tmp_path)["error"]


def test_mla_is_refused_where_vllm_answers_wrongly_after_a_hit(tmp_path: Path) -> None:
    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM's kernels for MLA on processors with AMX answer rightly after a hit")
    error = _run("deepseek_v2", tmp_path, "refused")["error"]
    assert "enable_prefix_caching: expected True for MLA" in error
