"""How many images a second does ADM for ImageNet 64x64 draw, ours against diffusers' UNet2DModel of equal shape?

DDIM on the CPU, class-conditional, learned variance, random weights; the difference in parameters is printed:
`python benchmarks/adm_sampling.py [--batch 4] [--steps 2]`.
"""

import argparse

import torch
from diffusers import DDIMScheduler, UNet2DModel
from harness import composed, interleaved, report
from torch import Tensor

from diffusion.denoiser import denoiser
from diffusion.process import GaussianDiffusion
from diffusion.sampling import SampleNoise, Sampler
from diffusion.schedule import cosine
from diffusion.training.run import build

CONFIG = {  # guided-diffusion's 64x64_diffusion, as diffusers spells it
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 3,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "num_class_embeds": 1000,
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
SHAPE = (3, 64, 64)


def theirs(peer: UNet2DModel, scheduler: DDIMScheduler, label: Tensor, x: Tensor) -> Tensor:
    """diffusers' loop: the network's first three channels are eps."""
    with torch.inference_mode():
        for t in scheduler.timesteps:
            eps = peer(x, t, class_labels=label).sample[:, :3]
            x = scheduler.step(eps, t, x).prev_sample
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    peer = UNet2DModel(**CONFIG).eval()
    net = build(composed("experiment=adm_imagenet64")["net"]).eval()
    label = torch.arange(given.batch)
    noise = SampleNoise(range(given.batch))
    x = noise.initial(SHAPE)
    diffusion = GaussianDiffusion(cosine(), parameterization="eps", variance="learned")
    sampler = Sampler(num_steps=given.steps, eta=0.0, variance="posterior")
    denoise = denoiser(diffusion, net, label=label)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    scheduler.set_timesteps(given.steps)
    calls = {
        "ours": lambda: sampler.sample(diffusion, denoise, x, noise=noise),
        "diffusers": lambda: theirs(peer, scheduler, label, x),
    }
    seconds = interleaved(calls, rounds=given.rounds)
    calls_made = given.batch * given.steps
    rows = {name: f"{calls_made / value:6.2f} images through the network a second" for name, value in seconds.items()}
    rows["ours / diffusers"] = f"{seconds['diffusers'] / seconds['ours']:6.3f}"
    sizes = [sum(p.numel() for p in network.parameters()) for network in (net, peer)]
    rows["parameters"] = f"{sizes[0]:,} and {sizes[1]:,}"
    report(f"Sampling, ADM 64x64, {given.steps}-step DDIM, batch {given.batch}, float32", rows)


if __name__ == "__main__":
    main()
