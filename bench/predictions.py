"""What the model predicts of a measurement, on the card that it was taken on."""

from __future__ import annotations

from cards import Card
from model import (
    STAGED_KERNEL,
    ZERO_COPY_KERNEL,
    Host,
    Kernel,
    batch_seconds,
    both_ways_seconds,
    fastest_path,
    gather_seconds,
    memory_share,
    path_seconds,
    plain_copy_seconds,
    small_copy_wait,
    zero_copy_seconds,
)
from results import ONE_COPY, OURS, Record
from units import GB, KIB

from triton_offload.calibration import Path
from triton_offload.specs import Direction
from triton_offload.transfer.ranges import SLICE_BYTES

HOST = Host()
# vLLM's kernel: 12 CTAs of 128 threads with eight words of 8 bytes each, for loads of pages that
# are smaller than 28 KiB, from 16 on.
VLLM_KERNEL = Kernel(12, 8 * KIB, 128, 32)
VLLM_SMALL, VLLM_LEAST = 28 * KIB, 16


def predicted(record: Record, card: Card | None) -> float | None:
    """GB/s as the record counts them; None where the model says nothing of its kind."""
    if card is None:
        return None
    kind = record.get("kind")
    if kind == "transfer":
        return _speed(_transfer(record, card), record["bytes"])
    if kind == "both at once" and record["contender"] in OURS:
        size, pages = record["page_bytes"], record["pages"]
        path = _path(record["contender"], card, Direction.LOAD, size, pages)
        return _speed(both_ways_seconds(card, path, size, pages, HOST), record["bytes"])
    if kind == "kernel" and record["name"] in ("gather", "scatter"):
        return _speed(gather_seconds(card, record["bytes"]), 2 * record["bytes"])
    if kind == "ctas":
        return _ctas(record, card)
    return None


def predicted_limit(record: Record, card: Card | None) -> float | None:
    """GB/s of the plain copy that a transfer was timed in turn with."""
    if card is None or record.get("kind") not in ("transfer", "both at once"):
        return None
    if record["kind"] == "both at once":
        return card.link.both / GB
    seconds = plain_copy_seconds(card, Direction(record["direction"]), record["bytes"])
    return _speed(seconds, record["bytes"])


def predicted_wait(card: Card | None) -> float | None:
    """Seconds of a small copy during a load, where the engine serves streams in turn."""
    return None if card is None else small_copy_wait(card, SLICE_BYTES)


def predicted_points(record: Record, card: Card | None) -> float | None:
    """Percentage points that a model bound by memory loses to staging more than to one copy."""
    if card is None or record["model"] != "decode":
        return None
    direction = Direction(record["direction"])
    staged, plain = (
        memory_share(card, path, direction) for path in (Path.STAGED, Path.COPY_ENGINE)
    )
    return 100 * (staged - plain)


def off(measured: float, predicted: float) -> str:
    """By how much a measurement is off its prediction."""
    return f"{measured / predicted - 1:+.0%}"


def beside(measured: float, predicted: float | None) -> str:
    """What stands behind a measured figure: the prediction, and how far off it was."""
    return "" if predicted is None else f" [{predicted:.3g}, {off(measured, predicted)}]"


def _transfer(record: Record, card: Card) -> float | None:
    direction, contender = Direction(record["direction"]), record["contender"]
    size, pages = record["page_bytes"], record["pages"]
    if contender in OURS:
        path = _path(contender, card, direction, size, pages)
        return path_seconds(card, path, direction, size, pages, HOST)
    if contender == ONE_COPY:
        return plain_copy_seconds(card, direction, size * pages)
    if contender == "vLLM" and direction is Direction.LOAD:
        if size < VLLM_SMALL and pages >= VLLM_LEAST:
            return zero_copy_seconds(card, direction, size * pages, VLLM_KERNEL)
        return batch_seconds(card, direction, size, pages)
    if contender in ("vLLM", "batched copy", "batched copy, overlap"):
        return batch_seconds(card, direction, size, pages)
    return None


def _path(contender: str, card: Card, direction: Direction, size: int, pages: int) -> Path:
    if contender == "auto":
        return fastest_path(card, direction, size, pages, HOST)
    return Path(contender)


def _ctas(record: Record, card: Card) -> float:
    num_bytes: int = record["bytes"]
    mapped = record["memory"] == "mapped host memory"
    shape = ZERO_COPY_KERNEL if mapped else STAGED_KERNEL
    kernel = Kernel(record["ctas"], shape.flight_bytes, shape.threads, shape.registers)
    if not mapped:
        return 2 * num_bytes / gather_seconds(card, num_bytes, kernel) / GB
    direction = Direction.STORE if record["name"] == "gather" else Direction.LOAD
    return num_bytes / zero_copy_seconds(card, direction, num_bytes, kernel) / GB


def _speed(seconds: float | None, num_bytes: int) -> float | None:
    return None if seconds is None else num_bytes / seconds / GB
