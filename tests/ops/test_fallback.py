"""If the fused kernels cannot run: one clear warning, or a clear error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from featup_hub import ops
from featup_hub.ops import choice, torch_backend
from featup_hub.ops.cuda import backend, cache, nvrtc, programs
from featup_hub.ops.cuda.driver import CudaDriverError
from featup_hub.upsamplers import JBUStage

CUDA = torch.device("cuda", 0)


class OnCuda(torch.Tensor):
    """Says that it is on a CUDA device."""

    device = CUDA
    get_device = lambda self: 0  # noqa: E731


def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnCuda)


SOURCE, KERNEL = on_cuda(1, 8, 4, 4), on_cuda(1, 49, 8, 8)


def chosen(impl: str, name: str, *args: Any) -> str:
    """The implementation that computes."""
    return "torch" if choice.run(impl, name, *args) is None else "cuda"


def choose(impl: str, source: torch.Tensor = SOURCE, kernel: torch.Tensor = KERNEL) -> str:
    return chosen(impl, "apply", source, kernel, None)


class Driver:
    """Loads and launches anything."""

    def load(self, device: int, image: bytes, names: Iterable[str]) -> dict[str, Any]:
        return {name: name for name in names}

    def launch(self, name: str, *others: Any) -> None:
        pass


class Compiler:
    """Compiles anything at once, for sm_75 to sm_120."""

    version = "13.0"
    path = "libnvrtc.so.13"
    architectures = (75, 80, 90, 120)

    def compile(self, source: str, name: str, *others: Any) -> tuple[bytes, str]:
        return b"\x7fELF" + name.encode(), ""


def forget() -> None:
    for remembered in (programs._load, programs._compile_once, choice._warn_once, cache._warn_once):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine with one sm_90 device on which everything works."""
    forget()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(nvrtc, "load", Compiler)
    monkeypatch.setattr(programs, "open_driver", Driver)
    for name in ("kernel", "apply", "apply_backward"):
        monkeypatch.setattr(torch_backend, name, lambda *args: None)
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path))
    yield
    forget()


Break = Callable[[pytest.MonkeyPatch], None]


def card(major: int, minor: int) -> Break:
    """A card of this compute capability."""
    return lambda patch: patch.setattr(
        torch.cuda, "get_device_capability", lambda index: (major, minor)
    )


def failing(owner: Any, name: str, error: Exception) -> Break:
    def fail(*_: Any) -> None:
        raise error

    return lambda patch: patch.setattr(owner, name, fail)


FAULTS: dict[str, tuple[Break, str]] = {
    "ROCm": (
        lambda patch: patch.setattr(torch.version, "hip", "6.2"),
        "built for ROCm .* impl='torch' computes the same",
    ),
    "old card": (card(6, 1), r"need compute capability 7\.0 or newer; this device has 6\.1"),
    "card too old for the compiler": (card(7, 0), "not for this device's sm_70; .* an older CUDA"),
    "card too new for the compiler": (card(14, 0), "not for this device's sm_140; .* a newer CUDA"),
    "no NVRTC": (failing(nvrtc, "load", nvrtc.NvrtcError("was not found")), "was not found"),
    "compile error": (
        failing(Compiler, "compile", nvrtc.NvrtcError("could not compile jbu.cu")),
        r"could not compile jbu\.cu",
    ),
    "no driver": (
        failing(programs, "open_driver", CudaDriverError("could not be loaded; install a driver")),
        "could not be loaded; install a driver",
    ),
    "rejected image": (
        failing(Driver, "load", CudaDriverError("error 218 in loading")),
        "error 218 in loading",
    ),
}


def test_where_all_is_well_auto_and_cuda_take_the_kernels_without_a_word():
    assert [choose(impl) for impl in ("auto", "cuda", "torch")] == ["cuda", "cuda", "torch"]


@pytest.mark.parametrize("fault", FAULTS)
def test_auto_falls_back_with_one_warning_a_named_one_never_does_and_the_status_says_the_same(
    monkeypatch, fault
):
    break_it, words = FAULTS[fault]
    break_it(monkeypatch)
    with pytest.warns(UserWarning, match=f"without the fused CUDA kernels: .*{words}") as caught:
        assert [choose("auto") for _ in range(3)] == ["torch"] * 3
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match=f"impl='cuda' was asked for and cannot run: .*{words}"):
        choose("cuda")
    _, status = ops.implementations()
    assert (status.impl, status.cubins) == ("torch", ())
    assert re.search(words, str(status))


def test_what_went_wrong_is_found_out_once_per_device(monkeypatch):
    calls = []

    def load():
        calls.append(1)
        raise nvrtc.NvrtcError("missing")

    monkeypatch.setattr(nvrtc, "load", load)
    with pytest.warns(UserWarning, match="missing"):
        assert [choose("auto") for _ in range(3)] == ["torch"] * 3
    assert len(calls) == 1


def test_a_failure_to_load_is_not_kept(monkeypatch):
    answers = iter([CudaDriverError("error 2 in loading: out of memory"), None])

    def load(self, *args):
        if error := next(answers):
            raise error
        return {name: name for name in args[2]}

    monkeypatch.setattr(Driver, "load", load)
    with pytest.warns(UserWarning, match="out of memory"):
        assert choose("auto") == "torch"
    assert choose("auto") == "cuda"


@pytest.mark.parametrize(("device", "code"), [(90, 90), (89, 80), (121, 120)])
def test_a_newer_minor_version_runs_code_for_an_older_one(device, code):
    path = programs.compile_program(backend.usual_programs()[0], device)[1]
    assert path is not None
    assert f"-sm_{code}-" in path.name


def test_tensors_on_the_cpu_take_the_torch_backend_silently_unless_cuda_is_named():
    assert choose("auto", torch.zeros(1, 8, 4, 4)) == "torch"  # warnings are errors here
    with pytest.raises(RuntimeError, match="need tensors on a CUDA device; got cpu; move them"):
        choose("cuda", torch.zeros(1, 8, 4, 4))


UNSUPPORTED = {
    "features in float64": ((on_cuda(1, 8, 4, 4, dtype=torch.float64), KERNEL), "torch.float64"),
    "kernels in float64": ((SOURCE, on_cuda(1, 49, 8, 8, dtype=torch.float64)), "sum in float32"),
    "5x5 taps": ((SOURCE, on_cuda(1, 25, 8, 8)), "made for 49 taps .* got 25"),
    "a huge batch": (
        (on_cuda(70_000, 1, 1, 1), on_cuda(70_000, 49, 1, 1)),
        "at most 65535 samples; got 70000",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_the_kernels_were_not_made_for_is_left_to_the_torch_backend(case):
    tensors, words = UNSUPPORTED[case]
    with pytest.warns(UserWarning, match=words):
        assert choose("auto", *tensors) == "torch"
    assert chosen("auto", "apply_backward", KERNEL, *tensors, True, True) == "torch"
    with pytest.raises(RuntimeError, match=words):
        choose("cuda", *tensors)
    with pytest.raises(RuntimeError, match=words):
        chosen("cuda", "apply_backward", KERNEL, *tensors, True, True)


@pytest.mark.parametrize("stage", [JBUStage(radius=2), JBUStage(key_dim=16), JBUStage(15)])
def test_stages_of_another_make_are_left_to_the_torch_backend(stage):
    guidance = on_cuda(1, stage.range_proj[0].in_channels, 8, 8)
    with pytest.warns(UserWarning, match="made for 7×7 taps, 32 key channels and at most 14"):
        assert chosen("auto", "kernel", guidance, stage.weights()) == "torch"


def test_an_unwritable_cache_is_no_obstacle(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATUP_HUB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set FEATUP_HUB_CACHE to a writable folder") as caught:
        assert [choose("auto") for _ in range(3)] == ["cuda"] * 3
    assert len(caught) == 1
    assert "kept in memory only" in str(ops.implementations()[1])


def test_the_status_names_device_compiler_and_cubin(tmp_path):
    cpu, card = ops.implementations()
    assert (cpu.device, cpu.impl) == ("cpu", "torch")
    assert (card.device, card.impl, card.reason) == ("cuda:0 (Some Card)", "cuda", None)
    assert {path.parent for path in card.cubins} == {tmp_path}
    assert len(card.cubins) == len(set(card.cubins)) == len(backend.usual_programs())
    assert str(card) == (
        f"cuda:0 (Some Card): cuda, compiled by NVRTC 13.0 (libnvrtc.so.13), kept in {tmp_path}"
    )
