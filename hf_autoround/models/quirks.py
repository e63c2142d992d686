# SPDX-License-Identifier: Apache-2.0
"""What is special about a model type, as data.

To add one: a line in QUIRKS. A rule that holds for every model belongs in the code that applies it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """`refuse`: why the model cannot be quantized."""

    refuse: str | None = None


_STATE_SPACE = "its state-space blocks use their projection weights outside of matrix products"

# routers and gates decide where a token goes: a few thousand weights that cost a model dearly when they are rounded
KEEP_FLOAT = ("gate", "router", "shared_expert_gate")

QUIRKS = {
    "mamba": Quirk(refuse=_STATE_SPACE),
    "mamba2": Quirk(refuse=_STATE_SPACE),
    "falcon_mamba": Quirk(refuse=_STATE_SPACE),
    "zamba": Quirk(refuse="its blocks share one transformer layer's weights"),
    "zamba2": Quirk(refuse="its blocks share one transformer layer's weights"),
    "jamba": Quirk(refuse=_STATE_SPACE),
    "bamba": Quirk(refuse=_STATE_SPACE),
}


def quirk(model_type: str) -> Quirk:
    """Return what is special about `model_type`, or a Quirk that says nothing is."""
    return QUIRKS.get(model_type, Quirk())
