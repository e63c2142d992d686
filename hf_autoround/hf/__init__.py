# SPDX-License-Identifier: Apache-2.0
"""The border to transformers: configuration, quantizer, registration."""
