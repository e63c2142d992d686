# SPDX-License-Identifier: Apache-2.0
"""torch.nn and nothing above it: where a weight lives, how a block runs on other weights, the layer that ships."""
