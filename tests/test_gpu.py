"""On a CUDA device the same seeds give the same images, and training runs in half precision."""

import numpy as np
import pytest
import torch

from diffusion.checkpoint import load_model
from diffusion.generate import generate
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.images import to_uint8
from diffusion.losses import DenoisingLoss
from diffusion.sampling import Sampler

pytestmark = pytest.mark.gpu
DIGITS = "checkpoints/digits.safetensors"


def draw(device: str) -> np.ndarray:
    model = load_model(DIGITS, device=device)
    images = generate(
        model.net,
        model.diffusion,
        Sampler(num_steps=20),
        ClassifierFreeGuidance(2.0),
        shape=model.facts["shape"],
        seeds=range(10),
        labels=list(range(10)),
        device=device,
    )
    return to_uint8(images)


def test_samples_are_those_of_the_cpu():
    ours, reference = draw("cuda").astype(int), draw("cpu").astype(int)
    assert np.abs(ours - reference).max() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_and_gradients_are_finite_and_near_the_cpus(dtype):
    draws = torch.Generator().manual_seed(0)
    x0, t = torch.rand(8, 1, 8, 8, generator=draws) * 2 - 1, torch.randint(1000, (8,), generator=draws)
    eps, label = torch.randn(x0.shape, generator=draws), torch.arange(8)
    losses = []
    for device in ("cpu", "cuda"):
        model = load_model(DIGITS, device=device)
        batch = (part.to(device) for part in (x0, t, eps))
        with torch.autocast("cuda", dtype, enabled=device == "cuda" and dtype != torch.float32):
            terms = DenoisingLoss()(model.diffusion, model.net, *batch, {"label": label.to(device)})
        terms.loss.mean().backward()
        assert all(p.grad.isfinite().all() for p in model.net.parameters())
        losses.append(terms.loss.mean().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if dtype == torch.float32 else 3e-2)
