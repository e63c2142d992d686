# SPDX-License-Identifier: Apache-2.0
"""AutoRound for the Hugging Face stack: weight rounding tuned by gradient descent.

Importing this package takes milliseconds; it registers itself with transformers and PEFT when they are used. The public
names are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
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
    "merge_onto_grid": "hf_autoround.hf.peft",
    "prepare_model_for_lora": "hf_autoround.hf.peft",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from hf_autoround.autoround import AutoRound as AutoRound
    from hf_autoround.errors import AutoRoundError as AutoRoundError
    from hf_autoround.hf.config import AutoRoundConfig as AutoRoundConfig
    from hf_autoround.hf.peft import merge_onto_grid as merge_onto_grid
    from hf_autoround.hf.peft import prepare_model_for_lora as prepare_model_for_lora
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
    """Calls `then` once the module `target` has been imported. Being looked for is not being imported: others ask whether
    PEFT is installed long before anybody uses it."""

    def __init__(self, target: str, then: Callable[[], None]) -> None:
        self.target, self.then = target, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.target:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        sys.meta_path.remove(self)
        self.then()


def _register_with_transformers() -> None:
    from hf_autoround.hf.register import register

    register()


def _register_with_peft() -> None:
    from hf_autoround.hf.peft import register

    register()


def _after_import(target: str, then: Callable[[], None]) -> None:
    if target in sys.modules:
        then()
    elif not any(isinstance(finder, _AfterImport) and finder.target == target for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(target, then))


_after_import("transformers.modeling_utils", _register_with_transformers)
_after_import("peft", _register_with_peft)
