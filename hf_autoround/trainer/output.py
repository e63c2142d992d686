# SPDX-License-Identifier: Apache-2.0
"""The folders that a run writes: whose they are, whether there is room, and how they become final.

Checkpoints are built in `.partial` inside the output folder and moved into place when they are whole, `config.json` last:
a folder that loads is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_autoround.errors import AutoRoundError, OutputError
from hf_autoround.formats.base import Format
from hf_autoround.formats.writer import CheckpointSink, checkpoint_names, manifest, write_config
from hf_autoround.models.loading import LazyModel
from hf_autoround.planning.plan import QuantPlan
from hf_autoround.streams.journal import FOLDER as JOURNAL
from hf_autoround.streams.journal import write_atomically
from hf_autoround.streams.shards import Item, SourceKey

PARTIAL = ".partial"
STATE = "trainer_state.json"
DONE = f"{JOURNAL}.done"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
_NOT_COPIED = ("config.json", "model.safetensors.index.json", "README.md", "quantization_config.json", STATE)


@dataclass(frozen=True)
class OutputFolder:
    """Where a run writes. One format goes straight into the folder, several each into a folder of their own."""

    folder: Path
    formats: tuple[Format, ...]

    @property
    def journal(self) -> Path:
        """The folder of the journal."""
        return self.folder / JOURNAL

    def final(self, target: Format) -> Path:
        """Where a format's checkpoint ends up."""
        return self.folder if len(self.formats) == 1 else self.folder / target.name

    def finished(self) -> dict[str, Any] | None:
        """Return the state of an earlier run of ours that is complete here, or None."""
        state = self.folder / STATE
        whole = all((self.final(target) / "config.json").exists() for target in self.formats)
        if self.journal.exists() or not state.exists() or not whole:
            return None
        shutil.rmtree(self.folder / DONE, ignore_errors=True)
        return json.loads(state.read_text())

    def refuse_other_files(self, ours: tuple[str, ...] = (JOURNAL, STATE)) -> None:
        """Raise OutputError if the folder holds files, and none that is called as in `ours`."""
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; give a folder")
        there = sorted(path.name for path in self.folder.iterdir()) if self.folder.exists() else []
        if there and not set(ours) & set(there):
            more = ", ..." if len(there) > 3 else ""
            raise OutputError(
                f"{self.folder} is not empty ({', '.join(there[:3])}{more}); give another --output_dir, or empty it"
            )

    def claim(self, resume: bool) -> None:
        """Make the folder ours, or refuse.

        Raises OutputError if it holds anything but an unfinished run of ours.
        """
        self.refuse_other_files(ours=(JOURNAL,))
        if self.journal.exists() and not resume:
            raise OutputError(
                f"{self.folder} holds an unfinished run; go on with it (--resume, resume_from_checkpoint=True) "
                "or remove the folder"
            )
        shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise OutputError(f"cannot write to {self.folder}: {error.strerror}") from error

    def refuse_full_disk(self, lazy: LazyModel, plan: QuantPlan, keys: list[SourceKey], kept: float) -> None:
        """Raise OutputError if what will be written does not fit on the disk; the journal keeps `kept` bytes for each weight."""
        needed = 0
        for target in self.formats:
            for shape, dtype in manifest(lazy, plan, keys, target).values():
                size = dtype.itemsize
                for length in shape:
                    size *= length
                needed += size
        needed += sum(int(kept * site.shape[0] * site.shape[1]) for site in plan.sites)
        needed -= sum(path.stat().st_size for path in self.journal.rglob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.folder} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; "
                "make room, or use another disk"
            )

    def write(
        self,
        lazy: LazyModel,
        plan: QuantPlan,
        keys: list[SourceKey],
        items: Iterable[Item],
        max_shard_size: int,
        companions: Callable[[Path, Format], None],
    ) -> None:
        """Write every format from one stream of items, then move the folders to their final names.

        `companions(folder, format)` adds what belongs to a checkpoint besides weights and config (tokenizer, card).
        """
        partial = self.folder / PARTIAL
        sinks: list[CheckpointSink] = []
        try:
            for target in self.formats:
                sinks.append(CheckpointSink(partial / target.name, target, lazy, plan, keys, max_shard_size))
            for item in items:
                for sink in sinks:
                    sink.add(item)
            for sink, target in zip(sinks, self.formats, strict=True):
                sink.close()
                write_config(sink.folder, target, _model_config(lazy), plan, checkpoint_names(lazy, keys))
                companions(sink.folder, target)
        except BaseException as error:
            for sink in sinks:
                sink.abandon()
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, AutoRoundError):
                raise OutputError(
                    f"cannot write to {self.folder}: {error}; what is finished is kept: mend it and resume"
                ) from error
            raise
        for target in self.formats:
            self._move(partial / target.name, self.final(target))
        shutil.rmtree(partial, ignore_errors=True)

    def finish(self, state: Mapping[str, Any]) -> None:
        """Write the run's state; what was needed to resume goes away after it."""
        write_atomically(self.folder / STATE, (json.dumps(dict(state), indent=2, sort_keys=True) + "\n").encode())

    def _move(self, source: Path, final: Path) -> None:
        if final != self.folder:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(source, final)
            return
        for path in sorted(source.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            if path.is_dir():
                shutil.rmtree(final / path.name, ignore_errors=True)
            os.replace(path, final / path.name)


def copy_companions(lazy: LazyModel, folder: Path, processing_class: Any) -> None:
    """Copy what else a model folder holds (tokenizer, generation config, chat template, code), or save it from memory."""
    if lazy.checkpoint.folder is not None:
        for path in sorted(lazy.checkpoint.folder.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS and path.name not in _NOT_COPIED and not path.name.startswith("."):
                shutil.copyfile(path, folder / path.name)
    elif lazy.model.generation_config is not None:
        lazy.model.generation_config.save_pretrained(folder)
    if processing_class is not None and not isinstance(processing_class, str):
        processing_class.save_pretrained(folder)


def _model_config(lazy: LazyModel) -> dict[str, Any]:
    if lazy.checkpoint.folder is not None:
        return json.loads((lazy.checkpoint.folder / "config.json").read_text())
    config = lazy.model.config.to_dict()
    stored = next(entry.dtype for entry in lazy.checkpoint.entries.values() if entry.dtype.is_floating_point)
    return {**config, "architectures": [type(lazy.model).__name__], "dtype": str(stored).removeprefix("torch.")}
