"""What a fit looks at: points where views show them, every view once, a backbone left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from featup_hub.training.implicit_views import look, points_of
from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, apply_jitter, sample_jitter
from tests.training.implicit_example import TINY, Blur, picture


@pytest.mark.parametrize("seed", range(6))
def test_points_are_those_that_a_jittered_map_shows(seed: int) -> None:
    jitter = sample_jitter((40, 56), max_pad=8, generator=seeded(seed))
    y, x = (torch.arange(n, dtype=torch.float64).add(0.5).div(n) for n in (40, 56))
    own = torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]
    seen = apply_jitter(own, [jitter])[0]
    points = points_of([jitter], (40, 56))[0]
    inside = ((points > 0.02) & (points < 0.98)).all(-1)
    assert inside.any()
    assert (points.movedim(-1, 0) - seen).abs().amax(0)[inside].max() < 1e-6


def test_random_points_stay_in_their_cells_and_are_even_in_the_mean() -> None:
    jitters = [Jitter(), Jitter(flip=True, zoom=2.0, top=0.25, left=0.5)]
    middles = points_of(jitters, (5, 7))
    drawn = torch.stack([points_of(jitters, (5, 7), seeded(n)) for n in range(300)])
    reach = torch.tensor([[0.5 / 5, 0.5 / 7], [0.25 / 5, 0.25 / 7]]).double()[:, None, None]
    assert ((drawn - middles).abs() <= reach + 1e-9).all()
    assert ((drawn.mean(0) - middles).abs() < 0.2 * reach).all()
    assert torch.equal(points_of(jitters, (5, 7), seeded(1)), drawn[1])


def test_the_backbone_sees_every_view_once_and_components_turn_back_into_its_features() -> None:
    backbone, image = Blur(), picture()
    config = replace(TINY, components=5)
    count = 0

    def count_images(_module: object, args: tuple[Tensor]) -> None:
        nonlocal count
        count += len(args[0])

    backbone.register_forward_pre_hook(count_images)
    pca, fitted, held_out = look(image, backbone, config)
    assert count == 15
    assert fitted.jitters[0].is_identity
    assert (len(fitted.jitters), len(held_out.jitters)) == (12, 3)
    assert not set(fitted.jitters) & set(held_out.jitters)
    for views in (fitted, held_out):
        for n, jitter in enumerate(views.jitters):
            expected = backbone(apply_jitter(image, [jitter]))[0]
            found = torch.einsum("ck,khw->chw", pca.directions, views.features[n].float())
            torch.testing.assert_close(
                found + pca.mean[:, None, None], expected, atol=5e-3, rtol=5e-3
            )


def test_the_backbone_looks_in_evaluation_mode_and_gets_its_mode_back() -> None:
    backbone, modes = Blur().train(), []
    backbone.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    look(picture(), backbone, TINY)
    assert not any(modes)
    assert backbone.training


def test_every_module_of_the_backbone_gets_its_own_mode_back() -> None:
    backbone = Blur().train()
    backbone.norms = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    backbone.norms[0].eval()  # frozen
    before = {name: module.training for name, module in backbone.named_modules()}
    look(picture(), backbone, TINY)
    assert {name: module.training for name, module in backbone.named_modules()} == before


def test_a_backbone_that_fails_gets_its_mode_back() -> None:
    class Failing(Blur):
        def features(self, image: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    backbone = Failing().train()
    with pytest.raises(RuntimeError, match="out of memory"):
        look(picture(), backbone, TINY)
    assert backbone.training
