# SPDX-License-Identifier: Apache-2.0
"""RoundingTrainer: what transformers' Trainer is for training, for rounding.

An epoch is a block, a step an iteration. `train()` leaves the quantized checkpoint in `args.output_dir`. Arithmetic and
bytes are done elsewhere: here are the order of things, the callbacks, and resuming.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from hf_autoround.calibration.batches import SampledText
from hf_autoround.calibration.sampling import sample_text
from hf_autoround.errors import AutoRoundError, MissingDependency
from hf_autoround.formats.base import Format
from hf_autoround.layers.sites import QuantizedLayer
from hf_autoround.models.memory import freed_memory_kept
from hf_autoround.models.processes import join
from hf_autoround.streams.block_walk import PlannedModel, Unit, units
from hf_autoround.streams.blocks import stream_blocks
from hf_autoround.streams.end_to_end import stream_end_to_end
from hf_autoround.streams.journal import Journal, digests, refuse_other_arguments
from hf_autoround.streams.shards import FromJournal, Item, rounded, stream_checkpoint
from hf_autoround.trainer.arguments import RoundingArguments
from hf_autoround.trainer.callbacks import BlockLines, RoundingProgress, sampling_bar
from hf_autoround.trainer.divergence_plot import plot_divergence
from hf_autoround.trainer.end_to_end_events import EndToEndTrainerEvents
from hf_autoround.trainer.events import TrainerEvents, TrainingStopped
from hf_autoround.trainer.model_card import model_card
from hf_autoround.trainer.output import OutputFolder, copy_companions
from hf_autoround.trainer.run import Run, prepare
from hf_autoround.tuning import ALGORITHMS

logger = logging.get_logger(__name__)


class RoundingTrainer:
    """Quantizes a model.

    `model`: a folder, a Hub id, or a PreTrainedModel (which is read, never changed). `train_dataset`: calibration data
    (texts, token ids, tensors, a datasets.Dataset, or a name); `args.dataset` if it is None. `processing_class`: the
    tokenizer, if it is not the model folder's own.

    Under torchrun (or accelerate launch on accelerators) the processes share the calibration samples; each of them calls
    the same methods, and the main one writes.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: RoundingArguments | None = None,
        train_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] | None = None,
    ) -> None:
        self.model, self.args = model, args or RoundingArguments()
        self.train_dataset, self.processing_class = train_dataset, processing_class
        self.processes = join(cpu=str(self.args.device_map) == "cpu")
        own: list[Any] = [DefaultFlowCallback, *self._reports(), RoundingProgress, BlockLines]
        self.callback_handler = self._handler([*own, *(callbacks or [])])
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = self.processes.main
        self.state.is_local_process_zero = self.processes.local_index == 0
        self.run: Run | None = None
        self.errors: dict[str, float] = {}
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    def train(self, resume_from_checkpoint: bool | None = None) -> TrainOutput:
        """Quantize the model and write it.

        With `resume_from_checkpoint` an unfinished run in `args.output_dir` goes on where it was killed, and ends in the
        same bytes. Raises an AutoRoundError, whose message says what to do instead, before any work if possible.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else bool(resume_from_checkpoint)
        started = time.time()
        run = self.prepare()
        before = self.processes.from_main(lambda: self._finished(run) if resume else None)
        if before is not None:
            return TrainOutput(before["global_step"], 0.0, {})
        journal = self.quantize(resume)
        self.processes.from_main(lambda: self._complete(run, journal))
        losses = [entry["loss_best"] for entry in self.state.log_history if entry.get("loss_best") is not None]
        loss = losses[-1] if losses else 0.0  # the last block's says how far the predictions are (a quantized head's: the logits)
        runtime = time.time() - started
        metrics = {"train_runtime": runtime, "train_loss": loss, "quantized_layers": len(run.plan.sites)}
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, loss, metrics)

    def prepare(self) -> Run:
        """Open the model, make the plan and read the data; nothing is written yet. Done once."""
        if self.run is None:
            with self.processes.together():
                run = prepare(self.model, self.args, self.train_dataset, self.processing_class, self.processes)
                self._refuse_disagreement(run)
            self.run = run
            self.callback_handler.model, self.callback_handler.processing_class = run.lazy.model, run.processing_class
            if self.processes.main:
                self._say_what_will_happen(run)
        return self.run

    def quantize(self, resume: bool = False) -> Journal:
        """Bring every block into the journal, and return the one that has the final numbers.

        Plain round to nearest has nothing to keep there.
        """
        run = self.prepare()
        with freed_memory_kept() if run.streams_blocks else nullcontext():
            return self._quantized(run, resume)

    def _quantized(self, run: Run, resume: bool) -> Journal:
        journal = self.processes.from_main(lambda: self._open_journal(run, resume))
        tokens = self._tokens(run, journal)
        steps_per_block = self.args.iters or 1
        all_units = self._units(run)
        block_steps, whole_steps = steps_per_block * len(all_units), self.args.end_to_end_steps
        self.state.max_steps = block_steps + whole_steps if run.streams_blocks else len(run.plan.sites)
        self.state.num_train_epochs = len(all_units) + (whole_steps > 0)
        self.state.train_batch_size = self.args.batch_size
        self.state.compute_steps(self.args, self.state.max_steps)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if run.streams_blocks:
            assert tokens is not None
            algorithm = ALGORITHMS[self.args.algorithm]
            events = TrainerEvents(self, run.plan, steps_per_block, self.state.num_train_epochs)
            model = PlannedModel(run.lazy, run.parts, run.plan, run.for_blocks(tokens))
            try:
                stream_blocks(model, algorithm, self.args.tuning(), run.settings, journal, events)
                if whole_steps:
                    journal = stream_end_to_end(
                        replace(model, tokens=tokens),
                        self.args.end_to_end(len(run.parts.block_names)),
                        run.settings,
                        "streamed" if self.args.low_gpu_mem_usage else self.args.residence,
                        journal,
                        EndToEndTrainerEvents(self, whole_steps, block_steps, len(all_units)),
                    )
            except TrainingStopped as stopped:
                raise AutoRoundError(
                    f"stopped by a callback after {stopped}; what is finished is kept in {run.output.folder}: resume to go on"
                ) from stopped
        return journal

    def write(self, output: OutputFolder, journal: Journal) -> None:
        """Write what is in a journal (or round to nearest on the way) in the formats of `output`; for the main process."""
        run = self.prepare()

        def companions(folder: Path, target: Format) -> None:
            copy_companions(run.lazy, folder, run.tokenizer_to_save(self.processing_class))
            plot = plot_divergence(self.state.log_history, folder)
            (folder / "README.md").write_text(self.create_model_card(target, plot), encoding="utf-8")

        if self.args.end_to_end_steps:
            self.errors = {name: error for unit in self._units(run) for name, error in journal.errors(unit.key).items()}
        output.write(run.lazy, run.plan, run.keys, self._items(run, journal), run.max_shard_size, companions)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Copy the finished checkpoint(s) to another folder, as Trainer.save_model would write them there."""
        run = self.prepare()

        def copy() -> None:
            self._refuse_unfinished(run)
            if output_dir is not None and Path(output_dir).expanduser().resolve() != run.output.folder.resolve():
                shutil.copytree(run.output.folder, Path(output_dir).expanduser(), dirs_exist_ok=True)

        self.processes.from_main(copy)

    def push_to_hub(self, repo_id: str | None = None, commit_message: str = "Quantized with hf_autoround") -> str:
        """Upload the finished checkpoint and return its address."""
        run = self.prepare()
        return self.processes.from_main(lambda: self._upload(run, repo_id, commit_message))

    def _upload(self, run: Run, repo_id: str | None, commit_message: str) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        name = repo_id or self.args.hub_model_id
        if name is None:
            raise AutoRoundError("push_to_hub needs a repository: pass repo_id, or hub_model_id in the arguments")
        self._refuse_unfinished(run)
        api = HfApi()
        try:
            repository = api.create_repo(name, private=self.args.hub_private_repo, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repository, folder_path=run.output.folder, commit_message=commit_message))
        except (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, ConnectionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise AutoRoundError(f"cannot upload to {name}: {reason}. The model is whole in {run.output.folder}") from error

    def create_model_card(self, target: Format, plot: str | None = None) -> str:
        """Return the README.md of a checkpoint in this format; `plot` is a picture beside it."""
        run = self.prepare()
        args = self.args
        recipe: dict[str, Any] = {"algorithm": args.algorithm}
        if args.algorithm == "sign_round":
            by = "Adam" if args.enable_adam else f"sign of the gradient, momentum {args.momentum}"
            recipe |= {"iters": args.iters, "optimizer": by, "lr": args.tuning().rate}
            keys = ("minmax_lr", "batch_size", "gradient_accumulate_steps", "nblocks", "enable_norm_bias_tuning")
            recipe |= {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
        if args.end_to_end_steps:
            settings = args.end_to_end(len(run.parts.block_names))
            recipe |= {"end_to_end_steps": settings.steps, "end_to_end_lr": settings.lr, "batch_size": settings.batch_size}
        if run.data is not None:
            recipe["seed"] = args.seed
        packed = target.config(run.plan, {}) is not None
        data, history = run.data.description if run.data else None, self.state.log_history
        errors = self.errors or {name: error for entry in history for name, error in entry.get("errors", {}).items()}
        return model_card(run.lazy.name, run.plan, recipe, data, history, errors, packed, plot)

    def log(self, logs: Mapping[str, Any], **kwargs: Any) -> None:
        """Tell callbacks and reports."""
        entry = dict(logs)
        self.control = self.callback_handler.call_event("on_log", self.args, self.state, self.control, logs=entry, **kwargs)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def _finished(self, run: Run) -> dict[str, Any] | None:
        """Return the state of a run with these arguments that is complete already, or None."""
        before = run.output.finished()
        if before is not None:
            refuse_other_arguments(run.output.folder, before["signature"], digests(run.signature()))
            logger.info(f"{run.output.folder} is finished already")
        return before

    def _open_journal(self, run: Run, resume: bool) -> Journal:
        run.output.claim(resume)
        run.output.refuse_full_disk(run.lazy, run.plan, run.keys, run.kept_per_weight)
        journal = Journal(run.output.journal, run.signature())
        journal.start()
        return journal

    def _tokens(self, run: Run, journal: Journal) -> Tensor | None:
        """Return the samples (N, T): those of the data, then those that the model writes; None if none are needed."""
        if run.data is None or run.data.sampled is None:
            return run.data.tokens if run.data else None
        sampled = self.processes.from_main(lambda: self._sampled(run, run.data.tokens, run.data.sampled, journal))
        return torch.cat([run.data.tokens, sampled])

    def _sampled(self, run: Run, prompts: Tensor, request: SampledText, journal: Journal) -> Tensor:
        tokens = journal.get_sampled()
        if tokens is None:
            with sampling_bar(self.args, request) as on_step:
                tokens = sample_text(run.lazy, run.parts, request, prompts, run.settings.placement, on_step)
            journal.put_sampled(tokens)
        return tokens

    def _complete(self, run: Run, journal: Journal) -> None:
        self.write(run.output, journal)
        run.output.finish(self._final_state())
        Journal(run.output.journal, {}).remove()

    def _refuse_unfinished(self, run: Run) -> None:
        if run.output.finished() is None:
            raise AutoRoundError(f"nothing is quantized in {run.output.folder} yet: call train() first")

    def _refuse_disagreement(self, run: Run) -> None:
        """Raise AutoRoundError if another process understood something else, as one does that has other files."""
        mine = digests({"plan": run.plan.to_dict(), "calibration data": run.data.digest if run.data else None})
        for number, other in enumerate(self.processes.gather(mine)):
            for what in mine:
                if mine[what] != other[what]:
                    raise AutoRoundError(
                        f"process {number} has another {what} than process {self.processes.index}: "
                        "every machine needs the same model, data and arguments"
                    )

    def _units(self, run: Run) -> list[Unit]:
        return units(run.parts, run.plan, self.args.nblocks)

    def _items(self, run: Run, journal: Journal) -> Iterable[Item]:
        if run.streams_blocks:
            key_of = {name: unit.key for unit in self._units(run) for name in unit.names}

            def unit_of(parameter: str) -> str | None:
                block = run.parts.block_of(parameter)
                name = run.parts.block_names[block] if block is not None else parameter.rpartition(".")[0]
                return key_of.get(name)

            results = FromJournal(journal, run.plan, unit_of)
            yield from stream_checkpoint(run.lazy, run.keys, results.finished, results.tuned)
            return
        for item in stream_checkpoint(run.lazy, run.keys, rounded(run.plan, run.settings.placement.main)):
            if isinstance(item.content, QuantizedLayer):
                self.errors[item.name] = round(item.content.error, 5)
                self.state.global_step += 1
                self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            yield item

    def _say_what_will_happen(self, run: Run) -> None:
        counts: dict[str, int] = {}
        for reason in run.plan.kept.values():
            counts[reason] = counts.get(reason, 0) + 1
        logger.info(f"{run.lazy.name}: {len(run.plan.sites)} weights by {self.args.algorithm} to {run.plan.scheme.name}")
        for reason, count in counts.items():
            names = [name for name, why in run.plan.kept.items() if why == reason]
            logger.info(f"  {count} left in 16 bits ({', '.join(names[:3])}{', ...' if count > 3 else ''}): {reason}")
        if run.data is not None:
            logger.info(f"calibration: {run.data.description}")
        for target in run.output.formats:
            note = target.note(run.plan)
            if note:
                logger.warning(note)

    def _final_state(self) -> dict[str, Any]:
        return {
            "signature": digests(self.prepare().signature()),
            "global_step": self.state.global_step,
            "max_steps": self.state.max_steps,
            "num_train_epochs": self.state.num_train_epochs,
            "log_history": self.state.log_history,
        }

    def _reports(self) -> list[type[TrainerCallback]]:
        try:
            return get_reporting_integration_callbacks(self.args.report_to)
        except (ValueError, ImportError) as error:
            raise MissingDependency(f"report_to={self.args.report_to}: {error}") from error

    def _handler(self, callbacks: list[Any]) -> CallbackHandler:
        try:
            return CallbackHandler(callbacks, None, self.processing_class, None, None)
        except RuntimeError as error:  # integrations look for their package when they are made
            raise MissingDependency(f"report_to={self.args.report_to}: {error}") from error
