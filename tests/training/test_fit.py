"""The fit of one image: both methods find known features; wrong arguments are refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featup_hub
from featup_hub.backbones import Backbone
from featup_hub.cli import main
from featup_hub.training.fit import PRESETS, fit
from featup_hub.upsamplers import ImplicitUpsampler, JBUFit, JBUStack
from tests.operations import REFUSED, Recorder


class Blur(Backbone):
    """Means of a few functions of the colours over each cell of 8×8 pixels."""

    name = "blur"

    def __init__(self) -> None:
        super().__init__(feat_dim=5, patch_size=8)

    def features(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(self.pixels(image), 8)

    def pixels(self, image: Tensor) -> Tensor:
        return torch.cat([image, image[:, :1] * image[:, 1:2], image[:, 2:].tanh()], dim=1)


def picture(height: int = 40, width: int = 56) -> Tensor:
    """Smooth colours, and a disc of others."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    ground = torch.stack([y, x, y * x])
    disc = ((y - 0.2) ** 2 + (x + 0.1) ** 2 < 0.25).float()
    return (ground * (1 - disc) + disc * torch.tensor([1.5, -1.0, 0.7])[:, None, None])[None]


EXACT = {"max_pad": 6}
NETWORK = {"method": "network", "views": 6, "held_out": 2, "max_pad": 6, "steps": 2, "batch": 2}


@pytest.mark.parametrize(
    "options", [EXACT, pytest.param({**NETWORK, "views": 20, "steps": 60}, marks=pytest.mark.slow)]
)
def test_a_fit_finds_the_features_that_were_averaged_better_than_bilinear(options):
    image, backbone = picture(), Blur()
    fitted = fit(image, backbone, **options)
    truth = backbone.pixels(image)
    bilinear = F.interpolate(backbone(image), (40, 56), mode="bilinear")
    error = (fitted.features() - truth).square().mean()
    assert error < 0.5 * (bilinear - truth).square().mean()
    assert fitted.scores["held_out_error"] < 0.1


class Spotted(Blur):
    """The same, plus a pattern that stays in place when the image moves, as ViTs have."""

    def features(self, image: Tensor) -> Tensor:
        seen = super().features(image)
        pattern = torch.randn(seen.shape[1:], generator=torch.Generator().manual_seed(5))
        return seen + 0.5 * pattern


def test_a_pattern_that_does_not_move_with_the_image_is_averaged_out():
    image, backbone = picture(), Spotted()
    clean = Blur()(image)
    noise = (backbone(image) - clean).square().mean()
    left = F.avg_pool2d(fit(image, backbone, max_pad=16).features(), 8) - clean
    assert left.square().mean() < 0.3 * noise


@pytest.mark.parametrize("size", [(33, 50), (8, 8)])
@pytest.mark.parametrize("options", [{"views": 20}, NETWORK])
def test_any_size_is_fitted_in_evaluation_mode_and_knows_its_backbone(size, options):
    fitted = fit(picture(*size), Blur(), **{**options, "max_pad": 3})
    assert fitted.features().shape == (1, 5, *size)
    assert fitted.features().isfinite().all()
    assert not any(module.training for module in fitted.modules())
    assert not any(p.requires_grad for p in fitted.parameters())
    assert (fitted.backbone, len(fitted.backbone_digest)) == ("blur", 64)


@pytest.mark.parametrize("options", [EXACT, NETWORK])
def test_the_same_seed_gives_the_same_features_and_leaves_the_global_generator_alone(options):
    before = torch.get_rng_state()
    first, second, other = (
        fit(picture(), Blur(), seed=seed, **options).features() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("options", [{"views": 20}, NETWORK])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fit_is_the_same_where_gradients_are_off(mode, options):
    with mode():
        fitted = fit(picture(), Blur(), **options)
    assert torch.equal(fitted.features(), fit(picture(), Blur(), **options).features())


@pytest.mark.parametrize("options", [{"views": 20}, NETWORK])
def test_a_fit_has_no_operation_without_a_deterministic_form(options):
    with Recorder() as recorder:
        fit(picture(), Blur(), **options)
    assert "mm" in recorder.names
    assert not recorder.names.keys() & REFUSED


def test_stages_of_the_callers_are_the_basis_and_stay_as_they_are():
    stack = JBUStack().train()
    fitted = fit(picture(), Blur(), upsampler=stack, views=20, max_pad=6)
    for name, value in fitted.upsampler.state_dict().items():
        assert torch.equal(value, stack.state_dict()[name])
    assert all(module.training for module in stack.modules())
    assert all(p.requires_grad for p in stack.parameters())


def test_every_module_of_the_backbone_gets_its_own_mode_back():
    class Failing(Blur):
        def features(self, image):
            assert not any(module.training for module in self.modules())
            raise RuntimeError("out of memory")

    backbone = Failing().train()
    backbone.norms = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    backbone.norms[0].eval()  # frozen
    before = {name: module.training for name, module in backbone.named_modules()}
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(picture(), backbone, views=20)
    assert {name: module.training for name, module in backbone.named_modules()} == before


def test_upstreams_recipe_has_upstreams_numbers():
    recipe = PRESETS["upstream"]
    assert (recipe.method, recipe.views, recipe.components) == ("network", 3000, 128)
    assert (recipe.max_pad, recipe.max_zoom) == (30, 1.8)
    assert (recipe.steps, recipe.batch, recipe.lr) == (1200, 10, 2e-3)
    fitted = fit(picture(), Blur(), recipe, steps=1, views=3, batch=1, held_out=1)
    assert [layer.weight.shape[1] for layer in fitted.layers] == [303, 128, 128]
    assert (fitted.dropout, len(fitted.fourier.frequency)) == (0.2, 30)


@pytest.mark.parametrize("method", ["least-squares", "network"])
def test_an_image_whose_features_are_the_same_everywhere_is_refused(method):
    with pytest.raises(RuntimeError, match="needs features that differ from place to place"):
        fit(torch.zeros(1, 3, 32, 40), Blur(), method=method, views=3, held_out=1)


def test_features_that_are_not_finite_and_a_loss_that_diverges_are_errors():
    with pytest.raises(RuntimeError, match="needs finite features; the backbone gave NaN or inf"):
        fit(picture() * math.nan, Blur(), views=20)
    with pytest.raises(RuntimeError, match=r"needs a finite loss; it diverged at step 2; lower lr"):
        fit(picture(), Blur(), **{**NETWORK, "lr": 1e30})


def test_an_image_that_was_not_normalised_brings_a_warning():
    with pytest.warns(UserWarning, match=r"from 0 to 255, which do not look normalised") as said:
        fit(
            torch.arange(256.0).repeat(1, 3, 1, 1).reshape(1, 3, 16, 16), Blur(), views=4, max_pad=2
        )
    assert said[0].filename == __file__


def test_wrong_images_and_options_are_refused():
    with pytest.raises(ValueError, match=r"one normalised RGB image, \(1, 3, H, W\); got \(2, 3,"):
        fit(torch.zeros(2, 3, 16, 16), Blur())
    with pytest.raises(TypeError, match=r"as a float32 tensor; got torch.uint8; .* model.preproc"):
        fit(picture().to(torch.uint8), Blur())
    with pytest.raises(TypeError, match=r"as a float32 tensor; got str; make it with"):
        fit("photo.jpg", Blur())
    with pytest.raises(TypeError, match=r"a featup_hub.Backbone; got UpsampledBackbone; take mod"):
        fit(picture(), featup_hub.load("efficientnet_lite0"))
    with pytest.raises(ValueError, match=r"stages alone; got .* closing convolution for 5 ch"):
        fit(picture(), Blur(), upsampler=JBUStack(5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        fit(picture(), Blur(), stepz=3)
    with pytest.raises(ValueError, match="views must be at least 1; got 0"):
        fit(picture(), Blur(), views=0)


@pytest.mark.parametrize("options", [[], ["--preset", "upstream", "--steps", "2", "--batch", "1"]])
def test_the_command_writes_a_fit_and_a_picture(options, tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setattr("featup_hub.loading.load_backbone", lambda *_, **__: Blur())
    out = tmp_path / "one.safetensors"
    line = ["fit", str(photos / "p0.png"), "--out", str(out), "--size", "32", "--max-pad", "4"]
    assert main([*line, "--views", "12", "--upsampler", "jbu_faithful", *options]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: held_out_error ")
    fitted = featup_hub.FittedFeatures.load(out)
    assert isinstance(fitted, ImplicitUpsampler if options else JBUFit)
    assert min(fitted.image_size) == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "one.safetensors"]
