# SPDX-License-Identifier: Apache-2.0
"""What is kept on disk of tuning end to end: its last checkpoint, and the best result so far as a journal of its own.

    checkpoint-00050/   the learned tensors of every block after 50 steps, progress.json
    best-00075/         the blocks as they would ship, in the journal's form
    finished.json       the stage is over; the best result is the final one

A folder gets its name only when it is whole, and its predecessor goes only then. A best result that is younger than the
last checkpoint is found again, bit for bit, by whoever goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_autoround.errors import OutputError
from hf_autoround.streams.journal import Journal, flush, write_atomically
from hf_autoround.tuning import BlockResult
from hf_autoround.tuning.end_to_end import Progress

FOLDER = "end_to_end"


class EndToEndJournal:
    """The checkpoints of one run, in a folder of its journal."""

    def __init__(self, journal: Journal) -> None:
        self.folder = journal.folder / FOLDER

    def finished(self) -> tuple[Progress, list[dict[str, Any]]] | None:
        """Return where the stage ended and its log, or None if it has not."""
        return _read(self.folder / "finished.json")

    def latest(self) -> tuple[Progress, list[dict[str, Any]]] | None:
        """Return the progress and the log of the last checkpoint, or None."""
        folder = self._newest("checkpoint")
        return None if folder is None else _read(folder / "progress.json")

    def load(self, unit: str) -> dict[str, Tensor]:
        """Return the learned tensors of a block in the last checkpoint."""
        folder = self._newest("checkpoint")
        assert folder is not None
        return load_file(folder / f"{unit}.safetensors")

    def save(self, progress: Progress, log: list[dict[str, Any]], blocks: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
        """Write a checkpoint."""

        def write(folder: Path) -> None:
            for unit, tensors in blocks:
                save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / f"{unit}.safetensors")
            write_atomically(folder / "progress.json", _text(progress, log))

        self._write("checkpoint", progress.step, write)
        self._keep_only("checkpoint", {progress.step})
        self._keep_only("best", {progress.best_step})

    def put_best(self, step: int, blocks: Iterable[tuple[str, BlockResult]]) -> None:
        """Write the blocks as they ship."""

        def write(folder: Path) -> None:
            for unit, result in blocks:
                Journal(folder, {}).put(unit, result, {})

        self._write("best", step, write)
        latest = self.latest()  # a resumed run begins there, and may not find this best again
        self._keep_only("best", {step} if latest is None else {step, latest[0].best_step})

    def best(self, step: int) -> Journal:
        """Return the best result, which was found at a step."""
        return Journal(self.folder / _name("best", step), {})

    def finish(self, progress: Progress, log: list[dict[str, Any]]) -> None:
        """Say that the stage is over."""
        write_atomically(self.folder / "finished.json", _text(progress, log))
        self._keep_only("checkpoint", set())
        self._keep_only("best", {progress.best_step})

    def _write(self, kind: str, step: int, write: Callable[[Path], None]) -> None:
        whole = self.folder / _name(kind, step)
        partial = whole.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            write(partial)
            for path in (*partial.iterdir(), partial):  # and nothing else: mapped files hold gigabytes that may stay in memory
                flush(path)
            shutil.rmtree(whole, ignore_errors=True)  # of a run that was killed after it
            os.replace(partial, whole)
            flush(self.folder)
        except (SafetensorError, OSError) as error:
            raise OutputError(f"cannot write {partial}: {error}; make room and resume") from error

    def _keep_only(self, kind: str, steps: set[int]) -> None:
        names = {_name(kind, step) for step in steps}
        for folder in self.folder.glob(f"{kind}-*"):
            if folder.name not in names:
                shutil.rmtree(folder)

    def _newest(self, kind: str) -> Path | None:
        whole = [folder for folder in self.folder.glob(f"{kind}-*") if folder.suffix != ".partial"]
        return max(whole, default=None)


def _name(kind: str, step: int) -> str:
    return f"{kind}-{step:06d}"


def _text(progress: Progress, log: list[dict[str, Any]]) -> bytes:
    return json.dumps({"progress": asdict(progress), "log": log}, indent=1).encode()


def _read(path: Path) -> tuple[Progress, list[dict[str, Any]]] | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return Progress(**content["progress"]), content["log"]
