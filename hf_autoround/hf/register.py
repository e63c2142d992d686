# SPDX-License-Identifier: Apache-2.0
"""Taking over `quant_method: auto-round` in transformers.

`register_quantizer` refuses names that exist, so the two mappings are assigned. transformers has no plug-in entry point:
`import hf_autoround` does it, at once if `transformers.modeling_utils` is loaded, otherwise when it is (importing it
costs seconds).
"""

from typing import Any


def register() -> None:
    """Put our quantizer and configuration in place of transformers' own. Doing it twice changes nothing."""
    from transformers.quantizers import auto
    from transformers.utils.quantization_config import AutoRoundConfig as TransformersAutoRoundConfig

    from hf_autoround.hf.config import AutoRoundConfig

    for method in ("auto-round", "intel/auto-round"):
        auto.AUTO_QUANTIZER_MAPPING[method] = _quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AutoRoundConfig
    # what `from_pretrained(gptq_or_awq_checkpoint, quantization_config=AutoRoundConfig())` goes through; transformers' own
    # refuses whatever gptqmodel wrote (it has a key "meta")
    TransformersAutoRoundConfig.from_dict = AutoRoundConfig.from_dict


def _quantizer(quantization_config: Any, **kwargs: Any) -> Any:
    """Make the quantizer; importing it only now keeps `import transformers` as fast as it was, and free of cycles."""
    from hf_autoround.hf.quantizer import AutoRoundHfQuantizer

    return AutoRoundHfQuantizer(quantization_config, **kwargs)
