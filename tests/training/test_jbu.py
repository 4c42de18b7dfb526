"""The JBU trainer: it learns, and writes files that other commands read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from featup_hub import JBUStack, load_upsampler
from featup_hub.training import jbu
from featup_hub.training.config import UPSTREAM_TAPS, JBUTrainingConfig
from featup_hub.training.jbu import train
from featup_hub.training.objective import consistency_loss
from featup_hub.training.process_group import ProcessGroup
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import TrainingSource, open_backbones
from featup_hub.weights import load_into, metadata, read, write
from tests.training.small_run import SMALL, rows


def loss_of(stack, source, seed=9, **changes):
    rgb = torch.rand(2, 3, 32, 48, generator=seeded(8))
    return consistency_loss(stack, source, rgb, (32, 48), replace(SMALL, **changes), seeded(seed))


def test_the_file_holds_stages_of_unit_sum_and_how_they_were_made(photos, stem, tmp_path):
    config = replace(SMALL, steps=2)
    path = train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    stack = JBUStack().eval()
    load_into(stack, read(path), origin=path)
    with torch.no_grad():
        total = stack.up4.kernel(torch.randn(1, 3, 8, 8)).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    notes = metadata(path)
    assert json.loads(notes["config"])["lr"] == config.lr
    assert (notes["seed"], notes["photos"]) == ("0", "9")


def test_the_file_names_no_folder():
    assert jbu._without_folder("vit_tiny=/home/somebody/w.safetensors") == "vit_tiny=w.safetensors"
    assert jbu._without_folder("efficientnet_lite0") == "efficientnet_lite0"
    assert jbu._without_folder("") == ""


def test_it_learns(photos, stem, tmp_path):
    """Over a few dozen steps the error falls below that of the first ones."""
    config = replace(SMALL, steps=40, lr=5e-3, warmup=2)
    train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    losses = [float(row["loss"]) for row in rows(tmp_path / "metrics.csv")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_every_tap_and_every_learned_part_receives_a_gradient(stem, downsampler):
    stack, source = JBUStack(dropout=0).train(), TrainingSource(stem, downsampler=downsampler)
    loss_of(stack, source)["loss"].backward()
    for name, parameter in [*stack.named_parameters(), *source.named_parameters()]:
        if name.startswith("up1."):  # stride 8: three stages
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
    rows = stack.up4.fixup_proj[3].weight.grad.flatten(1).abs().sum(1)
    assert (rows > 0).all()
    assert all(p.grad is None for p in source.backbone.parameters())


def test_named_taps_alone_receive_a_gradient_and_the_loss_is_the_same(stem):
    stack, source = JBUStack(dropout=0).train(), TrainingSource(stem)
    whole = loss_of(stack, source)["loss"]
    seven = loss_of(stack, source, kernel_taps=UPSTREAM_TAPS)["loss"]
    torch.testing.assert_close(whole, seven)
    seven.backward()
    for stage in (stack.up2, stack.up3, stack.up4):
        rows = stage.fixup_proj[3].weight.grad.flatten(1).abs().sum(1)
        assert rows.nonzero().flatten().tolist() == list(UPSTREAM_TAPS)


def test_all_taps_named_is_no_tap_named(stem):
    grads = []
    for taps in ((), tuple(range(49))):
        torch.manual_seed(0)
        stack, source = JBUStack(dropout=0).train(), TrainingSource(stem)
        loss_of(stack, source, kernel_taps=taps)["loss"].backward()
        grads.append(stack.up4.range_proj[0].weight.grad)
    torch.testing.assert_close(*grads)


def test_terms_add_up_with_their_weights(stem):
    stack, source = JBUStack(dropout=0).train(), TrainingSource(stem)
    terms = loss_of(stack, source, crf_weight=0.3, tv_weight=0.7)
    total = terms["reconstruction"] + 0.3 * terms["crf"] + 0.7 * terms["tv"]
    torch.testing.assert_close(terms["loss"], total)
    plain = loss_of(stack, source, crf_weight=0.0, uncertainty=False)
    torch.testing.assert_close(plain["loss"], plain["error"] / 2)


def test_the_projected_loss_estimates_the_full_one(stem):
    """With as many directions as channels the projection is a rotation: the very same error."""
    stack, source = JBUStack(dropout=0).train(), TrainingSource(stem)
    still = {"max_pad": 0, "max_zoom": 1.0, "views": 8}
    full = loss_of(stack, source, projection_dim=12, **still)["error"]
    few = [loss_of(stack, source, seed=n, projection_dim=3, **still)["error"] for n in range(24)]
    assert torch.stack(few).mean().item() == pytest.approx(full.item(), rel=0.15)


def test_sizes_vary_within_their_range_and_fit_the_patch(photos, stem):
    config = replace(SMALL, image_size=64, max_aspect=2.0, max_stride=1.5)
    run = jbu._Run(config, jbu.PhotoStream(photos), {"stem": stem}, ProcessGroup())
    drawn = [run._sizes(8, seeded(n)) for n in range(200)]
    for (height, width), looked_at in drawn:
        assert height % 8 == width % 8 == looked_at[0] % 8 == looked_at[1] % 8 == 0
        assert 0.4 < height / width < 2.4
        assert 0.55 < looked_at[0] / height < 1.7
    assert len({size for size, _ in drawn}) > 3
    assert any(size != looked_at for size, looked_at in drawn)
    still = jbu._Run(SMALL, jbu.PhotoStream(photos), {"stem": stem}, ProcessGroup())
    assert still._sizes(8, seeded(1)) == ((32, 32), (32, 32))


def test_odd_strides_and_shapes_and_several_backbones_train(photos, stem, tmp_path):
    other = type(stem)(patch_size=7, feat_dim=10, seed=3)
    config = replace(
        SMALL, backbones=("stem", "other"), steps=6, max_aspect=1.5, max_stride=1.5, window=1.5
    )
    train(photos, tmp_path, config, backbones={"stem": stem, "other": other}, progress=False)
    assert {row["source"] for row in rows(tmp_path / "metrics.csv")} == {"stem", "other"}


def test_a_run_can_start_from_other_stages(photos, stem, tmp_path):
    first = train(photos, tmp_path / "a", SMALL, backbones={"stem": stem}, progress=False)
    config = replace(SMALL, start=str(first), seed=5)
    run = jbu._Run(config, jbu.PhotoStream(photos), {"stem": stem}, ProcessGroup())
    for name, value in read(first).items():
        torch.testing.assert_close(run.stack.state_dict()[name], value, atol=1e-6, rtol=0)


def test_a_run_can_start_from_shipped_stages_by_their_name(photos, stem, tmp_path):
    run = jbu._Run(
        replace(SMALL, start="jbu_sharp"), jbu.PhotoStream(photos), {"stem": stem}, ProcessGroup()
    )
    for name, value in load_upsampler(weights="jbu_sharp").state_dict().items():
        torch.testing.assert_close(run.stack.state_dict()[name], value, atol=1e-6, rtol=0)
    run.export(tmp_path / "made.safetensors", photos=1)
    assert json.loads(metadata(tmp_path / "made.safetensors")["config"])["start"] == "jbu_sharp"
    with pytest.raises(FileNotFoundError, match="no weights file jbu_blunt; check the name"):
        jbu._Run(replace(SMALL, start="jbu_blunt"), run.stream, {"stem": stem}, ProcessGroup())


def test_a_joint_bilateral_stage_that_a_run_starts_with_is_trained_too(photos, stem, tmp_path):
    joint = JBUStack(joint_first=True).state_dict()
    write(joint, tmp_path / "joint.safetensors")
    config = replace(SMALL, start=str(tmp_path / "joint.safetensors"), image_size=64)
    path = train(photos, tmp_path / "b", config, backbones={"stem": stem}, progress=False)
    assert metadata(path)["architecture"] == "JBUStack(feat_dim=None, joint_first=True)"
    trained = read(path)
    assert trained.keys() == joint.keys()
    for name in ("share", "spatial", "range", "smoothing_range", "frequencies"):
        assert not torch.equal(trained[f"first.{name}"], joint[f"first.{name}"]), name


def test_the_learning_rate_rises_and_falls():
    config = JBUTrainingConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11


def test_the_global_generator_is_left_alone(photos, stem, tmp_path):
    before = torch.random.get_rng_state()
    config = replace(SMALL, steps=1, dropout=0.1)
    train(photos, tmp_path, config, backbones={"stem": stem}, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_backbones_are_opened_by_name_or_given(stem):
    (lite,) = open_backbones(("efficientnet_lite0_stride32",)).values()
    assert (lite.patch_size, lite.feat_dim) == (32, 320)
    with pytest.raises(ValueError, match="at least one backbone; name one"):
        open_backbones(())
    with pytest.raises(ValueError, match="there is none for b; add it"):
        open_backbones(("a", "b"), {"a": stem})
    with pytest.raises(ValueError, match=r"got 'jbu', an upsampler alone; .* name another"):
        open_backbones(("jbu",))


def test_a_timm_model_takes_its_weights_from_a_file(tmp_path):
    import timm

    from featup_hub.weights import write

    model = timm.create_model("test_vit", dynamic_img_size=True)
    write({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    name = f"test_vit={tmp_path / 'w.safetensors'}"
    backbone = open_backbones((name,))[name].eval()
    assert next(backbone.parameters()).dtype == torch.float32
    assert backbone(torch.zeros(1, 3, 64, 64)).shape[-2:] == (4, 4)


def test_noise_on_the_regions_cells_is_to_be_filtered_out(stem):
    """The target stays what it was: what noise adds to the source is an error."""
    stack, source = JBUStack(dropout=0), TrainingSource(stem)
    quiet, noisy = (
        loss_of(stack, source, region_weight=1.0, region_noise=noise) for noise in (0.0, 2.0)
    )
    torch.testing.assert_close(quiet["reconstruction"], noisy["reconstruction"])
    assert noisy["regions"] > 1.2 * quiet["regions"]
