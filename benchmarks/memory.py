# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a whole run over a checkpoint that is larger than the run may be.

    python benchmarks/memory.py [--peer PEER_PYTHON] [--layers 32 64] [--modes rtn model-free tuned resident streamed]

Makes a random Llama (hidden 1024, feed-forward 2048, float32) with each number of layers, quantizes it with this package
and, if given, with auto-round in its own virtual environment, and prints the peak of RssAnon and RssFile, sampled from
/proc every 20 ms. With several numbers of layers, what each further quantized weight costs: the difference of the peaks over
that of the weights, so that whatever does not grow with the model (imports, embeddings, one block at work) drops out.
`resident` and `streamed` are tuning end to end. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY = 4096
WEIGHTS = 4 * 1024 * 1024 + 3 * 1024 * 2048  # that are quantized, in one layer
PEER = """
import sys, torch
torch.set_num_threads(1)
from auto_round import AutoRound
model, out, mode = sys.argv[1:]
extra = dict(iters=0, disable_opt_rtn=True) if mode == "rtn" else dict(iters=4, nsamples=16, seqlen=256, low_gpu_mem_usage=True)
if mode == "model-free":
    extra = dict(iters=0, disable_opt_rtn=True, model_free=True)
data = [torch.randint(0, 4000, (1, 256)) for _ in range(16)]
AutoRound(model, scheme="W4A16", dataset=data, low_cpu_mem_usage=True, **extra).quantize_and_save(out, format="auto_round")
"""
OURS = """
import sys, torch
torch.set_num_threads(1)
from hf_autoround import AutoRound
model, out, mode = sys.argv[1:]
extra = dict(recipe="rtn") if mode == "rtn" else dict(iters=4, nsamples=16, seqlen=256)
if mode in ("resident", "streamed"):  # end to end
    extra = dict(iters=0, end_to_end_steps=2, residence=mode, nsamples=16, seqlen=256)
data = torch.randint(0, 4000, (16, 256), generator=torch.Generator().manual_seed(0))
AutoRound(model, scheme="W4A16", dataset=data, disable_tqdm=True, **extra).quantize_and_save(out)
"""


def make_model(folder: Path, layers: int) -> None:
    """Write the checkpoint layer by layer: one shard for each eight layers."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=VOCABULARY, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))).save_pretrained(folder)
    shapes = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024),
              "self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (2048, 1024), "mlp.up_proj": (2048, 1024),
              "mlp.down_proj": (1024, 2048)}  # fmt: skip
    index, shard, files = {}, {}, 0

    def flush() -> None:
        nonlocal shard, files
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        shard = {}

    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens", "lm_head"):
        shard[f"{name}.weight"] = torch.randn(VOCABULARY, 1024, generator=generator) * 0.02
    shard["model.norm.weight"] = torch.ones(1024)
    for layer in range(layers):
        for name, shape in shapes.items():
            shard[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * 0.02
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"model.layers.{layer}.{name}.weight"] = torch.ones(1024)
        if layer % 8 == 7:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def peak(command: list[str]) -> tuple[float, float, float]:
    """Run a command; return peak RssAnon and RssFile in MB, and seconds."""
    started = time.time()
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read after a failure, closed with the process)
    process = subprocess.Popen(command, stdout=log, stderr=log)
    anon = file = 0
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            anon = max(anon, int(status["RssAnon"].split()[0]))
            file = max(file, int(status["RssFile"].split()[0]))
        except (OSError, KeyError):
            pass
        time.sleep(0.02)
    if process.returncode:
        log.seek(0)
        print(log.read()[-3000:], file=sys.stderr)
        return float("nan"), float("nan"), float("nan")
    return anon / 1000, file / 1000, time.time() - started


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--peer", help="python of a virtual environment with auto-round 0.16.1")
    flags.add_argument("--layers", type=int, nargs="+", default=[32, 64])
    flags.add_argument("--modes", nargs="+", default=["rtn", "tuned"])
    flags.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "autoround-memory",
        help="where models are made, and stay for the next run",
    )
    args = flags.parse_args()
    print(f"{'tool':<22} {'mode':<11} {'layers':>6} {'RssAnon MB':>11} {'RssFile MB':>11} {'s':>6}")
    idle = peak([sys.executable, "-c", "import torch, transformers.modeling_utils"])
    print(f"{'import only':<22} {'':<11} {'':>6} {idle[0]:>11.0f} {idle[1]:>11.0f} {idle[2]:>6.0f}")
    peaks: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for layers in args.layers:
        model = args.work / f"llama-{layers}"
        if not (model / "model.safetensors.index.json").exists():
            make_model(model, layers)
        for mode in args.modes:
            tools = [("hf_autoround", sys.executable, OURS)] if mode != "model-free" else []
            tools += [("auto-round 0.16.1", args.peer, PEER)] if args.peer and mode not in ("resident", "streamed") else []
            for name, python, script in tools:
                with tempfile.TemporaryDirectory() as out:
                    anon, file, seconds = peak([python, "-c", script, str(model), f"{out}/out", mode])
                print(f"{name:<22} {mode:<11} {layers:>6} {anon:>11.0f} {file:>11.0f} {seconds:>6.0f}", flush=True)
                peaks.setdefault((name, mode), {})[layers] = anon, file
    fewest, most = min(args.layers), max(args.layers)
    if fewest < most:
        print(f"\nbytes per further quantized weight, from {fewest} to {most} layers")
        for (name, mode), found in peaks.items():
            anon, file = (
                (more - less) * 1e6 / WEIGHTS / (most - fewest) for less, more in zip(found[fewest], found[most], strict=True)
            )
            print(f"{name:<22} {mode:<11} {'':>6} {anon:>11.2f} {file:>11.2f}")


if __name__ == "__main__":
    main()
