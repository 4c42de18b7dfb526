"""Upsamplers by name, by file, by plug-in; and the position of a linear head."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featup_hub import load_upsampler
from featup_hub.evaluation import candidates
from featup_hub.evaluation.candidates import Candidate, UnknownUpsamplerError, candidate
from featup_hub.upsamplers import JBUStack, JointBilateralStage
from featup_hub.weights import write

SIZE = (16, 24)


@pytest.fixture
def inputs():
    return torch.randn(1, 5, 4, 6), torch.randn(1, 3, *SIZE)


@pytest.fixture(params=[4, 5], ids="{} stages".format)
def stack(request):
    stack = JBUStack(num_stages=request.param).eval()
    for index in range(1, 5):  # kernels that shrink what they filter, as upstream's do
        getattr(stack, f"up{index}").fixup_proj[3].bias.data.fill_(-0.05)
    return stack.requires_grad_(False)


@pytest.fixture
def file(stack, tmp_path):
    closing = {"fixup_proj.1.weight": torch.randn(9, 9, 1, 1), "fixup_proj.1.bias": torch.randn(9)}
    write({**stack.state_dict(), **closing}, tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


@pytest.fixture
def plug_in(monkeypatch):
    """Makes a candidate of a function in somebody's module."""

    def make(function, head="after", name="somebodys_upsampler:function"):
        module = types.ModuleType("somebodys_upsampler")
        module.function = function
        if head != "after":
            function.head = head
        monkeypatch.setitem(sys.modules, "somebodys_upsampler", module)
        return candidate(name)

    return make


def test_a_file_gives_its_stages_without_the_closing_convolution(file, stack, inputs):
    found = candidate(str(file))
    assert found.name == "mine"
    torch.testing.assert_close(found(*inputs, SIZE), stack(*inputs, size=SIZE))


def test_unit_divides_every_kernel_by_its_sum(file, inputs):
    ones = torch.ones_like(inputs[0])
    plain, unit = candidate(str(file)), candidate(f"{file}@unit")
    assert (plain(ones, inputs[1], SIZE) - 1).abs().max() > 0.1
    torch.testing.assert_close(unit(ones, inputs[1], SIZE), torch.ones(1, 5, *SIZE))
    assert unit.name == "mine@unit"


def test_a_plug_in_is_imported_and_taken_as_it_is(plug_in, inputs):
    found = plug_in(
        lambda source, image, size: F.interpolate(source, size) ** 2,
        name="theirs=somebodys_upsampler:function",
    )
    assert (found.name, found.head) == ("theirs", "after")
    weight = torch.randn(2, 5)
    expected = F.conv2d(found(*inputs, SIZE), weight[:, :, None, None])
    torch.testing.assert_close(found.project(*inputs, SIZE, weight), expected)


def test_an_exception_while_a_plug_in_is_imported_is_one_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_written.py").write_text("raise KeyError('not yet')")
    message = r"importable; got 'half_written:up' \(KeyError: 'not yet'\); .* mend the module"
    with pytest.raises(UnknownUpsamplerError, match=message):
        candidate("half_written:up")


@pytest.mark.parametrize(
    ("function", "head", "message"),
    [
        (lambda source: source, "after", r"source, image, size\); got .*too many positional"),
        (
            lambda source, image, size: source,
            "inside",
            r"size, head=\.\.\.\); got .*argument 'head'",
        ),
        (5, "after", r"\(5 is not a callable object\); change its parameters"),
    ],
)
def test_a_plug_in_of_other_arguments_is_refused_before_it_is_called(
    plug_in, function, head, message
):
    with pytest.raises(UnknownUpsamplerError, match=rf"callable as function\(.*{message}"):
        plug_in(function, head=head)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (None, "NoneType"),
        (np.zeros((1, 5, *SIZE)), "ndarray"),
        (torch.zeros(1, 5, 4, 6), r"\(1, 5, 4, 6\)"),
    ],
)
def test_a_plug_in_must_return_features_of_the_size_asked_for(plug_in, inputs, returned, got):
    found = plug_in(lambda source, image, size: returned)
    message = rf"a tensor of shape \(1, 5, 16, 24\); 'somebodys_upsampler:function' gave {got}; ups"
    with pytest.raises(ValueError, match=message):
        found(*inputs, SIZE)


def test_a_head_before_inside_and_after_are_one(file, inputs, plug_in):
    weight = torch.randn(3, 5)
    before = candidate(str(file))
    after = Candidate(name="after", function=before.function)

    def function(source, image, size, head):
        return before.function(F.conv2d(source, head[:, :, None, None]), image, size)

    inside = plug_in(function, head="inside")
    results = [c.project(*inputs, SIZE, weight) for c in (before, inside, after)]
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("name", ["jbu_denoise", "jbu_faithful", "jbu_faithful@unit"])
def test_shipped_upsamplers_are_found_by_their_names(name, inputs):
    found = candidate(name)
    assert (found.name, found.head) == (name, "before")
    assert found.identity
    own = load_upsampler(name.removesuffix("@unit")).requires_grad_(False)
    # Shipped kernels sum to one as they are.
    torch.testing.assert_close(found(*inputs, SIZE), own(*inputs, size=SIZE), rtol=1e-4, atol=1e-4)


def test_a_change_of_a_stack_s_code_changes_its_identity(tmp_path, monkeypatch):
    assert Path(inspect.getfile(JointBilateralStage)) in candidates.STACK_CODE
    code = tmp_path / "joint.py"
    monkeypatch.setattr(candidates, "STACK_CODE", [code])
    identities = set()
    for text in ("share = 0.6", "share = 0.7"):
        code.write_text(text)
        identities |= {candidate(name).identity for name in ("jbu_denoise", "jbu_denoise@unit")}
    assert len(identities) == 4


@pytest.mark.shared
def test_upstream_s_checkpoint_is_read_and_shrinks_features_unless_unit(shared, inputs):
    path = shared / "checkpoints" / "featup_clip_jbu_stack_cocostuff.ckpt"
    ones = torch.ones(1, 1, 4, 6)
    image = torch.rand(1, 3, *SIZE) - 0.5
    assert candidate(str(path))(ones, image, SIZE).mean() < 0.9
    unit = candidate(f"{path}@unit")(ones, image, SIZE)
    torch.testing.assert_close(unit, torch.ones_like(unit))


def test_a_stack_smooths_each_of_four_looks_by_itself():
    source, image = torch.randn(1, 5, 8, 12), torch.randn(1, 3, 64, 96)
    stack = load_upsampler()
    stack.looks_per_side = 2
    four = candidate("jbu_denoise").with_looks(4)
    assert (four.name, four.looks) == ("jbu_denoise ×4", 4)
    torch.testing.assert_close(four(source, image, (64, 96)), stack(source, image))
