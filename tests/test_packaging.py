# SPDX-License-Identifier: Apache-2.0
"""What a user of the package meets first: it imports in milliseconds, and a wheel holds what it must."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_importing_loads_neither_torch_nor_transformers_nor_peft():
    code = (
        "import sys, hf_autoround as h; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules], h.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "0.1.0"]


def test_importing_before_or_after_transformers_registers_and_every_module_can_come_first():
    check = "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as m; print(m['auto-round'].__module__)"
    for first in (
        "import hf_autoround; import transformers.modeling_utils",
        "import transformers.modeling_utils; import hf_autoround",
        "import hf_autoround.models.loading",
        "from hf_autoround import AutoRound",
        "from hf_autoround import AutoRoundConfig; import transformers.modeling_utils",
    ):
        done = subprocess.run([sys.executable, "-c", f"{first}; {check}"], capture_output=True, text=True, check=False)
        assert done.stdout.strip() == "hf_autoround.hf.config", (first, done.stderr)


def test_a_wheel_holds_the_package_its_types_and_what_optimum_finds(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {"hf_autoround/py.typed", "hf_autoround/cli/main.py", "hf_autoround/numerics/integer.py"} <= set(names)
    assert [name for name in names if name.startswith("optimum")] == ["optimum/commands/register/autoround.py"]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]
