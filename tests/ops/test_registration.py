"""Registration with torch: schema, fakes, autograd, autocast, vmap, compile."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from featup_hub import load_upsampler
from featup_hub.ops import StageWeights, jbu_apply, jbu_kernel, joint_kernel
from featup_hub.upsamplers import JBUStack, JBUStage
from tests.operations import Recorder
from tests.ops.formulations import randomise

OPS = torch.ops.featup_hub


def stage_weights(dtype: torch.dtype = torch.float32) -> StageWeights:
    stage = JBUStage().to(dtype)
    return StageWeights(*(tensor.detach() for tensor in stage.weights()))


def maps(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Guidance (2, 3, 6, 8), source (2, 4, 3, 4), kernel (2, 49, 6, 8), bias (4,)."""
    return (
        torch.randn(2, 3, 6, 8, dtype=dtype),
        torch.randn(2, 4, 3, 4, dtype=dtype),
        torch.randn(2, 49, 6, 8, dtype=dtype),
        torch.randn(4, dtype=dtype),
    )


def sample(operation: str, dtype: torch.dtype) -> tuple[Any, ...]:
    guidance, source, kernel, bias = maps(dtype)
    output = torch.randn(2, 4, 6, 8, dtype=dtype)
    return {
        "jbu_kernel": (guidance, *stage_weights(dtype), "torch"),
        "jbu_kernel_backward": (kernel, guidance, *stage_weights(dtype), "torch"),
        "jbu_apply": (source, kernel, bias, "torch"),
        "jbu_apply_backward": (output, source, kernel, True, True, "torch"),
    }[operation]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "operation", ["jbu_kernel", "jbu_kernel_backward", "jbu_apply", "jbu_apply_backward"]
)
def test_schema_and_fake_agree_with_what_the_operation_does(operation, dtype):
    torch.library.opcheck(
        getattr(OPS, operation),
        sample(operation, dtype),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (5, 3), (1, 1)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_fakes_agree_for_every_ratio_and_partial_backward(needs, size):
    source, kernel, bias = torch.randn(2, 4, *size), torch.randn(2, 49, 6, 8), torch.randn(4)
    for operation, args in (
        (OPS.jbu_apply, (source, kernel, bias, "torch")),
        (OPS.jbu_apply_backward, (torch.randn(2, 4, 6, 8), source, kernel, *needs, "torch")),
    ):
        torch.library.opcheck(operation, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("operation", ["jbu_kernel", "jbu_apply"])
def test_opcheck_passes_with_gradients_static_and_dynamic(operation):
    args = [
        arg.requires_grad_() if isinstance(arg, Tensor) else arg
        for arg in sample(operation, torch.float32)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, from its tracing
        torch.library.opcheck(getattr(OPS, operation), tuple(args))


def joint_inputs() -> list[Tensor]:
    shapes = ((2, 3, 7, 9), (2, 3, 4, 6), (), ())  # query, key, spatial width, range width
    return [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_the_joint_kernels_gradients_pass_gradcheck(impl):
    def kernels(*inputs):
        return joint_kernel(*inputs, cells=(3, 4), radius=2, impl=impl)

    shapes = ((1, 2, 5, 6), (1, 2, 3, 4), (), ())
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(kernels, inputs)


@pytest.mark.parametrize(
    ("operation", "args"), [("joint_kernel", (4, 6, 3, "torch")), ("pool_guidance", (3, 14))]
)
def test_opcheck_passes_with_sizes_as_arguments(operation, args):
    image = torch.rand(2, 3, 8, 7, dtype=torch.float64, requires_grad=True)
    inputs = joint_inputs() if operation == "joint_kernel" else (image,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, from its tracing
        torch.library.opcheck(getattr(OPS, operation), (*inputs, *args))


def test_the_poolings_gradient_passes_gradcheck():
    image = torch.rand(1, 2, 8, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: OPS.pool_guidance(image, 3, 14), image)


def test_modules_of_the_operations_can_be_reloaded():
    code = """if True:
        import importlib, sys, torch
        from featup_hub import load_upsampler
        upsampler = load_upsampler().train()
        arguments = torch.randn(1, 5, 4, 6, requires_grad=True), torch.randn(1, 3, 64, 96)
        torch.manual_seed(0)
        expected = upsampler(*arguments)
        modules = [name for name in sys.modules if name.startswith("featup_hub.ops")]
        for name in modules:
            importlib.reload(sys.modules[name])
        torch.manual_seed(0)
        again = upsampler(*arguments)
        again.sum().backward()
        print(torch.equal(again, expected), "featup_hub.ops.registration" in modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_a_forward_pass_of_the_default_upsampler_is_few_operators():
    upsampler, inputs = load_upsampler(), (torch.randn(1, 8, 4, 4), torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        upsampler(*inputs)  # the first call also looks at the image's values
        with Recorder() as recorder:
            upsampler(*inputs)
    # Views and questions about types cost nothing.
    free = ("promote_types", "view", "unsqueeze", "unbind", "t", "expand", "slice", "select")
    assert sum(count for name, count in recorder.names.items() if name not in free) <= 40


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func.jvp itself
def test_forward_mode_derivatives_are_those_of_the_definition():
    stack = randomise(JBUStack(num_stages=1, radius=1, joint_first=True)).double().eval()
    stack.requires_grad_(False)  # a registered operator would take the derivative for zero
    source, image = torch.randn(1, 4, 3, 4).double(), torch.randn(1, 3, 12, 15).double()
    output, along = torch.func.jvp(lambda x: stack(x, image), (source,), (source,))
    torch.testing.assert_close(along, output)  # linear in the source
    step = 1e-5 * torch.randn_like(image)
    _, along = torch.func.jvp(lambda x: stack(source, x), (image,), (step,))
    difference = (stack(source, image + step) - stack(source, image - step)) / 2
    torch.testing.assert_close(along, difference, rtol=1e-4, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="torch before 2.5")
def test_vmap_is_a_loop_over_samples_whatever_is_mapped():
    guidance, source, kernel, bias = (torch.stack([x, 2 * x, -x]) for x in maps())
    weights = stage_weights()
    both = torch.vmap(lambda s, k: jbu_apply(s, k, bias[0], impl="torch"), in_dims=(1, 0))(
        source.movedim(0, 1), kernel
    )
    one = torch.vmap(lambda b: jbu_apply(source[0], kernel[0], b, impl="torch"))(bias)
    kernels = torch.vmap(lambda g: jbu_kernel(g, weights, impl="torch"))(guidance)
    hotter = torch.vmap(
        lambda t: jbu_kernel(guidance[0], weights._replace(range_temp=t), impl="torch")
    )(torch.tensor([0.0, 1.0, 2.0]))
    for i in range(3):
        assert torch.equal(both[i], jbu_apply(source[i], kernel[i], bias[0], impl="torch"))
        assert torch.equal(one[i], jbu_apply(source[0], kernel[0], bias[i], impl="torch"))
        assert torch.equal(kernels[i], jbu_kernel(guidance[i], weights, impl="torch"))
        expected = jbu_kernel(
            guidance[0], weights._replace(range_temp=torch.tensor(float(i))), impl="torch"
        )
        assert torch.equal(hotter[i], expected)


def test_second_derivatives_are_refused_by_the_fast_path_and_given_by_the_definition():
    _, source, kernel, _ = maps()
    source.requires_grad_()

    def slope(impl):
        loss = jbu_apply(source, kernel, impl=impl).pow(3).sum()
        return torch.autograd.grad(loss, source, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r"second derivatives .* use impl='reference'"):
        slope("torch").sum().backward()
    slope("reference").sum().backward()
    assert source.grad is not None


@pytest.mark.slow
def test_a_stack_compiles_without_a_graph_break_and_has_the_same_gradients():
    torch._dynamo.reset()
    stack = JBUStack(5, num_stages=1).eval()
    compiled = torch.compile(stack, fullgraph=True, dynamic=True, backend="aot_eager")
    for h, w in ((3, 4), (5, 3)):
        source = torch.randn(1, 5, h, w, requires_grad=True)
        image = torch.randn(1, 3, 2 * h, 2 * w)
        expected, found = stack(source, image), compiled(source, image)
        torch.testing.assert_close(found, expected)
        slopes = [torch.autograd.grad(y.square().sum(), source)[0] for y in (expected, found)]
        torch.testing.assert_close(*slopes)
    torch._dynamo.reset()
