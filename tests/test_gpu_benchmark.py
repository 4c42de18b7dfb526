"""The GPU benchmark, rehearsed on a CPU: it must be known to work before it meets a card."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_report, gpu_session, gpu_timings, gpu_worker
from benchmarks.gpu_session import Session
from benchmarks.gpu_timings import Case
from featup_hub.ops import torch_backend
from featup_hub.ops.cuda import backend

SHAPES = {"source": 2, "output": 8, "channels": 4}


@pytest.fixture
def session() -> Session:
    cpu = torch.device("cpu")
    return Session(device=cpu, impl="torch", dry=True, deadline=time.monotonic() + 300)


@pytest.fixture
def _workers_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_worker(
        self: Session, task: str, *arguments: str, limit: float, prefix: Sequence[str] = ()
    ) -> Any:
        rows = gpu_worker.TASKS[task](self, None) if task != "compiled" else []
        return subprocess.CompletedProcess([task], 0, f"noise\n{json.dumps(rows)}\n", "")

    monkeypatch.setattr(Session, "run_worker", run_worker)


@pytest.mark.slow
@pytest.mark.usefixtures("_workers_in_process")
def test_a_rehearsal_runs_every_part_and_writes_both_files(
    session: Session, tmp_path: Path
) -> None:
    assert gpu.run(session, tmp_path) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert "errors" not in results
    assert set(results["checks"]) == {*gpu_checks.CHECKS, "memcheck", "racecheck"}
    assert all(row["ok"] for rows in results["checks"].values() for row in rows)
    for part in ("times", "torch", "grid"):
        assert [row["case"] for row in results[part]] == [str(case) for case in gpu_timings.DRY]
    assert any("upstream: not asked for" in note for note in results["notes"])
    page = (tmp_path / "gpu.md").read_text()
    for heading in ("Checks", "Stacks", "Operations", "Others in the same run", "Left out"):
        assert f"## {heading}" in page


@pytest.mark.slow
def test_a_worker_runs_in_a_process_of_its_own(session: Session) -> None:
    rows = session.ask_worker("sanitize", limit=280)
    assert rows
    assert all(row["ok"] for row in rows)


def test_a_worker_that_fails_is_an_error_with_its_last_words(session: Session) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)no-such-task failed: .*invalid choice"):
        session.ask_worker("no-such-task", limit=280)


def test_a_worker_that_is_ended_leaves_what_it_had_printed(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_worker(self: Session, *arguments: Any, **options: Any) -> Any:
        printed = b'noise\n[{"case": "first"}]\n[{"case": '
        raise subprocess.TimeoutExpired("worker", 7, output=printed)

    monkeypatch.setattr(Session, "run_worker", run_worker)
    assert session.ask_worker("compiled", limit=7) == [{"case": "first"}]
    assert session.notes == ["compiled: ended after 7 s"]


def test_every_run_draws_the_same_weights(session: Session) -> None:
    def weights() -> list[dict[str, torch.Tensor]]:
        session.random.manual_seed(0)
        return [session.stage().state_dict(), gpu_checks._stack_case(session)[0].state_dict()]

    first = weights()
    torch.rand(3)  # whatever else draws
    torch.testing.assert_close(weights(), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["kernel", "apply"])
def test_a_wrong_result_fails_the_parity_check(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = getattr(torch_backend, name)
    monkeypatch.setattr(torch_backend, name, lambda *args: right(*args) * (1 + 1e-4))
    assert not all(row["ok"] for row in gpu_checks.parity(session))


def test_an_unwritten_result_fails_the_parity_check(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch_backend.apply

    def forgets_a_pixel(*args: Any) -> torch.Tensor:
        output = right(*args)
        output[-1, -1, -1, -1] = float("nan")
        return output

    monkeypatch.setattr(torch_backend, "apply", forgets_a_pixel)
    assert not any(row["ok"] for row in gpu_checks.parity(session))


def test_a_missing_tap_fails_the_gradient_checks(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch_backend.apply_backward

    def seven_taps(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        grad_source, grad_kernel = right(*args)
        missing = [tap for tap in range(49) if round(tap**0.5) ** 2 != tap]
        grad_kernel[:, missing] = 0
        return grad_source, grad_kernel

    monkeypatch.setattr(torch_backend, "apply_backward", seven_taps)
    assert not all(row["ok"] for row in gpu_checks.gradients(session))
    assert not all(row["ok"] for row in gpu_checks.every_tap(session))


def test_the_yardstick_is_relative_and_never_passes_what_is_not_finite() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert gpu_session.relative_error(exact + torch.tensor([0.0, 0.4]), exact) == pytest.approx(0.1)
    assert gpu_session.relative_error(torch.tensor([1.0, float("nan")]), exact) == float("inf")
    assert gpu_session.relative_error(torch.tensor([1.0]), exact) == float("inf")


def test_floors_count_every_map_once_each_way() -> None:
    case = Case(source=14, output=224)
    maps = 4 * 384 * (14**2 + 2 * (28**2 + 56**2 + 112**2) + 224**2)
    pixels = 28**2 + 56**2 + 112**2 + 224**2
    assert case.sizes == [(14, 28), (28, 56), (56, 112), (112, 224)]
    assert case.forward_bytes() == maps + 4 * pixels * (49 + 49 + 3)
    half, batch = Case(source=14, output=224, dtype="bf16"), Case(source=14, output=224, batch=32)
    assert half.forward_bytes() == maps // 2 + 4 * pixels * (49 + 49 + 3)
    assert batch.backward_bytes() == 32 * case.backward_bytes()


def test_half_precision_is_timed_with_and_without_tensor_cores(session: Session) -> None:
    case = Case(source=2, output=8, channels=8, dtype="bf16")
    names = {row["operation"] for row in gpu_timings.time_operations(case, session, 1e9)}
    assert {"apply", "apply, no tensor cores"} <= names
    usual, plain = (
        backend.apply_program(torch.bfloat16),
        gpu_timings.plain_program(torch.bfloat16),
    )
    assert plain.contents()[2] == (*usual.contents()[2], "-DJBU_TENSOR_CORES=0")
    assert plain != usual  # or what is kept for one would be taken for the other


def test_every_type_meets_channels_in_eights_and_a_doubling(session: Session) -> None:
    rows = gpu_checks.parity(session)
    met = {
        row["dtype"]
        for row in rows
        if row["source"][1] % 8 == 0 and row["output"] == [2 * n for n in row["source"][2:]]
    }
    assert met == {"float32", "float16", "bfloat16"}


def test_parts_that_do_not_fit_into_the_time_left_are_listed(session: Session) -> None:
    session.dry, session.deadline = False, time.monotonic() + 5
    gpu._run_part("grid", 10, lambda: pytest.fail("was run"), session, {})
    assert session.notes == ["grid: left out, 5 s were left"]


def test_a_part_that_breaks_is_an_error_and_the_others_still_run(session: Session) -> None:
    def break_down() -> None:
        raise ValueError("no such luck")

    results: dict[str, Any] = {}
    gpu._run_part("times", 1, break_down, session, results)
    assert results == {"errors": {"times": "ValueError: no such luck"}}


def test_the_page_shows_ratios_and_failures() -> None:
    times = {"case": "a", "forward_median_ms": 2.0, "graph_ms": 1.5, "forward_floor_ms": 1.0}
    page = gpu_report.markdown(
        {
            "environment": {"device": "x"},
            "checks": {"parity": [{"ok": True, "error": 1e-7}, {"ok": False, "error": 0.5}]},
            "times": [times | {"forward_peak_bytes": 2**20}],
            "upstream": [{"case": "a", "impl": "upstream", "forward_median_ms": 100.0}],
            "errors": {"grid": "out of memory"},
        }
    )
    assert "parity: 1 of 2 passed, largest relative error 5.0e-01" in page
    assert "failed: {'ok': False, 'error': 0.5}" in page
    assert "| a | 2 | 1.5 | 1 | 1.50 | 1 |" in page
    assert "| a | upstream | 100 | 50.00 |" in page
    assert "- grid: out of memory" in page
