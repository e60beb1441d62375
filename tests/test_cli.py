"""The command line: output for people and programs, exit codes."""

from __future__ import annotations

import io
import itertools
import json
import signal
import subprocess
import sys
import types

import pytest
from rich.console import Console
from terminal import columns, without_spaces
from typer.testing import CliRunner

import triton_offload
from triton_offload import KVOffloader
from triton_offload.cli import replay as cli_replay
from triton_offload.cli.main import app
from triton_offload.cli.output import in_options, table
from triton_offload.device import host_pages
from triton_offload.device.host import HostDevice


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """As in a terminal: a script ignores them for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "prefix hit rate" in done.stdout
    assert "0.5000" in done.stdout


def test_replay_prints_json_and_nothing_else(trace):
    done = run("replay", trace, "--model", "smollm2-135m", "--chunks", "16", "--json")
    facts = json.loads(done.stdout)
    assert (facts["hits"], facts["references"], facts["hit_rate"]) == (6, 12, 0.5)
    assert (facts["wrong_chunks"], facts["ok"], facts["model"]) == (0, True, "smollm2-135m")
    assert facts["verified_bytes"] == facts["loaded_bytes"] > 0
    assert facts["load_gb_per_s"] > 0
    assert (facts["pin_error"], facts["broken_paths"]) == (None, [])


def test_replay_says_that_a_path_was_replaced_and_why_the_pool_is_not_pinned(trace, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("injected: not queued")

    monkeypatch.setattr(HostDevice, "gather", refuse)
    monkeypatch.setattr(HostDevice, "register", lambda self, host: False)
    args = ("replay", trace, "--model", "smollm2-135m", "--chunks", "16", "--path", "staged")
    facts = json.loads(run(*args, "--json").stdout)
    assert (facts["ok"], facts["pinned"], facts["broken_paths"]) == (True, False, ["staged"])
    assert facts["pin_error"] == "the device refuses to pin it"
    table = run(*args).stdout
    for name, value in (("pool pinned", "the device refuses to pin it"), ("replaced", "staged")):
        (line,) = [line for line in table.splitlines() if name in line]
        assert value in line


def test_replay_exits_with_1_where_bytes_are_wrong(trace, monkeypatch):
    monkeypatch.setattr(host_pages, "scatter", lambda *args: None)
    done = run("replay", trace, "--model", "smollm2-135m", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["wrong_chunks"] == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "gpt-0"], "--model: expected one of llama-3-8b"),
        (["--policy", "fifo"], "--policy: expected 'lru' or 'arc'"),
        (["--path", "teleport"], "--path: expected one of"),
        (["--chunks", "0"], "--chunks: expected at least 1"),
        (["--chunks", "2"], "--chunks: expected room for the longest request of 3 chunks"),
        (["--limit", "0"], "--limit: expected at least 1"),
        (["--in-flight", "0"], "--in-flight: expected at least 1"),
        (["--chunk-tokens", "-1"], "--chunk-tokens: expected at least 1, got -1"),
        (["--block-tokens", "3"], "--block-tokens: expected a divisor of --chunk-tokens (512)"),
        (["--scale", "1", "--chunks", "9999999"], "--scale: expected one at which pool and pages"),
        (["--host-bytes", "many"], "--host-bytes: expected a number of bytes"),
        (["--host-bytes", "1KiB"], "--host-bytes: expected at least one chunk"),
        (["--host-bytes", "1GiB", "--chunks", "9"], "--host-bytes: expected no --chunks beside it"),
        (["--host-bytes", "128MiB"], "--host-bytes: expected room for the longest request of 3"),
    ],
)
def test_bad_options_exit_with_2_and_name_what_was_typed(trace, args, message):
    done = run("replay", trace, *args)
    assert done.exit_code == 2
    error = done.stderr.strip()  # where there is no terminal a progress bar leaves an empty line
    assert error.startswith(f"triton-offload replay: {message}")
    assert "\n" not in error
    assert done.stdout == ""


def test_only_names_of_arguments_become_options():
    options = {"path": "--path", "num_chunks": "--chunks", "scale": "--scale"}
    assert in_options("path: expected a path", options) == "--path: expected a path"
    assert in_options("scale: no num_chunks of this scale", options) == (
        "--scale: no --chunks of this scale"
    )
    assert in_options("pathology: expected none", options) == "pathology: expected none"
    assert in_options("path is wrong", options) == "path is wrong"


def test_a_missing_trace_exits_with_2(tmp_path):
    done = run("replay", str(tmp_path / "none.jsonl"))
    assert done.exit_code == 2
    assert "none.jsonl" in done.output


def test_a_malformed_line_exits_with_2_and_its_number(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1]}\n{"hash_ids": \n')
    done = run("replay", str(path))
    assert done.exit_code == 2
    assert f"{path}:2: expected an object" in done.stderr


def test_host_bytes_are_chunks_of_the_full_model(trace):
    done = run("replay", trace, "--host-bytes", "640GiB", "--json", "--limit", "2")
    facts = json.loads(done.stdout)
    assert (facts["num_chunks"], facts["requests"]) == (10_240, 2)


# -- interrupted --


def interrupting(monkeypatch, *numbers: int) -> None:
    """Press Ctrl-C while the requests of these numbers are served."""
    served = itertools.count(1)
    serve = cli_replay._Replay._serve

    def press(self, *args):
        if next(served) in numbers:
            signal.raise_signal(signal.SIGINT)
        serve(self, *args)

    monkeypatch.setattr(cli_replay._Replay, "_serve", press)


@pytest.fixture
def closed(monkeypatch):
    """The offloaders that were closed."""
    seen = []
    close = KVOffloader.close

    def note(self, *args):
        close(self, *args)
        seen.append(self)

    monkeypatch.setattr(KVOffloader, "close", note)
    return seen


def test_an_interrupted_replay_prints_what_it_has_and_exits_with_130(trace, monkeypatch, closed):
    interrupting(monkeypatch, 3)
    done = run("replay", trace, "--model", "smollm2-135m", "--chunks", "16", "--json")
    assert done.exit_code == 130
    facts = json.loads(done.stdout)
    assert (facts["partial"], facts["requests"], facts["requests_asked"]) == (True, 3, 4)
    assert (facts["references"], facts["hits"], facts["verified_chunks"]) == (9, 4, 4)
    assert (facts["ok"], len(closed)) == (True, 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_table_of_an_interrupted_replay_says_so(trace, monkeypatch, closed):
    interrupting(monkeypatch, 1)
    done = run("replay", trace, "--model", "smollm2-135m", "--chunks", "16")
    assert (done.exit_code, len(closed)) == (130, 1)
    assert "partial, interrupted: 1 of 4 requests" in " ".join(done.stdout.split())


def test_wrong_bytes_weigh_more_than_an_interrupt(trace, monkeypatch):
    interrupting(monkeypatch, 3)
    monkeypatch.setattr(host_pages, "scatter", lambda *args: None)
    done = run("replay", trace, "--model", "smollm2-135m", "--json")
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert (facts["partial"], facts["wrong_chunks"]) == (True, 4)


def test_an_interrupt_within_the_last_request_leaves_a_whole_replay(trace, monkeypatch):
    interrupting(monkeypatch, 4)
    done = run("replay", trace, "--model", "smollm2-135m", "--json")
    assert (done.exit_code, json.loads(done.stdout)["partial"]) == (0, False)


def test_a_second_interrupt_ends_the_replay_at_once_and_closes_all_the_same(
    trace, monkeypatch, closed
):
    serve = cli_replay._Replay._serve

    def press_twice(self, *args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        serve(self, *args)

    monkeypatch.setattr(cli_replay._Replay, "_serve", press_twice)
    done = run("replay", trace, "--model", "smollm2-135m", "--json")
    assert done.exit_code not in (0, 2)
    assert (done.stdout, len(closed)) == ("", 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_so(trace, monkeypatch):
    interrupting(monkeypatch, 2)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = run("replay", trace, "--model", "smollm2-135m", "--json")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.exit_code, json.loads(done.stdout)["partial"]) == (0, False)


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    trace = tmp_path / "trace.jsonl"  # half a minute's worth and more
    trace.write_text("".join(json.dumps({"hash_ids": [1, 2, i + 3]}) + "\n" for i in range(30_000)))
    code = (
        "import signal, sys\n"
        "from triton_offload.cli import main, replay\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # as in a terminal
        "serve = replay._Replay._serve\n"
        "def tell(self, *args):\n"
        "    serve(self, *args)\n"
        "    if self._served == 2: print('serving', file=sys.stderr, flush=True)\n"
        "replay._Replay._serve = tell\n"
        f"sys.argv = ['triton-offload', 'replay', {str(trace)!r}, '--chunks', '64', '--json',\n"
        "            '--model', 'smollm2-135m', '--scale', '100000']\n"
        "main.main()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with child:
        try:
            assert child.stderr is not None
            assert child.stderr.readline() == "serving\n"
            child.send_signal(signal.SIGINT)
            out, error = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 130, error
    facts = json.loads(out)
    assert (facts["partial"], facts["requests_asked"], facts["ok"]) == (True, 30_000, True)
    assert 3 <= facts["requests"] < 30_000
    assert facts["verified_chunks"] == facts["hits"] >= 2


# -- narrow --


def test_a_narrow_terminal_cuts_nothing_of_a_replay(trace):
    arguments = ["replay", trace, "--model", "smollm2-135m", "--chunks", "16"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "20"})
    assert "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 20
    ((names, values),) = columns(done.stdout)
    assert names == without_spaces(
        *("prefix hit rate", "chunks referenced / hit", "chunks evicted", "stored", "loaded"),
        *("store GB/s", "load GB/s", "waits for transfers", "whole replay", "verified"),
        *("chunks verified / wrong", "transfers failed", "pool pinned"),
        "paths replaced",
    )
    assert values.startswith("0.500012/60")


def test_a_table_goes_on_in_the_next_line_and_takes_nothing_for_markup():
    shown = table("a_long_header", "another_long_one", title="what [bold] says", right=(1,))
    shown.add_row("a_long_name_of_a_card", "1234567890123")
    console = Console(width=20, file=io.StringIO())
    console.print(shown)
    text = console.file.getvalue()
    assert "what [bold] says" in text
    assert columns(text) == [
        ["a_long_headera_long_name_of_a_card", "another_long_one1234567890123"]
    ]
    assert [column.justify for column in shown.columns] == ["left", "right"]


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
