"""The configs named after diffusers' schedulers walk as those do with Stable Diffusion's scheduler_config.json."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from test_configs import built
from test_sampler_list import KNOWN, values

from diffusion.denoiser import denoiser
from diffusion.own_settings import with_own_settings
from diffusion.process import GaussianDiffusion
from diffusion.sampler_list import not_followed, of_scheduler
from diffusion.schedule import scaled_linear

STEPS = 20
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
    takes = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = net(scheduler.scale_model_input(x, t), torch.as_tensor(t).float().expand(len(x)))
        x = scheduler.step(output, t, x, **takes).prev_sample
    return x


def compare(node: dict, peer, prediction: str, steps: int, *, start: float, tolerance: float = 1e-4) -> None:
    """Assert that a sampler's config and a scheduler lead the same noise to the same end."""
    diffusion = GaussianDiffusion(scaled_linear(), {"epsilon": "eps", "v_prediction": "v"}[prediction])
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    wanted = theirs(peer, x, steps)
    generator = torch.Generator().manual_seed(1)
    ours = built({**node, "num_steps": steps}).sample(
        diffusion, denoiser(diffusion, net), x * start, noise=lambda x: torch.randn(x.shape, generator=generator)
    )
    assert (ours - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


OTHERS = [
    ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
    ("DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 0}),
    ("DDPMScheduler", {"timestep_spacing": "trailing", "clip_sample": False}),
    ("PNDMScheduler", {"skip_prk_steps": False}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("LMSDiscreteScheduler", {"timestep_spacing": "linspace", "use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    ("UniPCMultistepScheduler", {"timestep_spacing": "linspace", "solver_order": 2, "solver_type": "bh2"}),
    ("DEISMultistepScheduler", {"solver_order": 3, "timestep_spacing": "trailing"}),
]


@pytest.mark.parametrize(("kind", "changes"), OTHERS)
def test_a_scheduler_config_is_believed(kind, changes):
    peer = getattr(diffusers, kind).from_config({**STABLE_DIFFUSION, **changes})
    name, changed = of_scheduler(dict(peer.config, _class_name=kind))
    start = float(peer.init_noise_sigma)
    spread = start > 1 and changed["spacing"] != "leading"  # its first noise is not of variance one there
    node = {**values(name), **changed}
    tolerance = 2e-3 if "solver_order" in changes else 1e-4  # its second step has other weights than the third order's
    compare(node, peer, "epsilon", STEPS, start=start / (1 + start**2) ** 0.5 if spread else 1.0, tolerance=tolerance)


def test_clipping_is_believed():
    assert of_scheduler({"_class_name": "DDIMScheduler"})[1]["clip"] == "clip"
    assert of_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False})[1]["clip"] is None
    changes = of_scheduler({"_class_name": "DDPMScheduler", "thresholding": True, "dynamic_thresholding_ratio": 0.9})[1]
    assert (changes["clip"], changes["dynamic_quantile"]) == ("dynamic", 0.9)


def test_a_scheduler_that_nobody_here_knows_is_none():
    assert of_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}) is None
    assert of_scheduler({}) is None


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_config_of_diffusers_name_ends_where_diffusers_does(name, prediction):
    peer = CLASSES[name].from_config({**STABLE_DIFFUSION, "prediction_type": prediction})
    compare(values(name), peer, prediction, STEPS, start=1.0)
    known, changes = of_scheduler(dict(peer.config, _class_name=CLASSES[name].__name__))
    assert known == name
    assert changes.items() <= values(name).items() | {("kind", "bh2"), ("kind", "midpoint"), ("order", 2)}


def test_every_config_of_diffusers_name_is_held_to_its_class():
    assert {name for name in KNOWN if name.startswith("diffusers_")} == set(CLASSES)


def test_what_is_not_followed_of_a_scheduler_config_is_said():
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver", "use_lu_lambdas": True}
    assert not_followed(config) == ["use_lu_lambdas=True", "algorithm_type=dpmsolver"]
    assert not_followed({"_class_name": "DDIMScheduler", "use_lu_lambdas": False, "algorithm_type": None}) == []
    facts = {"sampler": "diffusers_dpmpp_2m", "scheduler": config}
    with pytest.warns(UserWarning, match="use_lu_lambdas=True, algorithm_type=dpmsolver is not followed exactly"):
        with_own_settings({"guidance": {}}, SimpleNamespace(facts=facts), ())
