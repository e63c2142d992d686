# SPDX-License-Identifier: Apache-2.0
"""`AutoRoundConfig`: what transformers passes around.

It keeps the name of transformers' own class and subclasses it: `from_pretrained` compares class names when it merges a
checkpoint's configuration with the caller's, and rebuilds its own class from a checkpoint's dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import AutoRoundConfig as TransformersAutoRoundConfig
from transformers.utils.quantization_config import QuantizationMethod

from hf_autoround.errors import AutoRoundError, UnknownName
from hf_autoround.registry import suggest
from hf_autoround.scheme import resolve_scheme

if TYPE_CHECKING:
    from hf_autoround.trainer.arguments import RoundingArguments

_NEVER_AN_ARGUMENT = ("quant_method", "backend", "packing_format", "stored", "stored_method", "tokenizer")
# of the folder that a run writes: there is none here
_OF_A_FOLDER = ("output_dir", "format", "max_shard_size", "resume_from_checkpoint", "hub_model_id", "hub_private_repo")
# for this process, not for the file (vLLM refuses checkpoints whose config names a backend it does not know)
_NOT_SAVED = ("backend", "stored", "stored_method", "tokenizer", "dataset", "layer_config", "ignore_layers", "scheme", "iters")


class AutoRoundConfig(TransformersAutoRoundConfig):
    """How a checkpoint is quantized or is to be quantized, and which backend is to run it.

    For a float checkpoint: `scheme` (a preset's name) with `bits`, `group_size` and `sym` to override it, `layer_config`,
    `ignore_layers` and `quant_lm_head` say what becomes of each layer. With `iters=0`, the default, each weight is rounded
    to nearest as it streams in; with a `dataset` besides, optimized round to nearest; with `iters` above 0 the loaded model is
    tuned on `dataset`. Every other argument of RoundingArguments (`nsamples`, `seqlen`, `seed`, `lr`, ...) means here what
    it means there, but for those of the folder that a run writes; `tokenizer` is only needed if the model's folder has none.

    For a quantized checkpoint everything but `backend` ("auto" or a name from `hf-autoround list backends`) comes from
    the checkpoint.
    """

    def __init__(
        self,
        bits: int | None = None,
        group_size: int | None = None,
        sym: bool | None = None,
        backend: str = "auto",
        scheme: str | None = None,
        iters: int = 0,
        **kwargs: Any,
    ) -> None:
        method = kwargs.pop("quant_method", None) or "auto-round"
        self.quant_method = QuantizationMethod.AUTOROUND
        self.stored_method = str(getattr(method, "value", method))  # how the other keys are to be read
        self.stored: dict[str, Any] | None = None  # what a checkpoint says, word for word
        self.backend, self.scheme, self.iters = backend, scheme, iters
        self.__dict__.update(kwargs)
        if any(value is None for value in (bits, group_size, sym)):
            weight = resolve_scheme(
                scheme or "W4A16", bits=bits, group_size=group_size, sym=sym, data_type=kwargs.get("data_type")
            ).weight
            if weight is not None:  # the plan says what is wrong with 16 bits
                bits, group_size, sym = weight.bits, weight.group_size, weight.symmetric
        self.bits, self.group_size, self.sym = bits, group_size, sym

    def post_init(self) -> None:
        """Check nothing here: the format that reads the dict does, with the layer's name at hand."""

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return what a caller may set for a checkpoint that is quantized already, or ask of one that is a float8 source."""
        return {"backend": self.backend} | ({"scheme": self.scheme} if self.scheme is not None else {})

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds: how the layers lie in the file."""
        config = {key: value for key, value in self.__dict__.items() if key not in _NOT_SAVED and value is not None}
        return config | {"quant_method": self.stored_method}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the configuration of a checkpoint, whichever method it names (what reads it later may refuse)."""
        given = {**config_dict, **kwargs}
        config = cls(**given)
        config.stored = {key: value for key, value in given.items() if value is not None}
        return (config, {}) if return_unused_kwargs else config

    @classmethod
    def wrap(cls, config: Any) -> AutoRoundConfig:
        """Return ours for transformers' own class, a dict, or ours."""
        if isinstance(config, cls):
            return config
        return cls(**(config if isinstance(config, dict) else config.__dict__))

    def arguments(self, output_dir: str) -> RoundingArguments:
        """Return the arguments of the run that quantizes a float checkpoint as this says.

        Raises UnknownName for an argument that there is not, AutoRoundError for one that means nothing here or a value that
        cannot be meant.
        """
        from hf_autoround.trainer.arguments import RoundingArguments

        known = {part.name: part.default for part in fields(RoundingArguments) if part.init}
        given = {key: value for key, value in self.__dict__.items() if key not in _NEVER_AN_ARGUMENT and value is not None}
        for name in given:
            if name not in known:
                raise UnknownName(f"AutoRoundConfig has no argument {name!r}{suggest(name, known)}")
        if ignored := [name for name in _OF_A_FOLDER if given.get(name, known[name]) != known[name]]:
            asked = ", ".join(f"{name}={given[name]!r}" for name in ignored)
            raise AutoRoundError(
                f"AutoRoundConfig({asked}): a model that is quantized while it loads is in memory, no folder is written; leave "
                "that to save_pretrained or push_to_hub, or quantize the model's files with AutoRound(...)"
            )
        if not isinstance(given.get("dataset"), str):
            given.pop("dataset", None)
        return RoundingArguments(**{"scheme": "W4A16", **given, "output_dir": output_dir})
