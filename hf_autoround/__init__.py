# SPDX-License-Identifier: Apache-2.0
"""AutoRound for the Hugging Face stack: weight rounding tuned by sign gradient descent.

Importing this package takes milliseconds; it registers itself with transformers when transformers is used. The public
names are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AutoRound": "hf_autoround.autoround",
    "AutoRoundConfig": "hf_autoround.hf.config",
    "RoundingArguments": "hf_autoround.trainer.arguments",
    "RoundingTrainer": "hf_autoround.trainer.trainer",
    "Scheme": "hf_autoround.scheme",
    "AutoRoundError": "hf_autoround.errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from hf_autoround.autoround import AutoRound as AutoRound
    from hf_autoround.errors import AutoRoundError as AutoRoundError
    from hf_autoround.hf.config import AutoRoundConfig as AutoRoundConfig
    from hf_autoround.scheme import Scheme as Scheme
    from hf_autoround.trainer.arguments import RoundingArguments as RoundingArguments
    from hf_autoround.trainer.trainer import RoundingTrainer as RoundingTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_autoround' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _AfterImport(MetaPathFinder, Loader):
    """Calls `register` once transformers can load models, then takes itself away."""

    target = "transformers.modeling_utils"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        _register()


def _register() -> None:
    from hf_autoround.hf.register import register

    register()


if _AfterImport.target in sys.modules:
    _register()
elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
    import importlib.util

    sys.meta_path.insert(0, _AfterImport())
