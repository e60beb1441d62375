"""Model families as tiny random models: what of each makes it a family, and nothing else."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # at 0.02 logits are nearly tied
    "tie_word_embeddings": False,  # tied, it repeats the last token
}
_WINDOWS: dict[str, Any] = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}


@dataclass(frozen=True)
class Family:
    """A model of one kind.

    `config`: its class in transformers. `values`: what differs from the sizes above. `engine`: what
    vllm.LLM is given. `depends_on_hits`: the engine's answers differ with how much of a prompt its
    own prefix cache has, for it cuts the rest of the prompt into other batches. `limit`: what vLLM
    0.32 on its CPU platform says where it can't run the family, with or without a connector.
    """

    config: str
    values: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    depends_on_hits: bool = False
    limit: str = ""


FAMILIES = {
    "mistral": Family("MistralConfig", {"sliding_window": 64}),
    # vLLM knows no Gemma 2 whose embeddings are not tied: they are small beside what layers add.
    "gemma2": Family(
        "Gemma2Config",
        {
            **_WINDOWS,
            "tie_word_embeddings": True,
            "initializer_range": 0.05,
            "query_pre_attn_scalar": 1,
        },
    ),
    # One group of two layers with windows, one of one, and one of two without: slots of two sizes.
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 5,
            "sliding_window": 64,
            "layer_types": [*_WINDOWS["layer_types"], "sliding_attention"],
        },
    ),
    "gpt_oss": Family(
        "GptOssConfig", {**_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "olmo3": Family("Olmo3Config", _WINDOWS),
    "llama4": Family(
        "Llama4TextConfig",
        {
            "attention_chunk_size": 64,
            "no_rope_layer_interval": 2,  # these see all of the context, the others a part
            "intermediate_size_mlp": 256,
            "num_local_experts": 2,
        },
    ),
    "fp8": Family("LlamaConfig", engine={"kv_cache_dtype": "fp8"}),
    "ngram": Family(
        "LlamaConfig",
        engine={
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_min": 1,
                "prompt_lookup_max": 3,
            }
        },
    ),
    "deepseek_v2": Family(
        "DeepseekV2Config",
        {
            "kv_lora_rank": 512,  # with the 64 of its positions what the kernel takes
            "qk_rope_head_dim": 64,
            "head_dim": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 4,
        },
        engine={"block_size": 16},
        depends_on_hits=True,
    ),
    "lfm2": Family(
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"] * 2, "conv_dim": 128, "block_dim": 128},
        depends_on_hits=True,
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            # A large page of attention, for blocks of few tokens: a state is as large as a block.
            "num_key_value_heads": 4,
            "head_dim": 128,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
        engine={"dtype": "bfloat16"},  # vLLM's kernel has no other
        depends_on_hits=True,
    ),
    "falcon_h1": Family(
        "FalconH1Config",
        {**_MAMBA2, "mamba_d_ssm": 256},
        limit="index 1 is out of bounds for dimension 0 with size 1",
    ),
    "granite_hybrid": Family(
        "GraniteMoeHybridConfig",
        {
            **_MAMBA2,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 256,
        },
        limit="index 1 is out of bounds for dimension 0 with size 1",
    ),
    "zamba2": Family(
        "Zamba2Config",
        {
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "n_mamba_heads": 8,
            "mamba_d_state": 16,
            "attention_hidden_size": 256,
            "attention_head_dim": 64,
            "num_key_value_heads": 4,
        },
        limit="index 1 is out of bounds for dimension 0 with size 1",
    ),
    "jamba": Family(
        "JambaConfig",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
        },
        limit="no attribute 'selective_scan_fwd'",
    ),
    "bamba": Family(
        "BambaConfig",
        {**_MAMBA2, "attn_layer_indices": [1, 3]},
        limit="does not dispatch through the Transformers attention interface",
    ),
}


def make_model(name: str, path: Path) -> Path:
    """Make and save the family's model."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**{**_SIZES, **family.values})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path
