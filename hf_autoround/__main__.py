# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_autoround` is `hf-autoround`."""

import sys

from hf_autoround.cli.main import main

sys.exit(main())
