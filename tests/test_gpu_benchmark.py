"""The GPU benchmark, tested on a CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_worker
from benchmarks.gpu import Session, square
from featup_hub.ops import torch_backend
from featup_hub.ops.cuda import backend


@pytest.fixture
def session(tmp_path: Path) -> Session:
    torch.manual_seed(0)
    cpu, deadline = torch.device("cpu"), time.monotonic() + 300
    return Session(device=cpu, impl="torch", dry=True, deadline=deadline, out=tmp_path)


@pytest.mark.slow
def test_a_rehearsal_runs_every_part_and_writes_both_files(session, monkeypatch):
    def in_process(self, task, **options):
        return [] if task == "compiled" else list(gpu_worker.TASKS[task](self))

    monkeypatch.setattr(Session, "run_worker", in_process)
    assert gpu.run(session) == 0
    results = json.loads((session.out / "gpu.json").read_text())
    assert results["errors"] == {}
    assert {row["check"] for row in results["checks"]} == set(gpu_worker.CHECKS)
    assert all(row["ok"] for part in ("checks", "memcheck") for row in results[part])
    assert [row["case"] for row in results["times"]] == [str(case) for case in gpu.DRY]
    assert "upstream: not asked for (--upstream), or a rehearsal" in results["notes"]
    assert str(gpu.DRY[0]) in (session.out / "gpu.md").read_text()


@pytest.mark.slow
def test_a_worker_runs_in_a_process_of_its_own(session):
    rows = session.run_worker("sanitize", limit=280)
    assert rows
    assert all(row["ok"] for row in rows)


def test_a_worker_that_fails_is_an_error_with_its_last_words(session):
    with pytest.raises(RuntimeError, match=r"(?s)no-such-task failed with status 2: .*invalid"):
        session.run_worker("no-such-task", limit=280)


def test_a_worker_that_is_ended_leaves_the_rows_it_had_printed(session, tmp_path):
    script = tmp_path / "talks_then_sleeps"
    script.write_text('#!/bin/sh\necho noise\necho \'{"case": "first"}\'\nexec sleep 60\n')
    script.chmod(0o755)
    assert session.run_worker("compiled", limit=1, prefix=[str(script)]) == [{"case": "first"}]
    assert session.notes == ["compiled: ended after 1 s"]


def without_a_pixel(output: torch.Tensor) -> torch.Tensor:
    output[-1, -1, -1, -1] = float("nan")
    return output


def with_seven_taps(grads: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    grads[1][:, [tap for tap in range(49) if round(tap**0.5) ** 2 != tap]] = 0
    return grads


@pytest.mark.parametrize(
    ("name", "fault", "check", "least"),
    [
        ("kernel", lambda kernel: kernel * (1 + 1e-4), gpu_worker.parity, 1),
        ("apply", lambda output: output * (1 + 1e-4), gpu_worker.parity, 1),
        ("apply", without_a_pixel, gpu_worker.parity, 15),  # of 15
        ("apply_backward", with_seven_taps, gpu_worker.gradients, 1),
        ("apply_backward", with_seven_taps, gpu_worker.every_tap, 1),
    ],
)
def test_a_wrong_an_unwritten_and_a_missing_result_fail_the_checks(
    session, monkeypatch, name, fault, check, least
):
    right = getattr(torch_backend, name)
    monkeypatch.setattr(torch_backend, name, lambda *args: fault(right(*args)))
    assert sum(not row["ok"] for row in check(session)) >= least


def test_a_check_that_breaks_fails_and_the_others_still_run(session, monkeypatch):
    def broken(session):
        raise ValueError("no such luck")
        yield {}

    checks = {"parity": broken, "every tap": gpu_worker.every_tap}
    monkeypatch.setattr(gpu_worker, "CHECKS", checks)
    first, second = gpu_worker.checks(session)
    assert first == {"check": "parity", "ok": False, "error": "ValueError: no such luck"}
    assert second["ok"]


def test_every_type_meets_channels_in_eights_and_a_doubling(session):
    met = set()
    for index in range(60):
        row, *_ = gpu_worker.draw(session, index)
        doubled = row["output"] == [2 * n for n in row["source"][2:]]
        met |= {row["dtype"]} if row["source"][1] % 8 == 0 and doubled else set()
    assert met == {"float32", "float16", "bfloat16"}


def test_the_yardstick_is_relative_and_never_passes_what_is_not_finite():
    exact, inf = torch.tensor([1.0, -4.0]), float("inf")
    found = exact + torch.tensor([0.0, 0.4])
    assert gpu_worker.relative_error(found, exact) == pytest.approx(0.1)
    assert gpu_worker.relative_error(torch.tensor([1.0, float("nan")]), exact) == inf
    assert gpu_worker.relative_error(torch.tensor([1.0]), exact) == inf


def test_floors_count_every_map_once_each_way():
    case = square(14, 224)
    maps = 4 * 384 * (14**2 + 2 * (28**2 + 56**2 + 112**2) + 224**2)
    kernels = 4 * (28**2 + 56**2 + 112**2 + 224**2) * (49 + 49 + 3)
    assert case.forward_bytes() == maps + kernels
    assert square(14, 224, dtype="bf16").forward_bytes() == maps // 2 + kernels
    assert square(14, 224, batch=32).forward_bytes() == 32 * case.forward_bytes()


def test_variants_are_compiled_with_an_option_more_and_kept_apart():
    usual = backend.apply_program(torch.bfloat16)
    make = gpu_worker.variant(backend.apply_program, "-DJBU_TENSOR_CORES=0")
    plain = make(torch.bfloat16)
    assert plain.contents()[2] == (*usual.contents()[2], "-DJBU_TENSOR_CORES=0")
    assert plain != usual  # or what is kept for one would be taken for the other


def test_parts_that_do_not_fit_into_the_time_left_are_listed(session, monkeypatch):
    def break_down():
        raise ValueError("no such luck")

    monkeypatch.setattr(gpu, "parts", lambda session: [("times", break_down), ("copy", dict)])
    assert gpu.run(session) == 1
    results = json.loads((session.out / "gpu.json").read_text())
    assert results["errors"] == {"times": "ValueError: no such luck"}
    assert results["copy"] == {}
    session.dry, session.deadline = False, time.monotonic() + 1
    gpu.run(session)
    assert session.notes == [f"{name}: left out, time is up" for name in ("times", "copy")]
