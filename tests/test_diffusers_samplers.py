"""The configs named after diffusers' schedulers walk as those do with Stable Diffusion's scheduler_config.json."""

import diffusers
import pytest
import torch
from test_configs import built, composed

from diffusion.denoiser import denoiser
from diffusion.process import GaussianDiffusion
from diffusion.schedule import scaled_linear

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
CLASSES = {
    "diffusers_ddim": diffusers.DDIMScheduler,
    "diffusers_pndm": diffusers.PNDMScheduler,
    "diffusers_euler": diffusers.EulerDiscreteScheduler,
    "diffusers_euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "diffusers_heun": diffusers.HeunDiscreteScheduler,
    "diffusers_dpm2": diffusers.KDPM2DiscreteScheduler,
    "diffusers_dpm2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "diffusers_lms": diffusers.LMSDiscreteScheduler,
    "diffusers_dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "diffusers_unipc": diffusers.UniPCMultistepScheduler,
    "diffusers_deis": diffusers.DEISMultistepScheduler,
}


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x.roll(1, -1) * 0.9 + x.roll(1, 1) * 0.4 + t.reshape(-1, 1, 1, 1) / 1000 - 0.3)


def theirs(scheduler, x: torch.Tensor, steps: int) -> torch.Tensor:
    """A pipeline's loop; noise comes from a generator of seed 1."""
    generator = torch.Generator().manual_seed(1)
    takes = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = net(scheduler.scale_model_input(x, t), torch.as_tensor(t).float().expand(len(x)))
        x = scheduler.step(output, t, x, **takes).prev_sample
    return x


@pytest.mark.parametrize("steps", [16, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_config_of_diffusers_name_ends_where_diffusers_does(name, prediction, steps):
    peer = CLASSES[name].from_config({**STABLE_DIFFUSION, "prediction_type": prediction})
    diffusion = GaussianDiffusion(scaled_linear(), {"epsilon": "eps", "v_prediction": "v"}[prediction])
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    sampler = built(composed(f"sampler={name}", f"sampler.num_steps={steps}", name="sample")["sampler"])
    ours = sampler.sample(
        diffusion, denoiser(diffusion, net), x, noise=lambda x: torch.randn(x.shape, generator=generator)
    )
    wanted = theirs(peer, x, steps)
    assert (ours - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=1)


def test_every_config_of_diffusers_name_is_held_to_its_class():
    from test_sampler_list import KNOWN

    assert {name for name in KNOWN if name.startswith("diffusers_")} == set(CLASSES)
