"""Tables against what they tabulate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.ops.tables import bicubic_matrix, fold_table, reach


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1, 2), (2, 4), (5, 10), (16, 28), (9, 9), (7, 20)]
)
def test_the_bicubic_matrix_is_pytorchs_interpolation(size_in: int, size_out: int) -> None:
    x = torch.randn(1, 1, 1, size_in, dtype=torch.float64)
    expected = F.interpolate(x, (1, size_out), mode="bicubic", align_corners=False)
    torch.testing.assert_close(x @ bicubic_matrix(size_in, size_out).t(), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 14])
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("tile", [1, 4, 8])
def test_every_tap_of_a_fold_table_sums_to_one_inside_and_to_zero_beyond(
    size: int, scale: int, tile: int
) -> None:
    table = fold_table(size, scale, tile, 3)
    sums = table.sum(2)
    torch.testing.assert_close(sums[: scale * size], torch.ones(scale * size, 7).double())
    assert sums[scale * size :].abs().sum() == 0
    assert table.shape == (-(-size // tile) * scale * tile, 7, tile + 2 * reach(3, scale))
