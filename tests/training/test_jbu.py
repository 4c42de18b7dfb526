"""The JBU trainer: it learns, and writes files that other commands read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from featup_hub import JBUStack, load_upsampler
from featup_hub.ops import reference
from featup_hub.training import jbu
from featup_hub.training.config import JBUTrainingConfig
from featup_hub.training.jbu import train
from featup_hub.training.objective import consistency_loss
from featup_hub.training.process_group import ProcessGroup
from featup_hub.training.seeds import seeded
from featup_hub.training.training_source import TrainingSource
from featup_hub.weights import load_into, metadata, read, write
from tests.operations import REFUSED, Recorder
from tests.training.conftest import SMALL, Stem, rows


def loss_of(stack, source, seed=9, size=(32, 48), **changes):
    rgb = torch.rand(2, 3, 32, 48, generator=seeded(8))
    return consistency_loss(stack, source, rgb, size, replace(SMALL, **changes), seeded(seed))


@pytest.fixture
def stack():
    return JBUStack(dropout=0).train()


@pytest.fixture
def source(stem):
    return TrainingSource(stem)


@pytest.fixture
def run(photos, stem):
    """Makes the state of a run."""
    return lambda **changes: jbu._Run(
        replace(SMALL, **changes), jbu.PhotoStream(photos), {"stem": stem}, ProcessGroup()
    )


@pytest.mark.parametrize("ema", [0.99, 0.0])
def test_the_file_holds_stages_of_unit_sum_and_how_they_were_made(small, tmp_path, ema):
    path = small(tmp_path / "run", steps=2, lr=0.1, ema=ema)
    stack = JBUStack().eval()
    load_into(stack, read(path), origin=path)
    with torch.no_grad():
        total = stack.up4.kernel(torch.randn(1, 3, 8, 8)).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)
    notes = metadata(path)
    assert json.loads(notes["config"])["lr"] == 0.1
    assert (notes["seed"], notes["photos"]) == ("0", "9")


def test_kernels_may_have_any_sum_if_that_is_wanted(small, tmp_path):
    path = small(tmp_path / "run", steps=2, lr=0.1, unit_sum=False)
    assert read(path)["up4.fixup_proj.3.bias"].mean().abs() > 1e-3


def test_the_error_falls_within_a_few_dozen_steps(small, tmp_path):
    path = small(tmp_path / "run", steps=24, lr=5e-3, warmup=2)
    losses = [float(row["loss"]) for row in rows(path.with_name("metrics.csv"))]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.parametrize("downsampler", ["attention", "simple"])
def test_every_tap_and_every_learned_part_receives_a_gradient(stack, stem, downsampler):
    source = TrainingSource(stem, downsampler=downsampler)
    loss_of(stack, source)["loss"].backward()
    for name, parameter in [*stack.named_parameters(), *source.named_parameters()]:
        if name.startswith("up1."):  # stride 8: three stages
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
    taps = stack.up4.fixup_proj[3].weight.grad.flatten(1).abs().sum(1)
    assert (taps > 0).all()
    assert all(p.grad is None for p in source.backbone.parameters())


@pytest.mark.parametrize("joint_first", [False, True])
def test_a_step_has_no_operation_without_a_deterministic_form(source, joint_first, monkeypatch):
    # The way of a GPU, where torch's own pooling is not taken for guidance with a gradient.
    for module in ("jbu", "joint"):
        name = f"featup_hub.upsamplers.{module}.pool_guidance"
        monkeypatch.setattr(name, reference.pool_guidance)
    changes = {"tv_weight": 0.1, "region_weight": 1.0, "region_field": 1.0}
    with Recorder() as recorder:
        stack = JBUStack(joint_first=joint_first)
        loss_of(stack, source, size=(40, 56), **changes)["loss"].backward()
    assert {"jbu_apply_backward", "jbu_kernel_backward", "index_select"} <= recorder.names.keys()
    assert not recorder.names.keys() & REFUSED


def test_terms_add_up_with_their_weights(stack, source):
    terms = loss_of(stack, source, crf_weight=0.3, tv_weight=0.7)
    total = terms["reconstruction"] + 0.3 * terms["crf"] + 0.7 * terms["tv"]
    torch.testing.assert_close(terms["loss"], total)
    plain = loss_of(stack, source, crf_weight=0.0, uncertainty=False)
    torch.testing.assert_close(plain["loss"], plain["error"] / 2)


def test_the_projected_loss_estimates_the_full_one(stack, source):
    """With as many directions as channels the projection is a rotation: the very same error."""
    still = {"max_pad": 0, "max_zoom": 1.0, "views": 8}
    full = loss_of(stack, source, projection_dim=12, **still)["error"]
    few = [loss_of(stack, source, seed=n, projection_dim=3, **still)["error"] for n in range(24)]
    assert torch.stack(few).mean().item() == pytest.approx(full.item(), rel=0.15)


def test_noise_on_the_regions_cells_is_to_be_filtered_out(stack, source):
    """The target stays what it was: what noise adds to the source is an error."""
    quiet, noisy = (
        loss_of(stack, source, region_weight=1.0, region_noise=noise) for noise in (0.0, 2.0)
    )
    torch.testing.assert_close(quiet["reconstruction"], noisy["reconstruction"])
    assert noisy["regions"] > 1.2 * quiet["regions"]


def test_sizes_vary_within_their_range_and_fit_the_patch(run):
    varying = run(image_size=64, max_aspect=2.0, max_stride=1.5)
    drawn = [varying._sizes(8, seeded(n)) for n in range(200)]
    for (height, width), looked_at in drawn:
        assert height % 8 == width % 8 == looked_at[0] % 8 == looked_at[1] % 8 == 0
        assert 0.4 < height / width < 2.4
        assert 0.55 < looked_at[0] / height < 1.7
    assert len({size for size, _ in drawn}) > 3
    assert any(size != looked_at for size, looked_at in drawn)
    assert run()._sizes(8, seeded(1)) == ((32, 32), (32, 32))


def test_the_callers_backbone_keeps_its_mode_and_its_gradients(small, stem, tmp_path):
    small(tmp_path, steps=1)
    assert all(module.training for module in stem.modules())
    assert all(parameter.requires_grad for parameter in stem.parameters())


def test_odd_strides_and_shapes_and_several_backbones_train(photos, stem, tmp_path):
    other = Stem(patch_size=7, feat_dim=10, seed=3)
    config = replace(
        SMALL, backbones=("stem", "other"), steps=6, max_aspect=1.5, max_stride=1.5, dropout=0.1
    )
    before = torch.random.get_rng_state()
    train(photos, tmp_path, config, backbones={"stem": stem, "other": other}, progress=False)
    assert {row["source"] for row in rows(tmp_path / "metrics.csv")} == {"stem", "other"}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_run_starts_from_a_file_or_shipped_stages_and_its_own_file_names_no_folder(run, tmp_path):
    write(JBUStack(unit_sum=True).state_dict(), tmp_path / "first.safetensors")
    for name in (str(tmp_path / "first.safetensors"), "jbu_faithful"):
        started = run(start=name, seed=5, backbones=(f"stem={tmp_path}/w.safetensors",))
        for key, value in load_upsampler(name).state_dict().items():
            torch.testing.assert_close(started.stack.state_dict()[key], value, atol=1e-6, rtol=0)
        started.export(tmp_path / "made.safetensors")
        config = json.loads(metadata(tmp_path / "made.safetensors")["config"])
        assert config["start"] == name.rpartition("/")[2]
        assert config["backbones"] == ["stem=w.safetensors"]
    with pytest.raises(FileNotFoundError, match="no weights file jbu_blunt; check the name"):
        run(start="jbu_blunt")
    write({}, tmp_path / "empty.safetensors")
    with pytest.raises(ValueError, match=r"empty.safetensors does not fit JBUStack"):
        run(start=str(tmp_path / "empty.safetensors"))


def test_a_joint_bilateral_stage_that_a_run_starts_with_is_trained_too(small, tmp_path):
    joint = JBUStack(joint_first=True).state_dict()
    write(joint, tmp_path / "joint.safetensors")
    path = small(tmp_path / "run", start=str(tmp_path / "joint.safetensors"), image_size=64)
    assert metadata(path)["architecture"] == "JBUStack(feat_dim=None, joint_first=True)"
    trained = read(path)
    assert trained.keys() == joint.keys()
    for name in (name for name in trained if name.startswith("first.")):
        assert not torch.equal(trained[name], joint[name]), name


def test_the_learning_rate_rises_and_falls():
    config = JBUTrainingConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    rates = [config.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
