"""FeatUp's implicit variant: trains a coordinate network on the views of one image.

In every step the network computes a map of all pixels. The map is jittered like a few views,
downsampled by a learned model of the backbone, and compared with the backbone's features of these
views, in principal components. The settings are upstream's.

Source: Fu, Hamilton et al., "FeatUp", ICLR 2024 (arXiv 2403.10516), section 3.2; numbers agree with
mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from featup_hub.training.config import FitConfig
from featup_hub.training.downsamplers import AttentionDownsampler
from featup_hub.training.losses import (
    ScaleNet,
    blur_residual,
    magnitude_tv,
    mean_magnitude,
    reconstruction_loss,
)
from featup_hub.training.seeds import seeded
from featup_hub.training.views import Jitter, apply_jitter
from featup_hub.upsamplers import ImplicitUpsampler
from featup_hub.upsamplers.coordinates import pixel_centres
from featup_hub.visualize import fit_pca

Views = Iterable[tuple[Sequence[Jitter], Tensor]]

PCA_VIEWS = 50  # views for the principal components


def fit_network(
    image: Tensor, fitted: Views, held_out: Views, patch_size: int, config: FitConfig
) -> tuple[ImplicitUpsampler, float]:
    """Trains a network on views of an image; arguments as of :func:`fit_source`, and the stride.

    Returns the network, and the unexplained share of the held-out views' variation in the principal
    components.
    """
    views = iter(fitted)
    first: list[tuple[Sequence[Jitter], Tensor]] = []
    while sum(len(part) for part, _ in first) < min(PCA_VIEWS, config.views):
        first.append(next(views))
    mean, directions = _components(torch.cat([raw for _, raw in first]), config.components)
    jitters: list[Jitter] = []
    kept: list[Tensor] = []
    for part, raw in chain(first, views):
        jitters += part
        kept.append(_project(raw, mean, directions).half())
    features = torch.cat(kept)
    # Modules draw initial weights from the global generator; its state is restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        model = ImplicitUpsampler(image.cpu(), mean.cpu(), directions.cpu())
        downsampler = AttentionDownsampler(directions.shape[1], patch_size)
        scale = ScaleNet(directions.shape[1])
        learned = nn.ModuleList([model, downsampler, scale])
    learned.to(image.device).train()
    pixels = pixel_centres(image.shape[-2], image.shape[-1], image.device).flatten(0, 1)
    colours = image[0].flatten(1).t()

    def predict(shown: Sequence[Jitter]) -> tuple[Tensor, Tensor]:
        whole = model.coordinates(pixels, colours).t().unflatten(1, image.shape[-2:])[None]
        seen = apply_jitter(whole.expand(len(shown), -1, -1, -1), shown)
        return whole, downsampler(seen, (features.shape[-2], features.shape[-1]))

    optimizer = torch.optim.NAdam(learned.parameters(), lr=config.lr)
    for step in range(config.steps):
        generator = seeded(config.seed, 2, step)
        chosen = torch.randint(len(jitters), (config.batch,), generator=generator)
        observed = features[chosen.to(features.device)].float()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            whole, predicted = predict([jitters[n] for n in chosen.tolist()])
        loss = reconstruction_loss(predicted, observed, scale(observed))
        loss = loss + 0.001 * mean_magnitude(whole) + 0.05 * magnitude_tv(whole)
        loss = loss + 0.1 * blur_residual(whole)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise RuntimeError(
                f"a fit needs a finite loss; it diverged at step {step + 1}; lower lr"
            )
    learned.eval()
    residual = total = 0.0
    with torch.no_grad():
        for part, raw in held_out:
            observed = _project(raw, mean, directions)
            residual += float((predict(part)[1] - observed).square().sum())
            total += float(observed.square().sum())
    return model, residual / total


def _components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Finds the mean, (C,), and principal components, (C, K), scaled to a mean variance of one."""
    basis = fit_pca(*features.split(1), k=min(count, features.shape[1]))
    mean, directions = basis.mean.to(features), basis.components.to(features)
    z = torch.einsum("ck,bchw->bkhw", directions, features - mean[:, None, None])
    return mean, directions * z.square().mean().sqrt()


def _project(features: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    """Returns the coordinates z, (B, K, h, w), of features, (B, C, h, w)."""
    scale = directions.square().sum(0).amax()  # the directions are orthogonal and of equal length
    return torch.einsum("ck,bchw->bkhw", directions / scale, features - mean[:, None, None])
