"""Allowed imports between layers, and the cost of importing the package."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LAYERS = [
    {"files"},
    {"ops", "pixels"},
    {"registry", "image", "visualize"},
    {"weights"},
    {"upsamplers", "backbones"},
    {"model"},
    {"loading"},
    {"training", "evaluation", "export", "demo"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PACKAGE = Path(__file__).resolve().parents[1] / "featup_hub"


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem != "__init__"]


def unit(path: Path) -> str:
    """The part of the package that a file belongs to: a folder or a module at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("featup_hub.")}
    return found & set(RANK)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_lower_layers_only(path):
    own = unit(path)
    assert own in RANK, f"{path.name} belongs to no layer; add it to LAYERS"
    for other in imported_units(ast.parse(path.read_text())) - {own}:
        assert RANK[other] < RANK[own], f"{own} imports {other}, which is not below it"


def test_importing_needs_torch_only_and_changes_nothing():
    program = """
import random, sys, warnings
import torch
warnings.simplefilter("error")
before = set(sys.modules)
state, threads, flags = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
import featup_hub
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"featup_hub", "torch"}, new
assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
upsampler = featup_hub.load_upsampler(pretrained=False)
upsampler(torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 8, 8))
assert not {"featup_hub.ops.cuda", "featup_hub.backbones.timm"} & set(sys.modules)
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"featup_hub", "torch"}, new
assert torch.is_grad_enabled() == flags
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == ""


@pytest.mark.parametrize("package", ["", ".backbones", ".upsamplers", ".weights"])
def test_every_name_that_a_package_lists_is_found_and_no_other(package):
    module = importlib.import_module(f"featup_hub{package}")
    assert set(module.__all__) <= set(dir(module))
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module 'featup_hub{package}' has no attribute 'no'"):
        _ = module.no


def test_an_editable_installation_is_found_from_the_folder_above_the_checkout(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "weights"):
        (tmp_path / name).symlink_to(PACKAGE.parent / name)
    (tmp_path / "featup_hub").mkdir()
    (tmp_path / "featup_hub/__init__.py").touch()
    build = "from setuptools import build_meta; build_meta.build_editable('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        entries = [wheel.read(n).decode().strip() for n in wheel.namelist() if n.endswith(".pth")]
    # A path comes before the folder above, which Python takes for an empty package of this name.
    assert entries == [str(tmp_path)]
