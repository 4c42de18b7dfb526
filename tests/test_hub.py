"""The Hub: its own library and timm against a local server that can fail."""

from __future__ import annotations

import errno
import json
import pickle

import pytest
import timm
import torch
from safetensors.torch import save
from torch import nn

import featup_hub
from featup_hub import weights
from featup_hub.loading import load_backbone
from tests.local_hub import LocalHub, serving

constants = pytest.importorskip("huggingface_hub.constants")

MODEL, REPO, FILE = "test_vit.r160_in1k", "timm/test_vit.r160_in1k", "model.safetensors"
CONFIG = b'{"feat_dim": 3}'
NEEDED = rf"^needed the weights of timm's {MODEL}; the Hugging Face Hub's library says: "


@pytest.fixture(scope="module")
def donor() -> nn.Module:
    """The network whose weights are on the Hub."""
    torch.manual_seed(1)
    return timm.create_model("test_vit").eval()


@pytest.fixture
def filled(hub: LocalHub, donor: nn.Module) -> LocalHub:
    """The Hub with one model of timm's on it."""
    hub.files[REPO] = {FILE: save(donor.state_dict()), "config.json": CONFIG}
    return hub


def is_loaded(donor: nn.Module) -> bool:
    """Loads the model; tells whether it has the weights that are on the Hub."""
    own = load_backbone(MODEL).model.state_dict()
    return all(torch.equal(tensor, donor.state_dict()[name]) for name, tensor in own.items())


def test_timms_weights_are_downloaded_once_and_found_in_the_cache_after(filled, donor, monkeypatch):
    assert is_loaded(donor)
    assert is_loaded(donor)
    assert filled.downloads() == 1
    asked = len(filled.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_loaded(donor)
    assert len(filled.requests) == asked


def test_a_mirror_that_does_not_tell_the_size_is_taken(filled, donor):
    filled.fault = "no size"
    assert is_loaded(donor)
    assert weights.download(REPO, "config.json").read_bytes() == CONFIG


def test_a_cache_that_takes_no_files_is_told_with_the_remedy(filled, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "models--x")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(RuntimeError, match=r"Permission denied.*set HF_HUB_CACHE to a folder"):
        weights.download(REPO, FILE)


def test_a_revision_is_the_one_named(filled, donor):
    old = filled.commit(REPO)
    filled.files[REPO] = {"config.json": b"{}"}
    assert weights.download(REPO, "config.json").read_bytes() == b"{}"
    with pytest.raises(
        RuntimeError, match=rf"\(revision {old}; there is no such folder\); .*Revision Not Found"
    ):
        weights.download(REPO, "config.json", revision=old)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("500", "locate"), ("drop", "disconnect"), ("html", "missing the"), ("html body", "size")],
)
def test_a_bad_server_is_one_clear_error_and_harms_no_later_load(
    filled, donor, monkeypatch, fault, reason
):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    filled.fault = fault
    with pytest.raises(RuntimeError, match=NEEDED + f"(?i:.*({reason}))") as caught:
        load_backbone(MODEL)
    assert caught.value.__suppress_context__  # one error, not a chain of them
    filled.fault = None
    assert is_loaded(donor)


def test_what_is_not_on_the_hub_is_told(hub):
    with pytest.raises(RuntimeError, match=NEEDED + r".*Repository Not Found"):
        load_backbone(MODEL)
    hub.files[REPO] = {"other": b""}
    with pytest.raises(RuntimeError, match=r"^needed config.json of .*Entry Not Found"):
        weights.download(REPO, "config.json")


def test_a_file_damaged_in_the_cache_is_told_with_the_remedy(filled, donor):
    assert is_loaded(donor)
    path = weights.download(REPO, FILE).resolve()
    for content in (b"damaged", pickle.dumps(print)):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"^needed the weights.*delete the file to download"):
            load_backbone(MODEL)
    path.unlink()
    assert is_loaded(donor)  # the advice was good


def test_a_network_without_weights_on_the_hub_is_told():
    with pytest.raises(RuntimeError, match="timm has no weights for 'test_vit4'; give a file of y"):
        load_backbone("test_vit4")


@pytest.mark.parametrize("spelling", ["hf-hub:someone/some.vit", "hf_hub:someone/some.vit"])
def test_a_repository_of_timms_kind_loads_by_the_name_that_timm_gives_it(hub, spelling):
    donor = timm.create_model("test_vit", num_classes=7, img_size=96).eval()
    own = {"input_size": [3, 96, 96], "fixed_input_size": True, "mean": [0.4] * 3, "std": [0.3] * 3}
    own |= {"classifier": "head", "num_classes": 7, "first_conv": "patch_embed.proj"}
    config = {"architecture": "test_vit", "num_classes": 7, "model_args": {"img_size": 96}}
    config["pretrained_cfg"] = {**own, "license": "mit"}
    hub.files["someone/some.vit"] = {
        "config.json": json.dumps(config).encode(), FILE: save(donor.state_dict())
    }  # fmt: skip
    model = featup_hub.load(spelling)
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        rgb = image * torch.tensor(model.std)[:, None, None]
        rgb = rgb + torch.tensor(model.mean)[:, None, None]
        tokens = donor.forward_features((rgb - 0.4) / 0.3)[:, 1:]
        torch.testing.assert_close(model.backbone(image).flatten(2).mT, tokens, atol=1e-4, rtol=0)
    assert featup_hub.loading.find_card(spelling).licence == "mit"
    assert featup_hub.loading.find_card(spelling).image_size == 96
    pinned = f"{spelling}@{hub.commit('someone/some.vit')}"
    assert load_backbone(pinned).feat_dim == model.feat_dim


def test_no_connection_is_one_error(hub_cache, monkeypatch):
    with serving() as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(RuntimeError, match=NEEDED + ".*next time, set HF_HUB_OFFLINE=1"):
        load_backbone(MODEL)


@pytest.mark.parametrize("repo_id", ["../evil", "a/b/c", "a/..", "/a", "a--b/../c", "", "./here"])
def test_names_that_are_no_repository_are_refused(repo_id):
    with pytest.raises(ValueError, match="a Hub repository is named owner/name; got"):
        weights.download(repo_id, FILE)


def test_offline_and_not_cached_is_one_error_that_says_what_to_do(hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=NEEDED) as caught:
        load_backbone(MODEL)
    for part in (
        "run once with a connection and without HF_HUB_OFFLINE",
        f"copy the cache {hub_cache} from a machine that has the file",
        "give its path, on the command line by --model NAME=FILE",
    ):
        assert part in str(caught.value)


@pytest.mark.shared
def test_dinov2_comes_from_the_hub_under_timms_names(hub, shared, monkeypatch):
    file = shared / "backbones/dinov2_vits14_saliency_ft.safetensors"
    hub.files["timm/vit_small_patch14_dinov2.lvd142m"] = {FILE: file.read_bytes()}
    image = torch.randn(1, 3, 56, 70)
    with torch.inference_mode():
        source = load_backbone("dinov2_vits14")(image)
        assert source.shape == (1, 384, 4, 5)
        assert torch.equal(load_backbone("dinov2", weights=file)(image), source)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert torch.equal(load_backbone("dinov2")(image), source)
    assert hub.downloads() == 1
