# SPDX-License-Identifier: Apache-2.0
"""The decoder's blocks are the ones that are quantized, whatever else a model has."""

import pytest
from transformers import AutoModelForImageTextToText, Qwen2VLConfig, T5Config

from hf_autoround.errors import UnsupportedLayer
from hf_autoround.models.blocks import model_parts
from hf_autoround.models.loading import build_skeleton

TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
    rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
)  # fmt: skip
VISION = dict(depth=3, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=4)


def test_a_vision_tower_with_more_blocks_is_left_alone():
    model = AutoModelForImageTextToText.from_config(Qwen2VLConfig(text_config=TEXT, vision_config=VISION))
    assert model_parts(model).block_names == ("model.language_model.layers.0", "model.language_model.layers.1")


def test_what_is_no_causal_language_model_is_refused_by_name():
    with pytest.raises(UnsupportedLayer, match="no causal language model of type t5"):
        build_skeleton(T5Config())
