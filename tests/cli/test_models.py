"""``featup-hub models``: the table, and where weights are."""

from __future__ import annotations

import json

from featup_hub.cli import main


def test_models_are_listed_with_where_their_weights_are(capsys, monkeypatch):
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
