"""An hour of real requests, at ten times its speed, against `vllm serve` with our connector.

The trace is that of `test_trace_hit_rates.py`, scaled to the tiny model: a thirty-second of its
tokens. `TRITON_OFFLOAD_TRACE_MINUTES` takes a part of the hour, from its beginning.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from served import Server, words
from served_clients import request
from served_model import speaking_model
from test_trace_hit_rates import TRACE

pytestmark = [pytest.mark.engine, pytest.mark.deep, pytest.mark.timeout(7200)]

MINUTES = float(os.environ.get("TRITON_OFFLOAD_TRACE_MINUTES", "60"))
SPEED, SCALE = 10, 32
CLIENTS = 64
# Of 4 layers of 16 KiB per block: the device holds 32 MiB, the host pool four times as much.
_SMALL = "--num-gpu-blocks-override 512 --max-model-len 4096 --max-num-seqs 32"
_EXTRA = {"cpu_bytes_to_use": "128MiB", "blocks_per_chunk": 1}
# Where two tokens are nearly tied, the shape of the batch alone may pick another one.
_TIED = 1e-3


@dataclass(frozen=True)
class Arrival:
    """`seconds`: when it comes, from the beginning."""

    seconds: float
    token_ids: list[int]
    max_tokens: int


@cache
def _block(hash_id: int) -> list[int]:
    return random.Random(hash_id).choices(range(3, 512), k=512 // SCALE)


def arrivals() -> list[Arrival]:
    if not TRACE.is_file():
        pytest.skip(f"no trace at {TRACE}")
    found = []
    for line in TRACE.read_text().splitlines():
        entry = json.loads(line)
        if entry["timestamp"] >= MINUTES * 60_000:
            break
        token_ids = [token for each in entry["hash_ids"] for token in _block(each)]
        found.append(
            Arrival(
                entry["timestamp"] / 1000 / SPEED,
                token_ids[: max(1, entry["input_length"] // SCALE)],
                max(1, entry["output_length"] // SCALE),
            )
        )
    return found


def ask(server: Server, arrival: Arrival) -> tuple[list[int], list[float]]:
    """The tokens of the answer, and by how much each won."""
    body = {
        "prompt": arrival.token_ids,
        "max_tokens": arrival.max_tokens,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,  # else two of one spelling are one
    }
    with request(server, "/v1/completions", body) as response:
        (choice,) = json.load(response)["choices"]
    margins = []
    for best in choice["logprobs"]["top_logprobs"]:
        first, second, *_ = sorted(best.values(), reverse=True)
        margins.append(first - second)
    return choice["token_ids"], margins


def differs(answer: list[int], plain: tuple[list[int], list[float]]) -> bool:
    """Whether it is another one than the plain one, up to where two tokens are nearly tied."""
    token_ids, margins = plain
    clear = next((i for i, margin in enumerate(margins) if margin < _TIED), len(margins))
    return len(answer) != len(token_ids) or answer[:clear] != token_ids[:clear]


def replay(
    server: Server, given: list[Arrival], *, paced: bool
) -> list[tuple[list[int], list[float]]]:
    """Ask each when it comes; or, where not paced, as soon as a client has an answer."""
    start = time.monotonic()
    late = []

    def ask_in_time(arrival: Arrival) -> tuple[list[int], list[float]]:
        ahead = start + arrival.seconds - time.monotonic()
        if paced:
            time.sleep(max(0, ahead))
            late.append(max(0, -ahead))
        return ask(server, arrival)

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask_in_time, given))
    took = time.monotonic() - start
    print(f"{len(given)} requests in {took:.0f} s, at most {max(late, default=0):.0f} s late")
    return answers


@contextmanager
def sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    """What `read` says, once a second."""
    seen: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1):
            seen.append(read())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def growth(samples: list[int]) -> float:
    """From the second quarter of the time to the last: caches and pools fill in the first."""
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


def test_an_hour_of_real_requests_is_answered_right_and_nothing_grows_by_us(tmp_path: Path) -> None:
    given = arrivals()
    model = speaking_model(tmp_path / "model")
    kv_transfer = words("docs/vllm.md", "TritonOffloadingConnector")
    kv_transfer["kv_connector_extra_config"] |= _EXTRA
    with Server(model, tmp_path / "served", _SMALL, kv_transfer) as server:
        with sampled(server.resident_bytes) as memory:
            answers = replay(server, given, paced=True)
        metrics = server.metrics()
        moved = {
            direction: metrics.total("triton_offload_bytes_total", direction=direction)
            for direction in ("store", "load")
        }
        assert metrics.total("triton_offload_jobs_total", status="failed") == 0
        assert server.stop() == 0
    with Server(model, tmp_path / "plain", _SMALL) as server:
        with sampled(server.resident_bytes) as plain_memory:
            plain = replay(server, given, paced=False)
        assert server.stop() == 0
    tied = sum(any(margin < _TIED for margin in margins) for _, margins in plain)
    wrong = [i for i, (answer, _) in enumerate(answers) if differs(answer, plain[i])]
    print(f"wrong: {len(wrong)}, nearly tied somewhere: {tied}, moved: {moved}")
    for name, samples in (("served", memory), ("plain", plain_memory)):
        print(f"{name}: {samples[0] >> 20} to {samples[-1] >> 20} MiB, grew {growth(samples):.0f}")
    assert not wrong
    assert tied < len(given) // 10
    assert min(moved.values()) > 0
    # A server without us grows as well. A page kept for each request of the hour would be 94 MiB
    # in that time.
    assert growth(memory) < max(growth(plain_memory), 0) + (32 << 20)
