"""Which sampler and which guidance scale does a published model bring along, where the user names none?"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.checkpoint import LoadedModel
from diffusion.cli import composed
from diffusion.sampler_list import not_followed, of_scheduler


def with_own_settings(
    config: Mapping[str, Any], model: LoadedModel, typed: Sequence[str], *, silent: bool = False
) -> dict[str, Any]:
    """Return sample.py's config with what the model brings along, and say on stderr what that is.

    `typed` are the `name=value` words of the command line, which win; sampler.num_steps=20 changes that one value of
    the model's own sampler. Nothing changes for models that bring nothing, as those of train.py.
    """
    said = {word.partition("=")[0].lstrip("+~") for word in typed}
    found, told = {}, []
    if "sampler" not in said and model.facts.get("sampler"):
        own = own_sampler(model.facts)
        found["sampler"] = sampler_node(*own, *(word for word in typed if word.startswith("sampler.")))
        told += [f"sampler={own[0]}", *own[1:]]
        if (lost := not_followed(model.facts.get("scheduler") or {})) and not silent:
            warnings.warn(f"of its scheduler_config.json {', '.join(lost)} is not followed exactly", stacklevel=2)
    scale = model.facts.get("guidance_scale")
    if scale is not None and not {"guidance", "guidance.guidance_scale"} & said:
        found["guidance"] = {**config["guidance"], "guidance_scale": float(scale)}
        told.append(f"guidance.guidance_scale={scale:g}")
    if told and not silent:
        print(f"this model's own settings: {' '.join(told)}", file=sys.stderr)
    return {**config, **found}


def own_sampler(facts: Mapping[str, Any]) -> list[str]:
    """Return the name of a model's own sampler in configs/sampler, and `sampler.NAME=VALUE` words for what it changes.

    Those are what diffusers' scheduler_config.json says otherwise, where the model came with one.
    """
    name = facts.get("sampler") or "ddim"
    found = of_scheduler(facts.get("scheduler") or {})
    if found is None or found[0] != name:
        return [name]
    usual = sampler_node(name)
    changes = {key: value for key, value in found[1].items() if usual[key] != value}
    return [name, *(f"sampler.{key}={'null' if value is None else value}" for key, value in changes.items())]


def sampler_node(name: str, *changes: str) -> dict[str, Any]:
    """Return the config of a sampler of configs/sampler by its name, with `sampler.NAME=VALUE` words applied."""
    return composed("sample", [f"sampler={name}", *changes])["sampler"]
