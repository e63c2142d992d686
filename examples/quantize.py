# SPDX-License-Identifier: Apache-2.0
"""Quantize a model to 4 bits, load it back, generate.

    python examples/quantize.py MODEL OUT [--dataset pydoc] [--iters 200]

MODEL is a folder or a Hub id. `pydoc` (Python's own manual) needs no network; give your own text for a model that matters.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_autoround import AutoRound


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model")
    flags.add_argument("out")
    flags.add_argument("--dataset", default="pydoc")
    flags.add_argument("--iters", type=int, default=200)
    flags.add_argument("--seqlen", type=int, default=512)
    flags.add_argument("--scheme", default="W4A16")
    args = flags.parse_args()

    rounding = AutoRound(args.model, scheme=args.scheme, dataset=args.dataset, iters=args.iters, seqlen=args.seqlen)
    rounding.quantize_and_save(args.out, format="auto_round")

    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    inputs = tokenizer("The first", return_tensors="pt", return_token_type_ids=False)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main()
