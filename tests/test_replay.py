"""Replay: exact on small traces, sees a wrong byte, and the real trace where it is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from triton_offload.device import host_pages
from triton_offload.models import MODELS, geometry
from triton_offload.replay import ReplayOptions, TraceError, read_trace, replay

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"
TRACE = Path(os.environ.get("TRITON_OFFLOAD_TRACES") or FOLDER) / "mooncake_conversation.jsonl"

SMALL = ReplayOptions(model="smollm2-135m", num_chunks=8, scale=4096, in_flight=2)
CHUNK_BYTES = 30 * SMALL.blocks_per_chunk * SMALL.page_bytes


def test_hits_bytes_and_evictions_are_those_of_the_trace():
    requests = [[1, 2, 3], [1, 2, 4], [5, 6, 7, 8], [1, 2, 3], [9], [4]]
    report = replay(requests, SMALL)
    # 1 2 3 | 1 2 hit, 4 new | 5 6 7 8: the pool is full | 1 2 3 hit | 9 evicts the oldest, 4 | miss
    assert (report.requests, report.references, report.hits) == (6, 15, 5)
    assert report.hit_rate == 5 / 15
    assert (report.stored_bytes, report.loaded_bytes) == (10 * CHUNK_BYTES, 5 * CHUNK_BYTES)
    assert report.evictions == 2
    assert (report.verified_chunks, report.wrong_chunks, report.ok) == (5, 0, True)


@pytest.mark.parametrize("path", ["auto", "staged", "copy_engine"])
def test_overlapping_requests_hit_what_the_ones_before_them_stored(path):
    requests = [[1, 2, 3, 10 + i] for i in range(20)]
    report = replay(requests, ReplayOptions(num_chunks=64, scale=4096, path=path))
    assert report.hits == 3 * 19
    assert report.ok


def test_a_wrong_byte_is_seen(monkeypatch):
    scatter = host_pages.scatter

    def flip(table, block_ids, slots, slot_ids, first_block):
        slots[int(slot_ids[0]), 5] ^= 1
        scatter(table, block_ids, slots, slot_ids, first_block)

    monkeypatch.setattr(host_pages, "scatter", flip)
    report = replay([[1, 2], [1, 2]], SMALL)
    assert (report.hits, report.verified_chunks, report.wrong_chunks) == (2, 2, 1)
    assert not report.ok


def test_a_load_that_does_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(host_pages, "scatter", lambda *args: None)
    assert replay([[1, 2], [1, 2]], SMALL).wrong_chunks == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one request"),
        ('{"hash_ids": [1]}\nnonsense\n', "line 2: expected an object"),
        ('{"input_length": 3}\n', 'line 1: expected an object with "hash_ids"'),
        ('{"hash_ids": [1, 1]}\n', "line 1: expected distinct"),
        ('{"hash_ids": [-1]}\n', "line 1: expected hash_ids from 0"),
    ],
)
def test_a_trace_that_cannot_be_read_names_the_line(tmp_path, text, message):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(trace)


def test_a_limit_reads_the_first_requests(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"hash_ids": [i]}) + "\n" for i in range(9)))
    assert read_trace(trace, 3) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt-0"}, "model: expected one of llama-3-8b, .*got 'gpt-0'"),
        ({"block_tokens": 100}, r"block_tokens: expected a divisor of chunk_tokens \(512\)"),
        ({"scale": 0}, "scale: expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReplayOptions(**options)


def test_geometries_are_those_of_the_models():
    assert geometry("llama-3-8b").page_bytes(16) == 65536
    assert geometry("llama-3-8b").num_layers * geometry("llama-3-8b").token_bytes == 131072
    assert geometry("deepseek-v3").token_bytes == 1152
    assert all(model.source for model in MODELS.values())


@pytest.mark.skipif(not TRACE.is_file(), reason="the trace is not at hand")
def test_every_byte_of_an_hour_of_real_requests():
    options = ReplayOptions(model="smollm2-135m", num_chunks=10_000, scale=4096, policy="arc")
    report = replay(read_trace(TRACE), options)
    assert report.ok
    assert report.verified_chunks == report.hits
    assert report.hit_rate >= 0.218
