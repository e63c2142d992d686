# SPDX-License-Identifier: Apache-2.0
"""Tensors in, tensors out: the number grids and how what is learned bends them.

To add a data type: write `numerics/<name>.py` with a subclass of `numerics.base.DataType`, and add it to DATA_TYPES. The
law tests take it from there.
"""

from hf_autoround.numerics.base import DataType
from hf_autoround.numerics.float8 import Float8
from hf_autoround.numerics.integer import Integer
from hf_autoround.numerics.microscaling import MX_FP, MX_FP_RCEIL, MX_INT
from hf_autoround.numerics.nvfp4 import NVFP4
from hf_autoround.numerics.quantized import QuantizedTensor, dequantize
from hf_autoround.numerics.tunables import Tunables
from hf_autoround.registry import find
from hf_autoround.scheme import Scheme, TensorSpec

DATA_TYPES: tuple[DataType, ...] = (Integer(), MX_FP, MX_FP_RCEIL, MX_INT, NVFP4(), Float8())


def data_type(spec: TensorSpec) -> DataType:
    """Return the data type that `spec` names.

    Raises UnknownName.
    """
    return find(DATA_TYPES, spec.data_type, kind="data type")


def refuse_scheme(scheme: Scheme, columns: int | None = None) -> str | None:
    """Return why no layer of so many inputs (None: however many) can have a scheme, or None.

    Raises UnknownName for a data type that there is not.
    """
    weight, inputs = scheme.weight, scheme.activation
    reason = None if weight is None else data_type(weight).refuse(weight, columns)
    return reason or (None if inputs is None else data_type(inputs).refuse_inputs(inputs, columns))


def needs_calibration(scheme: Scheme) -> bool:
    """Say whether a scheme needs to see inputs, or other layers, even to round to nearest."""
    weight, inputs = scheme.weight, scheme.activation
    if weight is not None and data_type(weight).shares_with_layers:
        return True
    return inputs is not None and data_type(inputs).calibrates_inputs(inputs)


__all__ = [
    "DATA_TYPES",
    "DataType",
    "QuantizedTensor",
    "Tunables",
    "data_type",
    "dequantize",
    "needs_calibration",
    "refuse_scheme",
]
