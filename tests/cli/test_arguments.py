"""Outputs are checked before the work; exceptions are one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from featup_hub.cli.arguments import UsageError, check_output, explain


def test_exceptions_are_explained_in_a_line() -> None:
    assert explain(OSError(28, "No space left on device", "x.npy")) == (
        "x.npy: No space left on device"
    )
    assert explain(MemoryError()).startswith("not enough memory; try a smaller --size")
    assert explain(ValueError()) == "ValueError"


def test_a_file_that_cannot_be_written_is_refused_with_what_to_do(tmp_path: Path) -> None:
    check_output(tmp_path / "new.onnx")
    (tmp_path / "old.onnx").write_text("old")
    check_output(tmp_path / "old.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.onnx", "old")]
    (tmp_path / "d.onnx").mkdir()
    for name, message in (
        ("d.onnx", r"is needed; \S+d.onnx is a folder; name a file in it"),
        ("no/m.onnx", r"takes new files; got \S+m.onnx \(No such file or directory\); make the"),
        ("old.onnx/m.onnx", r"takes new files; got \S+m.onnx \(Not a directory\); make the"),
        ("m" * 256, r"takes new files; got \S+mmm \(File name too long\); make the"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that takes no files")
def test_a_folder_that_takes_no_files_is_noticed_whatever_its_permissions_say() -> None:
    with pytest.raises(UsageError, match=r"takes new files; got /proc/x.onnx \(.+\); make the"):
        check_output(Path("/proc/x.onnx"))
