"""``featup-hub env``, shell completion, and a start without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from featup_hub import __version__
from featup_hub.cli import main
from featup_hub.cli.upsample import _IMPLEMENTATIONS


def test_env_shows_versions_and_why_an_implementation_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"featup_hub: {__version__}"
    assert f"torch: {torch.__version__}" in lines
    assert any(line.startswith("cpu: torch, because ") for line in lines)
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["featup_hub"] == __version__
    assert found["implementations"][0]["impl"] == "torch"


def test_implementations_to_choose_from_are_those_there_are() -> None:
    from typing import get_args

    from featup_hub.ops import Implementation

    assert set(_IMPLEMENTATIONS) == set(get_args(Implementation))


@pytest.mark.parametrize("line", ["--version", "--help", "upsample --help", "upsample --size"])
def test_help_and_mistyped_flags_are_answered_without_torch(line: str) -> None:
    program = f"""
import sys
from featup_hub.cli import main
try:
    main({line.split()!r})
except SystemExit:
    pass
slow = {{"torch", "numpy", "PIL", "timm"}} & set(sys.modules)
assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_script_for_shell_completion_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    assert "--value-range" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "needs shtab; pip install 'featup_hub[completion]'" in capsys.readouterr().err
