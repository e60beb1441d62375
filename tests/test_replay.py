"""Replay: exact on small traces, sees a wrong byte, and the real trace where it is at hand."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from triton_offload.cli.replay import ReplayOptions, TraceError, chunks_in, read_trace, replay
from triton_offload.device import host_pages

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
    assert not report.partial
    assert report.verified_bytes == report.loaded_bytes


@pytest.mark.parametrize("path", ["auto", "staged", "copy_engine"])
def test_overlapping_requests_hit_what_the_ones_before_them_stored(path):
    requests = [[1, 2, 3, 10 + i] for i in range(20)]
    report = replay(requests, ReplayOptions(num_chunks=64, scale=4096, path=path))
    assert report.hits == 3 * 19
    assert report.ok


@pytest.mark.parametrize("num_chunks", [4, 5, 9])
def test_a_pool_hardly_larger_than_a_request_waits_for_the_ones_before(num_chunks):
    requests = [[1, 2, 3, 10 + i] for i in range(20)]
    report = replay(requests, replace(SMALL, num_chunks=num_chunks, in_flight=4))
    assert (report.references, report.ok) == (80, True)


def test_a_pool_smaller_than_a_request_is_refused():
    message = "num_chunks: expected room for the longest request of 9 chunks, got 8"
    with pytest.raises(ValueError, match=message):
        replay([[1], list(range(9))], SMALL)


def test_what_cannot_fit_in_memory_is_refused():
    with pytest.raises(ValueError, match="scale: expected one at which pool and pages fit"):
        replay([[1]], replace(SMALL, num_chunks=10**9, scale=1))


def test_a_request_without_chunks_is_served():
    report = replay([[], [1], [], [1]], SMALL)
    assert (report.requests, report.references, report.hits, report.ok) == (4, 2, 1, True)


def test_pages_shrink_by_the_scale_and_never_below_16_bytes():
    full = ReplayOptions(model="llama-3-8b", block_tokens=16, scale=1)
    assert (full.page_bytes, full.chunk_bytes) == (65536, 64 << 20)
    assert replace(full, scale=100).page_bytes == 640  # 655.36, to a multiple of 16
    assert replace(full, scale=10**6).page_bytes == 16


def test_host_bytes_are_those_of_the_full_model():
    assert chunks_in(640 << 30, "llama-3-8b", 512) == 10_240
    with pytest.raises(ValueError, match="host_bytes: expected at least one chunk of 512 tokens"):
        chunks_in(1000, "llama-3-8b", 512)


@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES // 2, CHUNK_BYTES - 1])
def test_one_flipped_bit_of_a_stored_chunk_is_seen(monkeypatch, offset):
    gather = host_pages.gather

    def flip(table, block_ids, slots, slot_ids, first_block, *rest):
        gather(table, block_ids, slots, slot_ids, first_block, *rest)
        slots[int(slot_ids[-1]), offset] ^= 64

    monkeypatch.setattr(host_pages, "gather", flip)
    report = replay([[1, 2, 3], [4], [1, 2, 3]], SMALL)
    assert (report.verified_chunks, report.wrong_chunks, report.ok) == (3, 1, False)


def test_pages_in_each_others_place_are_seen(monkeypatch):
    scatter = host_pages.scatter

    def swap(table, block_ids, slots, slot_ids, first_block, *rest):
        scatter(table, block_ids.flip(0), slots, slot_ids, first_block)

    monkeypatch.setattr(host_pages, "scatter", swap)
    report = replay([[1, 2], [1, 2]], SMALL)
    assert report.wrong_chunks == 2


def test_layers_in_each_others_place_are_seen(monkeypatch):
    scatter = host_pages.scatter

    def swap(table, block_ids, slots, slot_ids, first_block, *rest):
        scatter(table, block_ids, slots, slot_ids, first_block, *rest)
        one, other = table.pages[3].view, table.pages[4].view
        kept = one[block_ids].clone()
        one[block_ids] = other[block_ids]
        other[block_ids] = kept

    monkeypatch.setattr(host_pages, "scatter", swap)
    assert replay([[1, 2], [1, 2]], SMALL).wrong_chunks == 2


def test_words_of_a_page_in_each_others_place_are_seen(monkeypatch):
    scatter = host_pages.scatter

    def roll(table, block_ids, slots, slot_ids, first_block, *rest):
        scatter(table, block_ids, slots, slot_ids, first_block, *rest)
        page = table.pages[0].view
        page[block_ids] = page[block_ids].roll(8, dims=1)

    monkeypatch.setattr(host_pages, "scatter", roll)
    assert replay([[1, 2], [1, 2]], SMALL).wrong_chunks == 2


def test_a_failed_store_is_no_success_though_no_byte_is_wrong(monkeypatch):
    def fail(*args):
        raise OSError("no such device")

    monkeypatch.setattr(host_pages, "gather", fail)
    report = replay([[1, 2]], SMALL)
    assert (report.failed_jobs, report.wrong_chunks, report.ok) == (1, 0, False)


def test_a_failed_load_is_counted_and_its_chunks_are_wrong(monkeypatch):
    def fail(*args):
        raise OSError("no such device")

    monkeypatch.setattr(host_pages, "scatter", fail)
    report = replay([[1, 2], [1, 2]], SMALL)
    assert (report.failed_jobs, report.wrong_chunks, report.ok) == (1, 2, False)


def test_a_wrong_byte_is_seen(monkeypatch):
    scatter = host_pages.scatter

    def flip(table, block_ids, slots, slot_ids, first_block, *rest):
        slots[int(slot_ids[0]), 5] ^= 1
        scatter(table, block_ids, slots, slot_ids, first_block, *rest)

    monkeypatch.setattr(host_pages, "scatter", flip)
    report = replay([[1, 2], [1, 2]], SMALL)
    assert (report.hits, report.verified_chunks, report.wrong_chunks) == (2, 2, 1)
    assert not report.ok


@pytest.mark.parametrize("in_flight", [1, 2])  # at 1 the pages hold the right bytes already
def test_a_load_that_does_nothing_is_seen(monkeypatch, in_flight):
    monkeypatch.setattr(host_pages, "scatter", lambda *args: None)
    options = replace(SMALL, in_flight=in_flight)
    assert replay([[1, 2], [1, 2]], options).wrong_chunks == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"hash_ids": [1]}\nnonsense\n', ":2: expected an object"),
        ('{"input_length": 3}\n', ':1: expected an object with "hash_ids"'),
        ('{"hash_ids": [1, 1]}\n', ":1: expected distinct"),
        ('{"hash_ids": [1]}\n\n[2]\n', ":3: expected an object"),
        ('{"hash_ids": [1]}\n"hash_ids"\n', ":2: expected an object"),
        ("null\n", ":1: expected an object"),
        ("[" * 100_000 + "\n", ":1: expected an object"),
        ('{"hash_ids": [true]}\n', ":1: expected hash_ids from 0"),
        ('{"hash_ids": [-1]}\n', r":1: expected hash_ids from 0 to 2\*\*31 - 1, got \[-1\]"),
        ('{"hash_ids": [2147483648]}\n', ":1: expected hash_ids from 0"),
        ('{"hash_ids": [1.0]}\n', ":1: expected hash_ids from 0"),
        ('{"hash_ids": 7}\n', ":1: expected hash_ids from 0"),
        ('{"hash_ids": null}\n', ":1: expected hash_ids from 0"),
        ('{"hash_ids": {"1": 2}}\n', ":1: expected hash_ids from 0"),
        ('{"hash_ids": [1], "input_length": -5}\n', ":1: expected input_length .* got -5"),
        ('{"hash_ids": [1], "input_length": "many"}\n', ":1: expected input_length .* 'many'"),
        ('{"hash_ids": [1], "input_length": 1.5}\n', ":1: expected input_length .* got 1.5"),
        ('{"hash_ids": [1], "input_length": true}\n', ":1: expected input_length .* got True"),
        ('{"hash_ids": [1], "output_length": -1}\n', ":1: expected output_length .* got -1"),
        ('{"hash_ids": [1], "output_length": null}\n', ":1: expected output_length .* got None"),
        ('{"hash_ids": [1], "timestamp": -3}\n', ":1: expected timestamp .* got -3"),
        ('{"hash_ids": [1], "timestamp": -0.5}\n', ":1: expected timestamp .* got -0.5"),
        ('{"hash_ids": [1], "timestamp": NaN}\n', ":1: expected timestamp .* got nan"),
        ('{"hash_ids": [1], "timestamp": 1e999}\n', ":1: expected timestamp .* got inf"),
        ('{"hash_ids": [1], "timestamp": "now"}\n', ":1: expected timestamp .* got 'now'"),
    ],
    ids=lambda value: value[:40].strip() if value[:1] in '{["n' else "",
)
def test_a_line_that_is_no_request_is_named(tmp_path, text, message):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(TraceError, match=f"^{re.escape(str(trace))}{message}"):
        read_trace(trace)


@pytest.mark.parametrize("text", ["", "\n\n", '{"hash_ids": []}\n'])
def test_a_trace_that_asks_for_nothing_is_refused(tmp_path, text):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(text)
    with pytest.raises(TraceError, match=f"^{trace}: expected at least one request with hash_ids"):
        read_trace(trace)


def test_what_a_request_may_say_of_itself_is_read(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"timestamp": 0, "input_length": 0, "output_length": 0, "hash_ids": [0, 2147483647]}\n'
        '{"timestamp": 0.25, "hash_ids": [1], "session": "of no interest"}\n'
    )
    assert read_trace(trace) == [[0, 2**31 - 1], [1]]


def test_a_line_that_is_not_utf_8_is_named(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(b'{"hash_ids": [1]}\n\xff\xfe\n')
    with pytest.raises(TraceError, match=r"trace\.jsonl:2: expected an object"):
        read_trace(trace)


def test_a_replay_that_is_interrupted_ends_and_verifies_what_it_began():
    requests = [[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2, 6]]
    done: list[int] = []
    report = replay(requests, SMALL, lambda n, rate: done.append(n), lambda: len(done) == 3)
    assert done == [1, 2, 3]
    assert (report.requests, report.requests_asked, report.partial) == (3, 4, True)
    assert (report.references, report.hits, report.verified_chunks, report.ok) == (9, 4, 4, True)
    assert report.loaded_bytes == report.verified_bytes == 4 * CHUNK_BYTES


def test_a_replay_that_is_interrupted_before_it_began_reports_nothing():
    report = replay([[1]], SMALL, interrupted=lambda: True)
    assert (report.requests, report.partial, report.hit_rate, report.ok) == (0, True, 0.0, True)


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
        ({"limit": 0}, "limit: expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReplayOptions(**options)


@pytest.mark.skipif(not TRACE.is_file(), reason="the trace is not at hand")
@pytest.mark.parametrize(
    ("policy", "num_chunks", "at_least"), [("lru", 10_000, 0.205), ("arc", 30_000, 0.305)]
)
def test_every_byte_of_an_hour_of_real_requests(policy, num_chunks, at_least):
    # Blocks as large as chunks: a fourth of the copies, the same hits.
    options = ReplayOptions("smollm2-135m", num_chunks, block_tokens=512, scale=8192, policy=policy)
    report = replay(read_trace(TRACE), options)
    assert report.ok
    assert report.verified_chunks == report.hits
    assert report.hit_rate >= at_least
