"""What does diffusers' scheduler_config.json say about the process that a network was trained for?

Betas, what is predicted and zero terminal SNR are the model's; spacing and the like are how its author samples.
"""

from pathlib import Path
from typing import Any

from diffusion.pretrained import families
from diffusion.pretrained.families import Family
from diffusion.pretrained.prediction import read_parameterization, read_schedule
from diffusion.pretrained.weight_files import WeightFile, read_json

NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
VARIANCES = {"learned": "learned", "learned_range": "learned", "fixed_large": "jump", "fixed_large_log": "jump"}
SAMPLERS = {  # scheduler class -> our sampler's config
    "DDIMScheduler": "diffusers_ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "diffusers_deis",
    "DPMSolverMultistepScheduler": "diffusers_dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "diffusers_euler_ancestral",
    "EulerDiscreteScheduler": "diffusers_euler",
    "HeunDiscreteScheduler": "diffusers_heun",
    "KDPM2AncestralDiscreteScheduler": "diffusers_dpm2_ancestral",
    "KDPM2DiscreteScheduler": "diffusers_dpm2",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "diffusers_lms",
    "PNDMScheduler": "diffusers_pndm",
    "UniPCMultistepScheduler": "diffusers_unipc",
}


def read_scheduler(
    folder: Path, file: WeightFile, family: Family, notes: list[str]
) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """The process' config node, what is predicted (None: not known), and the scheduler's config as it is."""
    path = folder / "scheduler_config.json"
    if not path.is_file():
        notes.append(f"there is no {folder.name}/scheduler_config.json; {family.title}'s own schedule is assumed")
        told = read_parameterization(file, family, notes)
        return families.diffusion_node(read_schedule(file, family, told, notes), told), told, {}
    config = read_json(path)
    kind = config.get("prediction_type", "epsilon")
    if kind not in NAMES:
        raise ValueError(f"{path} says prediction_type={kind!r}, which is none of {', '.join(NAMES)}")
    schedule = schedule_node(path, config)
    if config.get("rescale_betas_zero_snr"):
        if NAMES[kind] == "eps":
            notes.append("rescale_betas_zero_snr is not applied: a network that predicts eps cannot start from it")
        else:
            schedule = {"_target_": "diffusion.schedule.zero_terminal_snr", "schedule": schedule}
    variance = VARIANCES.get(config.get("variance_type") or "")
    return families.diffusion_node(schedule, NAMES[kind], variance), NAMES[kind], config


def schedule_node(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The schedule's config node; diffusers' defaults stand for what the file leaves out."""
    if betas := config.get("trained_betas"):
        if not isinstance(betas, list) or not all(_within(beta, 0, 1) for beta in betas):
            raise ValueError(f"{path} says trained_betas={str(betas)[:60]}, which are no numbers from 0 to 1")
        return {"_target_": "diffusion.schedule.Schedule", "betas": list(betas)}
    steps, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    ends = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
    if not _within(steps, 1, 10**6) or not isinstance(steps, int) or not all(_within(beta, 0, 1) for beta in ends):
        raise ValueError(
            f"{path} says num_train_timesteps={steps!r:.40} and beta_start={ends[0]!r:.40}, beta_end={ends[1]!r:.40}; "
            "these must be a whole number from 1 and two numbers from 0 to 1"
        )
    if kind == "scaled_linear":
        return families.scaled_linear(ends, steps)
    if kind == "linear":
        node = families.scaled_linear(ends, steps)
        return node | {"_target_": "diffusion.schedule.linear", "reference_steps": None}
    if kind == "squaredcos_cap_v2":
        return {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": steps}
    raise ValueError(
        f"{path} says beta_schedule={kind!r}, which is none of scaled_linear, linear, squaredcos_cap_v2, trained_betas"
    )


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
