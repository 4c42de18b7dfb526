"""Runs the documents: Python page by page; of commands, only the flags are parsed."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import featup_hub
from featup_hub import JBUStack, export
from featup_hub.cli import _parser
from featup_hub.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [*DOCS, README, ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in CODE.findall(page.read_text()) if language in languages]


def command_lines() -> list[str]:
    lines = []
    for page in PAGES:
        for block in blocks(page, "bash", "sh"):
            joined = block.replace("\\\n", " ")
            lines += [part for line in joined.splitlines() for part in line.split("&&")]
        lines += re.findall(r"`(featup-hub [^`]+)`", page.read_text())
    return sorted({line.strip() for line in lines if line.strip().startswith("featup-hub ")})


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pages may write, with what they read of a checkout."""
    for name in ("hubconf.py", "featup_hub", "tests", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    state = {f"upsampler.{name}": value for name, value in JBUStack(384).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "upstream.ckpt")
    monkeypatch.chdir(tmp_path)
    # For one size, in a tenth of the time; test_export_default.py traces four stages for any size.
    monkeypatch.setattr(export, "trace", partial(export.trace, dynamic=False))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in (*DOCS, README) if blocks(page, "python")],
    ids=lambda page: page.stem,
)
def test_a_pages_python_runs_from_top_to_bottom(page, checkout):
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


def test_pages_export_trained_weights():
    exporting = [block for page in DOCS for block in blocks(page, "python") if "trace(" in block]
    assert exporting
    assert all("load" in block and "JBUStack(" not in block for block in exporting)


@pytest.mark.slow
def test_the_notebook_gives_the_outputs_it_stores():
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    path = ROOT / "docs/featup_hub.ipynb"
    pictures = runpy.run_path(str(ROOT / "docs/pictures.py"))
    stored, made = nbformat.read(path, as_version=4), pictures["executed"](path)
    for cell, again in zip(stored.cells, made.cells, strict=True):
        for output, new in zip(cell.get("outputs", []), again.get("outputs", []), strict=True):
            assert output.get("text") == new.get("text")
            if "data" in output:
                assert difference(output.data["image/jpeg"], new.data["image/jpeg"]) < 2


def difference(first: str, second: str) -> float:
    """The mean difference of two encoded pictures, in levels of 256."""
    a, b = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(x))).convert("RGB"), np.float32)
        for x in (first, second)
    )
    assert a.shape == b.shape
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("line", command_lines())
def test_a_command_that_is_shown_is_understood(line):
    with contextlib.suppress(SystemExit):  # --help
        arguments = shlex.split(line, comments=True)[1:]
        if len(arguments) > 1:
            assert callable(_parser().parse_args(arguments).run)
        else:  # a command's name in a sentence
            _parser().parse_args([*arguments, "--help"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Returns the headings of a page as GitHub's links spell them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def test_the_index_lists_every_page():
    index = (ROOT / "docs/README.md").read_text()
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.ipynb")]
    assert {page.name for page in pages} - {"README.md"} == set(
        re.findall(r"\]\(([\w.-]+)\)", index)
    )


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_knows_every_public_name(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "api.html").read_text()
    for name in set(featup_hub.__all__) - {"__version__"}:
        assert re.search(rf'id="featup_hub\.([\w.]+\.)?{name}"', reference), name


def test_the_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == featup_hub.__version__
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert project[1] == featup_hub.__version__
    changes = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0] == "Unreleased"


def test_the_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    (paper,) = citation["references"]
    readme = README.read_text()
    assert paper["url"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_the_continuous_integration_runs_the_readmes_two_commands():
    script = (ROOT / ".ci/run").read_text()
    first, second = (block.strip() for block in blocks(README, "bash"))
    install, upsample = first.split(" && ")
    assert f"{install.replace('pip install', 'pip install --quiet')}\n" in script
    shown = upsample.replace("tests/data", "$OLDPWD/tests/data").partition(" --out")[0]
    assert shown in script.replace('"', "")
    install, tests = second.split(" && ")
    assert install.replace("pip install", "pip install --quiet") in script
    assert f"\n{tests}" in script


def test_the_readme_names_every_model_of_the_registry():
    text = README.read_text()
    table = text[text.index("## Which model") : text.index("## How good")]
    assert set(MODELS) <= set(re.findall(r"`([a-z0-9_]+)`", table))
