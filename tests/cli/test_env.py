"""``featup-hub env``, shell completion, and a start without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featup_hub import __version__
from featup_hub.cli import main
from featup_hub.cli.upsample import _IMPLEMENTATIONS
from featup_hub.ops.choice import ImplementationStatus


def test_env_shows_versions_and_why_an_implementation_runs(capsys, monkeypatch):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"featup_hub: {__version__}"
    assert f"torch: {torch.__version__}" in lines
    assert any(line.startswith("cpu: torch, because the fused kernels need ") for line in lines)
    compiled = ImplementationStatus(
        device="cuda:0 (a card)",
        impl="cuda",
        compiler="NVRTC 12.8",
        cubins=(Path("/cache/forward.cubin"), Path("/cache/backward.cubin")),
    )
    monkeypatch.setattr("featup_hub.ops.implementations", lambda: [compiled])
    assert main(["env"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "cuda:0 (a card): cuda, compiled by NVRTC 12.8, kept in /cache",
        "  /cache/forward.cubin",
        "  /cache/backward.cubin",
    ]
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["featup_hub"] == __version__
    (row,) = found["implementations"]
    assert row["cubins"] == ["/cache/forward.cubin", "/cache/backward.cubin"]
    assert (row["impl"], row["reason"]) == ("cuda", None)


def test_implementations_to_choose_from_are_those_there_are():
    from typing import get_args

    from featup_hub.ops import Implementation

    assert set(_IMPLEMENTATIONS) == set(get_args(Implementation))


@pytest.mark.parametrize("line", ["--version", "--help", "upsample --help", "upsample --size"])
def test_help_and_mistyped_flags_are_answered_without_torch(line):
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


def test_a_script_for_shell_completion_is_printed(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    assert "--value-range" in capsys.readouterr().out
