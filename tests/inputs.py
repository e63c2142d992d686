# SPDX-License-Identifier: Apache-2.0
"""What a float model computes when its products see the quantized inputs that a packed model's layers ask for."""

import torch

from hf_autoround.layers.activations import InputQuantizer, quantized_inputs
from hf_autoround.layers.packed_linear import PackedLinear
from hf_autoround.models.blocks import find_sites


def logits_on_quantized_inputs(fake, packed, rows):
    """Return the logits of a float model (with eager experts) for the rows, its inputs quantized as the packed model's."""
    static, quantizers = {}, {}
    layers = {name: layer for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    for site in find_sites(fake):
        layer = layers.get(site.name)
        if layer is None or layer.scheme.activation is None:
            continue
        for name in layer.input_names:
            static.setdefault(site.parameter, {})[site.expert] = getattr(layer, name)
        given = list(static.get(site.parameter, {}).values())
        each = None if not given else given[0] if site.expert is None else torch.stack(given)
        how = InputQuantizer(layer.scheme.activation, each)
        quantizers[site.parameter] = fake.get_parameter(site.parameter), site.transposed, how
    with torch.no_grad(), quantized_inputs(quantizers):
        return fake(rows).logits
