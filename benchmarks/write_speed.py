# SPDX-License-Identifier: Apache-2.0
"""How long packing and writing take, beside copying the files.

    python benchmarks/write_speed.py [--layers 16] [--formats auto_round auto_gptq ...] [--rounds 3]

Rounds a random Llama (hidden 1024, feed-forward 2048, float32; 16 layers are 700 MB) to nearest in each format, and adds up what
is spent in the sink that packs layers and writes them to files, flushed to the disk. Beside it `shutil.copy` of the source's
weight files, and of those that were written, flushed too. What is read lies in the page cache. The least of all rounds, wall and
CPU seconds, one thread. Then a tuned run of few steps for each block: which part of it is the journal, packing and writing.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from memory import make_model

Seconds = tuple[float, float]  # wall, CPU


class Stopwatch:
    """Adds up the time spent inside functions."""

    def __init__(self) -> None:
        self.seconds: Seconds = 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside a `with`."""
        start = time.perf_counter(), time.process_time()
        yield
        stop = time.perf_counter(), time.process_time()
        self.seconds = self.seconds[0] + stop[0] - start[0], self.seconds[1] + stop[1] - start[1]

    def around(self, function: Callable) -> Callable:
        """Return the function, counted."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return counted


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights."""
    return sorted(folder.glob("*.safetensors"))


def copying(folder: Path, work: Path) -> Seconds:
    """Copy a checkpoint's weight files and flush them, as the writer does."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory(dir=work) as out, watch.running():
        for file in weight_files(folder):
            with open(shutil.copy(file, out), "rb+") as copied:
                os.fsync(copied.fileno())
    return watch.seconds


def quantizing(model: Path, out: Path, **arguments: Any) -> tuple[Seconds, Seconds]:
    """Quantize; return what the whole run took and what packing and writing took of it."""
    from hf_autoround import AutoRound
    from hf_autoround.formats.writer import CheckpointSink
    from hf_autoround.streams.journal import Journal

    whole, written = Stopwatch(), Stopwatch()
    with (
        patch.object(CheckpointSink, "add", written.around(CheckpointSink.add)),
        patch.object(CheckpointSink, "close", written.around(CheckpointSink.close)),
        patch.object(Journal, "put", written.around(Journal.put)),
        patch.object(Journal, "get", written.around(Journal.get)),
        whole.running(),
    ):
        AutoRound(str(model), scheme="W4A16", disable_tqdm=True, **arguments).quantize_and_save(str(out))
    return whole.seconds, written.seconds


def least(measured: list[Seconds]) -> Seconds:
    """Return the least wall and the least CPU seconds."""
    return min(wall for wall, _ in measured), min(cpu for _, cpu in measured)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--layers", type=int, default=16)
    flags.add_argument("--formats", nargs="+", default=["auto_round", "auto_gptq", "auto_awq", "llm_compressor", "mlx"])
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=4, help="of the tuned run; 0 for none")
    flags.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "autoround-write",
        help="where models are made, and stay for the next run",
    )
    args = flags.parse_args()

    import torch

    torch.set_num_threads(1)
    model = args.work / f"llama-{args.layers}"
    if not (model / "model.safetensors.index.json").exists():
        make_model(model, args.layers)
    print(f"{sum(map(os.path.getsize, weight_files(model))) / 1e6:.0f} MB; wall and CPU seconds, and how many times copying")
    columns = ("pack and write", "copy source", "times", "copy result", "times", "round")
    print(f"{'format':<15} " + " ".join(f"{column:>14}" for column in columns))
    for name in args.formats:
        written, source, result, other = [], [], [], []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory(dir=args.work) as out:
                whole, part = quantizing(model, Path(out) / "out", recipe="rtn", format=name)
                written.append(part)
                other.append((whole[0] - part[0], whole[1] - part[1]))
                source.append(copying(model, args.work))
                result.append(copying(Path(out) / "out", args.work))
        cells = [least(written)]
        for copied in (least(source), least(result)):
            cells += [copied, (cells[0][0] / copied[0], cells[0][1] / copied[1])]
        cells.append(least(other))
        print(f"{name:<15} " + " ".join(f"{f'{wall:.2f} {cpu:.2f}':>14}" for wall, cpu in cells), flush=True)
    if not args.steps:
        return
    data = torch.randint(0, 4000, (16, 256), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=args.work) as out:
        whole, part = quantizing(model, Path(out) / "out", iters=args.steps, dataset=data, nsamples=16, seqlen=256)
    print(
        f"tuned, {args.steps} steps of 8 x 256 tokens: {part[0]:.1f} of {whole[0]:.1f} s, CPU {part[1]:.1f} of {whole[1]:.1f} s"
    )


if __name__ == "__main__":
    main()
