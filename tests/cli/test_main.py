"""The command line as a whole: errors and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from featup_hub import __version__
from featup_hub.cli import main
from featup_hub.cli.arguments import UsageError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("upsample x --model dinov", "did you mean 'dinov2'"),
        ("upsample x --model jbu", "a model with a backbone is needed; got 'jbu'"),
        ("upsample x --size 225", "size must be a positive multiple of 16; got 225"),
        ("upsample x --size 224x100", "a positive multiple of 16; got 100; try 96 or 112"),
        ("upsample x --size big", "such as 448, or HxW, 448x640; got 'big'"),
        ("upsample x --device gpu", "device must be cpu, cuda, cuda:1 or mps"),
        ("upsample x --device cuda:99", "device cuda:99 cannot be used here"),
        ("upsample x --upsampler nothing", "no weights file nothing; check the name"),
        ("upsample x --upsampler .", "weights must be a file; . is a folder"),
        ("upsample x --model vit=nothing", "no weights file nothing; check"),
        ("upsample x --looks 3", "looks must be one of 1, 4, 16, 64, 256, the squares of the div"),
        ("upsample x --layer 99", "has layers 0 to 4; got layer=99"),
        ("upsample x --bands 1,2", "--bands: bands are three numbers from 1, such as"),
        ("export model.pth", "must be named *.onnx or *.pt2; got model.pth"),
        ("export m.onnx --static 224", "--static must be HxW, such as 224x224; got"),
        ("upsample x --impl cuda --device cpu", "--impl cuda needs a CUDA device"),
        ("upsample x --over", "unrecognized arguments: --over; see featup-hub upsample --help"),
        ("--over upsample x", "unrecognized arguments: --over; see featup-hub --help"),
        ("upsample", "required: IMAGE; see featup-hub upsample --help"),
        ("upsampel", "invalid choice: 'upsampel' (choose from"),
        ("fit x --size -4", "--size must be positive; got -4"),
        ("fit x --views 0", "--views must be at least 1; got 0"),
        ("fit x --upsampler nothing", "no weights file nothing; check the name"),
        ("fit x --out .", "a file to write is needed; . is a folder; name a file in it"),
        (
            "fit x --out no/x",
            "takes new files; got no/x (No such file or directory); make the folder",
        ),
        ("export no/m.onnx", "got no/m.onnx (No such file or directory); make the folder"),
        ("export photos/a.jpg/m.onnx", "got photos/a.jpg/m.onnx (Not a directory); make the"),
        (f"export {256 * 'm'}.onnx", "m.onnx (File name too long); make the folder"),
        ("convert x no/m.safetensors", "got no/m.safetensors (No such file or directory)"),
        ("fit x --device gpu", "device must be cpu, cuda, cuda:1 or mps"),
        ("train x --out y --steps -3", "--steps must be at least 1; got -3"),
        ("train x --out y --device gpu", "device must be cpu, cuda, cuda:1"),
        ("train photos", "required: --out; see featup-hub train --help"),
        ("train photos --out x --steps ten", "invalid int value: 'ten'"),
        (
            "evaluate --data folder:photos --out photos/a.jpg",
            "--out must be a folder that takes new files; ",
        ),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(line, message, photos, command):
    done = command(line)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert message in done.err.splitlines()[0]
    assert "Traceback" not in done.err
    assert not Path("features").exists()
    with pytest.raises(UsageError):
        command(line, "--debug")


def test_an_interruption_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, time\n"
        "try:\n"
        "    os.kill(os.getpid(), 2)\n"
        "    time.sleep(9)\n"
        "except BaseException:\n"  # as torch's C++ code does if an exception passes through it
        "    os.abort()\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-m", "featup_hub", "env"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        # Where the tests run in the background, interruptions may be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_without_a_command_the_help_is_shown(command):
    done = command()
    assert done.code == 2
    assert all(name in done.err for name in ("models", "upsample", "train", "convert"))


def test_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"featup_hub {__version__}\n"


def test_python_m_runs_the_command_line_and_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m featup_hub models | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("name ")
    assert done.stderr == ""
    assert done.returncode == 0
