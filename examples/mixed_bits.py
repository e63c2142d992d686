# SPDX-License-Identifier: Apache-2.0
"""Give single layers other bits: 2-bit weights, but 4 bits where it hurts most, and one layer left alone.

    python examples/mixed_bits.py MODEL OUT

`layer_config` takes full names, parts of names and regular expressions; exact names beat patterns, later patterns beat
earlier ones.
"""

import json
import sys
from pathlib import Path

from hf_autoround import AutoRound


def main(model, out):
    AutoRound(
        model,
        scheme="W2A16G64",
        layer_config={
            "down_proj": {"bits": 4},  # every down projection
            r"layers\.0\.": "W4A16",  # the whole first block, by a regular expression
        },
        ignore_layers=["layers.1.self_attn.o_proj"],
        recipe="rtn",  # no data needed: quick to try; leave it out to tune
    ).quantize_and_save(out)
    config = json.loads((Path(out) / "config.json").read_text())["quantization_config"]
    for name, scheme in sorted(config["extra_config"].items()):
        print(f"{name:<40} {scheme['bits']} bits")


if __name__ == "__main__":
    main(*sys.argv[1:])
