from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from featup_hub.registry import MODELS


@pytest.fixture(scope="module")
def hubconf() -> ModuleType:
    """The entry points as torch.hub imports them."""
    path = Path(__file__).parents[1] / "hubconf.py"
    spec = importlib.util.spec_from_file_location("hubconf", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(code: str, *arguments: object, cwd: Path) -> None:
    """Runs Python elsewhere, where featup_hub can only come from torch.hub."""
    own = {"PYTHONPATH", "COVERAGE_PROCESS_START"}
    environment = {k: v for k, v in os.environ.items() if k not in own}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**environment, "HF_HUB_OFFLINE": "1", "TORCH_HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_model_is_an_entry_point_and_nothing_else_is(hubconf):
    public = {n for n in dir(hubconf) if callable(getattr(hubconf, n)) and not n.startswith("_")}
    assert public == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_entry_points_load_the_model_of_their_name(name, hubconf, monkeypatch):
    calls = []
    monkeypatch.setattr(hubconf, "_load", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(
        hubconf, "_load_upsampler", lambda *args, **options: calls.append((args, options))
    )
    entry = getattr(hubconf, name)
    assert entry.__doc__
    if name == "jbu":
        entry(False, upsampler="w")
        assert calls == [((), {"pretrained": False, "upsampler": "w"})]
        return
    assert list(inspect.signature(entry).parameters)[:2] == ["pretrained", "use_norm"]  # upstream's
    entry(False, True, upsampler="w", looks=4)
    entry()
    given = {"pretrained": False, "use_norm": True, "upsampler": "w", "looks": 4}
    default = {"pretrained": True, "use_norm": True}
    assert calls == [((name,), given), ((name,), default)]


LOAD = """
import sys, torch
stages = sys.argv[2]
def load():
    return torch.hub.load(
        sys.argv[1], "efficientnet_lite0", source="local", trust_repo=True, upsampler=stages
    )
"""


def test_a_model_loads_elsewhere_and_keeps_working_when_its_folder_left_the_path(
    root, tmp_path, stages
):
    # Loaded by a relative path, then the folder changes: what is imported late must be found.
    code = """
import importlib, os, pkgutil
torch.manual_seed(1)
state = torch.get_rng_state()
path = list(sys.path)
first, second = load(), load()
import featup_hub
assert os.path.realpath(featup_hub.__file__).startswith(sys.argv[3])
assert sys.path == path
assert torch.equal(torch.get_rng_state(), state)
assert not any(module.training for module in first.modules())
os.chdir("/")
loaded = {name for name in sys.modules if name.startswith("featup_hub.")}
late = [m.name for m in pkgutil.walk_packages(featup_hub.__path__, "featup_hub.")]
late = [name for name in late if name not in loaded and "weights_data" not in name]
assert late
importlib.import_module("featup_hub.visualize")
image = torch.randn(1, 3, 60, 75)
with torch.no_grad():
    assert torch.equal(first(image), second(image))
    assert first(image).shape == (1, 112, 60, 75)
featup_hub.load_backbone("efficientnet_lite0")
"""
    run(LOAD + code, os.path.relpath(root, tmp_path), stages, root, cwd=tmp_path)


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_repository_with_common_names_is_not_disturbed(ours_first, root, tmp_path, stages):
    other = tmp_path / "other"
    for name in ("utils", "models", "weights", "tests", "benchmarks", "ops"):
        (other / name).mkdir(parents=True)
        (other / name / "__init__.py").write_text(f"ORIGIN = 'other {name}'\n")
    (other / "hubconf.py").write_text(
        "import benchmarks, models, ops, tests, utils, weights\n"
        "def origins():\n"
        "    return [m.ORIGIN for m in (benchmarks, models, ops, tests, utils, weights)]\n"
    )
    code = f"""
def theirs():
    found = torch.hub.load(sys.argv[3], "origins", source="local", trust_repo=True)
    names = ["benchmarks", "models", "ops", "tests", "utils", "weights"]
    assert found == ["other " + name for name in names], found
order = [load, theirs] if {ours_first} else [theirs, load]
for step in order:
    step()
import featup_hub.weights
assert featup_hub.weights.__file__.startswith(sys.argv[1])
with torch.no_grad():
    load()(torch.randn(1, 3, 32, 32))
"""
    run(LOAD + code, root, stages, other, cwd=tmp_path)


def test_the_shipped_models_load_without_a_network(root, tmp_path):
    code = """
import sys, torch
for name in ("efficientnet_lite0", "efficientnet_lite0_stride32", "jbu"):
    torch.hub.load(sys.argv[1], name, source="local", trust_repo=True)
"""
    run(code, root, cwd=tmp_path)
