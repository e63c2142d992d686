# SPDX-License-Identifier: Apache-2.0
"""`hf-autoround demo`: train a small language model, quantize it in six ways, load each back, and compare.

It needs neither network nor data: the text is Python's own manual. The model is far too small to be of use, but it is a
real one: rounding it hurts, and tuning the rounding helps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from hf_autoround.calibration.sources import open_source
from hf_autoround.cli.parser import Parser
from hf_autoround.evaluation import perplexity
from hf_autoround.models.loading import hidden_progress_bar
from hf_autoround.trainer.arguments import recipe
from hf_autoround.trainer.trainer import RoundingTrainer

VOCABULARY, LENGTH = 2048, 128
METHODS = ("rtn", "opt-rtn", "default")
SCHEMES = ("W4A16", "W2A16G64")


def run(words: Sequence[str]) -> int:
    """Run the demo; return the exit code."""
    flags = Parser(prog="hf-autoround demo", description=(__doc__ or "").partition("\n\n")[2])
    flags.add_argument("--output_dir", metavar="FOLDER", help="Keep the models here; by default they are thrown away.")
    flags.add_argument("--steps", type=int, default=500, metavar="N", help="Training steps of the float model. [500]")
    flags.add_argument("--iters", type=int, default=200, metavar="N", help="Tuning steps per block. [200]")
    args = flags.parse_args(list(words))
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="autoround-demo-") as temporary, hidden_progress_bar():
        folder = Path(args.output_dir) if args.output_dir else Path(temporary)
        print(f"training a small Qwen3 language model on Python's manual: {args.steps} steps")
        held_out = train(folder / "float", args.steps)
        print(compare(folder, held_out, args.iters))
        print(f'\nW4A16, tuned, goes on from "The Python":{generated(folder / "W4A16-default")}')
    return 0


def train(folder: Path, steps: int, seed: int = 0) -> Tensor:
    """Train a model and its tokenizer into `folder`; return rows of tokens (N, T) that it never saw."""
    texts = list(open_source("pydoc", 0))
    held_out, training = texts[::10], [text for place, text in enumerate(texts) if place % 10]
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        rows = _rows(tokenizer, training)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
        for _ in tqdm(range(steps), unit="step", disable=None):
            batch = rows[torch.randint(len(rows), (16,))]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return _rows(tokenizer, held_out)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def compare(folder: Path, held_out: Tensor, iters: int) -> str:
    """Quantize `folder/float` by every scheme and method; return the table."""
    rows = [_row("float", "", folder / "float", held_out, 16.0, 0.0)]
    for scheme in SCHEMES:
        for method in METHODS:
            target = folder / f"{scheme}-{method}"
            steps = {"iters": iters} if method == "default" else {}
            arguments = recipe(
                method, scheme=scheme, output_dir=str(target), dataset="pydoc", seqlen=LENGTH, disable_tqdm=True, **steps
            )
            started = time.time()
            trainer = RoundingTrainer(folder / "float", arguments)
            trainer.train()
            rows.append(_row(scheme, arguments.algorithm, target, held_out, _bits_per_weight(trainer), time.time() - started))
    head = f"{'scheme':<10} {'method':<11} {'bits/weight':>11} {'size MB':>8} {'perplexity':>11} {'seconds':>8}"
    return "\n".join(["", head, "-" * len(head), *rows])


def generated(folder: Path, prompt: str = "The Python") -> str:
    """Return how a model goes on."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).split())


def _row(scheme: str, method: str, folder: Path, held_out: Tensor, bits: float, seconds: float) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    score = perplexity(model, held_out)
    return f"{scheme:<10} {method:<11} {bits:>11.2f} {size:>8.2f} {score:>11.2f} {seconds:>8.1f}"


def _bits_per_weight(trainer: RoundingTrainer) -> float:
    """Return the stored bits of the quantized layers (codes, scales, zero points) per weight."""
    run = trainer.prepare()
    target = run.output.formats[0]
    bits = weights = 0
    for site in run.plan.sites:
        weights += site.shape[0] * site.shape[1]
        for shape, dtype in target.stored(run.plan, site, torch.bfloat16).values():
            bits += 8 * dtype.itemsize * shape[0] * shape[1]
    return bits / weights


def _rows(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    ids = [token for text in texts for token in [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
