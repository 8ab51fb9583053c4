"""What does guidance need beside its numbers: a classifier that fits, a model with a condition, a warning where not?

Between the configs of guidance and diffusion/guidance.py, which holds the formulas.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffusion.checkpoint import LoadedClassifier, load_classifier, weights_hash
from diffusion.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    NoGuidance,
    TwoScaleGuidance,
    is_noise,
    within,
)
from diffusion.image_tasks import EDITING
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler


def with_classifier(
    guidance: Any,
    diffusion: GaussianDiffusion,
    *,
    shape: Sequence[int],
    num_classes: int | None,
    autoencoder: nn.Module | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    buildable: Sequence[str] = (),
) -> Any:
    """Return classifier guidance with its classifier loaded and fit for a denoiser; any other guidance as it is.

    The denoiser is told by its `diffusion`, the `shape` (C, H, W) of its images, its `num_classes` if it has classes,
    and its `autoencoder`. The classifier computes in float32, or in float64 if that is `dtype`. Raises ValueError for
    a file that holds no classifier and for a classifier of other images, latents, noise or classes.
    """
    if not isinstance(guidance, ClassifierGuidance):
        return guidance
    if guidance.classifier is None and guidance.classifier_checkpoint is not None:
        loaded = load_classifier(guidance.classifier_checkpoint, device=device, buildable=buildable)
        loaded.net.to(torch.float64 if dtype == torch.float64 else torch.float32)
        guidance = replace(guidance, classifier=loaded)
    if isinstance(guidance.classifier, LoadedClassifier):
        check_same_space(guidance.name, guidance.classifier.parts.get("autoencoder"), autoencoder)
    guidance.check(
        diffusion, shape if autoencoder is None else autoencoder.latent_shape(shape), num_classes=num_classes
    )
    return guidance


def check_same_space(name: str, latents_of: Mapping[str, Any] | None, autoencoder: nn.Module | None) -> None:
    """Raise ValueError unless a classifier judges what the denoiser draws: pixels, or latents of one autoencoder.

    `latents_of` is what the classifier's file says about its autoencoder, None for one that judges pixels.
    """
    spaces = ["pixels" if of is None else "the latents of an autoencoder" for of in (latents_of, autoencoder)]
    if spaces[0] != spaces[1]:
        raise ValueError(
            f"{name} judges {spaces[0]}, but the denoiser draws {spaces[1]}; train a classifier on {spaces[1]}"
        )
    if latents_of is None:
        return
    config = latents_of["config"]
    theirs = (latents_of["sha256"][:12], config.get("scale_factor"), config.get("shift", 0.0))
    ours = (weights_hash(autoencoder)[:12], autoencoder.scale_factor, autoencoder.shift)
    if theirs != ours:
        worded = ["weights {}, scale_factor={} shift={}".format(*of) for of in (theirs, ours)]
        raise ValueError(
            f"{name} judges latents of another autoencoder ({worded[0]}) than the denoiser's ({worded[1]}); train "
            "both on the same one"
        )


def say_guidance(guidance: Any, sampler: Sampler, diffusion: GaussianDiffusion) -> None:
    """Say on stderr, where a classifier guides, in which form the sampler lets it, and at which timesteps not."""
    if not isinstance(guidance, ClassifierGuidance):
        return
    form, noise = "shifts the mean (DDPM)", []
    if not sampler.shifts_mean:
        form = "bends the score (DDIM, ODE solvers)"
        grid = sampler.timesteps(diffusion.schedule)[:-1]
        noise = [t for t in grid if within(guidance.interval, t) and is_noise(diffusion.schedule.level(t))]
    where = f", but not at timestep {', '.join(map(str, noise))}, which is noise only" if noise else ""
    print(f"{guidance.name} guides: it {form}, classifier_scale={guidance.classifier_scale:g}{where}", file=sys.stderr)


def with_two_scales(guidance: Any, task: str | None, image_guidance_scale: float | None) -> Any:
    """Return guidance by text and by picture for a network that edits pictures, any other guidance as it is.

    `task` is what `picture_task` says. Raises ValueError for a scale that the model has no use for.
    """
    if task != EDITING:
        if image_guidance_scale is not None:
            raise ValueError(
                f"image_guidance_scale={image_guidance_scale} is for models that edit pictures (InstructPix2Pix), and "
                "this is none; leave it out"
            )
        return guidance
    scales = {} if image_guidance_scale is None else {"image_guidance_scale": image_guidance_scale}
    if isinstance(guidance, ClassifierFreeGuidance):
        return TwoScaleGuidance(guidance.guidance_scale, rescale=guidance.rescale, interval=guidance.interval, **scales)
    return replace(guidance, **scales) if isinstance(guidance, TwoScaleGuidance) else guidance


def guidance_for(guidance: Any, *, conditional: bool, condition_drop: float) -> Any:
    """Return the guidance to use with such a model, with a warning where it cannot do what it is for."""
    if getattr(guidance, "guidance_scale", 1) == 1:
        return guidance
    if not conditional:
        if isinstance(guidance, ClassifierGuidance):
            warnings.warn("this model has no condition: sampling with the classifier's guidance alone", stacklevel=1)
            return replace(guidance, guidance_scale=1.0)
        warnings.warn("this model has no condition to guide towards: sampling without guidance", stacklevel=1)
        return NoGuidance()
    if not condition_drop:
        warnings.warn(
            f"guidance_scale={guidance.guidance_scale}, but this model was trained without condition drop: what it "
            "answers without a condition means nothing, so guidance will hurt. Use guidance=none, or train with "
            "task.condition_drop=0.1",
            stacklevel=1,
        )
    return guidance
