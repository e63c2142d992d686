# SPDX-License-Identifier: Apache-2.0
"""Producers of finished layers: tuned block by block, or straight from the shards; and the journal between."""
