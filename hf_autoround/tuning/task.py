# SPDX-License-Identifier: Apache-2.0
"""What an algorithm is given of a block, and what it returns.

It sees functions and tensors: neither the model, nor files, nor other blocks.

Shapes: N samples, B samples of a batch, E experts, O out features, I in features, R sampled inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hf_autoround.layers.sites import QuantizedLayer, oriented
from hf_autoround.numerics import DataType, Tunables, data_type, dequantize
from hf_autoround.numerics.grouping import group, ungroup
from hf_autoround.scheme import Scheme, TensorSpec


@dataclass(frozen=True)
class TunableWeight:
    """One parameter to quantize: its float values (as stored), whether they lie (I, O), and its scheme.

    `largest` ([E,] O, 1, 1) is the largest |w| of all that share a range with each row, None where nothing does (or where
    the parameter is all that does); `static` ([E,] 1) what calibration gave for its inputs, if they need it.
    """

    parameter: Tensor
    transposed: bool
    scheme: Scheme
    largest: Tensor | None = None
    static: Tensor | None = None

    @property
    def spec(self) -> TensorSpec:
        """The numbers of the scheme."""
        assert self.scheme.weight is not None
        return self.scheme.weight

    @property
    def data_type(self) -> DataType:
        """The data type of the scheme."""
        return data_type(self.spec)

    @property
    def columns(self) -> int:
        """The weights of a row, I."""
        return self.parameter.shape[-2 if self.transposed else -1]

    def groups(self) -> Tensor:
        """Return the float32 values in groups, ([E,] O, G, S)."""
        return group(oriented(self.parameter, self.transposed).float(), self.spec.granularity)

    def neutral(self) -> Tunables:
        """Return the tunables of round to nearest."""
        return self.data_type.neutral(self.groups(), self.spec, self.largest)

    def fake_quantized(self, groups: Tensor, tunables: Tunables) -> Tensor:
        """Return the weight after quantization, float32 and stored like the parameter; differentiable."""
        values = dequantize(self.data_type.quantize(groups, self.spec, tunables))
        return oriented(ungroup(values, self.columns), self.transposed)

    def finished(self, tunables: Tunables) -> QuantizedLayer:
        """Return what ships under these tunables."""
        groups = self.groups()
        quantized = self.data_type.quantize(groups, self.spec, tunables)
        frozen = self.data_type.freeze(quantized, self.spec)
        size = groups.norm().item()
        error = dequantize(frozen).sub_(groups).norm().item() / size if size else 0.0
        return QuantizedLayer(frozen, self.columns, self.scheme, error, self.static)


@dataclass(frozen=True)
class BlockTask:
    """One block (or several at a time) to quantize.

    `error(indices, weights)` says, differentiably, how far the block's outputs on the *quantized* chain's inputs of the samples
    `indices` (B,), with `weights` in place of its own, are from the float model's. `norms` are the 1-D parameters that may be
    tuned besides, and ship as `stored_dtype`. `importance` holds sums of squared inputs, ([E,] 1, I), `inputs`
    some of the inputs themselves: one (R, I) for a weight, E of them for fused experts.

    The samples may be shared out: `share(indices)` are those that can be run here, and `total(tensor)` is the sum of what
    all shares give. Everyone has to ask for the same totals in the same order.
    """

    seed: int
    samples: int
    weights: Mapping[str, TunableWeight]
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    stored_dtype: torch.dtype = torch.float32
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    error: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None
    share: Callable[[Tensor], Tensor] = lambda indices: indices
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class BlockResult:
    """What became of a block: quantized parameters, float tensors that were tuned, and how its error fell.

    `tunables` are what the layers were made with, for who goes on tuning them.
    """

    layers: dict[str, QuantizedLayer]
    tuned: dict[str, Tensor] = field(default_factory=dict)
    tunables: dict[str, Tunables] = field(default_factory=dict)
    loss_first: float | None = None
    loss_best: float | None = None
    best_step: int | None = None

    @property
    def static(self) -> dict[str, Tensor]:
        """What calibration gave for the inputs of the layers, where their schemes ask for it."""
        return {name: layer.static for name, layer in self.layers.items() if layer.static is not None}

    def to(self, device: torch.device) -> BlockResult:
        """Return the result with its tensors on a device."""
        return replace(
            self,
            layers={name: layer.to(device) for name, layer in self.layers.items()},
            tuned={name: tensor.to(device) for name, tensor in self.tuned.items()},
            tunables={
                name: tunables.of({part: tensor.to(device) for part, tensor in tunables.tensors().items()})
                for name, tunables in self.tunables.items()
            },
        )


@dataclass(frozen=True)
class TuningSettings:
    """How tuning goes. Rates fall linearly to zero; None is `rate` for the rounding, and for the scales that times the
    data type's `range_rate`. `norm_lr` is relative to the size of a norm's weights. `keep_tunables`: the result has them too.
    """

    iters: int = 200
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    lr: float | None = None
    minmax_lr: float | None = None
    norm_lr: float = 1e-3
    momentum: float = 0.0
    enable_adam: bool = True
    enable_minmax_tuning: bool = True
    enable_norm_bias_tuning: bool = True
    selection_samples: int = 16
    selection_every: int = 10
    keep_tunables: bool = False

    @property
    def rate(self) -> float:
        """The rate of the rounding in the first step."""
        if self.lr is not None:
            return self.lr
        return 0.2 / self.iters**0.5 if self.enable_adam else 1 / self.iters


OnStep = Callable[[int, float, float], bool]  # (step, loss of the batch, learning rate) -> stop?


class BlockAlgorithm(Protocol):
    """Decides the numbers of one block."""

    def __call__(self, task: BlockTask, settings: TuningSettings, on_step: OnStep) -> BlockResult: ...
