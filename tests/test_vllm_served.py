"""`vllm serve`: what it answers over HTTP when its caches are far too small.

Real text in completions and chats that share prefixes, 32 clients at once, some of whom go away
midway. The answers are those of transformers, which a server without a connector gives as well.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import pytest
from processes import wait_until
from served import Metrics, Server, words
from served_clients import Asked, Manner, ask_all
from served_model import Prompt, answers, prompts, speaking_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]  # vllm serve may take minutes to start

CLIENTS = 32
ROUNDS = 3
# Of 48 prompts of some 11 blocks the device holds four, and the host pool, of 96 blocks, eight.
_SMALL = "--num-gpu-blocks-override 48 --max-model-len 640 --max-num-seqs 12"
_EXTRA = {"cpu_bytes_to_use": "6MiB", "blocks_per_chunk": 2}
BYTES = "vllm:kv_offload_total_bytes_total"
TWO_STRINGS, THREE_STRINGS = "OffloadingConnector", "TritonOffloadingConnector"


class Served:
    """The tiny model, and servers of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.model = speaking_model(folder / "model")
        everything = answers(self.model, list(prompts()))
        # Nearly tied logits may flip with the shape of the batch alone.
        self.expected = {p: e for p, e in everything.items() if e.margin > 1e-3}
        assert len(self.expected) > 0.9 * len(everything)

    @contextmanager
    def running(self, connector: str | None = None, plugin: str | None = None) -> Iterator[Server]:
        kv_transfer = None
        if connector is not None:
            kv_transfer = words("docs/vllm.md", connector)
            kv_transfer["kv_connector_extra_config"] |= _EXTRA
        folder = self._folder / f"{connector}-{plugin}"
        with Server(self.model, folder, _SMALL, kv_transfer, plugin) as server:
            yield server

    def right(self, server: Server) -> list[bool]:
        """Whether each answer was right; of those that were aborted, what came of them."""
        asked = workload(list(self.expected))
        start = time.monotonic()
        answered = ask_all(server, asked, CLIENTS)
        right = []
        for each, token_ids in zip(asked, answered, strict=True):
            wanted = self.expected[each.prompt].token_ids
            if each.manner is Manner.ABORTED:  # by now it may have more tokens than are known
                assert len(token_ids) >= 3
                known = min(len(token_ids), len(wanted))
                token_ids, wanted = token_ids[:known], wanted[:known]
            if token_ids != wanted:
                print(each.manner, token_ids, "in place of", wanted)
            right.append(token_ids == wanted)
        print(
            {manner.value: sum(a.manner is manner for a in asked) for manner in Manner},
            f"right: {sum(right)} of {len(right)}, {time.monotonic() - start:.1f} s",
            f"{server.resident_bytes() >> 20} MiB",
        )
        return right


def workload(asked: list[Prompt]) -> list[Asked]:
    """Round after round each prompt in another order, in each manner by turns."""
    rng = random.Random(1)
    manners = [Manner.WHOLE, Manner.STREAMED, Manner.WHOLE, Manner.STREAMED, Manner.ABORTED]
    made = []
    for _ in range(ROUNDS):
        made += rng.sample(asked, len(asked))
    return [Asked(prompt, manners[i % 5]) for i, prompt in enumerate(made)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("served"))


def settled(server: Server) -> Metrics:
    """The metrics when nobody waits for an answer and every transfer is counted."""
    seen = [-1.0]

    def is_settled() -> bool:
        # vLLM submits the stores of a step at the start of its next one.
        ask_all(server, [Asked(Prompt("", "Hello", chat=False), Manner.WHOLE)], clients=1)
        metrics = server.metrics()
        seen.append(metrics.total(BYTES))
        waiting = [f"vllm:num_requests_{which}" for which in ("running", "waiting")]
        return seen[-1] == seen[-2] and not any(map(metrics.total, waiting))

    wait_until(is_settled, server.log)
    return server.metrics()


def check_bytes(metrics: Metrics) -> None:
    """Both ways much was moved, as many bytes as vLLM counts; what was stored had no room."""
    for direction, theirs in (("store", "GPU_to_CPU"), ("load", "CPU_to_GPU")):
        ours = metrics.total("triton_offload_bytes_total", direction=direction)
        assert ours == metrics.total(BYTES, transfer_type=theirs) > 0
        assert jobs(metrics, direction, "success") > 10
        assert metrics.total("triton_offload_transfer_seconds_total", direction=direction) > 0
        print(f"{direction}: {jobs(metrics, direction, 'success'):.0f} jobs, {ours:.0f} bytes")
    stored = metrics.total("triton_offload_bytes_total", direction="store")
    assert stored > 2 * metrics.total("triton_offload_pool_bytes")


def jobs(metrics: Metrics, direction: str, status: str) -> float:
    return metrics.total("triton_offload_jobs_total", direction=direction, status=status)


@pytest.mark.deep
@pytest.mark.parametrize("connector", [None, TWO_STRINGS, THREE_STRINGS])
def test_every_answer_is_right(served: Served, connector: str | None) -> None:
    with served.running(connector) as server:
        assert all(served.right(server))
        if connector is not None:
            metrics = settled(server)
            for direction in ("GPU_to_CPU", "CPU_to_GPU"):
                assert metrics.total(BYTES, transfer_type=direction) > 0
        if connector == THREE_STRINGS:
            check_bytes(metrics)
            for direction in ("store", "load"):
                assert jobs(metrics, direction, "failed") == 0
                assert metrics.total("triton_offload_survived_total", direction=direction) == 0
        assert server.is_healthy()
        assert server.stop() == 0


def test_every_answer_is_right_where_every_tenth_transfer_fails(served: Served) -> None:
    with served.running(THREE_STRINGS, plugin="every_tenth_fails") as server:
        assert all(served.right(server))
        metrics = settled(server)
        check_bytes(metrics)
        failed = {}
        for direction in ("store", "load"):
            failed[direction] = jobs(metrics, direction, "failed")
            assert failed[direction] > 0
            for name, labels in (("failures", {}), ("survived", {"kind": "failed"})):
                total = metrics.total(f"triton_offload_{name}_total", direction=direction, **labels)
                assert total == failed[direction], name
            assert metrics.total("triton_offload_lost_chunks_total", direction=direction) > 0
        all_jobs = metrics.total("triton_offload_jobs_total")
        print(f"failed: {failed} of {all_jobs:.0f}")
        assert sum(failed.values()) >= all_jobs // 20  # of one job two may fail
        recomputed = metrics.total("triton_offload_recomputed_requests_total")
        assert 0 < recomputed <= failed["load"]
        assert server.is_healthy()
        assert server.stop() == 0


@pytest.mark.deep
def test_with_two_strings_a_failure_ends_the_server_and_the_log_says_what_survives_it(
    served: Served,
) -> None:
    with served.running(TWO_STRINGS, plugin="every_tenth_fails") as server:
        with pytest.raises((AssertionError, OSError, HTTPException)):
            served.right(server)
        assert server.wait() == 0  # which is what vLLM says then
        assert "injected: the link is down" in server.log()
        assert f'the connector of "kv_connector": "{THREE_STRINGS}"' in server.log()


@pytest.mark.deep
def test_loads_of_wrong_bytes_are_noticed(served: Served) -> None:
    with served.running(THREE_STRINGS, plugin="flipped_stores") as server:
        right = served.right(server)
        assert right.count(False) > len(right) // 10
        assert jobs(settled(server), "load", "success") > 0
