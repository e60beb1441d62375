"""What the demonstration concludes from an engine's answers; the engine here is made up."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from terminal import columns

from triton_offload.cli import demo, demo_model


@dataclass
class Counts:
    jobs: int = 0
    num_bytes: int = 0
    seconds: float = 0.5


class MadeUpEngine:
    """Answers with a prompt's last token; a `wrong` one differs where it was loaded."""

    wrong = False
    loads_nothing = False
    made: list[MadeUpEngine]

    def __init__(self, model, extra_config=None, **llm_args) -> None:
        self.model = model
        pool = SimpleNamespace(device=SimpleNamespace(name="made-up device"))
        self.worker = SimpleNamespace(stores=Counts(), loads=Counts(), pool=pool)
        self.poisoned = False
        self.stored: set[tuple[int, ...]] = set()
        self.num_closed = 0
        self.made.append(self)

    def close(self) -> None:
        self.num_closed += 1

    def generate(self, prompts, max_tokens):
        answers = []
        for prompt in prompts:
            token, seconds = prompt[-1], 0.4
            if tuple(prompt) in self.stored and self.poisoned:
                self.worker.loads.jobs += 1
                self.worker.loads.num_bytes += 0 if self.loads_nothing else len(prompt)
                token, seconds = token + self.wrong, 0.1
            else:
                self.worker.stores.jobs += 1
                self.worker.stores.num_bytes += len(prompt)
            self.stored.add(tuple(prompt))
            answers.append(demo.Generation([7, token], [1.0, 0.25], seconds))
        return answers

    def settle(self) -> None:
        return

    def forget(self, *, host_pool_too: bool = False) -> None:
        if host_pool_too:
            self.stored.clear()

    def poison(self) -> int:
        self.poisoned = True
        return 1


@pytest.fixture
def engine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "Engine", MadeUpEngine)
    monkeypatch.setattr(MadeUpEngine, "made", [], raising=False)
    monkeypatch.setattr(MadeUpEngine, "wrong", False)
    monkeypatch.setattr(MadeUpEngine, "loads_nothing", False)
    monkeypatch.setattr(demo, "small_model", lambda: ("a model", tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return MadeUpEngine


def test_equal_outputs_are_said_to_be_equal(engine, capfd):
    assert demo.run_demo() == 0
    out = capfd.readouterr().out
    assert "all outputs are equal: 8 of 8" in out
    assert "made-up device" in out
    assert "4.0 x" in out  # 0.4 s recomputed, 0.1 s loaded


def test_an_output_that_differs_is_named_and_fails_the_demo(engine, capfd):
    engine.wrong = True
    assert demo.run_demo(json_output=True) == 1
    result = json.loads(capfd.readouterr().out)
    assert result["all_equal"] is False
    assert result["equal_outputs"] == 0
    assert len(result["differences"]) == 8
    assert "prompt 0, token 1: recomputed" in result["differences"][0]
    assert "(logit margins 0.25 and 0.25)" in result["differences"][0]
    assert demo.run_demo() == 1
    assert "outputs differ, equal are only: 0 of 8" in capfd.readouterr().out


def test_a_prompt_that_was_not_loaded_is_no_success(engine):
    engine.loads_nothing = True
    with pytest.raises(RuntimeError, match="was not loaded"):
        demo.run_demo()
    (made,) = engine.made
    assert made.num_closed == 1


def test_the_engine_is_closed_once_when_all_is_measured(engine):
    assert demo.run_demo(json_output=True) == 0
    (made,) = engine.made
    assert made.num_closed == 1


def test_a_narrow_terminal_cuts_nothing(engine, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert demo.run_demo() == 0
    out = capfd.readouterr().out
    assert "…" not in out
    stored, loaded = made_up_bytes(engine)
    assert columns(out) == [
        [
            "jobsbytesrate",
            f"devicetohost17{stored}0.00GB/s",
            f"hosttodevice8{loaded}0.00GB/s",
        ],
        ["seconds", "recomputed0.400", "loaded0.100", "speed-up4.0x"],
    ]


def made_up_bytes(engine) -> list[str]:
    (made,) = engine.made
    counts = (made.worker.stores, made.worker.loads)
    return [f"{each.num_bytes / 2**20:.1f}MiB" for each in counts]


@pytest.mark.parametrize("failing", [False, True], ids=["ends", "raises"])
def test_what_is_kept_quiet_goes_to_the_log_and_the_rest_where_it_went_before(
    tmp_path, capfd, monkeypatch, failing
):
    monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", closefd=False))  # as it is without pytest
    log = tmp_path / "deep" / "quiet.log"
    open_before = set(os.listdir("/proc/self/fd"))
    with suppress(OSError), demo._quiet(log):
        os.write(1, b"from C++\n")
        print("from Python")
        os.write(2, b"an error\n")
        if failing:
            raise OSError
    print("after", flush=True)
    assert sorted(log.read_text().splitlines()) == ["an error", "from C++", "from Python"]
    assert capfd.readouterr().out == "after\n"
    assert set(os.listdir("/proc/self/fd")) <= open_before  # others may be collected meanwhile


def test_a_difference_names_the_first_token_that_differs():
    one = demo.Generation([5, 6, 7], [1.0, 2.0, 3.0], 0.1)
    other = demo.Generation([5, 8, 9], [1.0, 0.5, 3.0], 0.1)
    assert demo._difference(3, one, other) == (
        "prompt 3, token 1: recomputed 6, loaded 8 (logit margins 2 and 0.5)"
    )


def test_without_vllm_the_demo_says_so(monkeypatch, capfd):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.run_demo() == 2
    assert "not installed" in capfd.readouterr().out


def test_prompts_share_their_document_and_nothing_else(tmp_path):
    prompts = demo_model.shared_prefix_prompts(tmp_path, 2, 3, 100)
    assert len(prompts) == 6
    text = ["".join(map(chr, prompt)) for prompt in prompts]
    documents = [prompt.split("Question:")[0] for prompt in text]
    assert len(set(documents)) == 2
    assert documents[0] == documents[1] == documents[2]
    assert len(set(text)) == 6
    assert demo_model.shared_prefix_prompts(tmp_path, 2, 3, 100) == prompts


def test_a_margin_is_what_the_best_token_is_ahead():
    choices = {1: SimpleNamespace(logprob=-2.0), 2: SimpleNamespace(logprob=-0.5)}
    assert demo._margin(choices) == 1.5


def test_poison_reaches_every_byte_of_the_caches_once():
    storage = torch.zeros(64, dtype=torch.uint8)
    caches = [storage[:16], storage[32:], torch.zeros(4, dtype=torch.float32)]
    runner = SimpleNamespace(kv_caches=caches)
    assert demo._poison_pages(SimpleNamespace(model_runner=runner)) == 64 + 16
    assert (storage == 0x41).all()
    assert caches[2][0] == pytest.approx(12.08, abs=0.01)


def test_without_its_weights_a_tiny_random_model_takes_the_small_ones_place(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made = []
    monkeypatch.setattr(demo_model, "tiny_llama", lambda path: made.append(path) or path)
    name, path = demo_model.small_model(tmp_path)
    assert (name, made) == ("tiny random Llama", [path])
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "tokenizer_config.json").touch()
    assert demo_model.small_model(tmp_path) == ("SmolLM2-135M-Instruct", tmp_path / "smollm2-135m")
