"""The Hub, for real: its own library against a server on this machine that can misbehave."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import featup_hub
from featup_hub import JBUStack, weights
from featup_hub.registry import WeightFile
from tests.local_hub import Fault, LocalHub, serving

constants = pytest.importorskip("huggingface_hub.constants")

REPO, NAME = "someone/some.model", "model.safetensors"
CACHE_MESSAGE = r"needed model.safetensors of someone/some.model \(revision main\); it is not in "


def content(size: int = 1000) -> bytes:
    generator = torch.Generator().manual_seed(size)
    from safetensors.torch import save

    return save({"weight": torch.randn(size, generator=generator)})


def row(sha256: str | None = None, revision: str | None = None) -> WeightFile:
    return WeightFile(
        name="some model",
        filename=NAME,
        repo_id=REPO,
        sha256=sha256,
        revision=revision,
        licence="MIT",
        data="none",
    )


def data_in(hub_cache: Path) -> list[Path]:
    """Everything in the cache that is, or may be taken for, a file of weights."""
    found = [*hub_cache.glob("**/blobs/**/*"), *hub_cache.glob("**/snapshots/**/*")]
    return [path for path in found if path.is_symlink() or path.is_file()]


def test_a_file_is_downloaded_once_and_read_from_the_cache_after(hub, hub_cache):
    hub.files[REPO] = {NAME: content()}
    first = weights.load(row())
    asked = len(hub.requests)
    second = weights.load(row())
    assert torch.equal(first["weight"], second["weight"])
    assert hub.downloads() == 1
    assert len(hub.requests) == asked  # not even a question
    assert weights.resolve(row()).is_relative_to(hub_cache)


def test_a_cached_file_is_loaded_with_the_network_gone(hub, monkeypatch):
    hub.files[REPO] = {NAME: content()}
    weights.load(row())
    hub.fault = "drop"
    assert weights.load(row())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights.load(row())


def test_a_pinned_revision_and_digest_are_what_is_loaded(hub):
    hub.files[REPO] = {NAME: content(10)}
    old, digest = hub.commit(REPO), hashlib.sha256(content(10)).hexdigest()
    assert weights.load(row(digest, old))["weight"].shape == (10,)
    hub.files[REPO] = {NAME: content(20)}
    assert weights.load(row(digest, old))["weight"].shape == (10,)  # cached by its commit
    assert weights.load(row(None, hub.commit(REPO)))["weight"].shape == (20,)


def test_another_file_than_the_pinned_one_is_refused_and_leaves_the_cache(hub, hub_cache):
    hub.files[REPO] = {NAME: content()}
    with pytest.raises(RuntimeError, match=f"came with sha256 .*, needed {'0' * 64}; it was remo"):
        weights.load(row("0" * 64))
    assert data_in(hub_cache) == []
    digest = hashlib.sha256(content()).hexdigest()
    assert weights.load(row(digest))  # and the next load is not poisoned


@pytest.mark.parametrize("pinned", [False, True])
def test_a_bit_flipped_on_the_way_is_seen_and_leaves_the_cache(hub, hub_cache, pinned):
    hub.files[REPO] = {NAME: content()}
    digest = hashlib.sha256(content()).hexdigest()
    hub.fault = "flip"
    with pytest.raises(RuntimeError, match=f"came with sha256 .*, needed {digest}; it was removed"):
        weights.load(row(digest if pinned else None))
    assert data_in(hub_cache) == []
    hub.fault = None
    assert weights.load(row())


def test_a_bit_flipped_in_the_cache_is_seen_on_the_next_load(hub):
    hub.files[REPO] = {NAME: content()}
    path = weights.resolve(row())
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.resolve().write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model.safetensors is not the weights") as caught:
        weights.load(row())
    assert f"delete {path.resolve()} and fetch it again" in str(caught.value)
    path.resolve().unlink()
    assert weights.load(row())  # the advice was good


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("500", "500"),
        ("drop", "disconnected"),
        ("html", "etag and commit must be plain words; got None"),
        ("html body", "Consistency check failed: file should be of size"),
        ("half", "more than 3 times the announced .* bytes came"),
        ("endless", "more than 3 times the announced .* bytes came"),
        ("no size", "does not say how large the file is"),
        ("evil etag", "etag and commit must be plain words; got '../../../evil'"),
        ("evil commit", "etag and commit must be plain words; got '../../../evil'"),
        ("redirect", "(redirect|302)"),
        ("hang", "(timed out|Timeout)"),
        ("stall", "(timed out|Timeout|more than 3 times the announced)"),
    ],
)
def test_a_bad_server_costs_few_tries_and_one_clear_error_and_the_cache_stays_clean(
    hub: LocalHub, hub_cache: Path, tmp_path: Path, monkeypatch, fault: Fault, reason: str
):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.files[REPO] = {NAME: content(10_000)}
    hub.fault = fault
    with pytest.raises(RuntimeError, match=CACHE_MESSAGE + rf"[\s\S]*(?i:{reason})") as caught:
        weights.load(row())
    assert caught.value.__suppress_context__  # one error, not a chain of them
    # What the server is asked bounds the time, whatever the machine is busy with.
    assert len(hub.requests) <= {"hang": 1, "redirect": 3 * 21, "stall": 16}.get(fault, 12)
    assert data_in(hub_cache) == []
    assert [path.name for path in tmp_path.rglob("*evil*")] == []
    hub.fault = None
    assert weights.load(row())


def test_a_slow_server_is_given_the_time_it_needs(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    hub.files[REPO] = {NAME: content(4000)}
    hub.fault = "slow"
    start = time.monotonic()
    assert weights.load(row())["weight"].shape == (4000,)
    assert time.monotonic() - start > 32 * 0.02
    assert hub.downloads() == 1


@pytest.mark.parametrize("fault", ["500 twice", "half once"])
def test_a_passing_failure_is_overcome(hub, monkeypatch, fault):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.files[REPO] = {NAME: content()}
    hub.fault = fault
    assert weights.load(row())["weight"].shape == (1000,)


def test_what_is_not_on_the_hub_is_told_at_once(hub):
    with pytest.raises(RuntimeError, match=CACHE_MESSAGE + r"[\s\S]*Repository Not Found"):
        weights.load(row())
    hub.files[REPO] = {"other": b""}
    with pytest.raises(RuntimeError, match=CACHE_MESSAGE + r"[\s\S]*Entry Not Found"):
        weights.load(row())
    with pytest.raises(RuntimeError, match=r"revision v9.*[\s\S]*Revision Not Found"):
        weights.load(row(revision="v9"))
    assert len(hub.requests) == 3  # no second try for an answer that is final


def test_offline_and_not_cached_is_one_error_within_seconds(tmp_path):
    code = """if True:
        from time import monotonic
        from featup_hub import registry, weights
        start = monotonic()
        try:
            weights.load(registry.MODELS["dinov2"].backbone_file)
        finally:
            print(monotonic() - start)
    """
    done = python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert float(done.stdout) < 10  # with the import of huggingface_hub
    assert done.stderr.count("Traceback") == 1
    last = done.stderr.strip().splitlines()[-1]
    for part in (
        "needed model.safetensors of timm/vit_small_patch14_dinov2.lvd142m (revision main)",
        f"not in the Hugging Face cache {(tmp_path / 'hub').resolve()}",
        "HF_HUB_OFFLINE is set",
        "run once with a connection",
        "copy that cache from a machine",
        "/timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
        "give its path, on the command line by --model NAME=FILE",
    ):
        assert part in last


def test_no_connection_is_one_error_within_seconds(hub_cache, monkeypatch):
    with serving() as gone:
        endpoint = gone.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=CACHE_MESSAGE + r"[\s\S]*refused"):
        weights.load(row())
    assert time.monotonic() - start < 10
    assert data_in(hub_cache) == []


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/passwd", "a\\b", "", ".", "a//b", "C:x", "a\0b", "a/./b"],
)
def test_names_that_lead_out_of_a_repository_are_refused(hub_cache, name):
    with pytest.raises(ValueError, match="a file's name must be relative, without"):
        weights.download(REPO, name)
    with pytest.raises(ValueError, match="a file's name must be relative, without"):
        weights.resolve(replace(row(), filename=name))
    if name:
        with pytest.raises(ValueError, match="a revision's name must be relative, without"):
            weights.download(REPO, NAME, revision=name)
    assert not hub_cache.exists()


@pytest.mark.parametrize("repo_id", ["../evil", "a/b/c", "a/..", "/a", "a--b/../c", "", "./here"])
def test_names_that_are_no_repository_are_refused(repo_id):
    with pytest.raises(ValueError, match="a Hub repository is named owner/name; got"):
        weights.download(repo_id, NAME)


def test_a_link_that_leads_out_of_the_cache_is_refused(hub, hub_cache, tmp_path):
    hub.files[REPO] = {NAME: content()}
    path = weights.resolve(row())
    (tmp_path / "elsewhere").write_bytes(content())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match=r"must lie in the Hugging Face cache .*; delete it"):
        weights.load(row())


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with these variables only of the Hub's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    path = str(Path(__file__).resolve().parents[1])
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_processes_that_load_at_once_get_one_whole_file(hub, hub_cache, tmp_path):
    hub.files[REPO] = {NAME: content(2_000_000)}
    code = f"""if True:
        import pathlib, time, hashlib, huggingface_hub.file_download
        from featup_hub import registry, weights
        row = registry.WeightFile(
            name="m", filename={NAME!r}, repo_id={REPO!r}, licence="", data=""
        )
        print("ready", flush=True)
        while not pathlib.Path({str(tmp_path / "go")!r}).exists():
            time.sleep(0.01)
        print(hashlib.sha256(weights.load(row)["weight"].numpy().tobytes()).hexdigest())
    """
    variables = environment(HF_ENDPOINT=hub.endpoint, HF_HUB_CACHE=str(hub_cache))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    assert {process.stdout.readline() for process in running} == {"ready\n"}
    (tmp_path / "go").touch()
    printed = {process.communicate(timeout=300)[0] for process in running}
    assert len(printed) == 1
    assert len(printed.pop().strip()) == 64
    assert sum(request.startswith("HEAD") for request in hub.requests) > 1  # at once indeed
    assert hub.downloads() == 1
    assert len([path for path in data_in(hub_cache) if not path.is_symlink()]) == 1


@pytest.mark.shared
def test_dinov2_comes_from_the_hub_under_timms_names(hub, shared, tmp_path, monkeypatch):
    file = shared / "backbones/dinov2_vits14_saliency_ft.safetensors"
    repo_id = "timm/vit_small_patch14_dinov2.lvd142m"
    hub.files[repo_id] = {NAME: file.read_bytes()}
    stages = tmp_path / "stages.safetensors"
    weights.write(JBUStack().state_dict(), stages)
    model = featup_hub.load("dinov2", weights=stages)
    assert hub.requests[-1] == f"GET /{repo_id}/resolve/main/{NAME}"
    image = torch.randn(1, 3, 56, 70)
    with torch.inference_mode():
        source, features = model.source(image), model(image)
    assert source.shape == (1, 384, 4, 5)
    assert features.shape == (1, 384, 56, 70)
    own = featup_hub.load("dinov2", weights=stages, backbone_weights=file)
    with torch.inference_mode():
        assert torch.equal(own.source(image), source)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = featup_hub.load("dinov2", weights=stages)
    with torch.inference_mode():
        assert torch.equal(again(image), features)
    assert hub.downloads() == 1
