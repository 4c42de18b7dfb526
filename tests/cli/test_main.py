"""The command line as a whole: what is said of what cannot work, and the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from featup_hub import __version__
from featup_hub.cli import main
from featup_hub.cli.terminal import UsageError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["upsample", "x", "--model", "dinov"], "did you mean 'dinov2'"),
        (["upsample", "x", "--model", "jbu"], "a model with a backbone is needed; jbu"),
        (["upsample", "x", "--size", "225"], "--size must be a positive multiple of 16; got 225"),
        (["upsample", "x", "--size", "224x100"], "got 100; try 96 or 112; 16 is the stride"),
        (["upsample", "x", "--size", "0"], "got 0; try 16 or 32"),
        (["upsample", "x", "--size", "big"], "such as 448, or HxW, 448x640; got 'big'"),
        (["upsample", "x", "--device", "gpu"], "--device must be cpu, cuda, cuda:1 or mps"),
        (["upsample", "x", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["upsample", "x", "--weights", "nothing"], "no weights file nothing; check the name"),
        (["upsample", "x", "--weights", "."], "weights must be a safetensors file; . is a folder"),
        (["upsample", "x", "--backbone-weights", "nothing"], "no weights file nothing; check"),
        (["upsample", "x", "--backbone-weights", "."], "must be a safetensors file; . is a folder"),
        (["upsample", "x", "--over"], "unrecognized arguments: --over"),
        (["upsample"], "required: IMAGE; see featup-hub upsample --help"),
        (["upsampel"], "invalid choice: 'upsampel' (choose from"),
        (["fit", "x", "--size", "-4"], "--size must be positive; got -4"),
        (["fit", "x", "--out", "."], "--out must be a file that can be written; .: it is a folder"),
        (["fit", "x", "--out", "no/x"], "no/x: its folder does not exist"),
        (["fit", "x", "--device", "gpu"], "--device must be cpu, cuda, cuda:1 or mps"),
        (["train", "x", "--out", "y", "--steps", "-3"], "--steps must be positive; got -3"),
        (["train", "x", "--out", "y", "--batch", "0"], "--batch must be positive; got 0"),
        (["train", "x", "--out", "y", "--device", "gpu"], "--device must be cpu, cuda, cuda:1"),
        (["train", "photos"], "required: --out; see featup-hub train --help"),
        (["train", "photos", "--out", "x", "--steps", "ten"], "invalid int value: 'ten'"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err.splitlines()[0]
    assert "Traceback" not in err
    with pytest.raises(UsageError):
        main([*arguments, "--debug"])


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in ("models", "upsample", "train", "convert"))


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"featup_hub {__version__}\n"


def test_python_m_runs_the_command_line_and_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m featup_hub models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name ")
    assert done.stderr == ""
    assert done.returncode == 0
