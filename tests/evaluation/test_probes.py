"""Probes find the linear map of the truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from featup_hub.evaluation import probes
from featup_hub.evaluation.dataset import Sample
from featup_hub.evaluation.probes import (
    ProbeExamples,
    cells,
    fit_depth,
    fit_probe,
    fit_segmentation,
)


def test_depth_regression_recovers_a_linear_law_in_log_depth_without_missing_cells():
    features = torch.randn(500, 4) * torch.tensor([1.0, 10.0, 0.1, 1.0]) + 3
    weight, bias = torch.tensor([0.2, -0.01, 2.0, 0.0]), 0.7
    depth = features @ weight + bias
    depth[:50] = torch.nan
    found, offset = fit_depth(features, depth, 1e-9)
    torch.testing.assert_close(found[0], weight, rtol=1e-3, atol=1e-4)
    assert offset.item() == pytest.approx(bias, abs=1e-2)


def test_segmentation_separates_what_a_plane_separates():
    features = torch.randn(2000, 3) * 5 + 2
    labels = (features @ torch.tensor([1.0, -2.0, 0.5]) > 1).long()
    weight, bias = fit_segmentation(features, F.one_hot(labels, 2).float(), 0.01, steps=300)
    predicted = (features @ weight.t() + bias).argmax(1)
    assert (predicted == labels).float().mean() > 0.96


def test_cells_of_void_do_not_teach():
    features = torch.cat([torch.randn(200, 1), torch.full((200, 1), 50.0)])
    shares = torch.zeros(400, 2)
    shares[:200] = F.one_hot((features[:200, 0] > 0).long(), 2).float()
    with_void = fit_segmentation(features, shares, 0.01, steps=20)
    without = fit_segmentation(features[:200], shares[:200], 0.01, steps=20)
    assert all(map(torch.equal, with_void, without))


def test_a_joint_probe_reads_classes_and_depth_within_the_range_seen(monkeypatch):
    monkeypatch.setattr(probes, "RIDGES", (1e-6,))
    labels = torch.zeros(8, 16, dtype=torch.long)
    labels[:, 8:] = 1
    depth = torch.where(labels > 0, 4.0, 2.0)
    source = torch.tensor([-1.0, 1.0]).expand(1, 1, 1, 2).clone()
    sample = Sample(name="a", image=torch.zeros(3, 8, 16), labels=labels, depth=depth)
    probe = fit_probe([cells(sample, source, 2)] * 3, steps=100)
    features = torch.tensor([-1.0, 1.0, 100.0])[None, None, None]
    predicted, metres = probe.read(F.conv2d(features, probe.weight[:, :, None, None]))
    assert predicted[0].tolist() == [0, 1, 1]
    torch.testing.assert_close(metres[0], torch.tensor([2.0, 4.0, 4.0]), rtol=1e-3, atol=1e-3)


def test_a_probe_without_labels_reads_depth_alone():
    sample = Sample(name="a", image=torch.zeros(3, 4, 8), depth=torch.rand(4, 8) + 1)
    probe = fit_probe([cells(sample, torch.randn(1, 2, 1, 2), 0)], steps=1)
    labels, depth = probe.read(torch.zeros(1, 1, 4, 8))
    assert labels is None
    assert depth.shape == (4, 8)


def test_the_penalty_is_the_one_that_serves_images_held_out(monkeypatch):
    # Many features, few cells, noise: without a penalty the probe learns the noise.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, generator=generator) / 60**0.5
    examples = []
    for _ in range(10):
        features = torch.randn(8, 60, generator=generator)
        truth = features @ weight + torch.randn(8, generator=generator)
        examples.append(ProbeExamples(features, None, truth))
    unseen, errors = torch.randn(500, 60, generator=generator), []
    for ridges in ((1e-6,), (1e-6, 1.0)):
        monkeypatch.setattr(probes, "RIDGES", ridges)
        found = fit_probe(examples, steps=1).weight[0]
        errors.append((unseen @ (found - weight)).square().mean())
    assert errors[1] < 0.5 * errors[0]
