# SPDX-License-Identifier: Apache-2.0
"""GPTQModel's kernels, when it is installed: Marlin, ExLlama v2 and AWQ's on CUDA, plain PyTorch anywhere.

One of its layers is made from a packed layer's tensors and called for the product. Whether a kernel fits is asked of
GPTQModel itself, and last of all by running a tiny layer: its extensions are compiled on first use, and only then is it known
that a compiler is missing. https://github.com/ModelCloud/GPTQModel (names and arguments as in 7.6)

GPTQModel is imported as late as can be: that takes seconds, prints a banner and sets allocator variables.

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_autoround.backends.base import Backend, Package, every_reason, multiply
from hf_autoround.layers.packed_linear import PackedLinear, Repacked, dequantize_and_multiply
from hf_autoround.layouts import GPTQ_V1, GPTQ_V2, IntegerLayout
from hf_autoround.layouts.bits import pack_bits
from hf_autoround.layouts.gptq import GPTQ
from hf_autoround.scheme import TensorSpec, integer_scheme


class ForeignLayer(Repacked):
    """A layer of GPTQModel's made from a packed one. Subclasses name its class, `module:class` below `nn_modules.qlinear`.

    It is no child module: its tensors belong to kernels, which may not be saved, cast or moved. The layout's tensors wait in
    host memory for that.
    """

    path: ClassVar[str]
    scratch: ClassVar[WeakValueDictionary]  # device -> what ExLlama's layers there share

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        self.spec, self.layout = layer.spec, layer.layout
        self.shape, self.dtype = (layer.out_features, layer.in_features), layer.compute_dtype
        self.host = {name: tensor.detach().cpu() for name, tensor in layer.packed().items()}
        self.build(layer.device)

    @classmethod
    def load(cls) -> Any:
        """Import GPTQModel's class."""
        module, _, name = cls.path.partition(":")
        return getattr(import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)

    def build(self, device: torch.device) -> None:
        """Make the layer on a device."""
        kind = self.load()
        with torch.device(device):
            linear = kind(**arguments(self.spec, self.shape, self.dtype), bias=False, register_buffers=True, adapter=None)
        tensors = dict(self.host)
        if isinstance(self.layout, GPTQ):
            tensors["g_idx"] = torch.arange(self.shape[1], dtype=torch.int32) // linear.group_size
            tensors["qzeros"] = self._zeros(GPTQ_V2 if kind.REQUIRES_FORMAT_V2 else GPTQ_V1)
        for name, tensor in tensors.items():
            getattr(linear, name).data.copy_(tensor)
        linear.eval()
        linear.optimized = True  # else the PyTorch kernels compile themselves, for seconds a layer: compile the model instead
        if "exllamav2" in self.path:
            self.space = self._scratch_space(linear, device)  # lives as long as a layer that uses it
            linear.post_init(self.space)
        else:
            linear.post_init()
        self.on, self.linear = device, (linear,)  # in a tuple, where torch does not look for modules

    def _zeros(self, wanted: GPTQ) -> Tensor:
        """Return qzeros as a version of the GPTQ layout stores them."""
        zeros = cast(IntegerLayout, self.layout).unpack_zeros(self.host["qzeros"], self.spec, self.shape[0]).t()
        return pack_bits((zeros.int() - wanted.zero_offset) & (2**self.spec.bits - 1), self.spec.bits)

    def _scratch_space(self, linear: Any, device: torch.device) -> Any:
        from gptqmodel.utils.exllamav2 import ScratchSpace

        space, size = self.scratch.get(device), linear.temp_dq_size()
        if space is None or space.scratch_bytes < size:
            space = self.scratch[device] = ScratchSpace(scratch_bytes=size + 128, dev=device)  # it rounds up to 128
        return space

    def codes(self) -> Tensor:
        """Return the unsigned codes (O, I) uint8 that it was made from."""
        return cast(IntegerLayout, self.layout).unpack_codes(self.host["qweight"].to(self.on), self.spec, self.shape)

    def product(self, rows: Tensor) -> Tensor:
        """(M, I) -> (M, O), computed in the model's dtype: kernels are made for one."""
        outputs = self.linear[0](rows.to(self.dtype))
        return (outputs.clone() if outputs.is_inference() else outputs).to(rows.dtype)  # AWQ's kernels return such tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> ForeignLayer:
        """Make the layer again: kernels keep addresses."""
        other = copy.copy(self)
        other.build(self.on)
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Make the layer again where it is moved to, for the same reason; it is never cast."""
        device = fn(torch.empty(0, device=self.on)).device
        if device != self.on and device.type == self.on.type:
            self.build(device)
        return self


class GPTQModel(Backend):
    """a kernel of GPTQModel's"""

    needs = Package("gptqmodel", "gptqmodel")

    def __init__(self, name: str, path: str, layouts: tuple[str, ...], device: str | None = "cuda") -> None:
        self.name, self.layouts, self.device = f"gptqmodel:{name}", layouts, device
        fields = {"path": path, "scratch": WeakValueDictionary(), "__doc__": ForeignLayer.__doc__}
        self.layer = type("ForeignLayer", (ForeignLayer,), fields)

    def refuse(self, layer: PackedLinear, device: torch.device) -> str | None:
        """Return every reason why the kernel cannot run a layer there, or None. GPTQModel itself gives its first."""
        rows, columns, bits = layer.out_features, layer.in_features, layer.spec.bits
        reasons = every_reason(
            self.device is not None and device.type != self.device and f"it runs on {self.device}, not on {device.type}",
            self.device is None and device.type == "meta" and "it needs the weights in memory, and these are offloaded",
            layer.layout.name not in self.layouts
            and f"it reads the layouts {' and '.join(self.layouts)}, not {layer.layout.name}",
            bits in (5, 6, 7) and f"it reads {bits}-bit codes in another order",
            isinstance(layer.layout, GPTQ)
            and (columns * bits % 32 or rows * bits % 32)
            and f"it needs inputs and outputs that fill whole words, not {columns} and {rows}",
        )
        if reasons is not None:
            return reasons
        try:
            kind = self.layer.load()
        except ImportError as error:
            return f"its kernel cannot be imported: {error}"
        fits, error = kind.validate(**arguments(layer.spec, (rows, columns), layer.compute_dtype), device=device)
        if not fits:
            return _sentence(error)
        return None if self.device is None else _tried(self.layer, layer.layout, bits, layer.compute_dtype, device)

    def prepare(self, layer: PackedLinear) -> None:
        """Make GPTQModel's layer, and keep the layout's tensors in host memory."""
        layer.repack(self.layer)

    def forward(self, layer: PackedLinear, inputs: Tensor) -> Tensor:
        """Return x W^T + b in the dtype of x."""
        if layer.repacked is None:  # it has moved to another kind of device
            return dequantize_and_multiply(layer, inputs)
        return multiply(layer, inputs, _outputs, _input_gradient)


def arguments(spec: TensorSpec, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Return what GPTQModel calls the numbers of a layer."""
    numbers = dict(bits=spec.bits, group_size=spec.group_size, sym=spec.symmetric, desc_act=False)
    return numbers | dict(in_features=shape[1], out_features=shape[0], pack_dtype=torch.int32, dtype=dtype)


def _outputs(layer: PackedLinear, rows: Tensor) -> Tensor:
    if rows.dtype in (torch.float32, torch.float64):  # what comes in float32 is meant to be exact, and kernels are not
        return rows @ layer.dequantized(rows.dtype).t()
    return cast(ForeignLayer, layer.repacked).product(rows)


def _input_gradient(layer: PackedLinear, gradient: Tensor) -> Tensor:
    """Kernels multiply one way only: the product with the identity is the weight, transposed."""
    identity = torch.eye(layer.in_features, dtype=gradient.dtype, device=gradient.device)
    return gradient @ _outputs(layer, identity).t()


@lru_cache
def _tried(kind: type[ForeignLayer], layout: IntegerLayout, bits: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why a kernel fails on a layer of 128 by 128, or None."""
    tiny = PackedLinear((128, 128), integer_scheme(bits, 128), layout, bias=False, dtype=dtype).to(device)
    for tensor in tiny.packed().values():
        tensor.data.zero_()
    try:
        tiny.repack(kind)
        _outputs(tiny, torch.zeros(1, 128, dtype=dtype, device=device))
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return _sentence(error)
    return None


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    words = re.sub(r"<class '\S*?(\w+)'>", r"\1", lines[0]).rstrip(".")
    return f"it is refused by gptqmodel: {words}"


GPTQ_LAYOUTS, AWQ_LAYOUTS = ("gptq", "gptq_v2"), ("awq",)
MARLIN = GPTQModel("marlin", "marlin:MarlinLinear", GPTQ_LAYOUTS)
EXLLAMA_V2 = GPTQModel("exllamav2", "exllamav2:ExllamaV2Linear", GPTQ_LAYOUTS)
TORCH = GPTQModel("torch", "torch:TorchLinear", GPTQ_LAYOUTS, device=None)
AWQ_MARLIN = GPTQModel("awq_marlin", "marlin_awq:AwqMarlinLinear", AWQ_LAYOUTS)
AWQ_EXLLAMA_V2 = GPTQModel("awq_exllamav2", "exllamav2_awq:AwqExllamaV2Linear", AWQ_LAYOUTS)
AWQ_GEMM = GPTQModel("awq_gemm", "gemm_awq:AwqGEMMLinear", AWQ_LAYOUTS)
AWQ_TORCH = GPTQModel("awq_torch", "torch_awq:AwqTorchLinear", AWQ_LAYOUTS, device=None)
