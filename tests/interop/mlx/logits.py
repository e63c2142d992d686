# SPDX-License-Identifier: Apache-2.0
"""Print the logits that mlx-lm computes: `logits.py folder float32|stored rows`, rows of token ids as JSON.

Runs in mlx-lm's environment, which has neither torch nor this package.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
folder, dtype, rows = sys.argv[1:]
model, _ = load_model(Path(folder))
if dtype == "float32":
    model.set_dtype(mx.float32)
logits = model(mx.array(json.loads(rows)))
print(json.dumps({"dtype": str(logits.dtype), "logits": logits.astype(mx.float32).tolist()}))
