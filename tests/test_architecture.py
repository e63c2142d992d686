# SPDX-License-Identifier: Apache-2.0
"""The architecture as a test: floors import only downwards, files stay short, optional packages stay optional."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_autoround"
FLOORS = [
    {"errors", "registry", "scheme"},
    {"numerics"},
    {"layouts"},
    {"layers"},
    {"models"},
    {"calibration"},
    {"planning", "tuning"},
    {"streams"},
    {"formats", "backends"},
    {"trainer"},
    {"autoround", "hf"},
    {"evaluation"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
WITHIN_FLOOR = {"errors", "registry", "scheme"}  # single files that may use each other
OPTIONAL = {
    "gguf",
    "gptqmodel",
    "vllm",
    "optimum",
    "lm_eval",
    "mlx",
    "compressed_tensors",
    "peft",
    "auto_round_kernel",
    "triton",
    "matplotlib",
}
REQUIRED = {"torch", "transformers", "accelerate", "datasets", "safetensors"}
BROUGHT_ALONG = {"huggingface_hub", "tokenizers", "tqdm", "numpy", "psutil"}  # by transformers or accelerate
# modules of kernels, which find their language among their globals: they import it, and are imported where they are used
KERNELS = {"hf_autoround.backends.triton_kernels": "triton"}
FORBIDDEN = {"print", "hasattr", "setattr"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(tree: ast.AST, file: Path):
    """Yield (absolute name, node) for every import, `from . import x` resolved to the module x."""
    package = ["hf_autoround", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, node.module] if node.module else base)
            yield from ((f"{name}.{alias.name}" if name == "hf_autoround" else name, node) for alias in node.names)


def module_level(tree: ast.Module):
    """Return every node that runs on import: the bodies of `if`, `try` and `with` too, functions not."""
    pending, nodes = list(tree.body), set()
    while pending:
        node = pending.pop()
        nodes.add(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return nodes


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_keeps_to_its_floor(file):
    tree = ast.parse(file.read_text())
    here = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if here in ("__init__", "__main__"):
        return
    for name, node in imports(tree, file):
        top, *rest = name.split(".")
        if top != "hf_autoround" or not rest or rest[0] == "__version__":
            continue
        below = LEVEL[rest[0]] < LEVEL[here] or rest[0] == here or {rest[0], here} <= WITHIN_FLOOR
        assert below, f"line {node.lineno}: {here} must not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_is_short_and_smuggles_nothing(file):
    source = file.read_text()
    tree = ast.parse(source)
    assert source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert source.count("\n") <= 400, "split this file"
    on_import = module_level(tree)
    language = KERNELS.get(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    for name, node in imports(tree, file):
        top = name.partition(".")[0]
        late = (top in OPTIONAL and top != language) or name in KERNELS
        assert not (late and node in on_import), f"line {node.lineno}: import {name} where it is used"
        known = top in {"hf_autoround", *REQUIRED, *BROUGHT_ALONG, *OPTIONAL} or top in sys.stdlib_module_names
        assert known, f"line {node.lineno}: {top} is no dependency of ours"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"line {node.lineno}: no global state"
        if isinstance(node, ast.ExceptHandler):
            caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"Exception"}
            assert "Exception" not in caught, f"line {node.lineno}: catch what can happen, not Exception"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            allowed = FORBIDDEN - ({"print"} if file.is_relative_to(ROOT / "cli") else set())
            assert node.func.id not in allowed, f"line {node.lineno}: no {node.func.id}()"


def test_every_floor_is_a_place_in_the_tree():
    assert {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} - {"__init__", "__main__"} == set(LEVEL)


def test_integrations_hide_nothing_of_their_hosts():
    assert not list((ROOT.parent / "integrations" / "optimum").rglob("__init__.py")), "optimum is a namespace package (PEP 420)"
