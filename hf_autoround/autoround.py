# SPDX-License-Identifier: Apache-2.0
"""`AutoRound(...)`: the short spelling of a RoundingTrainer, with the names of the `auto-round` tool."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_autoround.errors import AutoRoundError, UnsupportedScheme
from hf_autoround.formats import find_formats, refuse_plan
from hf_autoround.scheme import SchemeLike, resolve_scheme
from hf_autoround.streams.journal import Journal
from hf_autoround.trainer.arguments import recipe
from hf_autoround.trainer.output import OutputFolder
from hf_autoround.trainer.trainer import RoundingTrainer


class AutoRound:
    """Quantize a model: `AutoRound(model, scheme="W4A16").quantize_and_save(folder)`.

    `model`: a folder, a Hub id or a PreTrainedModel. `scheme`: a preset's name or a dict. `dataset`: texts, token ids,
    tensors, a datasets.Dataset, or a name or path. `recipe`: default, best, light, e2e, e2e-best, e2e-light,
    opt-rtn or rtn. Everything else is a field of RoundingArguments.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: Any = None,
        scheme: SchemeLike = "W4A16",
        dataset: Any = None,
        recipe: str = "default",
        **arguments: Any,
    ) -> None:
        resolved = resolve_scheme(scheme)
        if resolved.weight is not None and not isinstance(scheme, str):
            arguments = resolved.to_dict() | arguments
        name = scheme if isinstance(scheme, str) else "W4A16"
        if resolved.weight is None and not isinstance(scheme, str):
            raise UnsupportedScheme("a scheme of 16 bits leaves every layer as it is: there is nothing to quantize")
        self.model, self.tokenizer, self.dataset = model, tokenizer, dataset
        self.args = _arguments(recipe, scheme=name, **arguments)
        self._trainer: RoundingTrainer | None = None
        self._journal: Journal | None = None
        self._workspace: tempfile.TemporaryDirectory[str] | None = None

    def quantize_and_save(self, output_dir: str | Path | None = None, format: str | None = None) -> str:  # noqa: A002
        """Quantize the model and write it to `output_dir` (several formats: to `output_dir/<format>`); return the folder."""
        output_dir, format = output_dir or self.args.output_dir, format or self.args.format  # noqa: A001
        if self._journal is not None:
            return self.save_quantized(output_dir, format)
        args = dataclasses.replace(self.args, output_dir=str(output_dir), format=format)
        self._new_trainer(args).train()
        return str(output_dir)

    def quantize(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Quantize and return the model, loaded packed, with each layer's scheme. `save_quantized` writes it then."""
        self._workspace = tempfile.TemporaryDirectory(prefix="autoround-")
        args = dataclasses.replace(self.args, output_dir=str(Path(self._workspace.name) / "run"))
        self._trainer = self._new_trainer(args)
        if self._trainer.processes.count > 1:
            raise AutoRoundError("quantize() is for one process: several write a folder, with quantize_and_save(folder)")
        self._journal = self._trainer.quantize()
        folder = Path(self._workspace.name) / "model"
        self.save_quantized(folder)
        plan = self._trainer.prepare().plan
        return AutoModelForCausalLM.from_pretrained(folder), {name: scheme.to_dict() for name, scheme in plan.schemes.items()}

    def save_quantized(self, output_dir: str | Path, format: str = "auto_round") -> str:  # noqa: A002
        """Write what `quantize` found; return the folder."""
        if self._trainer is None or self._journal is None:
            raise AutoRoundError("nothing is quantized yet: call quantize() first, or quantize_and_save(folder)")
        output = OutputFolder(Path(output_dir).expanduser(), tuple(find_formats(format)))
        refuse_plan(output.formats, self._trainer.prepare().plan)
        output.claim(resume=False)
        self._trainer.write(output, self._journal)
        return str(output_dir)

    def _new_trainer(self, args: Any) -> RoundingTrainer:
        return RoundingTrainer(self.model, args, train_dataset=self.dataset, processing_class=self.tokenizer)


_arguments = recipe
