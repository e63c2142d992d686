# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every architecture the suite knows, made from configs: seconds to quantize, nothing to download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
_SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCABULARY, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, tie_word_embeddings=False),
    # groups of 128 are whole
    "llama_wide": LlamaConfig(**{**_SIZES, "hidden_size": 128, "intermediate_size": 256}, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(
        **_SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0],
        decoder_sparse_step=1, tie_word_embeddings=False,
    ),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "opt": OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCABULARY, word_embed_proj_dim=64,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    ),
    "gemma2": Gemma2Config(**_SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**_SIZES, tie_word_embeddings=False),
    "gpt_oss": GptOssConfig(
        **_SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, tie_word_embeddings=False,
    ),
    "falcon": FalconConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2,
        new_decoder_architecture=True, num_kv_heads=2,
    ),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny model, its random weights a function of its name, with a tokenizer of 128 words."""
    torch.manual_seed(sum(map(ord, name)))
    # dtype: saving writes it into the config, which would make the next model of that name another one
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms that do something
            parameter.data.add_(torch.randn(parameter.shape).to(dtype) * 0.1)
        else:
            parameter.data.mul_(3)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w3 to w127."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tokens(rows: int = 16, length: int = 24) -> torch.Tensor:
    """Calibration rows (rows, length)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
