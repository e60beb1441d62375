"""A tiny random model that speaks text, prompts for it, and what it answers without an engine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton_offload.cli.demo_model import tiny_llama

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text()  # which stays as it is
OUTPUT_TOKENS = 16
_DOCUMENT, _DOCUMENTS = 800, 6  # letters, of which a token has some three
_QUESTIONS = (
    "Who is the Licensor, and who is not?",
    "What must a copy of the Work carry with it?",
    "May a Contributor sell support, warranty or indemnity?",
    "When do the patent licenses end?",
)
_TEMPLATE = (
    "{% for each in messages %}<|turn|>{{ each.role }}: {{ each.content }}{% endfor %}"
    "<|turn|>assistant:"
)


@dataclass(frozen=True)
class Prompt:
    """A question about a document, asked in a chat or as a text to be gone on with."""

    document: str
    question: str
    chat: bool

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def body(self) -> dict[str, Any]:
        """The part of a request that says what is asked."""
        if self.chat:
            return {"messages": self.messages}
        return {"prompt": self.document + self.question}

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "system", "content": self.document},
            {"role": "user", "content": self.question},
        ]


def prompts() -> Iterator[Prompt]:
    """Each document with each question; as long, or not, as whole blocks and chunks."""
    for i in range(_DOCUMENTS):
        document = TEXT[1800 * i :][: _DOCUMENT + 37 * i]
        for question in _QUESTIONS:
            for chat in (False, True):
                yield Prompt(document, question, chat)


@dataclass(frozen=True)
class Expected:
    """`margin`: by how much the best of two tokens won where that was the least."""

    token_ids: list[int]
    margin: float


def speaking_model(path: Path) -> Path:
    """The tiny Llama of the demonstration with a tokenizer that has as many tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers' own imports warn about
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        tiny_llama(path)
        tokens = tokenizers.Tokenizer(models.BPE())
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|begin|>", "<|end|>", "<|turn|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokens.train_from_iterator([TEXT], trainer)
        tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=tokens, bos_token="<|begin|>", eos_token="<|end|>"
        )
        tokenizer.chat_template = _TEMPLATE
        tokenizer.save_pretrained(path)
    return path


def answers(model: Path, asked: list[Prompt]) -> dict[Prompt, Expected]:
    """What transformers answers, one prompt after the other and each of them recomputed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        found = {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more of them spin, and are no faster on so small a model
        try:
            for prompt in asked:
                if prompt.chat:
                    text = tokenizer.apply_chat_template(prompt.messages, tokenize=False)
                else:
                    text = prompt.document + prompt.question
                token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                found[prompt] = _answer(network, token_ids)
        finally:
            torch.set_num_threads(threads)
    return found


def _answer(network: Any, token_ids: list[int]) -> Expected:
    import torch

    answer: list[int] = []
    margins = []
    given, past = torch.tensor([token_ids]), None
    with torch.inference_mode():
        for _ in range(OUTPUT_TOKENS):
            output = network(given, past_key_values=past, use_cache=True)
            past = output.past_key_values
            best = output.logits[0, -1].topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            answer.append(int(best.indices[0]))
            given = torch.tensor([answer[-1:]])
    return Expected(answer, min(margins))
