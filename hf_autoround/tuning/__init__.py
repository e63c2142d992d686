# SPDX-License-Identifier: Apache-2.0
"""One block in, its quantized layers out.

To add an algorithm: write `tuning/<name>.py` with a function `(task, settings, on_step) -> BlockResult` and a line in
ALGORITHMS.
"""

from hf_autoround.tuning.opt_rtn import SAMPLED_ROWS, optimized_round_to_nearest
from hf_autoround.tuning.rtn import round_to_nearest
from hf_autoround.tuning.sign_round import sign_round
from hf_autoround.tuning.task import BlockAlgorithm, BlockResult, BlockTask, TunableWeight, TuningSettings

ALGORITHMS: dict[str, BlockAlgorithm] = {
    "sign_round": sign_round,
    "opt_rtn": optimized_round_to_nearest,
    "rtn": round_to_nearest,
}

__all__ = ["ALGORITHMS", "SAMPLED_ROWS", "BlockAlgorithm", "BlockResult", "BlockTask", "TunableWeight", "TuningSettings"]
