# SPDX-License-Identifier: Apache-2.0
"""Write the logits that transformers computes with auto-round's loader, with quantized inputs and without:
`logits.py folder dtype rows.safetensors answer.safetensors`.

Runs in an environment that has auto-round and not this package.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

folder, dtype, rows, answer = sys.argv[1:]
torch.set_num_threads(1)
model, report = AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype), device_map="cpu", output_loading_info=True
)
assert not any(report.values()), report
kinds = {type(module).__module__ for module in model.modules() if type(module).__module__.startswith("auto_round")}
assert kinds, "auto-round loaded nothing"


def logits() -> torch.Tensor:
    """Return the model's logits."""
    with torch.no_grad():
        return model(load_file(rows)["rows"]).logits.float().contiguous()


found = {"logits": logits()}
for module in model.modules():
    if "pre_dequantized_input" in vars(module):
        module.pre_dequantized_input = True  # its word for: leave the inputs alone
save_file(found | {"weights alone": logits()}, answer)
print(*sorted(kinds))
