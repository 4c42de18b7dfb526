"""Time and memory of the upsampler only."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest
import torch

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.config import EvaluationConfig
from featup_hub.evaluation.cost import cost_sums, measure_cost
from featup_hub.evaluation.features import Bench, Source
from featup_hub.evaluation.scores import METRICS
from tests.evaluation.conftest import MeanColour


def measure(function):
    sums = cost_sums(
        torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 8, 8), Candidate(name="x", function=function)
    )
    return {
        metric.name: metric.value(sums["cost"]).item()
        for metric in METRICS
        if metric.sums == "cost"
    }


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


@pytest.mark.parametrize(("images", "counted"), [(1, 1), (2, 1), (3, 2)])
def test_the_first_image_warms_up_and_a_lone_one_is_taken_twice(splits, images, counted):
    train, val = splits
    val = replace(val, images=val.images[:images], labels=(), depth=())
    source = Source(name="mean colour", backbone=MeanColour())
    calls = []
    recorder = Candidate(name="x", function=lambda source, image, size: calls.append(size))
    bench = Bench(source=source, train=train, val=val, config=EvaluationConfig())
    found = list(measure_cost(bench, [recorder]))
    assert len(calls) == counted + 1
    assert [(protocol, name) for protocol, name, _ in found] == [("cost", "x")] * counted
