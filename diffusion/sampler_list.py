"""What do people of other programs call our samplers? One table, for the listing and for names in pictures.

Nothing here imports torch, but `listing`, which asks the solvers for their orders.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Known(NamedTuple):
    """Where else a config of configs/sampler is known; a pair is a sampler and its schedule of noise."""

    a1111: tuple[str, str] | None = None
    comfyui: tuple[str, str] | None = None
    diffusers: str = ""  # the scheduler's class, less "Scheduler", and what its config says


SD = "steps_offset=1"  # and leading spacing: what Stable Diffusion's scheduler_config.json says
KNOWN: dict[str, Known] = {
    "ddim": Known(None, ("ddim", "simple"), "DDIM(trailing)"),
    "ddpm": Known(None, ("ddpm", "simple"), "DDPM(trailing)"),
    "ldm_ddim": Known(("DDIM", "Automatic"), None, "DDIM(steps_offset=1, set_alpha_to_one=False)"),
    "sgm_euler": Known(None, None, "EulerDiscrete(trailing)"),
    "plms": Known(("PLMS", "Automatic"), None, "PNDM(skip_prk_steps=True, steps_offset=1)"),
    "euler": Known(("Euler", "Uniform"), ("euler", "normal"), "EulerDiscrete(linspace)"),
    "euler_ancestral": Known(("Euler a", "Uniform"), ("euler_ancestral", "normal"), "EulerAncestralDiscrete(linspace)"),
    "heun": Known(("Heun", "Uniform"), ("heun", "normal"), "HeunDiscrete(linspace)"),
    "dpm2": Known(("DPM2", "Karras"), ("dpm_2", "karras"), "KDPM2Discrete(karras)"),
    "dpm2_ancestral": Known(("DPM2 a", "Karras"), ("dpm_2_ancestral", "karras"), "KDPM2AncestralDiscrete(karras)"),
    "lms": Known(("LMS", "Uniform"), ("lms", "normal"), "LMSDiscrete(linspace)"),
    "dpmpp_2s_ancestral": Known(("DPM++ 2S a", "Karras"), ("dpmpp_2s_ancestral", "karras")),
    "dpmpp_2m": Known(("DPM++ 2M", "Uniform"), ("dpmpp_2m", "normal"), "DPMSolverMultistep"),
    "dpmpp_2m_karras": Known(("DPM++ 2M", "Karras"), ("dpmpp_2m", "karras"), "DPMSolverMultistep(karras)"),
    "dpmpp_3m": Known(None, None, "DPMSolverMultistep(karras, solver_order=3)"),
    "dpmpp_sde": Known(("DPM++ SDE", "Karras"), ("dpmpp_sde", "karras"), "DPMSolverSDE(karras)"),
    "dpmpp_2m_sde": Known(
        ("DPM++ 2M SDE", "Exponential"), ("dpmpp_2m_sde", "exponential"), "DPMSolverMultistep(sde-dpmsolver++)"
    ),
    "dpmpp_3m_sde": Known(
        ("DPM++ 3M SDE", "Exponential"),
        ("dpmpp_3m_sde", "exponential"),
        "DPMSolverMultistep(sde-dpmsolver++, solver_order=3)",
    ),
    "unipc": Known(("UniPC", "Automatic"), ("uni_pc", "normal"), "UniPCMultistep(linspace)"),
    "deis": Known(None, ("deis", "normal"), "DEISMultistep(linspace, solver_order=3)"),
    "lcm": Known(("LCM", "Automatic"), ("lcm", "any"), "LCM"),
    "diffusers_ddim": Known(None, None, f"DDIM({SD})"),
    "diffusers_pndm": Known(None, None, f"PNDM({SD}, skip_prk_steps=True)"),
    "diffusers_euler": Known(None, None, f"EulerDiscrete({SD})"),
    "diffusers_euler_ancestral": Known(None, None, f"EulerAncestralDiscrete({SD})"),
    "diffusers_heun": Known(None, None, f"HeunDiscrete({SD})"),
    "diffusers_dpm2": Known(None, None, f"KDPM2Discrete({SD})"),
    "diffusers_dpm2_ancestral": Known(None, None, f"KDPM2AncestralDiscrete({SD})"),
    "diffusers_lms": Known(None, None, f"LMSDiscrete({SD})"),
    "diffusers_dpmpp_2m": Known(None, None, f"DPMSolverMultistep({SD})"),
    "diffusers_unipc": Known(None, None, f"UniPCMultistep({SD})"),
    "diffusers_deis": Known(None, None, f"DEISMultistep({SD})"),
}
# What has no config of its own: the nearest one, and what it changes there.
VARIANTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "A1111": {
        "dpm++ 2m sde heun": ("dpmpp_2m_sde", {"kind": "heun"}),
        "k_euler": ("euler", {}),
        "k_euler_a": ("euler_ancestral", {}),
        "k_lms": ("lms", {}),
        "unipc": ("unipc", {"kind": "bh1", "order": 3}),
    },
    "ComfyUI": {
        "ddim": ("euler", {}),
        "ddpm": ("euler_ancestral", {}),
        "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"kind": "heun"}),
        "uni_pc": ("unipc", {"kind": "bh1", "order": 3}),
        "uni_pc_bh2": ("unipc", {"order": 3}),
    },
}
INSTEAD = "dpmpp_2m_karras"  # for a sampler that nobody here knows
SPACINGS = {  # A1111's schedule types and ComfyUI's schedulers, in small letters and without blanks
    "uniform": "normal",
    "ddim": "ddim_uniform",
    **{
        name: name
        for name in ("normal", "karras", "exponential", "polyexponential", "sgm_uniform", "kl_optimal", "simple")
    },
    **{name: name for name in ("ddim_uniform", "beta", "align_your_steps")},
}
LABELS = {  # A1111's schedule type for our spacing
    "normal": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
}
A1111 = {  # by solver, and whether it adds noise
    ("euler", False): "Euler",
    ("euler", True): "Euler a",
    ("heun", False): "Heun",
    ("dpm2", False): "DPM2",
    ("dpm2", True): "DPM2 a",
    ("lms", False): "LMS",
    ("plms", False): "PLMS",
    ("dpmpp_2s", True): "DPM++ 2S a",
    ("dpmpp_2m", False): "DPM++ 2M",
    ("dpmpp_sde", True): "DPM++ SDE",
    ("dpmpp_2m_sde", True): "DPM++ 2M SDE",
    ("dpmpp_3m_sde", True): "DPM++ 3M SDE",
    ("unipc", False): "UniPC",
    ("lcm", True): "LCM",
}
OWN_SCHEDULE = ("DDIM", "PLMS", "UniPC", "LCM")


def translated(name: str, schedule: str | None = None, *, program: str = "A1111") -> tuple[str, dict[str, Any], bool]:
    """Return our config for a sampler of A1111 or ComfyUI, the values to change in it, and whether it is the same.

    `schedule` is A1111's schedule type or ComfyUI's scheduler; None and "Automatic" are the sampler's own. Old names
    with the schedule at their end ("DPM++ 2M Karras") are understood. An unknown sampler becomes `INSTEAD`.
    """
    asked, schedule = _parted(name, schedule)
    spacing = SPACINGS.get(schedule) if schedule not in (None, "automatic") else None
    known_schedule = spacing is not None or schedule in (None, "automatic")
    pairs = {config: getattr(known, program.lower()) for config, known in KNOWN.items()}
    named = [config for config, pair in pairs.items() if pair and pair[0].lower() == asked]
    if asked in VARIANTS[program]:
        config, changes = VARIANTS[program][asked]
    elif named:  # DPM++ 2M has a config for each of its usual schedules
        wanted = spacing or ("karras" if program == "A1111" else "normal")
        config, changes = next((one for one in named if _spacing(pairs[one]) == wanted), named[0]), {}
    else:
        return INSTEAD, {"spacing": spacing} if spacing else {}, False
    if spacing and not (pairs[config] and spacing == _spacing(pairs[config])):
        changes = {**changes, "spacing": spacing}
    return config, dict(changes), known_schedule


def _parted(name: str, schedule: str | None) -> tuple[str, str | None]:
    """Return a sampler's and a schedule's name as the tables have them."""
    asked = name.strip().lower().removesuffix("_gpu")
    if schedule is None:
        for label in ("karras", "exponential", "polyexponential"):
            if asked.endswith(f" {label}"):
                return asked.removesuffix(f" {label}"), label
        return asked, None
    return asked, schedule.strip().lower().replace(" ", "_")


def _spacing(pair: tuple[str, str]) -> str | None:
    return SPACINGS.get(pair[1].lower().replace(" ", "_"))


def a1111_name(sampler: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return A1111's sampler and schedule type for one of ours, ours where it has none; None is its own schedule.

    `sampler` holds the values solver, eta and spacing of a config.
    """
    solver, spacing = str(sampler.get("solver", "euler")), str(sampler.get("spacing"))
    if solver == "euler" and spacing not in LABELS:
        return ("DDIM" if (sampler.get("eta") or 0) < 1 else "DDPM"), None
    name = A1111.get((solver, bool(sampler.get("eta"))), solver)
    return name, LABELS.get(spacing) if name not in OWN_SCHEDULE else None


SCHEDULERS = {  # diffusers' classes, less "Scheduler" and "Discrete", and the configs that begin as they do
    "DDIM": "diffusers_ddim",
    "DDPM": "ddpm",
    "DEISMultistep": "diffusers_deis",
    "DPMSolverMultistep": "diffusers_dpmpp_2m",
    "Euler": "diffusers_euler",
    "EulerAncestral": "diffusers_euler_ancestral",
    "Heun": "diffusers_heun",
    "KDPM2": "diffusers_dpm2",
    "KDPM2Ancestral": "diffusers_dpm2_ancestral",
    "LCM": "lcm",
    "LMS": "diffusers_lms",
    "PNDM": "diffusers_pndm",
    "UniPCMultistep": "diffusers_unipc",
}
MULTISTEP = ("DEISMultistep", "DPMSolverMultistep", "UniPCMultistep")


def of_scheduler(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return our config for a scheduler_config.json and the values to change in it; None for an unknown class.

    What the file leaves out is as in diffusers: linspace, or leading for DDIM, DDPM and PNDM.
    """
    kind = str(config.get("_class_name", "")).removesuffix("Scheduler").removesuffix("Discrete")
    if kind not in SCHEDULERS:
        return None
    if kind == "LCM":
        return "lcm", {}
    clip = "dynamic" if config.get("thresholding") else "clip"
    whole = kind in ("DDIM", "DDPM")
    clips = config.get("thresholding") or config.get("clip_sample", whole)
    changes = {**_scheduler_grid(kind, config), "clip": clip if clips else None, **_scheduler_solver(kind, config)}
    if clip == "dynamic":
        changes["dynamic_quantile"] = config.get("dynamic_thresholding_ratio", 0.995)
    if kind == "DDPM" or config.get("skip_prk_steps", False) or kind != "PNDM":
        return SCHEDULERS[kind], changes
    return SCHEDULERS[kind], {**changes, "solver": "pndm", "kind": None}  # with the Runge-Kutta steps first


def not_followed(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of a scheduler_config.json that `of_scheduler` has nothing for, as `name=value`.

    lower_order_final, which changes runs of less than 15 steps, and sample_max_value are not among them.
    """
    usual = {"use_lu_lambdas": (False,), "use_flow_sigmas": (False,), "euler_at_final": (False,)}
    usual |= {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"), "use_beta_sigmas": (False,)}
    return [f"{name}={config[name]}" for name, known in usual.items() if config.get(name) not in (None, *known)]


def _scheduler_grid(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    spacing = config.get("timestep_spacing", "leading" if kind in ("DDIM", "DDPM", "PNDM") else "linspace")
    bent = [name for name in ("karras", "exponential", "beta") if config.get(f"use_{name}_sigmas")]
    one = config.get("set_alpha_to_one", kind == "DDIM") if kind in ("DDIM", "PNDM") else kind != "DEISMultistep"
    grid = {
        "spacing": spacing,
        "offset": config.get("steps_offset", 0) if spacing == "leading" else 0,
        "final": -1 if one and config.get("final_sigmas_type") != "sigma_min" else 0,
        "discard_penultimate": kind in MULTISTEP and spacing != "trailing" and not bent,
    }
    if bent:
        return {**grid, "spacing": bent[0], "offset": 0}
    if spacing == "linspace" and kind not in ("DDIM", "DDPM", "PNDM", *MULTISTEP):
        grid["spacing"] = "normal"
    return grid


def _scheduler_solver(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    order = config.get("solver_order", 2)
    if kind in ("UniPCMultistep", "DEISMultistep"):
        return {"order": order, **({"kind": config.get("solver_type", "bh2")} if kind.startswith("UniPC") else {})}
    if kind != "DPMSolverMultistep" or order == 1:
        return {"solver": "euler"} if kind == "DPMSolverMultistep" else {}
    stochastic = str(config.get("algorithm_type", "dpmsolver++")).startswith("sde")
    solver = {"solver": f"dpmpp_{order}m{'_sde' if stochastic else ''}", "eta": float(stochastic)}
    return {**solver, "kind": config.get("solver_type", "midpoint")} if order == 2 else solver


def listing(options: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all samplers, from the values of each config by name."""
    from .solvers import SOLVERS

    rows = [("sampler=", "order", "evals", "noise", "spacing", "A1111", "ComfyUI", "diffusers")]
    for name in [*(name for name in KNOWN if name in options), *(name for name in options if name not in KNOWN)]:
        values, known = options[name], KNOWN.get(name, Known())
        solver = SOLVERS[values["solver"]].having(values["order"])
        pairs = [" / ".join(pair) if pair else "-" for pair in (known.a1111, known.comfyui)]
        noise = "yes" if values["eta"] else "-"
        facts = (str(solver.order or "?"), str(solver.evaluations), noise, str(values["spacing"]))
        rows.append((name, *facts, *pairs, known.diffusers or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
