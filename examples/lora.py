# SPDX-License-Identifier: Apache-2.0
"""Quantize a model, train a LoRA adapter on it, merge the two.

    python examples/lora.py MODEL OUT [--text FILE] [--scheme W2A16G64] [--steps 100]

OUT/quantized, OUT/adapter and OUT itself, the merged model, are written. Without a text it learns Python's manual.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_autoround import AutoRound, prepare_model_for_lora


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model")
    flags.add_argument("out", type=Path)
    flags.add_argument("--text", type=Path)
    flags.add_argument("--scheme", default="W2A16G64")
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--length", type=int, default=128)
    args = flags.parse_args()
    AutoRound(args.model, scheme=args.scheme, recipe="rtn").quantize_and_save(args.out / "quantized")

    tokenizer = AutoTokenizer.from_pretrained(args.out / "quantized")
    text = args.text.read_text() if args.text else "\n".join(topics.values())
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = [{"input_ids": row, "labels": row} for row in ids.split(args.length)[:-1]]

    model = prepare_model_for_lora(AutoModelForCausalLM.from_pretrained(args.out / "quantized"))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    training = TrainingArguments(
        args.out / "training", max_steps=args.steps, per_device_train_batch_size=8, learning_rate=1e-3, warmup_steps=10,
        logging_steps=max(1, args.steps // 10), save_strategy="no", report_to="none",
    )  # fmt: skip
    Trainer(model, training, train_dataset=rows).train()
    model.save_pretrained(args.out / "adapter")

    quantized = AutoModelForCausalLM.from_pretrained(args.out / "quantized", dtype="float32")
    merged = PeftModel.from_pretrained(quantized, args.out / "adapter").merge_and_unload()  # 16-bit layers, as its config says
    merged.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"merged model written to {args.out}")


if __name__ == "__main__":
    main()
