"""Which sampler and which guidance scale does a published model bring along, where the user names none?"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.checkpoint import LoadedModel
from diffusion.cli import composed


def with_own_settings(
    config: Mapping[str, Any], model: LoadedModel, typed: Sequence[str], *, silent: bool = False
) -> dict[str, Any]:
    """Return sample.py's config with what the model brings along, and say on stderr what that is.

    `typed` are the `name=value` words of the command line, which win; sampler.num_steps=20 changes that one value of
    the model's own sampler. Nothing changes for models that bring nothing, as those of train.py.
    """
    said = {word.partition("=")[0].lstrip("+~") for word in typed}
    found, told = {}, []
    if "sampler" not in said and (name := model.facts.get("sampler")):
        found["sampler"] = sampler_node(name, [word for word in typed if word.startswith("sampler.")])
        told.append(f"sampler={name}")
    scale = model.facts.get("guidance_scale")
    if scale is not None and not {"guidance", "guidance.guidance_scale"} & said:
        found["guidance"] = {**config["guidance"], "guidance_scale": float(scale)}
        told.append(f"guidance.guidance_scale={scale:g}")
    if told and not silent:
        print(f"this model's own settings: {' '.join(told)}", file=sys.stderr)
    return {**config, **found}


def sampler_node(name: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return the config of a sampler of configs/sampler by its name, with `sampler.NAME=VALUE` words applied."""
    return composed("sample", [f"sampler={name}", *changes])["sampler"]
