# SPDX-License-Identifier: Apache-2.0
"""Taking over `quant_method: auto-round` in transformers.

`register_quantizer` refuses names that exist, so the two mappings are assigned. transformers has no plug-in entry point:
`import hf_autoround` does it, at once if `transformers.modeling_utils` is loaded, otherwise when it is (importing it
costs seconds).
"""

from collections.abc import Callable
from typing import Any

MLX = "mlx"


def register() -> None:
    """Put our quantizer and configuration in place of transformers' own. Doing it twice changes nothing."""
    from transformers.quantizers import auto

    from hf_autoround.hf.config import AutoRoundConfig, TransformersAutoRoundConfig

    # what a caller who passes AutoRoundConfig() for a GPTQ or AWQ checkpoint gets: transformers' own refuses some of them
    TransformersAutoRoundConfig.from_dict = classmethod(_from_dict)
    for method in ("auto-round", "intel/auto-round", MLX):
        auto.AUTO_QUANTIZER_MAPPING[method] = _quantizer
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = AutoRoundConfig
    known = auto.AutoHfQuantizer.supports_quant_method
    if known.__module__ != __name__:
        auto.AutoHfQuantizer.supports_quant_method = staticmethod(_with_mlx(known))


def _from_dict(cls: type, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
    from hf_autoround.hf.config import AutoRoundConfig

    return AutoRoundConfig.from_dict(config_dict, return_unused_kwargs, **kwargs)


def _with_mlx(supports: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Give MLX's configurations the method that they do not name: transformers asks for it before anything else."""

    def supports_quant_method(config: Any) -> bool:
        if isinstance(config, dict) and "quant_method" not in config and {"bits", "group_size"} <= config.keys():
            config["quant_method"] = MLX
        return supports(config)

    return supports_quant_method


def _quantizer(quantization_config: Any, **kwargs: Any) -> Any:
    """Make the quantizer; importing it only now keeps `import transformers` as fast as it was, and free of cycles."""
    from hf_autoround.hf.quantizer import AutoRoundHfQuantizer

    return AutoRoundHfQuantizer(quantization_config, **kwargs)
