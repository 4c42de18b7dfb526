"""The emulator replaces a device in the tests of the fused kernels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featup_hub.ops.cuda import backend
from tests.ops.cuda.emulator import Emulator
from tests.ops.cuda.fused_results import Emulate


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulator keeps what it compiled, for all tests, also of pytest-xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulator"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def emulate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Emulate:
    """Puts an emulator in the device's place; its options may be changed any time."""

    def use(**options: Any) -> None:
        emulator = Emulator(folder, **options)
        monkeypatch.setattr(backend, "prepare", emulator.prepare)

    # Whatever a kernel does not write stays NaN.
    monkeypatch.setattr(torch.Tensor, "new_empty", _new_nan)
    monkeypatch.setattr(torch, "empty_like", lambda x: x.new_full(x.shape, float("nan")))
    use()
    return use


def _new_nan(tensor: Tensor, *size: int) -> Tensor:
    return tensor.new_full(size, float("nan"))
