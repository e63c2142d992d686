# SPDX-License-Identifier: Apache-2.0
"""Several processes run the same command under torchrun: one of them speaks.

What is wrong is mostly wrong in all of them, and a launcher ends the others as soon as one has failed. So the main process
says it and exits at once, and the others wait for their end; an error that still finds one alive is its own, to be said.
"""

import os
import time

_PATIENCE = 10.0  # seconds: the main process is as far as the others, or a few behind at the start


def wait_for_turn() -> None:
    """Return at once in the main process, and in another one when the main process has not ended everything in time."""
    number = int(os.environ.get("RANK", "0")) if several() else 0
    if number:
        time.sleep(_PATIENCE + number)


def several() -> bool:
    """Say whether a launcher started more processes than this one."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
