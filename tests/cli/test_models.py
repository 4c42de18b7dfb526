"""``featup-hub models``: the table, and where weights are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featup_hub.cli import main
from featup_hub.ops.choice import ImplementationStatus


def test_models_are_listed_with_where_their_weights_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: dict[str, str] = {"timm/vit_small_patch16_224.dino": "/cache/file"}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo_id, *_, **__: cached.get(repo_id)
    )
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "channels", "stride", "weights", "licence", "backbone"]
    row = next(line.split() for line in lines if line.startswith("dinov2 "))
    assert row == ["dinov2", "384", "14", "Hub", "Apache-2.0", "vit_small_patch14_dinov2.lvd142m"]
    assert "Hub: downloaded from the Hugging Face Hub at first use" in lines
    assert "name of a shipped upsampler: jbu_denoise, jbu_faithful" in "\n".join(lines)
    notes = [line for line in lines if line.startswith("dinov3_vits16, dinov3_vitb16: ")]
    assert "The DINOv3 License" in notes[0]
    assert main(["models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["dino16"]["weights"] == "cached"
    assert rows["jbu"]["weights"] == "shipped"
    assert rows["jbu"]["channels"] is None
    assert rows["efficientnet_lite0"]["weights"] == "shipped"
    assert rows["efficientnet_lite0"]["licence"] == "Apache-2.0"


def test_who_computes_is_told_with_the_reason_and_where_compiled_kernels_lie(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["models", "--impl"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("cpu: torch, because the fused kernels need tensors on a CUDA device")
    compiled = ImplementationStatus(
        device="cuda:0 (a card)",
        impl="cuda",
        compiler="NVRTC 12.8",
        cubins=(Path("/cache/forward.cubin"), Path("/cache/backward.cubin")),
    )
    monkeypatch.setattr("featup_hub.ops.implementations", lambda: [compiled])
    assert main(["models", "--impl"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cuda:0 (a card): cuda, compiled by NVRTC 12.8, kept in /cache",
        "  /cache/forward.cubin",
        "  /cache/backward.cubin",
    ]
    assert main(["models", "--impl", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["cubins"] == ["/cache/forward.cubin", "/cache/backward.cubin"]
    assert (row["impl"], row["reason"]) == ("cuda", None)
