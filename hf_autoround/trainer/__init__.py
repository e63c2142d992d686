# SPDX-License-Identifier: Apache-2.0
"""The Trainer-like door: arguments, callbacks, the run."""
