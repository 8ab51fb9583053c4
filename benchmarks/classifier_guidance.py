"""What does a guided step cost over an unguided one? The classifier's forward and backward, and what else?

Both forms, with the networks of the recipes: `python benchmarks/classifier_guidance.py [--device cuda] [--adm]`.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import composed, interleaved, report
from torch import nn

from diffusion.denoiser import Denoiser, denoiser
from diffusion.guidance import ClassifierGuidance
from diffusion.process import GaussianDiffusion, Prediction
from diffusion.sampling import SampleNoise, Sampler
from diffusion.schedule import cosine
from diffusion.training.run import build

# The recipe of a denoiser, that of a classifier, and the batch size.
PAIRS = {
    "digits": ("digits_unconditional", "digits_classifier", 64),
    "shapes": ("shapes", "shapes_classifier", 16),
}
ADM = {"ADM-64": ("adm_imagenet64", "imagenet64_classifier", 8)}
STEPS = 10


def networks(denoisers: str, classifiers: str, device: str) -> tuple[nn.Module, nn.Module, tuple[int, int, int]]:
    """The two networks with weights of which none is zero, and the shape of the images."""
    torch.manual_seed(0)
    config = composed(f"experiment={denoisers}")
    net, classifier = build(config["net"]), build(composed(f"experiment={classifiers}")["classifier"])
    for module in (net, classifier):
        for weight in module.parameters():
            nn.init.normal_(weight, std=1 / math.sqrt(max(1, weight[0].numel())))
        module.to(device).eval().requires_grad_(False)
    size = config["data"]["image_size"]
    return net, classifier, (config["data"]["channels"], size, size)


def contenders(
    net: nn.Module, classifier: nn.Module, shape: tuple[int, int, int], batch: int, eta: float, device: str
) -> dict[str, Callable[[], float]]:
    """`STEPS` steps without and with guidance, and as many of the classifier's forwards and backwards, written plainly.

    These are run by themselves, where the classifier stays in the caches, and between unguided steps, as guidance does.
    """
    learned = net.out_channels != shape[0]
    diffusion = GaussianDiffusion(cosine(), variance="learned" if learned else "posterior")
    sampler = Sampler(STEPS, eta=eta, spacing="leading")  # its first timestep is one that both forms guide at
    labels = [i % classifier.num_classes for i in range(batch)]
    told = torch.tensor(labels, device=device)
    denoise = denoiser(diffusion, net, **({} if net.num_classes is None else {"label": told}))
    noise = SampleNoise(range(batch), device=device)
    x = noise.initial(shape)
    push = ClassifierGuidance(classifier=classifier).log_prob_grad(diffusion, x, labels)

    @torch.enable_grad()
    def forward_and_backward(t: int) -> torch.Tensor:
        x_t = x.detach().requires_grad_()
        loss = F.cross_entropy(classifier(x_t, torch.full((batch,), t, device=device)), told, reduction="sum")
        return torch.autograd.grad(loss, x_t)[0]

    def between(x: torch.Tensor, t: int) -> Prediction:
        forward_and_backward(t)
        return denoise(x, t)

    def sampled(denoise: Denoiser, gradient: Callable | None = None) -> float:
        return sampler.sample(diffusion, denoise, x, noise=noise, log_prob_grad=gradient).sum().item()

    grid = sampler.timesteps(diffusion.schedule)[:-1]
    return {
        "unguided": lambda: sampled(denoise),
        "guided": lambda: sampled(denoise, push),
        "unguided, forward and backward between": lambda: sampled(between),
        "forward and backward": lambda: [forward_and_backward(t) for t in grid][-1].sum().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adm", action="store_true", help="the networks of ADM at 64x64, too: minutes on a CPU")
    arguments = parser.parse_args()
    for name, (denoisers, classifiers, batch) in (PAIRS | (ADM if arguments.adm else {})).items():
        net, classifier, shape = networks(denoisers, classifiers, arguments.device)
        for form, eta in (("score, DDIM", 0.0), ("mean shift, DDPM", 1.0)):
            calls = contenders(net, classifier, shape, batch, eta, arguments.device)
            seconds = interleaved(calls, rounds=arguments.rounds, warmup=3)
            rows = {who: f"{value / STEPS * 1e3:9.3f} ms a step" for who, value in seconds.items()}
            more = seconds["guided"] - seconds["unguided"]
            between = seconds["unguided, forward and backward between"] - seconds["unguided"]
            rows["guided - unguided"] = f"{more / STEPS * 1e3:9.3f} ms a step"
            rows["(guided - unguided) / forward and backward"] = f"{more / seconds['forward and backward']:9.3f}"
            rows["(guided - unguided) / the same between steps"] = f"{more / between:9.3f}"
            report(f"Classifier guidance, {name}, batch {batch}, {form}, {arguments.device}", rows)


if __name__ == "__main__":
    main()
