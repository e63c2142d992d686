# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL divergence, time and memory of this package beside auto-round 0.16.1, on the same data, runs interleaved.

    python benchmarks/accuracy.py --model MODEL --calibration TEXT --test TEXT --schemes W2A16G32 W4A16 --peer PEER_PYTHON

Each tool is imported once, and every run is a fork of that process, with --threads threads: its time is that of quantizing and
writing.
Both tools get the same rows of tokens. The judge loads every checkpoint in float32 through this package: perplexity on
--test, and KL divergence to the float model on rows 128 to 159 of the calibration text, which nobody tunes on.
"""

import argparse
import ast
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HELD_OUT = slice(128, 160)  # rows of the calibration text
LATE = 32  # positions from here on are judged apart: some models are over-confident after BOS
RUN = """
import json, os, resource, sys, time
os.environ["HF_HUB_OFFLINE"] = "1"  # or one of the tools waits for a network that is not needed
import torch
import transformers.modeling_utils
{tool}
def cpu():
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
for line in sys.stdin:
    if not os.fork():
        job = json.loads(line)
        torch.set_num_threads(job["threads"])
        start, before = time.perf_counter(), cpu()
        quantize(job, torch.load(job["tokens"]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print("RESULT", json.dumps([time.perf_counter() - start, cpu() - before, peak]), flush=True)
        break
    if os.wait()[1]:
        break
"""
OURS = """
from hf_autoround import AutoRound
recipes = {"opt_rtn": "opt-rtn", "e2e": "e2e", "e2e_light": "e2e-light", "e2e_best": "e2e-best",
           "v2": "default"}
def quantize(job, tokens):
    recipe = recipes.get(job["recipe"], job["recipe"])
    AutoRound(job["model"], scheme=job["scheme"], recipe=recipe, dataset=tokens, seqlen=tokens.shape[1],
              nsamples=len(tokens), seed=job["seed"], disable_tqdm=True, **job["iters"], **job["extra"]
              ).quantize_and_save(job["out"])
"""
PEER = """
from transformers import AutoTokenizer
from auto_round import AutoRound
recipes = {"rtn": dict(iters=0, disable_opt_rtn=True), "opt_rtn": dict(iters=0), "light": dict(iters=50, lr=5e-3),
           "default": dict(iters=200), "v2": dict(iters=200, enable_alg_ext=True), "best": dict(iters=1000)}
recipes |= {"e2e": recipes["default"], "e2e_light": recipes["light"], "e2e_best": recipes["best"]}  # what each stands beside
formats = {"INT8": "llm_compressor"}  # auto_round has none for it
def quantize(job, tokens):
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    AutoRound(job["model"], tokenizer, scheme=job["scheme"], dataset=[row[None] for row in tokens], seqlen=tokens.shape[1],
              nsamples=len(tokens), batch_size=8, seed=job["seed"], **recipes[job["recipe"]] | job["iters"]
              ).quantize_and_save(job["out"], format=formats.get(job["scheme"], "auto_round"))
"""


def rows(tokenizer, text: Path, length: int, bos: bool):
    """Return the text as rows of tokens, a BOS before each row if asked for."""
    import torch

    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    cut = ids[: len(ids) // length * length].view(-1, length)
    return torch.cat([torch.full((len(cut), 1), tokenizer.bos_token_id), cut], 1) if bos else cut


class Judge:
    """Scores checkpoints against the float model."""

    def __init__(self, model: str, test, held_out) -> None:
        import torch

        import hf_autoround  # noqa: F401

        self.test, self.held_out = test, held_out
        float_model = self.load(model)
        with torch.inference_mode():
            self.float_predictions = [self.predictions(float_model, rows) for rows in held_out.split(8)]

    def load(self, folder: Path | str):
        """Return a checkpoint in float32, its weights unpacked; inputs are quantized as its schemes say."""
        from torch.nn import functional as F
        from transformers import AutoModelForCausalLM

        from hf_autoround import AutoRoundConfig
        from hf_autoround.layers.packed_linear import PackedLinear

        quantized = "quantization_config" in json.loads((Path(folder) / "config.json").read_text())
        extra = {"quantization_config": AutoRoundConfig()} if quantized else {}  # or others' readers would take some formats
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **extra)
        for layer in model.modules():
            if isinstance(layer, PackedLinear):
                weight = layer.dequantized()
                layer.kernel = lambda layer, inputs, weight=weight: F.linear(inputs, weight, layer.bias)
        return model

    @staticmethod
    def predictions(model, rows):
        """Return the log-probabilities of what follows each token but the last: (N, T - 1, vocabulary)."""
        return model(rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)

    def scores(self, folder: Path) -> tuple[float, float, float, float]:
        """Return perplexity on the test rows and mean KL(float || quantized) per token of the held-out ones, then both over
        positions from 32 on alone."""
        import torch

        model = self.load(folder)
        with torch.inference_mode():
            losses = torch.cat(
                [-self.predictions(model, rows).gather(-1, rows[:, 1:, None]).squeeze(-1) for rows in self.test.split(8)]
            )
            kl = torch.cat(
                [
                    (p.exp() * (p - self.predictions(model, rows))).sum(-1)
                    for p, rows in zip(self.float_predictions, self.held_out.split(8), strict=True)
                ]
            )
        parts = losses.mean().exp(), kl.mean(), losses[:, LATE - 1 :].mean().exp(), kl[:, LATE:].mean()
        return tuple(part.item() for part in parts)


class Tool:
    """One of the tools, in a process that has imported it."""

    def __init__(self, name: str, python: str, code: str) -> None:
        self.name, pipe = name, subprocess.PIPE
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read after a failure, closed with the process)
        command = [python, "-c", RUN.format(tool=code)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.log, text=True)

    def run(self, job: dict) -> list[float]:
        """Return wall seconds, CPU seconds and peak memory in MB of one run."""
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("RESULT"):
                return json.loads(line.removeprefix("RESULT"))
        self.log.seek(0)
        raise SystemExit(f"{job} failed:\n{self.log.read()[-3000:]}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True)
    flags.add_argument("--calibration", type=Path, required=True)
    flags.add_argument("--test", type=Path, required=True)
    flags.add_argument("--schemes", nargs="+", default=["W2A16G32", "W3A16", "W4A16"])
    flags.add_argument("--recipes", nargs="+", default=["rtn", "opt_rtn", "light", "default"])
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--nsamples", type=int, default=128)
    flags.add_argument("--seqlen", type=int, default=256)
    flags.add_argument("--iters", type=int, help="in place of the tuned recipes' own, for both tools")
    flags.add_argument("--windows", type=int, default=0, help="score the first N test rows only")
    flags.add_argument("--bos", action="store_true", help="BOS before each test row")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--ours", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of AutoRound, for us alone")
    flags.add_argument("--peer", help="python of a virtual environment with auto-round 0.16.1")
    args = flags.parse_args()

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    calibration = rows(tokenizer, args.calibration, args.seqlen, False)
    test = rows(tokenizer, args.test, args.seqlen, args.bos)
    judge = Judge(args.model, test[: args.windows or None], calibration[HELD_OUT])
    calibration = torch.cat([calibration[: HELD_OUT.start], calibration[HELD_OUT.stop :]])
    extra = {name: ast.literal_eval(value) for name, _, value in (each.partition("=") for each in args.ours)}
    print(f"float: perplexity {judge.scores(Path(args.model))[0]:.3f}   {args.threads} thread(s), seeds {args.seeds}", flush=True)
    print(
        f"{'scheme':<10} {'recipe':<9} {'tool':<13} {'perplexity':>26} {'KL':>9} {'late ppl':>9} {'late KL':>9} "
        f"{'wall s':>8} {'CPU s':>8} {'peak MB':>8}",
        flush=True,
    )
    tools = [Tool("hf_autoround", sys.executable, OURS)] + ([Tool("auto-round", args.peer, PEER)] if args.peer else [])
    with tempfile.TemporaryDirectory() as work:
        torch.save(calibration[: args.nsamples].clone(), f"{work}/tokens.pt")
        for scheme in args.schemes:
            for recipe in args.recipes:
                results: dict[str, list] = {tool.name: [] for tool in tools}
                for seed in args.seeds if "rtn" not in recipe else args.seeds[:1]:
                    for tool in tools:
                        out = Path(work) / f"{tool.name}-{scheme}-{recipe}-{seed}"
                        job = {"model": args.model, "scheme": scheme, "recipe": recipe, "seed": seed, "threads": args.threads,
                               "tokens": f"{work}/tokens.pt", "out": str(out), "extra": extra,
                               "iters": {"iters": args.iters} if args.iters and "rtn" not in recipe else {}}  # fmt: skip
                        usage = tool.run(job)
                        folder = next(path.parent for path in sorted(out.rglob("config.json")))
                        results[tool.name].append((*judge.scores(folder), *usage))
                for name, values in results.items():
                    mean = [statistics.mean(column) for column in zip(*values, strict=True)]
                    each = "/".join(f"{value[0]:.2f}" for value in values)
                    shown = f"{mean[0]:.2f} ({each})" if len(values) > 1 else f"{mean[0]:.2f}"
                    print(
                        f"{scheme:<10} {recipe:<9} {name:<13} {shown:>26} {mean[1]:>9.4g} {mean[2]:>9.2f} {mean[3]:>9.4g} "
                        f"{mean[4]:>8.1f} {mean[5]:>8.1f} {mean[6]:>8.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
