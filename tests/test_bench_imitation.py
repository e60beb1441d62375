"""The benchmarks' GPU branches run on the imitated card, and what they leave makes a report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import report
import torch
from card import build
from measuring import BENCH, ROOT, benchmark_options, command_of, environment_of
from parts import PARTS
from results import Results

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
    pytest.mark.skipif(build.compiler() is None, reason=build.NO_COMPILER),
]

FILES = [
    BENCH / f"test_{name}.py" for name in ("transfers", "interference", "kernels", "submission")
]
OF_A_GPU = {
    *("transfer", "both at once", "slots", "groups", "interference", "small copy"),
    *("scatter latency", "kernel", "ctas", "planning", "submission", "polling", "launch", "pool"),
}
#: what may be skipped; how long a transfer lasts here is nobody's choice
SKIPS = (
    "vLLM is not here",
    "slots make no difference",
    "the transfers ended before the model had run once",
)
#: kinds of which something is promised, and how many there are: a page size, two paths, two ways;
#: three models, two ways, ours and one copy
PROMISED = {"transfer": 4, "both at once": 1, "interference": 12, "small copy": 1}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two parts, as `make gpu` has them."""
    out = tmp_path_factory.mktemp("out")
    environment = environment_of({"PYTHONPATH": str(ROOT / "tests"), "IMITATED_CARD": "13.0"})
    for part in PARTS:
        options = [*benchmark_options(part, out), "-p", "imitation_bench", f"--part={part}"]
        done = subprocess.run(
            command_of(FILES, part, out, 240, options),
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_benchmark_of_a_gpu_runs_and_none_is_skipped_but_for_vllm(out: Path) -> None:
    for part in PARTS:
        notes = json.loads((out / f"{part}.notes.json").read_text())
        assert notes["failed"] == []
        assert all(reason.startswith(SKIPS) for reason in notes["skipped"])
    assert {record["kind"] for record in Results.load(out).records} == OF_A_GPU
    assert all(record["device"] == "gpu" for record in Results.load(out).records)


def test_what_is_promised_is_in_the_first_part_alone(out: Path) -> None:
    records = Results.load(out).records
    first = [record for record in records if record.suite == "promised"]
    counts = {kind: sum(record["kind"] == kind for record in first) for kind in PROMISED}
    slowdowns = counts.pop("interference")
    assert counts == {kind: PROMISED[kind] for kind in counts}
    assert 0 < slowdowns <= PROMISED["interference"]
    assert len(first) == slowdowns + sum(counts.values())
    tests = [record["test"] for record in records]
    assert len(set(tests)) == len(tests)  # none is measured twice
    rest = [record for record in records if record.suite == "rest" and record["kind"] == "transfer"]
    assert rest
    assert not any(
        record["contender"] in ("auto", "staged") and record["bytes"] == 128 << 10
        for record in rest
        if record["page_bytes"] >= 4096
    )


def test_peers_are_measured_beside_ours(out: Path) -> None:
    found = {record["contender"] for record in Results.load(out).of("transfer")}
    ours = {"staged", "zero_copy", "copy_engine", "auto"}
    peers = {"index_select", "copy per page", "batched copy", "batched copy, overlap"}
    assert found == ours | peers


def test_the_report_has_every_promise_and_what_was_predicted_for_the_card(out: Path) -> None:
    text = report.build(Results.load(out), [])
    assert "this card (H100 SXM, PCIe Gen5 x16)" in text
    promised = text[text.index("## Promises") : text.index("## Transfers")]
    rows = [line for line in promised.splitlines() if line.startswith("| ")]
    for words in (
        "store, pages of 4 KiB: of one plain copy",
        "load, pages of 4 KiB: of one plain copy",
        "both ways at once, pages of 4 KiB: over one way",
        "longest wait of a 4 KiB copy during a load",
    ):
        (row,) = [row for row in rows if words in row]
        assert not row.endswith("| - | - |"), row
    for title in ("How many CTAs it takes", "Polling and launching", "A scatter of 8 MiB"):
        assert title in text
