# SPDX-License-Identifier: Apache-2.0
"""GPTQ's `g_idx` in other people's checkpoints: in order it is passed over, out of order it is loaded and used.

The configuration does not tell: `desc_act` is also true for files whose groups are in order ("static groups").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from hf_autoround.layers.sites import WeightSite
from hf_autoround.layouts.gptq_indexed import groups_in_order
from hf_autoround.models.checkpoint import stored_names
from hf_autoround.models.loading import names_in_memory
from hf_autoround.scheme import Scheme


def layers_out_of_order(model: PreTrainedModel, files: Iterable[str] | None, schemes: Mapping[WeightSite, Scheme]) -> set[str]:
    """Return the names of the layers whose inputs are not grouped from the first to the last."""
    sites = {site.name: site for site in schemes}
    found = set()
    for file in files or ():
        keys = [name for name in stored_names([file]) if name.endswith(".g_idx")]
        if not keys:
            continue
        # transformers builds the model, and calls this, with the meta device as default
        with safe_open(file, framework="pt") as handle, torch.device("cpu"):
            for key, name in names_in_memory(model, keys).items():
                site = sites.get(name.removesuffix(".g_idx"))
                if site is None:
                    continue
                weight = schemes[site].weight
                assert weight is not None
                if not torch.equal(handle.get_tensor(key).int(), groups_in_order(site.shape[1], weight.granularity)):
                    found.add(site.name)
    return found
