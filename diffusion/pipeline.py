"""How is a text-to-image model used from Python: as a whole, or part by part in a loop of your own?

pipe = LatentDiffusion.load("checkpoints/v1-5-pruned-emaonly.safetensors")
images = pipe("a red fox in the snow", seed=0)  # (1, 3, 512, 512) in [-1, 1]

condition, null = pipe.told("a red fox in the snow")  # the same by hand; each line may be your own
denoise = ClassifierFreeGuidance(7.5)(pipe.diffusion, pipe.net, condition, null)
noise = SampleNoise([0], device=pipe.device)
x = noise.initial(pipe.autoencoder.latent_shape((3, 512, 512)))
for state in pipe.sampler.states(pipe.diffusion, denoise, x, noise=noise):
    x = state.x
images = pipe.decode(x)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.asked import choose_prompts, choose_sizes
from diffusion.checkpoint import build, load_model
from diffusion.devices import choose_device, choose_dtype
from diffusion.generate import batches, conditions, decoded, sampler_for
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.image_tasks import encoded
from diffusion.own_settings import own_sampler, sampler_node
from diffusion.prepare import is_published, place, prepared, text_options_kept, with_parameterization
from diffusion.process import GaussianDiffusion
from diffusion.sampling import Sampler

# What sample.py would be told of all that a call does not mention.
UNSAID: dict[str, Any] = {
    **dict.fromkeys(("prompt", "negative_prompt", "labels", "condition_image", "condition_noise", "height", "width")),
    **dict.fromkeys(("image", "mask", "strength", "image_guidance_scale", "clip_skip", "long_prompt", "tile")),
    **dict.fromkeys(("original_size", "crop", "offload", "num_samples")),
    "paste": True,
    "emphasis": False,
    "buildable": (),
    "batch_size": 1,
    "pad_to": 1,
    "seed": 0,
}


@dataclass
class LatentDiffusion:
    """A denoiser and what it needs beside it, on one device: each part may be taken, used and replaced by itself.

    facts: `shape` (C, H, W) of an image, `condition_drop` (above 0 where guidance is possible) and, of published
    weights, `task`, `sampler` and `guidance_scale`. `sampler` and `guidance_scale` are what a call uses unless told.
    """

    net: nn.Module
    diffusion: GaussianDiffusion
    autoencoder: nn.Module | None = None
    conditioner: nn.Module | None = None
    facts: Mapping[str, Any] = field(default_factory=lambda: {"shape": (3, 512, 512), "condition_drop": 0.1})
    sampler: Sampler = field(default_factory=Sampler)
    guidance_scale: float = 7.5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    recognised: Any = None  # what its file is, as `pretrained.recognise` says

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "auto", dtype: str = "auto", silent: bool = False, **files: Any
    ) -> "LatentDiffusion":
        """Load a model of ours or a published one, a file or a folder, in any layout that `load_model` reads.

        `device` and `dtype` as in sample.py; `files` are settings of `load_model`: autoencoder=FILE, text_encoder=FILE,
        parameterization="v", weights="raw". Raises ValueError for what is no model or lacks a part.
        """
        model = load_model(path, settled=False, **files)
        place_ = choose_device(device)
        precision = choose_dtype(dtype, place_, published=is_published(model))
        place(model, place_, precision)
        given = files.get("parameterization")
        model = with_parameterization(model, place_, precision, given=given, silent=silent)
        node = sampler_node(*own_sampler(model.facts))
        return cls(
            net=model.net,
            diffusion=model.diffusion,
            autoencoder=model.autoencoder,
            conditioner=model.conditioner,
            facts=model.facts,
            sampler=sampler_for(build(node, {node["_target_"]}), latents=model.autoencoder is not None),
            guidance_scale=model.facts.get("guidance_scale") or 2.0,
            device=place_,
            dtype=precision,
            recognised=model.recognised,
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_samples: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance: Any = None,
        sampler: Sampler | None = None,
        on_step: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1], float32 on the CPU; image i depends on `seed` + i alone.

        One for each prompt unless `num_samples` says how many. `settings` are those of sample.py: negative_prompt,
        seed, height, width, image and mask (files, or Pillow's images), strength, labels, ... Raises ValueError for
        what the model does not know.
        """
        if unknown := sorted(settings.keys() - UNSAID.keys()):
            raise ValueError(f"there is no {', '.join(unknown)}; the settings are {', '.join(UNSAID)}")
        if num_samples is None:
            num_samples = max([len(given) for given in (prompt, settings.get("labels")) if _is_list(given)], default=1)
        names = {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}
        config = {**UNSAID, **names, **settings, "prompt": prompt, "num_samples": num_samples}
        sampler = self.sampler if sampler is None else sampler
        sampler = sampler if num_steps is None else replace(sampler, num_steps=num_steps)
        if guidance is None:
            guidance = ClassifierFreeGuidance(self.guidance_scale if guidance_scale is None else guidance_scale)
        with text_options_kept(self.conditioner):
            _, told = prepared(self, sampler, guidance, config, device=self.device, silent=True, ask_network=False)
            made = batches(self.net, self.diffusion, sampler, **told, on_step=on_step)
            return torch.cat([batch.images for batch in made])

    def told(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        shape: Sequence[int] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what the network is told of the prompts, and what of none (or of the negative prompts).

        `shape` (C, H, W) is that of the images, by default the model's, which Stable Diffusion XL is told, too.
        """
        count = len(prompt) if _is_list(prompt) else 1
        shape = self.facts["shape"] if shape is None else shape
        texts = {"caption": choose_prompts("prompt", prompt, count)}
        away = None
        if negative_prompt is not None:
            away = {"caption": choose_prompts("negative_prompt", negative_prompt, count)}
        for inputs, negative in ((texts, False), (away, True)):
            if inputs is not None and "sizes" in self.conditioner.entries:
                inputs["sizes"] = [choose_sizes(self.conditioner, {}, shape, negative=negative)] * count
        about = {"seeds": range(count), "device": self.device, "dtype": torch.float32}
        return conditions(self.net, self.conditioner, None, texts, away, **about)

    def encode(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Return the latents (B, c, h, w), the mode, of images (B, C, H, W) in [-1, 1]."""
        return encoded(self.autoencoder, images.to(self.device), dtype=self.dtype, tile=tile)

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Return the images (B, C, H, W) of latents, float32 on the CPU."""
        return decoded(self.autoencoder, latents, dtype=self.dtype, tile=tile)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LatentDiffusion":
        """Move all parts, in place, and return this."""
        self.device, self.dtype = torch.device(device), self.dtype if dtype is None else dtype
        place(self, self.device, self.dtype)
        return self


def _is_list(given: Any) -> bool:
    return isinstance(given, list | tuple)
