"""An engine whose steps wait for loads, layer by layer: `engine_layers.py MODEL OUTPUT`.

What it saw is written to OUTPUT as JSON: see `test_vllm_engine_layers.py`.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sync_connector
from engine import ALWAYS, FEW, FEW_TOKENS, Rounds, _surviving
from faulty import FaultyDevice, fail
from schedules import small_sizes

from triton_offload.cli.demo import Engine
from triton_offload.cli.demo_model import tiny_llama
from triton_offload.vllm.layer_loads import LayerLoads

SLOW = 0.02  # seconds that a band takes longer than it would


def plain(model: Path) -> list[list[int]]:
    """Without a connector, each prompt recomputed."""
    engine = Engine(model, max_model_len=1024)
    answers = []
    for prompt in FEW:
        engine.forget()
        answers.append(engine.generate([prompt], FEW_TOKENS)[0].token_ids)
    engine.close()
    return answers


class Waits:
    """What layers waited for. `early`: how often the last layer's pages were not there yet when
    the first one's wait was over."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        wait_for = LayerLoads.wait_for

        def counting(loads: LayerLoads, name: str) -> None:
            jobs = set(loads.jobs)
            wait_for(loads, name)
            for job in jobs:
                self.counts["waits"] += 1
                if loads._number[name] == 0:
                    self.counts["loads"] += 1
                    with suppress(KeyError):
                        self.counts["early"] += not self._is_there(loads, job)

        self.patch = patch.object(LayerLoads, "wait_for", counting)

    @staticmethod
    def _is_there(loads: LayerLoads, job: int) -> bool:
        transfers = loads._transfers
        assert transfers._manager is not None
        try:
            transfers._manager.wait_for_layer(transfers._ours[job], len(loads._number) - 1, 0.0)
        except TimeoutError:
            return False
        return True


def layers(model: Path) -> dict[str, Any]:
    sync_connector.install()
    device, waits = FaultyDevice(), Waits()
    engine = _surviving(model, device, blocks_per_chunk=2)
    rounds = Rounds(engine)
    rounds.run("stored", rounds.store)
    device.fault = lambda: time.sleep(SLOW)
    device.faults["scatter"] = ALWAYS
    with waits.patch:
        rounds.run("loaded", rounds.load)
        rounds.seen["loaded"]["counts"] = dict(waits.counts)
    with patch.object(LayerLoads, "wait_for", lambda loads, name: None):
        rounds.run("without waits", rounds.load)
    device.fault = fail
    device.faults["scatter"] = 2  # the first band's, of the first load and the second
    rounds.run("two loads fail", rounds.load)
    device.faults.clear()
    rounds.run("loaded at the end", rounds.load)
    return rounds.seen


def main(model: str, output: str) -> None:
    # vllm and what it imports warn about each other; what our own modules do must not warn.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="triton_offload")
    path = tiny_llama(Path(model))
    answers = plain(path)
    with small_sizes():
        seen = layers(path)
    Path(output).write_text(json.dumps({"plain": answers, **seen}))


if __name__ == "__main__":
    main(*sys.argv[1:])
