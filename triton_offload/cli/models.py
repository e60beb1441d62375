"""Page geometry of known models: what a token costs in the KV cache, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """`token_bytes`: bytes that one token takes in the cache of one layer; `source`: whence."""

    num_layers: int
    token_bytes: int
    source: str

    def page_bytes(self, block_tokens: int) -> int:
        """Bytes of one block in one layer's tensor, K and V in one page as vLLM lays them out."""
        return block_tokens * self.token_bytes


def _attention(num_layers: int, kv_heads: int, head_dim: int, model: str) -> KVGeometry:
    """Grouped-query attention in 16 bits: K and V of every KV head."""
    source = (
        f"{model}, config.json: num_hidden_layers {num_layers}, "
        f"num_key_value_heads {kv_heads}, head_dim {head_dim}, 2 bytes"
    )
    return KVGeometry(num_layers, 2 * kv_heads * head_dim * 2, source)


MODELS = {
    "llama-3-8b": _attention(32, 8, 128, "meta-llama/Meta-Llama-3-8B"),
    "llama-3-70b": _attention(80, 8, 128, "meta-llama/Meta-Llama-3-70B"),
    "qwen2.5-7b": _attention(28, 4, 128, "Qwen/Qwen2.5-7B"),
    "mistral-7b": _attention(32, 8, 128, "mistralai/Mistral-7B-v0.3"),
    "smollm2-135m": _attention(30, 3, 64, "HuggingFaceTB/SmolLM2-135M"),
    # Multi-head latent attention keeps one latent and one rotary key per token, for all heads.
    "deepseek-v3": KVGeometry(
        61,
        (512 + 64) * 2,
        "deepseek-ai/DeepSeek-V3, config.json: num_hidden_layers 61, kv_lora_rank 512, "
        "qk_rope_head_dim 64, 2 bytes",
    ),
}


def geometry(model: str) -> KVGeometry:
    """The geometry of a known model; raises ValueError with the list of those."""
    if model not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
    return MODELS[model]
