"""Tables against what they tabulate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.ops.tables import bicubic_matrix, fold_axis


@pytest.mark.parametrize(
    ("size_in", "size_out"), [(1, 2), (2, 4), (5, 10), (16, 28), (9, 9), (7, 20)]
)
def test_the_bicubic_matrix_is_pytorchs_interpolation(size_in, size_out):
    x = torch.randn(1, 1, 1, size_in, dtype=torch.float64)
    expected = F.interpolate(x, (1, size_out), mode="bicubic", align_corners=False)
    torch.testing.assert_close(x @ bicubic_matrix(size_in, size_out).t(), expected)


def test_a_doubled_axis_has_the_narrowest_windows_there_are():
    axis = fold_axis(20, 40, 4, 3, torch.float64, torch.device("cpu"))
    assert axis.window == 8  # ten output pixels, half a pixel apart, and a cubic's reach
    assert fold_axis(40, 40, 4, 3, torch.float64, torch.device("cpu")).window == 4 + 2 * 3
