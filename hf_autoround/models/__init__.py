# SPDX-License-Identifier: Apache-2.0
"""What a transformers model looks like: its checkpoint, its blocks, its weights, and the walk over them."""
