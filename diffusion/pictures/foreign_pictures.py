"""What do pictures of A1111 and ComfyUI say, in this project's settings, and what of it cannot be honoured?

Nothing is dropped in silence: what has no counterpart here is a note that is printed. Nothing here imports torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusion.pictures.parameters import Parameters
from diffusion.sampler_list import OWN_SCHEDULE

# A1111's field -> our setting and its type. "Denoising strength" belongs to another pass where there is an upscaler.
SETTINGS = {
    "Steps": ("sampler.num_steps", int),
    "CFG scale": ("guidance.guidance_scale", float),
    "Image CFG scale": ("image_guidance_scale", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", int),
    "Denoising strength": ("strength", float),
    "Eta": ("sampler.eta", float),
    "Eta DDIM": ("sampler.eta", float),
    "Sigma churn": ("sampler.s_churn", float),
    "Sigma tmin": ("sampler.s_tmin", float),
    "Sigma tmax": ("sampler.s_tmax", float),
    "Sigma noise": ("sampler.s_noise", float),
    "Schedule max sigma": ("sampler.sigma_max", float),
    "Schedule min sigma": ("sampler.sigma_min", float),
    "Schedule rho": ("sampler.rho", float),
}
# Fields that are read elsewhere here, or that change no picture.
READ = ("Sampler", "Schedule type", "Size", "Model", "Model hash", "VAE", "VAE hash", "RNG", "Emphasis")
READ += ("Version", "User", "Pad conds", "Created Date")
BY_TIMESTEP = ("DDIM", "DDIM CFG++", "PLMS", "UniPC")  # A1111's others take one move more of an image's grid
SECOND_PASS = ("Hires upscaler", "Hires upscale", "Hires resize", "Hires steps")
TAG = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>")
WEIGHED = re.compile(r"(?<!\\)[(\[]")
UNREAD = (  # (what is found in a prompt, what it is)
    (re.compile(r"\[[^\[\]]*[:|][^\[\]]*\]"), "a prompt that changes during sampling, [a:b:0.5] or [a|b]"),
    (re.compile(r"\bAND\b"), "several prompts joined by AND"),
    (re.compile(r"\bBREAK\b"), "BREAK"),
    (re.compile(r"\bembedding:\S+"), "a textual inversion, embedding:NAME"),
)


@dataclass
class Found:
    """What a foreign picture says. `sampler` is (name, schedule) in the words of its `source`, "A1111" or "ComfyUI".

    `settings` are those of sample.py, by dotted key; `model` and `vae` are names of files, `model_hash` begins the
    SHA-256 of the model's file. `from_image` tells that it was made from another image, and `masked` with a mask.
    """

    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    sampler: tuple[str, str | None] | None = None
    model: str | None = None
    model_hash: str | None = None
    vae: str | None = None
    from_image: bool = False
    masked: bool = False
    notes: list[str] = field(default_factory=list)


def from_parameters(parameters: Parameters) -> Found:
    """Translate A1111's text. Raises ValueError where it has no settings, and for numbers that are none."""
    fields = parameters.fields
    if not fields:
        raise ValueError("its parameters text holds no line of settings (Steps: ..., Sampler: ..., Seed: ...)")
    found = Found("A1111", sampler=_sampler(fields) if "Sampler" in fields else None)
    two_passes = any(name in fields for name in SECOND_PASS)
    for name, (key, kind) in SETTINGS.items():
        if name in fields and not (name == "Denoising strength" and two_passes):
            found.settings[key] = parameters.number(name, kind)
    if parameters.size is not None:
        found.settings |= dict(zip(("height", "width"), parameters.size, strict=True))
    found.from_image = "strength" in found.settings or "image_guidance_scale" in found.settings
    found.masked = "Mask blur" in fields
    if "strength" in found.settings and "sampler.num_steps" in found.settings:
        steps, by_sigma = found.settings["sampler.num_steps"], fields.get("Sampler") not in BY_TIMESTEP
        moves = int(min(found.settings["strength"], 0.999) * steps) + by_sigma  # as A1111 counts them
        found.settings["strength"] = strength_of(moves, steps, found.settings["strength"])
    found.model, found.model_hash, found.vae = fields.get("Model"), fields.get("Model hash"), fields.get("VAE")
    if found.vae in ("None", "Automatic"):
        found.vae = None
    read_prompts(found, parameters.prompt, parameters.negative_prompt, weigh=fields.get("Emphasis") != "None")
    if fields.get("Emphasis") not in (None, "None", "Original"):
        found.notes.append(f"Emphasis: {fields['Emphasis']}")
    idle = [*SETTINGS, *READ] if not two_passes else [*(set(SETTINGS) - {"Denoising strength"}), *READ]
    found.notes += [f"{name}: {value}" for name, value in fields.items() if name not in idle]
    found.notes.append(f"its starting noise ({rng_of(fields.get('RNG'))})")
    return found


def _sampler(fields: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the sampler and its schedule; k-diffusion's samplers had the uniform one, where none is written."""
    name, schedule = fields["Sampler"], fields.get("Schedule type")
    labelled = name.endswith((" Karras", " Exponential", " Polyexponential"))
    return name, schedule if schedule or labelled or name in OWN_SCHEDULE else "Uniform"


def strength_of(moves: int, steps: int, strength: float) -> float:
    """Return a strength that walks the last `moves` moves of a grid of `steps`: the one given, where it does so."""
    return strength if int(strength * steps) == moves else min(round((moves + 0.5) / max(steps, 1), 4), 1.0)


def rng_of(name: str | None) -> str:
    """Say where A1111 drew its noise: on the GPU unless its text says otherwise."""
    return f"RNG: {name}" if name else "drawn on its GPU"


def read_prompts(found: Found, prompt: str, negative_prompt: str, *, weigh: bool = True) -> None:
    """Take the texts of a program that weighs words and joins windows of 77 tokens; note what it does besides."""
    texts = []
    for text in (prompt, negative_prompt):
        if tags := TAG.findall(text):
            found.notes.append(" ".join(tags))
        texts.append(TAG.sub("", text))
    found.settings["prompt"] = texts[0]
    if texts[1]:
        found.settings["negative_prompt"] = texts[1]
    found.settings["long_prompt"] = "chunk"
    if weigh and any(WEIGHED.search(text) or "\\(" in text or "\\[" in text for text in texts):
        found.settings["emphasis"] = True
    found.notes += [what for pattern, what in UNREAD if any(pattern.search(text) for text in texts)]


def unique(notes: Iterable[str]) -> list[str]:
    """Return notes once each, in their order."""
    return list(dict.fromkeys(notes))
