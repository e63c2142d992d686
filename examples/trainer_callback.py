# SPDX-License-Identifier: Apache-2.0
"""RoundingTrainer with a callback: an epoch is a block, a step an iteration. This one ends a block that no longer improves.

python examples/trainer_callback.py MODEL OUT
"""

import sys

from transformers import TrainerCallback

from hf_autoround import RoundingArguments, RoundingTrainer


class Patience(TrainerCallback):
    """End a block when the mean loss of the last steps is no better than that of those before."""

    def __init__(self, steps=20):
        self.steps, self.losses = steps, []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.losses = []

    def on_step_end(self, args, state, control, loss=None, **kwargs):
        self.losses.append(loss)
        recent, before = self.losses[-self.steps :], self.losses[-2 * self.steps : -self.steps]
        if before and len(before) == self.steps and sum(recent) >= sum(before):
            control.should_epoch_stop = True


def main(model, out):
    args = RoundingArguments(output_dir=out, scheme="W3A16", iters=100, seqlen=256, nsamples=32, dataset="pydoc")
    output = RoundingTrainer(model, args, callbacks=[Patience()]).train()
    print(f"{output.metrics['quantized_layers']} layers, KL divergence to the float model {output.training_loss:.3e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
