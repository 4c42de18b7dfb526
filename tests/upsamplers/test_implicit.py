"""The implicit upsampler: its formula by hand, queries that agree, files right or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from featup_hub import ImplicitUpsampler
from featup_hub.upsamplers.implicit import FORMAT, FourierFeatures
from featup_hub.weights import metadata, read, write


def make(height: int = 9, width: int = 13, *, base: bool = False, **options) -> ImplicitUpsampler:
    draw = torch.Generator().manual_seed(3)
    return ImplicitUpsampler(
        torch.randn(1, 3, height, width, generator=draw),
        torch.randn(7, generator=draw),
        torch.randn(7, 4, generator=draw),
        base=torch.randn(1, 4, 3, 5, generator=draw) if base else None,
        **{"frequencies": 3, "log_range": (-1.0, 2.0), "hidden": 8, **options},
    ).eval()


def test_fourier_features_are_the_sines_and_cosines_computed_by_hand() -> None:
    module = FourierFeatures(3, (-2.0, 10.0), signals=2)
    signals = torch.tensor([[0.25, 0.5], [0.75, 0.125]])
    frequencies = [math.exp(-2), math.exp(4), math.exp(10)]
    torch.testing.assert_close(module.frequency, torch.tensor(frequencies))
    with torch.no_grad():
        module.frequency[2] = 1000.0  # so that single precision can be compared
    found = module(signals).detach()
    assert found.shape == (2, 12)
    for n in range(2):
        for wave, function in enumerate((math.sin, math.cos)):
            for s in range(2):
                for k, omega in enumerate([*frequencies[:2], 1000.0]):
                    phase = module.phase[wave, s, k].item()
                    expected = function(omega * float(signals[n, s]) + phase)
                    assert float(found[n, 6 * wave + 3 * s + k]) == pytest.approx(
                        expected, abs=2e-4
                    )


@pytest.mark.parametrize("base", [False, True])
def test_features_are_the_formula_written_out_for_one_pixel(base: bool) -> None:
    module = make(base=base)
    row, column = 4, 7
    image = module.image[0]
    low, high = image.flatten(1).amin(1), image.flatten(1).amax(1)
    colour = (image[:, row, column] - low) / (high - low)
    signals = torch.cat([torch.tensor([(row + 0.5) / 9, (column + 0.5) / 13]), colour])
    angle = signals[:, None] * module.fourier.frequency
    x = torch.cat(
        [
            (angle + module.fourier.phase[0]).sin().flatten(),
            (angle + module.fourier.phase[1]).cos().flatten(),
            colour,
        ]
    )
    x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
    for layer in module.layers[:2]:
        x = (layer.weight @ x + layer.bias).relu()
    z = module.layers[2].weight @ x + module.layers[2].bias
    if base:
        whole = F.interpolate(module.base.float(), (9, 13), mode="bilinear")
        z = z + whole[0, :, row, column]
    expected = module.mean + module.directions @ z
    torch.testing.assert_close(module.features()[0, :, row, column], expected, atol=1e-4, rtol=1e-4)


def test_points_at_pixels_have_the_features_of_the_map() -> None:
    module = make(base=True)
    whole = module.features()[0]
    points = torch.tensor([[0.0, 0.0], [8.0, 12.0], [3.0, 7.0]])
    found = module.features_at(points)
    for n, (row, column) in enumerate(points.long().tolist()):
        torch.testing.assert_close(found[n], whole[:, row, column], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.features_at(points, tile=2), found)
    assert module.features_at(torch.empty(0, 2)).shape == (0, 7)


def test_points_between_pixels_have_the_features_of_a_larger_map() -> None:
    module = make(base=True)
    twice = module.features((18, 26))[0]
    # Pixel (2i, 2j) of twice the size lies a quarter of a pixel before the centre of (i, j).
    found = module.features_at([[3.75, 6.25], [0.25, 11.75]])
    torch.testing.assert_close(found[0], twice[:, 8, 13], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], twice[:, 1, 24], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [None, (5, 6), (20, 11), (1, 1)])
def test_tiles_do_not_change_the_features(size: tuple[int, int] | None) -> None:
    module = make()
    whole = module.features(size)
    assert whole.shape[2:] == (size or (9, 13))
    for tile in (1, 29, 1000):
        torch.testing.assert_close(module.features(size, tile=tile), whole, atol=1e-5, rtol=1e-5)
    strips = dict(module.strips(size, tile=2 * whole.shape[3]))
    assert all(strip.shape[2] <= 2 for strip in strips.values())
    torch.testing.assert_close(torch.cat(list(strips.values()), 2), whole, atol=1e-5, rtol=1e-5)


def test_dropout_leaves_the_same_inputs_out_at_all_points_and_none_in_evaluation() -> None:
    module = make(dropout=0.5)
    module.directions, module.mean = torch.eye(4), torch.zeros(4)
    position = torch.full((6, 2), 0.4)
    told = module.train().coordinates(position)
    torch.testing.assert_close(told, told[:1].expand(6, -1))
    assert not torch.equal(told, module.coordinates(position))
    assert torch.equal(module.eval().coordinates(position), module.coordinates(position))


def test_gradients_reach_every_parameter() -> None:
    module = make()
    module.coordinates(torch.rand(50, 2)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("base", [False, True])
def test_a_saved_file_reproduces_the_features_bit_for_bit(base: bool, tmp_path: Path) -> None:
    module = make(base=base, backbone="stem", backbone_digest="ab12", scores={"steps": 5.0})
    module.save(tmp_path / "one.safetensors")
    before = torch.get_rng_state()
    found = ImplicitUpsampler.load(tmp_path / "one.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert not found.training
    for size in (None, (31, 17)):
        assert torch.equal(found.features(size), module.features(size))
    assert torch.equal(found.features_at([[1.3, 2.9]]), module.features_at([[1.3, 2.9]]))
    assert (found.backbone, found.backbone_digest) == ("stem", "ab12")
    assert found.scores == {"steps": 5.0}
    found.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"image": torch.zeros(1, 3, 4, 4)}, path)
    with pytest.raises(ValueError, match=r"of format featup_hub.implicit/1; got a file of other"):
        ImplicitUpsampler.load(path)
    make().save(path)
    write(read(path), path, metadata={**metadata(path), "upsampler": "featup_hub.implicit/2"})
    with pytest.raises(ValueError, match=r"implicit/1; got featup_hub.implicit/2; make one with"):
        ImplicitUpsampler.load(path)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        ImplicitUpsampler.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["image", "mean", "fourier.phase", "layers.1.weight"])
def test_a_file_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make().save(path)
    tensors = read(path)
    del tensors[name]
    write(tensors, path, metadata=metadata(path))
    with pytest.raises(ValueError, match=r"lacks or spoils|missing: "):
        ImplicitUpsampler.load(path)


@pytest.mark.parametrize(
    "change", ["shape", "surplus", "notes", "depth", "mean", "kind", "base", "square"]
)
def test_a_file_whose_parts_do_not_fit_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make().save(path)
    tensors, notes = read(path), metadata(path)
    if change == "shape":
        tensors["layers.1.weight"] = torch.zeros(3, 3)
    elif change == "surplus":
        tensors["stray"] = torch.zeros(3)
    elif change == "notes":
        notes["scores"] = "not JSON"
    elif change == "depth":
        notes["scores"] = "[" * 5000
    elif change == "mean":
        tensors["mean"] = torch.zeros(8)
    elif change == "kind":
        tensors["image"] = tensors["image"].long()
    elif change == "base":
        tensors["base"] = torch.zeros(1, 5, 3, 5)
    else:
        tensors["directions"] = torch.zeros(4)
    write(tensors, path, metadata=notes)
    with pytest.raises(ValueError, match=r"lacks or spoils|does not fit ImplicitUpsampler"):
        ImplicitUpsampler.load(path)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make().save(path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not the weights needed"):
        ImplicitUpsampler.load(path)


def test_the_format_names_its_version_and_holds_what_the_fit_needs(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    make(scores={"held_out_error": 0.25}).save(path)
    notes = metadata(path)
    assert notes["upsampler"] == FORMAT
    assert json.loads(notes["scores"]) == {"held_out_error": 0.25}
    assert {"image", "mean", "directions", "fourier.frequency", "fourier.phase"} <= set(read(path))


def test_wrong_queries_are_refused() -> None:
    module = make()
    with pytest.raises(ValueError, match=r"\(1, 3, H, W\); got \(2, 3, 4, 4\); fit one per image"):
        ImplicitUpsampler(torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match=r"points must be \(N, 2\), row and column; got \(3,\)"):
        module.features_at(torch.zeros(3))
    with pytest.raises(ValueError, match=r"-0.5 to 8.5 by -0.5 to 12.5 pixels; got \[1.0, 13.0\]"):
        module.features_at([[8.5, 12.5], [1.0, 13.0]])
    with pytest.raises(ValueError, match=r"size and tile must be positive; got \(0, 3\)"):
        module.features((0, 3))
