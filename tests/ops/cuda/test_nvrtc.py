"""NVRTC: search path, compilation, and error messages."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compiled_kernels
from featup_hub.ops.cuda import backend, nvrtc

KERNEL = """
#include "value.cuh"
extern "C" __global__ void fill(float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = VALUE;
}
"""
HEADERS = {"value.cuh": "#define VALUE 3.0f\n"}


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Nvrtc:
    try:
        return nvrtc.load()
    except nvrtc.NvrtcError as error:
        pytest.skip(f"this torch has no NVRTC: {error}")


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The places that are searched."""
    places: list[str] = []
    nvrtc.load.cache_clear()
    monkeypatch.setattr(nvrtc, "search_path", lambda: iter(places))
    yield places
    nvrtc.load.cache_clear()


def test_the_library_found_is_of_the_version_torch_was_built_with(compiler):
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    assert compiler.version.split(".")[0] == torch.version.cuda.split(".")[0]


def test_a_program_compiles_to_an_elf_image_for_each_architecture(compiler):
    images = {
        compiler.compile(KERNEL, "fill.cu", compiler.architectures[index], [], HEADERS)[0]
        for index in (0, -1)
    }
    assert all(image.startswith(b"\x7fELF") and b"fill" in image for image in images)
    assert len(images) == 2


def test_options_reach_the_program_and_its_errors_the_user(compiler):
    source, arch = "#ifndef WANTED\n#error option is missing\n#endif\n", compiler.architectures[0]
    assert compiler.compile(source, "o.cu", arch, ["-DWANTED=1"], {})
    with pytest.raises(
        nvrtc.NvrtcError, match=r"(?s)could not compile o\.cu.*o\.cu\(2\).*option is missing"
    ):
        compiler.compile(source, "o.cu", arch, [], {})


def test_an_architecture_nvrtc_does_not_know_is_reported(compiler):
    assert 30 not in compiler.architectures
    with pytest.raises(nvrtc.NvrtcError, match="for sm_30: NVRTC_ERROR_INVALID_OPTION"):
        compiler.compile(KERNEL, "fill.cu", 30, [], HEADERS)


def ends(compiler: nvrtc.Nvrtc, index: int) -> int:
    """Takes the oldest and the newest architecture in turn."""
    return compiler.architectures[-(index % 2)]


@pytest.mark.slow
@pytest.mark.parametrize("index", range(7), ids=lambda i: str(backend.usual_programs()[i]))
def test_the_packages_own_kernels_compile_without_spilling_a_register(compiler, index):
    program, architecture = backend.usual_programs()[index], ends(compiler, index)
    usage = compiled_kernels.usage(compiled_kernels.compile_with_nvrtc(program, architecture)[1])
    assert set(usage) == set(program.kernels)
    assert {kernel: (use.spilled, use.stack) for kernel, use in usage.items()} == dict.fromkeys(
        usage, (0, 0)
    )


@pytest.mark.parametrize(
    ("program", "architectures", "without"),
    [
        # Everything from sm_80 on, be it slow in TF32.
        (backend.apply_program(torch.bfloat16), (75, 80, 120), {75}),
        (backend.apply_program(torch.float32), (75, 80, 86, 90, 120), {75, 86, 120}),
        (backend.kernel_program(3), (75, 80, 86, 90, 120), {75, 86, 120}),
    ],
    ids=str,
)
def test_programs_are_compiled_for_tensor_cores_where_these_are_faster(
    compiler, program, architectures, without
):
    source, headers, options = program.contents()
    told = f"{source}\n#if JBU_TENSOR_CORES\n#error tensor cores\n#else\n#error none\n#endif\n"
    for architecture in architectures:
        words = "#error none" if architecture in without else "#error tensor cores"
        with pytest.raises(nvrtc.NvrtcError, match=words):
            compiler.compile(told, program.source, architecture, options, headers)


def test_a_missing_library_is_reported_with_what_was_tried_and_what_to_install(search):
    search.append("libno-such-nvrtc.so.99")
    with pytest.raises(nvrtc.NvrtcError, match=r"(?s)nvidia-cuda-nvrtc.*libno-such-nvrtc\.so\.99:"):
        nvrtc.load()


def test_a_library_that_is_not_nvrtc_is_passed_over(monkeypatch, search):
    search.append("other.so")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with pytest.raises(nvrtc.NvrtcError, match=r"other\.so: .*no attribute"):
        nvrtc.load()


@pytest.mark.parametrize(
    ("cuda", "system", "name"),
    [
        ("11.8", "posix", "libnvrtc.so.11.2"),
        ("11.8", "nt", "nvrtc64_112_0.dll"),
        ("12.6", "posix", "libnvrtc.so.12"),
        ("12.6", "nt", "nvrtc64_120_0.dll"),
    ],
)
def test_every_version_of_cuda_has_its_own_name_for_the_library(monkeypatch, cuda, system, name):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(nvrtc, "os", SimpleNamespace(name=system, environ={}))
    assert name in list(nvrtc.search_path())


def test_wheels_beside_torch_come_before_cuda_home_and_the_system(monkeypatch, tmp_path):
    places = [
        tmp_path / "site" / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13",
        tmp_path / "site" / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.13",
        tmp_path / "toolkit" / "lib64" / "libnvrtc.so",
    ]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "site" / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert list(nvrtc.search_path()) == [
        str(places[0]),
        str(places[1]),
        "libnvrtc.so.13",
        str(places[2]),
        "libnvrtc.so",
    ]
