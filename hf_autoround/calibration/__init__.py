# SPDX-License-Identifier: Apache-2.0
"""Calibration data: from whatever a user has to equal rows of tokens."""
