"""What was measured once is not measured again, and only then."""

from __future__ import annotations

import pytest
import torch

from featup_hub.evaluation.candidates import Candidate
from featup_hub.evaluation.ledger import Stage, run_stage
from featup_hub.evaluation.measurement import Measurement


class Counter:
    def __init__(self):
        self.measured = []

    def __call__(self, candidates):
        found = [Measurement(protocol=p, data="d/val", backbone="b /16") for p in ("one", "two")]
        for each in candidates:
            self.measured.append(each.name)
            for measurement in found:
                for image in range(3):
                    measurement.add(each.name, {"strip": torch.tensor([image, len(each.name)])})
        return found


@pytest.fixture
def counter():
    return Counter()


def upsampler(name, identity="same"):
    return Candidate(name=name, function=lambda *_: None, identity=identity)


def run(counter, cache, *candidates, settings=None):
    settings = {"seed": 0} if settings is None else settings
    return run_stage(Stage("t", settings, counter), candidates, cache)


def test_a_second_run_measures_only_who_is_new(counter, tmp_path):
    first = run(counter, tmp_path, upsampler("a", "1"))
    second = run(counter, tmp_path, upsampler("b", "2"), upsampler("a", "1"))
    assert counter.measured == ["a", "b"]
    assert [(m.protocol, list(m.sums)) for m in second] == [
        ("one", ["b", "a"]),
        ("two", ["b", "a"]),
    ]
    for before, after in zip(first, second, strict=True):
        kept = after.sums["a"]["strip"]
        assert torch.equal(torch.stack(before.sums["a"]["strip"]), torch.stack(kept))
        assert (after.data, after.backbone) == ("d/val", "b /16")


def test_another_name_of_the_same_upsampler_is_known(counter, tmp_path):
    run(counter, tmp_path, upsampler("a"))
    (found, _) = run(counter, tmp_path, upsampler("z"))
    assert counter.measured == ["a"]
    assert list(found.sums) == ["z"]


@pytest.mark.parametrize("change", ["settings", "identity"])
def test_other_settings_or_another_file_are_measured_again(counter, tmp_path, change):
    run(counter, tmp_path, upsampler("a"))
    settings = {"seed": 1} if change == "settings" else None
    run(counter, tmp_path, upsampler("a", change), settings=settings)
    assert counter.measured == ["a", "a"]


def test_what_has_no_identity_or_no_cache_is_measured_every_time(counter, tmp_path):
    for _ in range(2):
        run(counter, tmp_path, upsampler("a", None))
        run(counter, None, upsampler("b"))
    assert counter.measured == ["a", "b"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_stage_without_settings_is_never_kept(counter, tmp_path):
    for _ in range(2):
        run_stage(Stage("time", None, counter), [upsampler("a")], tmp_path)
    assert counter.measured == ["a", "a"]


def test_a_stage_that_measured_nothing_is_refused_in_words(tmp_path):
    def nothing(candidates):
        return [Measurement(protocol="one", data="d/val", backbone="b /16")]

    with pytest.raises(ValueError, match=r"at least one image is needed.*none for oracle on d/val"):
        run_stage(Stage("oracle on d/val", {"seed": 0}, nothing), [upsampler("a")], tmp_path)
    assert list(tmp_path.iterdir()) == []
