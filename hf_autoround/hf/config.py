# SPDX-License-Identifier: Apache-2.0
"""`AutoRoundConfig`: what transformers passes around.

It keeps the name of transformers' own class and subclasses it: `from_pretrained` compares class names when it merges a
checkpoint's configuration with the caller's, and rebuilds its own class from a checkpoint's dict.
"""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import AutoRoundConfig as TransformersAutoRoundConfig
from transformers.utils.quantization_config import QuantizationMethod

from hf_autoround.errors import UnsupportedScheme

# for this process, not for the file: vLLM refuses checkpoints whose config names a backend it does not know
_NOT_SAVED = ("backend",)


class AutoRoundConfig(TransformersAutoRoundConfig):
    """How a checkpoint is quantized, and which backend is to run it.

    `backend` is "auto" or a name from `hf-autoround list backends`. Everything else comes from the checkpoint.
    """

    def __init__(self, bits: int = 4, group_size: int = 128, sym: bool = True, backend: str = "auto", **kwargs: Any) -> None:
        self.quant_method = QuantizationMethod.AUTOROUND
        self.bits, self.group_size, self.sym, self.backend = bits, group_size, sym, backend
        self.packing_format = kwargs.pop("packing_format", None) or "auto_round:auto_gptq"
        kwargs.pop("quant_method", None)
        self.__dict__.update(kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Take a checkpoint's dict as it is, a GPTQ or AWQ one too: `packing_format` then says whose keys the rest are.

        Raises UnsupportedScheme for any other method.
        """
        method = str(config_dict.get("quant_method", "auto-round"))
        if method in ("gptq", "awq"):
            config_dict = {**config_dict, "packing_format": f"auto_round:{method}"}
        elif "auto-round" not in method:
            raise UnsupportedScheme(f"AutoRoundConfig reads auto-round, gptq and awq checkpoints, and this one is {method!r}")
        return super(TransformersAutoRoundConfig, cls).from_dict(config_dict, return_unused_kwargs, **kwargs)

    def post_init(self) -> None:
        """Check nothing here: the format that reads the dict does, with the layer's name at hand."""

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a caller may set for a checkpoint that is quantized already."""
        return {"backend": self.backend}

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds."""
        config = {key: value for key, value in self.__dict__.items() if key not in _NOT_SAVED and value is not None}
        return config | {"quant_method": "auto-round"}

    @classmethod
    def wrap(cls, config: Any) -> AutoRoundConfig:
        """Return ours for transformers' own class, a dict, or ours."""
        if isinstance(config, cls):
            return config
        return cls(**(config if isinstance(config, dict) else config.__dict__))
