"""The demonstration: a real vLLM engine whose KV cache leaves device memory and comes back.

Each prompt is answered twice, one request at a time: once recomputed, once loaded from the host
pool into poisoned device pages. vllm, which is no dependency of this package, is imported inside
functions only.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from triton_offload.cli.demo_model import CACHE, shared_prefix_prompts, small_model
from triton_offload.cli.output import table

if TYPE_CHECKING:
    from triton_offload.stats import DirectionStats
    from triton_offload.vllm import TritonOffloadingWorker

# As float32 it reads 12.08: wrong as a key and as a value, and no NaN that would spread through
# the masked positions of an attention kernel.
_POISON_BYTE = 0x41
_BLOCK_TOKENS = 32  # the smallest that vLLM's CPU attention takes
_OUTPUT_TOKENS = 16
_DOCUMENTS, _QUESTIONS_EACH, _WORDS = 2, 4, 850  # some 1,300 tokens a prompt


@dataclass(frozen=True)
class Generation:
    """One answer. `margins[i]`: by how much token i's logit beat the runner-up's."""

    token_ids: list[int]
    margins: list[float]
    seconds_to_first: float


class Engine:
    """A vLLM engine in this process, in float32, with or without the connector.

    `extra_config`: `kv_connector_extra_config` for TritonOffloadingSpec; None: no connector.
    `llm_args`: what else vllm.LLM is to be given.
    """

    def __init__(
        self, model: Path, extra_config: dict[str, Any] | None = None, **llm_args: Any
    ) -> None:
        # What is set wins, except for what the demonstration can't do without.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, value in {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }.items():
            os.environ.setdefault(name, value)
        import vllm

        if extra_config is not None:
            llm_args["kv_transfer_config"] = {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "spec_name": "TritonOffloadingSpec",
                    "spec_module_path": "triton_offload.vllm",
                    **extra_config,
                },
            }
        self._sampling = vllm.SamplingParams
        chosen = {"dtype": "float32", "block_size": _BLOCK_TOKENS, **llm_args}
        self.llm = vllm.LLM(
            model=str(model),
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            enforce_eager=True,
            **chosen,
        )
        self._request_ids = itertools.count()

    @property
    def worker(self) -> TritonOffloadingWorker:
        """The transfers' side of the connector."""
        worker = self._connector_worker().worker
        return getattr(worker, "transfers", worker)  # type: ignore[no-any-return]

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Generation]:
        """Answers to all prompts, which are queued at once."""
        engine = self.llm.llm_engine
        params = self._sampling(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, detokenize=False
        )
        start = time.perf_counter()
        order = [f"request-{next(self._request_ids)}" for _ in prompts]
        for request_id, prompt in zip(order, prompts, strict=True):
            engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        first: dict[str, float] = {}
        done: dict[str, Generation] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                answer = output.outputs[0]
                if answer.token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - start)
                if output.finished:
                    margins = [_margin(choices) for choices in answer.logprobs]
                    done[output.request_id] = Generation(
                        list(answer.token_ids), margins, first[output.request_id]
                    )
        return [done[name] for name in order]

    def settle(self) -> None:
        """Let the engine step until every store and load has been reported.

        vLLM submits the stores of a step at the start of its next one. Raises TimeoutError.
        """
        deadline = time.monotonic() + 60
        while True:
            self.generate([[1, 2, 3]], 2)  # no whole block, so nothing new to store
            if not (self._connector_worker()._unsubmitted_store_jobs or self.worker.num_in_flight):
                return
            if time.monotonic() > deadline:
                raise TimeoutError("the engine's transfers did not end within 60 s")

    def forget(self, *, host_pool_too: bool = False) -> None:
        """Drop vLLM's prefix cache; raises RuntimeError where vLLM keeps it."""
        if not self.llm.reset_prefix_cache(reset_connector=host_pool_too):
            raise RuntimeError("vLLM did not reset its prefix cache")

    def poison(self) -> int:
        """Overwrite every byte of the device's KV cache and return how many there are."""
        return sum(self.llm.collective_rpc(_poison_pages))

    def close(self) -> None:
        """End the engine, and with it the connector's transfers and pool."""
        self.llm.llm_engine.engine_core.shutdown()

    @staticmethod
    def _connector_worker() -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().connector_worker


def _margin(choices: Any) -> float:
    best, second = sorted((choice.logprob for choice in choices.values()), reverse=True)[:2]
    return float(best - second)


def _poison_pages(worker: Any) -> int:
    caches = {c.untyped_storage().data_ptr(): c for c in worker.model_runner.kv_caches}
    for cache in caches.values():
        everything = torch.empty(0, dtype=torch.uint8, device=cache.device)
        everything.set_(cache.untyped_storage()).fill_(_POISON_BYTE)
    return sum(cache.untyped_storage().nbytes() for cache in caches.values())


@dataclass(frozen=True)
class DemoResult:
    """What was measured. Seconds to the first token are medians over the prompts."""

    model: str
    platform: str
    num_prompts: int
    prompt_tokens: int
    stores: DirectionStats
    loads: DirectionStats
    seconds_to_first_recomputed: float
    seconds_to_first_loaded: float
    equal_outputs: int
    all_equal: bool
    differences: list[str]


def measure(name: str, model: Path, advance: Any = lambda: None) -> DemoResult:
    """Answer every prompt recomputed and loaded; `advance()` is called after each request."""
    prompts = shared_prefix_prompts(model, _DOCUMENTS, _QUESTIONS_EACH, _WORDS)
    with _quiet(CACHE / "demo-engine.log"):
        engine = Engine(
            model,
            {"cpu_bytes_to_use": 2 << 30, "blocks_per_chunk": 2},
            max_model_len=4096,
            max_num_batched_tokens=4096,
        )
    with closing(engine):
        return _measure_with(engine, name, prompts, advance)


def _measure_with(engine: Engine, name: str, prompts: list[list[int]], advance: Any) -> DemoResult:
    engine.generate([prompts[0][::-1]], _OUTPUT_TOKENS)  # warm up: another prompt, as long
    engine.settle()
    recomputed, loaded = [], []
    for prompt in prompts:
        engine.forget(host_pool_too=True)
        recomputed += engine.generate([prompt], _OUTPUT_TOKENS)
        engine.settle()
        advance()
    engine.forget(host_pool_too=True)
    for prompt in prompts:  # fill the host pool with all of them
        engine.generate([prompt], 1)
        advance()
    for prompt in prompts:
        engine.settle()
        engine.forget()
        engine.poison()
        before = engine.worker.loads.num_bytes
        loaded += engine.generate([prompt], _OUTPUT_TOKENS)
        if engine.worker.loads.num_bytes <= before:
            raise RuntimeError("a prompt that is in the host pool was not loaded from it")
        advance()
    engine.settle()
    differences = [
        _difference(i, a, b)
        for i, (a, b) in enumerate(zip(recomputed, loaded, strict=True))
        if a.token_ids != b.token_ids
    ]
    worker = engine.worker
    assert worker.pool is not None
    return DemoResult(
        model=name,
        platform=worker.pool.device.name,
        num_prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        stores=worker.stores,
        loads=worker.loads,
        seconds_to_first_recomputed=statistics.median(g.seconds_to_first for g in recomputed),
        seconds_to_first_loaded=statistics.median(g.seconds_to_first for g in loaded),
        equal_outputs=len(prompts) - len(differences),
        all_equal=not differences,
        differences=differences,
    )


def _difference(index: int, a: Generation, b: Generation) -> str:
    at = next(i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y)
    return (
        f"prompt {index}, token {at}: recomputed {a.token_ids[at]}, loaded {b.token_ids[at]} "
        f"(logit margins {a.margins[at]:.3g} and {b.margins[at]:.3g})"
    )


def run_demo(json_output: bool = False) -> int:
    """Run the demonstration and print its table, or one JSON object.

    Returns the exit status: 0 where all outputs are equal, 1 where one differs, 2 without vLLM.
    """
    # A descriptor of its own: the progress bar stays where everything else is kept quiet.
    with os.fdopen(os.dup(2 if json_output else 1), "w") as out:
        return _run_demo(Console(file=out), json_output)


def _run_demo(console: Console, json_output: bool) -> int:
    if importlib.util.find_spec("vllm") is None:
        console.print("the demo serves a model with vLLM, which is not installed (see `make demo`)")
        return 2
    with Progress(console=console, transient=True) as progress:
        requests = 3 * _DOCUMENTS * _QUESTIONS_EACH  # recomputed, stored, loaded
        task = progress.add_task("preparing the model and the engine", total=requests)
        with _quiet(CACHE / "demo-model.log"):
            name, model = small_model()

        def advance() -> None:
            progress.update(task, advance=1, description=f"serving {name}")

        result = measure(name, model, advance)
    if json_output:
        print(json.dumps(asdict(result)))
    else:
        _print_table(console, result)
    return 0 if result.all_equal else 1


def _print_table(console: Console, result: DemoResult) -> None:
    title = f"{result.model} in vLLM on the {result.platform}: {result.num_prompts} prompts"
    moved = table("", "device to host", "host to device", title=title)
    ways = (result.stores, result.loads)
    moved.add_row("jobs", *(f"{way.jobs}" for way in ways))
    moved.add_row("bytes", *(f"{way.num_bytes / 2**20:.1f} MiB" for way in ways))
    rates = (way.num_bytes / max(way.seconds, 1e-9) / 1e9 for way in ways)
    moved.add_row("rate", *(f"{rate:.2f} GB/s" for rate in rates))
    console.print(moved)
    a, b = result.seconds_to_first_recomputed, result.seconds_to_first_loaded
    headers = ("", "recomputed", "loaded", "speed-up")
    times = table(*headers, title="time to first token, medians")
    times.add_row("seconds", f"{a:.3f}", f"{b:.3f}", f"{a / b:.1f} x")
    console.print(times)
    verdict = "all outputs are equal" if result.all_equal else "outputs differ, equal are only"
    console.print(
        *result.differences, f"{verdict}: {result.equal_outputs} of {result.num_prompts}", sep="\n"
    )


@contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what the process prints to `log`: engines and their libraries print from C++ too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    with ExitStack() as rest, log.open("w") as file:
        for fd in (1, 2):
            original = os.dup(fd)
            rest.callback(os.close, original)
            rest.callback(os.dup2, original, fd)
            os.dup2(file.fileno(), fd)
        rest.callback(sys.stdout.flush)
        yield


if __name__ == "__main__":
    sys.exit(run_demo())
