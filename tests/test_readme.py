"""The README's two commands, which ``.ci/run`` runs, and its table of models."""

from __future__ import annotations

import re
from pathlib import Path

from featup_hub.registry import MODELS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_continuous_integration_runs_the_readmes_two_commands(root: Path) -> None:
    script = (root / ".ci/run").read_text()
    first, second = (block.strip() for block in blocks("bash"))
    install, upsample = first.split(" && ")
    assert f"{install.replace('pip install', 'pip install --quiet')}\n" in script
    shown = upsample.replace("tests/data", "$OLDPWD/tests/data").partition(" --out")[0]
    assert shown in script.replace('"', "")
    install, tests = second.split(" && ")
    assert install.replace("pip install", "pip install --quiet") in script
    assert f"\n{tests}" in script


def test_every_model_of_the_registry_is_named() -> None:
    table = README[README.index("## Which model") : README.index("## How good")]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    for name in MODELS:
        assert name in named
