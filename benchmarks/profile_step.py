# SPDX-License-Identifier: Apache-2.0
"""Where the time of a tuning step goes: the operations of a short tuned run, by their own CPU time.

python benchmarks/profile_step.py MODEL TEXT [--scheme W2A16G32] [--seqlen 256] [--threads 1]
"""

import argparse
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from hf_autoround import AutoRound

PRODUCTS = ("aten::mm", "aten::bmm", "aten::baddbmm", "aten::addmm")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model")
    flags.add_argument("text")
    flags.add_argument("--scheme", default="W2A16G32")
    flags.add_argument("--seqlen", type=int, default=256)
    flags.add_argument("--iters", type=int, default=40)
    flags.add_argument("--threads", type=int, default=1)
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as out, profile(activities=[ProfilerActivity.CPU]) as profiled:
        AutoRound(
            args.model, scheme=args.scheme, dataset=args.text, seqlen=args.seqlen, iters=args.iters, disable_tqdm=True
        ).quantize_and_save(f"{out}/out")
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    print(f"{'operation':<44} {'share':>6} {'calls':>8}")
    for event in events[:12]:
        print(f"{event.key[:44]:<44} {event.self_cpu_time_total / total:>6.1%} {event.count:>8}")
    print(f"matrix products {products / total:.1%} of {total / 1e6:.1f} CPU seconds")


if __name__ == "__main__":
    main()
