"""The command line: output for people and programs, exit codes."""

from __future__ import annotations

import json
import sys
import types

import pytest
from typer.testing import CliRunner

import triton_offload
from triton_offload.cli.main import app
from triton_offload.device import host_pages


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps({"hash_ids": [1, 2, 3 + i]}) + "\n" for i in range(4)))
    return str(path)


def run(*args: str):
    return CliRunner().invoke(app, list(args))


def test_replay_prints_a_table(trace):
    done = run("replay", trace, "--model", "smollm2-135m", "--chunks", "16")
    assert done.exit_code == 0, done.output
    assert "prefix hit rate" in done.stdout
    assert "0.5000" in done.stdout


def test_replay_prints_json_and_nothing_else(trace):
    done = run("replay", trace, "--model", "smollm2-135m", "--chunks", "16", "--json")
    facts = json.loads(done.stdout)
    assert (facts["hits"], facts["references"], facts["hit_rate"]) == (6, 12, 0.5)
    assert (facts["wrong_chunks"], facts["ok"], facts["model"]) == (0, True, "smollm2-135m")
    assert facts["verified_bytes"] == facts["loaded_bytes"] > 0
    assert facts["load_gb_per_s"] > 0


def test_replay_exits_with_1_where_bytes_are_wrong(trace, monkeypatch):
    monkeypatch.setattr(host_pages, "scatter", lambda *args: None)
    done = run("replay", trace, "--model", "smollm2-135m", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["wrong_chunks"] == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "gpt-0"], "model: expected one of llama-3-8b"),
        (["--policy", "fifo"], "policy: expected 'lru' or 'arc'"),
        (["--path", "teleport"], "path: expected one of"),
        (["--chunks", "0"], "num_chunks: expected at least 1"),
        (["--chunks", "2"], "num_chunks: expected room for the longest request of 3 chunks"),
        (["--limit", "0"], "limit: expected at least 1"),
        (["--host-bytes", "many"], "host_bytes: expected a number of bytes"),
        (["--host-bytes", "1KiB"], "host_bytes: expected at least one chunk"),
        (["--host-bytes", "1GiB", "--chunks", "9"], "host_bytes: expected no chunks beside it"),
    ],
)
def test_bad_options_exit_with_2_and_say_what_is_wrong(trace, args, message):
    done = run("replay", trace, *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_a_missing_trace_exits_with_2(tmp_path):
    done = run("replay", str(tmp_path / "none.jsonl"))
    assert done.exit_code == 2
    assert "none.jsonl" in done.output


def test_a_malformed_line_exits_with_2_and_its_number(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n{"hash_ids": \n')
    done = run("replay", str(path))
    assert done.exit_code == 2
    assert "line 2: expected an object" in done.stderr


def test_host_bytes_are_chunks_of_the_full_model(trace):
    done = run("replay", trace, "--host-bytes", "640GiB", "--json", "--limit", "2")
    facts = json.loads(done.stdout)
    assert (facts["num_chunks"], facts["requests"]) == (10_240, 2)


@pytest.mark.parametrize("status", [0, 1])
def test_demo_exits_with_its_status(monkeypatch, status):
    seen = []
    fake = types.ModuleType("triton_offload.cli.demo")
    fake.run_demo = lambda json_output=False: seen.append(json_output) or status
    monkeypatch.setitem(sys.modules, "triton_offload.cli.demo", fake)
    assert run("demo", "--json").exit_code == status
    assert seen == [True]


def test_version():
    assert run("--version").stdout.strip() == triton_offload.__version__
