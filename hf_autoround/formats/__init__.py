# SPDX-License-Identifier: Apache-2.0
"""Files: which layout, which configuration, which container.

To add a format: write `formats/<name>.py` with a subclass of `formats.base.Format` and add it to FORMATS; the
command line, `hf-autoround list formats` and the law tests read it from there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hf_autoround.errors import UnsupportedScheme
from hf_autoround.formats.auto_awq import AutoAWQFormat, read_awq_config
from hf_autoround.formats.auto_gptq import AutoGPTQFormat, read_gptq_config
from hf_autoround.formats.auto_round import AutoRoundFormat, read_auto_round_config
from hf_autoround.formats.base import Format, StoredPlan, StoredTensor
from hf_autoround.formats.compressed_tensors import read_compressed_tensors_config
from hf_autoround.formats.fake import FakeFormat
from hf_autoround.formats.fp8 import FP8Format, read_fp8_config
from hf_autoround.formats.llm_compressor import LLMCompressorFormat
from hf_autoround.formats.mlx import AutoRoundMLXFormat, MLXFormat, read_mlx_config
from hf_autoround.layers.sites import WeightSite
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.registry import find
from hf_autoround.scheme import Scheme

FORMATS: tuple[Format, ...] = (
    AutoRoundFormat(),
    AutoGPTQFormat(),
    AutoAWQFormat(),
    LLMCompressorFormat(),
    FP8Format(),
    MLXFormat(),
    AutoRoundMLXFormat(),
    FakeFormat(),
)

_READERS: dict[str, Callable[[Mapping[str, Any]], StoredPlan]] = {
    "auto-round": read_auto_round_config,
    "intel/auto-round": read_auto_round_config,
    "gptq": read_gptq_config,
    "awq": read_awq_config,
    "compressed-tensors": read_compressed_tensors_config,
    "fp8": read_fp8_config,
    "mlx": read_mlx_config,
}


def find_formats(names: str) -> list[Format]:
    """Return the formats of a comma-separated list, each once.

    Raises UnknownName.
    """
    found = [find(FORMATS, name.strip(), kind="format") for name in names.split(",") if name.strip()]
    return list(dict.fromkeys(found))


def reasons_against(formats: Iterable[Format], site: WeightSite, scheme: Scheme) -> dict[str, str]:
    """Return the reasons not to store a site of those formats that have one, by format."""
    reasons = {target.name: target.refuse(site, scheme) for target in formats}
    return {name: reason for name, reason in reasons.items() if reason}


def refuse_plan(formats: Sequence[Format], plan: QuantPlan) -> None:
    """Raise UnsupportedScheme if one of the formats cannot store a site of a plan, or how it mixes schemes."""
    for site in plan.sites:
        if reasons := reasons_against(formats, site, plan.schemes[site.name]):
            raise UnsupportedScheme("; ".join(f"{name} cannot store {site.name}: {why}" for name, why in reasons.items()))
    for target in formats:
        if reason := target.refuse_plan(plan):
            raise UnsupportedScheme(f"{target.name} cannot store this: {reason}")


def read_config(config: Mapping[str, Any]) -> StoredPlan:
    """Return what a checkpoint's `quantization_config` says, ours or that of another tool.

    Raises UnsupportedScheme for what we do not read.
    """
    method = str(config.get("quant_method", "auto-round"))
    if method not in _READERS:
        raise UnsupportedScheme(f"quant_method {method!r} is not supported; there are {', '.join(_READERS)}")
    return _READERS[method](config)


__all__ = [
    "FORMATS",
    "AutoRoundFormat",
    "Format",
    "MLXFormat",
    "StoredPlan",
    "StoredTensor",
    "find_formats",
    "read_config",
    "reasons_against",
    "refuse_plan",
]
