# SPDX-License-Identifier: Apache-2.0
"""The end of a model: from what its last block returns to logits, by the model's own forward.

The base model runs with blocks that return what they are given, so final norms are its own; the head runs with a base
model that returns what it is given, so soft caps and logit scales are its own.

Shapes: B samples, T tokens, H hidden size, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from hf_autoround.models.walk import autocast, replaced, walk_through


@dataclass
class Head:
    """Final norm and output head of a model whose parts outside of the blocks are loaded on `device`.

    `weights` are the head's own parameters, by full name, in the dtype of products.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module]
    device: torch.device
    autocast: torch.dtype | None = None
    returns_tuple: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    _returned: type = field(default=BaseModelOutputWithPast, init=False)

    def finished(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return what the head receives, (B, T, H), for the last block's hidden states (B, T, H); differentiable."""
        last = len(self.blocks) - 1
        with autocast(self.device, self.autocast):
            output = walk_through(
                self.model,
                self.blocks,
                tokens.to(self.device),
                lambda place, state, args, kwargs: hidden if place == last else state,
                self.returns_tuple,
            )
        self._returned = type(output)
        return output.last_hidden_state

    @property
    def rows(self) -> int:
        """For how many rows at a time logits should be computed: for fewer than some hundreds reading the head takes longer."""
        return max(256, (1 << 22 if self.device.type == "cpu" else 1 << 26) // self.model.config.get_text_config().vocab_size)

    @cached_property
    def linear(self) -> bool:
        """Say whether logits are a linear function of hidden states: no bias, no soft cap. Known after `finished`."""
        wide = [weight for weight in self.weights.values() if weight.ndim == 2]
        if len(wide) != 1:
            return False
        rows = torch.linspace(-1, 1, wide[0].shape[-1], device=self.device).to(wide[0])[None]
        with torch.no_grad():
            # a power of two scales a product exactly; a large one, as rounding hides how a soft cap bends small logits
            return torch.equal(self.logits(rows) * 1024, self.logits(rows * 1024))

    def logits(self, rows: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits (R, V) of finished hidden states (R, H), with `weights` in place of the head's own."""
        # OPT's forward calls the decoder inside of its base model; get_decoder of others may be the model itself
        bodies = {id(body): body for body in (self.model.base_model, self.model.get_decoder()) if body is not self.model}
        output = self._returned(last_hidden_state=rows[None])
        token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with replaced(list(bodies.values()), lambda place: lambda *args, **kwargs: output), autocast(self.device, self.autocast):
            # tied weights need no care, as nothing but the head runs; looking for them takes longer than the product
            parameters, call = {**self.weights, **(weights or {})}, {"input_ids": token, "use_cache": False}
            logits = functional_call(self.model, parameters, kwargs=call, tie_weights=False).logits
        return logits.squeeze(0)  # an index would have its backward copy the gradient into zeros
