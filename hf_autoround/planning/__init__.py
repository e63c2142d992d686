# SPDX-License-Identifier: Apache-2.0
"""Which weight gets which scheme."""
