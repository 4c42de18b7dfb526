"""Time and memory are those of the upsampler."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.cost import COST, cost_sums


def measure(function):
    sums = cost_sums(
        torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 8, 8), Candidate(name="x", function=function)
    )
    return {metric.name: metric.value(sums["cost"]).item() for metric in COST}


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux")
def test_memory_held_for_a_moment_is_seen():
    def hungry(source, image, size):
        held = torch.ones(64 * 2**20 // 4)
        return held[:1].clone()

    assert 60 < measure(hungry)["peak MiB"] < 100
    assert measure(lambda source, image, size: source)["peak MiB"] < 10


def test_waiting_costs_seconds_but_no_cpu_seconds():
    def slow(source, image, size):
        time.sleep(0.3)
        return source

    found = measure(slow)
    assert found["seconds"] >= 0.3
    assert found["CPU seconds"] < 0.2
