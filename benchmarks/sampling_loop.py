"""What does a step of sampling cost beside the network? Our loop against diffusers' scheduler loops, trivial network.

(4, 3, 32, 32) float32 on the CPU, x0 clipped as diffusers does by default: `python benchmarks/sampling_loop.py`.
"""

import argparse

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from harness import interleaved, report

from diffusion.denoiser import denoiser
from diffusion.process import GaussianDiffusion
from diffusion.sampling import SampleNoise, Sampler
from diffusion.schedule import linear

SHAPE = (4, 3, 32, 32)
RUNS = {"DDPM": (DDPMScheduler, 1000, 1.0), "DDIM": (DDIMScheduler, 50, 0.0)}


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.1 * x


def theirs(scheduler: DDPMScheduler | DDIMScheduler) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t), t, x, generator=generator).prev_sample
    return x


def ours(diffusion: GaussianDiffusion, sampler: Sampler) -> torch.Tensor:
    noise = SampleNoise(range(SHAPE[0]))
    return sampler.sample(diffusion, denoiser(diffusion, net), noise.initial(SHAPE[1:]), noise=noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    diffusion = GaussianDiffusion(linear())
    for name, (peer, num_steps, eta) in RUNS.items():
        scheduler = peer(num_train_timesteps=1000, timestep_spacing="trailing")
        scheduler.set_timesteps(num_steps)
        sampler = Sampler(num_steps=num_steps, eta=eta)
        repeats = 1000 // num_steps  # as many steps a round for either
        seconds = interleaved(
            {
                "ours": lambda sampler=sampler, n=repeats: [ours(diffusion, sampler) for _ in range(n)],
                "diffusers": lambda scheduler=scheduler, n=repeats: [theirs(scheduler) for _ in range(n)],
            },
            rounds=rounds,
        )
        rows = {who: f"{value / repeats / num_steps * 1e6:8.1f} us a step" for who, value in seconds.items()}
        rows["ours / diffusers"] = f"{seconds['ours'] / seconds['diffusers']:8.3f}"
        report(f"Sampling loop without a network, {num_steps}-step {name}, {SHAPE}", rows)


if __name__ == "__main__":
    main()
