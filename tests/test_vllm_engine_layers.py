"""A real vLLM engine whose steps wait for loads, layer by layer.

It is vLLM 0.32, with `sync_connector.py`. Of 0.33 no engine runs on a CPU here:
`test_vllm_layers.py` drives its two halves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.deep]

_SCRIPT = Path(__file__).with_name("engine_layers.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layers")
    output = folder / "output.json"
    command = [sys.executable, _SCRIPT, folder / "model", output]
    done = subprocess.run(
        command, cwd=_SCRIPT.parent.parent, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_outputs_are_equal_where_every_layer_waits_for_its_own_pages(seen: dict[str, Any]) -> None:
    assert seen["stored"]["answers"] == seen["plain"]
    assert seen["loaded"]["answers"] == seen["plain"]
    assert seen["loaded"]["loads"] == len(seen["plain"])
    counts = seen["loaded"]["counts"]
    assert counts["loads"] == len(seen["plain"])
    assert counts["waits"] == 4 * counts["loads"], "one for each layer of the model"
    assert counts["early"] > 0, "no layer was computed before the last one had come"


def test_they_change_where_no_layer_waits(seen: dict[str, Any]) -> None:
    assert seen["without waits"]["loads"] == len(seen["plain"])
    assert all(
        answer != right
        for answer, right in zip(seen["without waits"]["answers"], seen["plain"], strict=True)
    )


def test_layers_that_fail_are_recomputed(seen: dict[str, Any]) -> None:
    assert seen["two loads fail"]["failed_loads"] == 2
    assert seen["two loads fail"]["answers"] == seen["plain"]
    assert seen["loaded at the end"]["answers"] == seen["plain"]
    assert seen["loaded at the end"]["failed_loads"] == 0
