"""One small network of every family of timm has the properties listed in docs/families.md.

``python -m tests.backbones.test_families`` writes that file again.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch

from featup_hub.backbones import TimmBackbone

TABLE = Path(__file__).resolve().parents[2] / "docs/families.md"
ODD = (97, 131)
HEAD = """# Families of timm

One small network of each family (a module of timm), checked without weights at its native size and
at 97×131. Every image may have any size. The column "the network sees" gives the change of the
image for the network; the upsampler always gets the original image.

* **multiples of p**: the image is resized up to the next multiples of the stride p.
* **H×W only**: the network accepts one input size. The image is resized to it. The source then
  has a fixed number of cells. For some networks timm offers another size:
  `load(name, backbone_kwargs={"img_size": 448})`.
* **padded by n**: its convolutions have no padding, so n pixels are added, half on each side.
  Without them the source would not cover the image.

"""
COLUMNS = ("family", "network", "native size", "the network sees", "channels", "source of 97×131")


def rows() -> list[list[str]]:
    """The table's rows, as the file has them."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "|" in line]
    return cells[2:]


# Drawing weights and normalising batches change no size, and are slow on the meta device.
@patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor, create=True)
@patch("torch.batch_norm", lambda x, *_: x)
def described(family: str, name: str) -> list[str]:
    """A row of the table, from what the network does."""
    height, width = timm.get_pretrained_cfg(name).input_size[1:]
    # Sizes that depend on the image's values need real memory; a recurrence is faster with it.
    device = "cpu" if family in ("gemma4_vit", "sequencer") else "meta"
    with torch.device(device), torch.inference_mode():
        backbone = TimmBackbone(name).eval()
        stride = backbone.patch_size
        if backbone.fixed_size:
            sees = "{}×{} only".format(*backbone.fixed_size)
        else:
            padding = f", padded by {backbone._padding}" if backbone._padding else ""
            sees = f"multiples of {stride}{padding}"
        odd = tuple(backbone(torch.zeros(1, 3, *ODD)).shape)
        if not backbone.fixed_size:  # else the odd image was resized to the native size
            assert odd[2:] == tuple(-(-side // stride) for side in ODD)
        if family != "gemma4_vit" and not backbone.fixed_size:
            native = tuple(backbone(torch.zeros(1, 3, height, width)).shape)
            assert native == (1, backbone.feat_dim, -(-height // stride), -(-width // stride))
    assert odd[:2] == (1, backbone.feat_dim)
    return [family, name, f"{height}×{width}", sees, str(odd[1]), "{}×{}".format(*odd[2:])]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_a_family_takes_its_native_size_and_odd_sizes_as_the_table_says(row):
    if not timm.is_model(row[1]):
        pytest.skip(f"timm {timm.__version__} has no {row[1]}")
    assert described(row[0], row[1]) == row


def test_the_table_has_every_family_of_the_timm_it_was_made_with():
    if f"timm {timm.__version__}." not in TABLE.read_text(encoding="utf-8"):
        pytest.skip(f"the table was made with another timm than {timm.__version__}")
    assert [row[0] for row in rows()] == sorted(timm.models.list_modules())


def main() -> None:
    """Writes the table, with the networks it names and new families' first by name."""
    members = {row[0]: row[1] for row in rows()}
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    for family in sorted(timm.models.list_modules()):
        name = members.get(family) or timm.list_models(module=family)[0]
        lines.append(f"| {' | '.join(described(family, name))} |")
        print(lines[-1], flush=True)
    TABLE.write_text(
        f"{HEAD}Made with timm {timm.__version__}.\n\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
