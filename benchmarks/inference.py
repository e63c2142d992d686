# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of packed checkpoints on a CPU: this package, a bfloat16 model, and auto-round on the same files.

    python benchmarks/inference.py [--peer PEER_PYTHON] [--threads 2] [--rounds 3] [--clock process_time]

Makes a random Llama (hidden 2048, feed-forward 5632, vocabulary 32000, bfloat16) and rounds it to nearest at several widths.
Then, in rounds, every (tool, checkpoint) loads in a process of its own, and the bfloat16 model beside it; in turns, both
generate 32 tokens from a prompt of 16 and run a prompt of 512, so that other work on the machine slows both. Prints medians
over the rounds of each round's best, and of their ratios to the bfloat16 model's best (the first row is that model against
itself: noise). `ark` is this package with backend="ark", if auto-round-lib is installed beside it. Peak RssAnon is sampled from
/proc every 5 ms while loading, less that of the imports. Linux only. PEER_PYTHON needs auto-round 0.16.1 and auto-round-lib
0.16.0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median

MEASURE = """
import json, sys, threading, time, torch
folder, base, tool, dtype, threads, clock_name = sys.argv[1:]
now = getattr(time, clock_name)
torch.set_num_threads(int(threads))
import transformers.modeling_utils
from transformers import AutoModelForCausalLM
extra = {}
if tool in ("ours", "ark"):
    import hf_autoround.hf.quantizer
    from hf_autoround import AutoRoundConfig
    extra = {"quantization_config": AutoRoundConfig(backend=tool)} if tool == "ark" else {}
elif tool == "peer":
    import auto_round, auto_round.inference.convert_model
    from transformers import AutoRoundConfig
    import auto_round_kernel
    extra = {"quantization_config": AutoRoundConfig(backend="ark"), "device_map": "cpu"}
def anon():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000
peak, loading = 0.0, True
def sample():
    global peak
    while loading:
        peak = max(peak, anon())
        time.sleep(0.005)
watch = threading.Thread(target=sample)
before, started = anon(), time.perf_counter()
watch.start()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **extra)
load = time.perf_counter() - started
loading = False
watch.join()
rows = torch.randint(0, 32000, (1, 512), generator=torch.Generator().manual_seed(0))
def clock(call):
    started = now()
    call()
    return now() - started
def generate(model):
    model.generate(rows[:, :16], attention_mask=torch.ones(1, 16, dtype=torch.int64), max_new_tokens=32, min_new_tokens=32,
                   do_sample=False)
@torch.no_grad()
def prefill(model):
    model(rows, logits_to_keep=1)
models = model, AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
best = {}
for call, tokens in ((generate, 32), (prefill, 512)):
    for one in models:
        call(one)
    times = [[clock(lambda: call(one)) for one in models] for _ in range(3)]
    ours, base = (min(column) for column in zip(*times))
    best |= {call.__name__: tokens / ours, call.__name__ + " ratio": base / ours}
print("RESULT", json.dumps(best | {"load": load, "peak": peak - before}))
"""
WIDTHS = {"W4A16": {}, "W4A16-asym": {"sym": False}, "W8A16": {}, "W8A16G-1": {"group_size": -1}, "W2A16": {}}


def make_models(work: Path, layers: int) -> dict[str, Path]:
    """Write the float model and its roundings, if they are not there, and return their folders."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from hf_autoround import AutoRound

    folders = {name: work / name for name in ("bfloat16", *WIDTHS)}
    if not (folders["bfloat16"] / "config.json").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
            vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folders["bfloat16"])
        words = {f"w{index}": index for index in range(32000)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
        tokenizer.save_pretrained(folders["bfloat16"])
    for name, arguments in WIDTHS.items():
        if not (folders[name] / "config.json").exists():
            scheme = name.split("-")[0].removesuffix("G")
            AutoRound(str(folders["bfloat16"]), scheme=scheme, recipe="rtn", disable_tqdm=True, **arguments).quantize_and_save(
                folders[name]
            )
    return folders


def measure(python: str, folder: Path, tool: str, dtype: str, threads: int, clock: str) -> dict[str, float] | None:
    """Run one process and return what it measured, None if it failed."""
    command = [python, "-c", MEASURE, str(folder), str(folder.with_name("bfloat16")), tool, dtype, str(threads), clock]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{tool} {folder.name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--peer", help="python of a virtual environment with auto-round 0.16.1 and auto-round-lib 0.16.0")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument(
        "--clock", choices=["perf_counter", "process_time"], default="perf_counter",
        help="process_time, with one thread, hardly sees other work on the machine",
    )  # fmt: skip
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--layers", type=int, default=6)
    flags.add_argument("--widths", nargs="+", default=list(WIDTHS))
    flags.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "autoround-inference",
        help="where models are made, and stay for the next run",
    )
    args = flags.parse_args()
    folders = make_models(args.work, args.layers)
    runs = [("bfloat16", "bfloat16", "bfloat16")] + [("ours", name, "bfloat16") for name in args.widths]
    if find_spec("auto_round_kernel"):
        runs += [("ark", name, "bfloat16") for name in args.widths]
    if args.peer:  # its kernels compute in float32: the faster of the two counts
        runs += [("peer", name, dtype) for name in args.widths for dtype in ("bfloat16", "float32")]
    found: dict[tuple[str, str, str], list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(args.rounds):
        for tool, name, dtype in runs:
            python = args.peer if tool == "peer" else sys.executable
            result = measure(python, folders[name], tool, dtype, args.threads, args.clock)
            if result is not None:
                found[tool, name, dtype].append(result)
    print(f"{'tool':<9} {'checkpoint':<11} {'in':<9} {'generate':>9} {'x bf16':>7} {'prefill':>9} {'x bf16':>7} "
          f"{'load s':>7} {'peak MB':>8} {'disk MB':>8} {'ratio':>6}")  # fmt: skip
    for (tool, name, dtype), rounds in found.items():
        if not rounds:
            continue
        disk = sum(path.stat().st_size for path in folders[name].glob("*.safetensors")) / 1e6
        cells = []
        for what in ("generate", "prefill"):
            speed, ratio = (median(row[key] for row in rounds) for key in (what, f"{what} ratio"))
            cells.append(f"{speed:>9.1f} {ratio:>7.2f}")
        load, peak = (median(row[what] for row in rounds) for what in ("load", "peak"))
        print(f"{tool:<9} {name:<11} {dtype:<9} {' '.join(cells)} {load:>7.2f} {peak:>8.0f} {disk:>8.0f} {peak / disk:>6.2f}")


if __name__ == "__main__":
    main()
