"""The models whose cost is measured: of the published sizes on a GPU, and drawn from in batches."""

import pytest
import torch
from diffusers import DDIMScheduler

from benchmarks.bench_models import draw
from benchmarks.models import MODELS, build, denoisers

# Millions of parameters as published: EDM2's table, and the checkpoints of Stable Diffusion. DiT's 675 grow in
# diffusers, where every block embeds the class and the time by itself.
PUBLISHED = {
    "EDM2-S 64": (280.2, 0.002),
    "EDM2-S 512": (280.2, 0.002),
    "EDM2-XXL 512": (1523.2, 0.002),
    "DiT-XL/2 256": (735, 0.08),
    "SD-V1.4 512": (859.5, 1e-3),
    "SD-V2.1 768": (865.9, 1e-3),
    "SD-XL 1024": (2567.5, 1e-3),
    "SD3 1024": (2028.3, 2e-3),
}


@pytest.mark.parametrize("model", [m for m in MODELS if m.paper in PUBLISHED], ids=lambda m: m.paper)
def test_published_sizes(model, monkeypatch):
    monkeypatch.setattr("benchmarks.models.EulerDiscreteScheduler", DDIMScheduler)  # Euler's needs real numbers
    with torch.device("meta"):
        [network] = denoisers(model.published())
    millions, tolerance = PUBLISHED[model.paper]
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=tolerance)


def test_batches():
    model = next(m for m in MODELS if m.paper == "DiT-XL/2 256")
    assert draw(build(model), model, "finite_difference", batch=2) > 0
