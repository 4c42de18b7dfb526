"""Saving, sharing and loading in the Hub's layout."""

from __future__ import annotations

import json

import pytest
import torch

from featup_hub import JBUStack


def stack(**options: int) -> JBUStack:
    module = JBUStack(**options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    return module


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_saved_upsampler_comes_back(tmp_path):
    saved = stack(feat_dim=5, num_stages=2, key_dim=8, radius=2)
    saved.save_pretrained(tmp_path / "new/folder")
    state = torch.random.get_rng_state()
    loaded = JBUStack.from_pretrained(tmp_path / "new/folder")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(saved, loaded)
    assert not loaded.training
    source, image = torch.randn(1, 5, 2, 3), torch.randn(1, 3, 8, 12)
    assert torch.equal(saved(source, image), loaded(source, image))
    config = json.loads((tmp_path / "new/folder/config.json").read_text())
    assert config["feat_dim"] == 5
    loaded.train()(source, image).sum().backward()  # a whole module, not one for looking at only
    (tmp_path / "new/folder/model.safetensors").unlink()
    assert torch.isfinite(loaded(source, image)).all()


def test_the_number_of_looks_comes_back_and_is_in_no_file_of_one_look(tmp_path):
    saved = JBUStack(joint_first=True, looks_per_side=2).eval()
    saved.save_pretrained(tmp_path)
    source, image = torch.randn(1, 5, 4, 6), torch.randn(1, 3, 8, 12)
    assert torch.equal(JBUStack.from_pretrained(tmp_path)(source, image), saved(source, image))
    JBUStack().save_pretrained(tmp_path)
    assert "looks_per_side" not in json.loads((tmp_path / "config.json").read_text())
    assert JBUStack.from_pretrained(tmp_path).looks_per_side == 1


def test_a_card_is_written_once_and_kept(tmp_path):
    stack().save_pretrained(tmp_path, licence="mit")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: featup_hub\n")
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.license == "mit"
    (tmp_path / "README.md").write_text("mine")
    stack().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_is_pushed_is_pulled(hub):
    pushed = stack(feat_dim=4)
    address = pushed.push_to_hub("someone/upsampler", licence="mit", token="none")
    commit = hub.commit("someone/upsampler")
    assert address == f"{hub.endpoint}/someone/upsampler/commit/{commit}"
    made = ["README.md", "config.json", "model.safetensors"]
    assert sorted(hub.files["someone/upsampler"]) == made
    assert b'from_pretrained("someone/upsampler")' in hub.files["someone/upsampler"]["README.md"]
    assert same(pushed, JBUStack.from_pretrained("someone/upsampler"))
    assert same(pushed, JBUStack.from_pretrained("someone/upsampler", revision=commit))


def test_a_push_keeps_the_card_that_is_there(hub):
    hub.files["someone/upsampler"] = {"README.md": b"mine"}
    stack().push_to_hub("someone/upsampler", token="none")
    assert hub.files["someone/upsampler"]["README.md"] == b"mine"
    assert "model.safetensors" in hub.files["someone/upsampler"]


def test_a_branch_is_looked_up_again_where_there_is_a_connection(hub, monkeypatch):
    first, second = stack(), stack(num_stages=2)
    first.push_to_hub("someone/upsampler", token="none")
    assert same(first, JBUStack.from_pretrained("someone/upsampler"))
    second.push_to_hub("someone/upsampler", token="none")
    assert same(second, JBUStack.from_pretrained("someone/upsampler"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(second, JBUStack.from_pretrained("someone/upsampler"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("<html>", r"must be a JSON object with .* of JBUStack \(feat_dim, .*Expecting"),
        ("[]", r"must be a JSON object .*must be a mapping"),
        ('{"hidden_size": 3}', r"unexpected .* 'hidden_size'; is it another model's\?"),
        ('{"feat_dim": "5"}', r"feat_dim must be at least 1, a whole number; got '5'"),
        ('{"num_stages": 0}', r"num_stages must be at least 1"),
        ('{"feat_dim": 6}', r"model.safetensors does not fit JBUStack.*fixup_proj.1.weight"),
        ("{}", r"model.safetensors does not fit JBUStack.*not known here: fixup_proj.1.bias"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, message):
    stack(feat_dim=5).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        JBUStack.from_pretrained(tmp_path)


def test_a_folder_without_its_files_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got no config.json; make the folder with save"):
        JBUStack.from_pretrained(tmp_path)
    stack().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights file .*model.safetensors"):
        JBUStack.from_pretrained(tmp_path)
