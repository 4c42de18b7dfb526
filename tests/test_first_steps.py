"""From a photograph to features, and the errors for wrong inputs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import featup_hub
from featup_hub import JBUStack, ModuleBackbone, UpsampledBackbone
from featup_hub.image import preprocess

NAME = "efficientnet_lite0"


@pytest.fixture(scope="module")
def model() -> UpsampledBackbone:
    return featup_hub.load(NAME)


@pytest.fixture
def small() -> UpsampledBackbone:
    backbone = ModuleBackbone(nn.Conv2d(3, 6, 8, stride=8), feat_dim=6, patch_size=8)
    return UpsampledBackbone(backbone, JBUStack(num_stages=1, radius=1, key_dim=2)).eval()


def test_a_path_a_picture_and_an_array_give_the_same_tensor(model, root):
    path = root / "tests" / "data" / "chelsea.jpg"
    photo = featup_hub.read_image(path)
    expected = preprocess(photo, 224, mean=model.mean, std=model.std, multiple_of=16)
    for given in (path, str(path), photo, np.asarray(photo)):
        assert torch.equal(model.preprocess(given), expected)
    assert model.preprocess(path, 64).shape[2:] == (64, 96)
    assert model.preprocess(path, (64, 64)).shape[2:] == (64, 64)


def test_without_a_card_a_photograph_keeps_its_size_and_has_the_models_precision(small):
    image = small.double().preprocess(Image.new("RGB", (50, 35)))
    assert (image.shape, image.dtype) == ((1, 3, 32, 48), torch.float64)


@pytest.mark.parametrize("given", ["photo.jpg", Path("photo.jpg"), [[1]], np.zeros((8, 8, 3))])
def test_what_is_no_tensor_is_refused_with_what_to_call(small, given):
    for method in (small, small.source, small.forward_features):
        with pytest.raises(TypeError, match=r"call model\(model\.preprocess\(photo\)\)"):
            method(given)


def test_an_image_of_another_precision_or_on_another_device_is_refused(model, small):
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(TypeError, match=rf"torch.float32 on cpu; got {dtype} on cpu; conv"):
            small(torch.randn(1, 3, 16, 16).to(dtype))
    with pytest.raises(TypeError, match=r"torch.float32 on cpu; got torch.float32 on meta; conv"):
        model(torch.randn(1, 3, 16, 16, device="meta"))
    with pytest.raises(ValueError, match=r"on one device are needed; got guidance on meta and wei"):
        small(torch.randn(1, 3, 16, 16), guidance=torch.randn(1, 3, 16, 16, device="meta"))


def test_an_image_that_was_not_normalised_brings_one_warning(small):
    for scale in (1.0, 255.0):
        fresh = copy.deepcopy(small)
        with pytest.warns(UserWarning, match=r"do not look normalised; use model\.preprocess"):
            fresh(torch.rand(1, 3, 16, 16) * scale)
        fresh(torch.rand(1, 3, 16, 16) * scale)  # warnings are errors here
        with pytest.warns(UserWarning, match=r"do not look normalised"):
            JBUStack()(torch.randn(1, 5, 2, 2), torch.rand(1, 3, 16, 16) * scale)


def test_bright_and_constant_images_bring_no_warning(small):
    # Warnings are errors here.
    for image in (torch.rand(1, 3, 16, 16) + 1.5, torch.zeros(1, 3, 16, 16)):
        copy.deepcopy(small)(image)
    torch.func.vmap(copy.deepcopy(small))(torch.rand(2, 1, 3, 16, 16))
    copy.deepcopy(small).to("meta")(torch.rand(1, 3, 16, 16, device="meta"))


def test_a_backbone_of_other_bands_is_guided_by_rgb():
    model = featup_hub.load("test_resnet", pretrained=False, backbone_kwargs={"in_chans": 13})
    bands, rgb = torch.randn(1, 13, 64, 96), torch.randn(1, 3, 128, 192)
    with torch.no_grad():
        expected = model.upsampler(model.source(bands), rgb)
        assert torch.equal(model(bands, guidance=rgb), expected)
        assert torch.equal(model.forward_features(bands, guidance=rgb), expected)
    with pytest.raises(ValueError, match=r"takes 13; pass RGB beside the image: model"):
        model(bands)


def test_a_shipped_upsampler_is_loaded_by_its_name_in_a_model_and_alone():
    image = torch.randn(1, 3, 32, 48)
    named = featup_hub.load(NAME, upsampler="jbu_faithful", device="cpu")
    alone = featup_hub.load_upsampler("jbu_faithful")
    with torch.inference_mode():
        assert torch.equal(alone(named.source(image), image), named(image))


def test_a_layer_of_the_backbone_can_be_chosen():
    shallow = featup_hub.load("test_resnet", pretrained=False, layer=1)
    deep = featup_hub.load("test_resnet", pretrained=False)
    assert shallow.patch_size < deep.patch_size
    with pytest.raises(ValueError, match=r"clip has features of one layer only; got layer=3"):
        featup_hub.load("clip", pretrained=False, layer=3)


def test_random_and_pretrained_weights_have_one_architecture():
    random = featup_hub.load(NAME, pretrained=False)
    pretrained = featup_hub.load(NAME)
    random.load_state_dict(pretrained.state_dict())
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(random(image), pretrained(image))
    featup_hub.load_upsampler().load_state_dict(
        featup_hub.load_upsampler(pretrained=False).state_dict()
    )


def test_a_model_is_copied_and_sent_to_other_processes(model):
    image = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        expected = model(image)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(image), expected)


class Features(Dataset[torch.Tensor]):
    """Features of black pictures, computed in the process that asks."""

    def __init__(self, model: UpsampledBackbone) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(self.model.preprocess(Image.new("RGB", (16, 16), "black")))[0]


@pytest.mark.slow
def test_a_model_works_in_the_workers_of_a_data_loader(small):
    images = Features(small)
    workers = DataLoader(images, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    (batch,) = list(workers)
    assert torch.equal(batch, torch.stack([images[0], images[1]]))


def test_a_head_for_other_channels_is_refused_at_once(small):
    with pytest.raises(ValueError, match="features of 6 channels is needed; got one that takes 5"):
        small.fold_head(nn.Linear(5, 2))
