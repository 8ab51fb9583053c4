"""Which file published with guided-diffusion belongs to which recipe of ours, and how is it read without running code?

A new file is one line of `FILES`; the names of its tensors come from the recipe's network itself.
"""

import difflib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion.models.attention import SpatialTransformer
from diffusion.models.classifier import Classifier
from diffusion.models.layers import Downsample
from diffusion.pretrained.guided_diffusion import unet_rules
from diffusion.pretrained.guided_diffusion_classifier import classifier_rules
from diffusion.pretrained.keymap import KeyMap


@dataclass(frozen=True)
class Published:
    """A file's recipe, with `overrides` where the file differs from it.

    `new_attention_order` is the only thing about a file that its tensors' names and shapes do not tell.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    new_attention_order: bool = False


FILES: Mapping[str, Published] = {
    "64x64_diffusion.pt": Published("adm_imagenet64", new_attention_order=True),
    "128x128_diffusion.pt": Published("adm_imagenet128"),
    "256x256_diffusion.pt": Published("adm_imagenet256"),
    "256x256_diffusion_uncond.pt": Published("adm_imagenet256_unconditional"),
    "512x512_diffusion.pt": Published("adm_imagenet512"),
    "64_256_upsampler.pt": Published("adm_upsample_64_256"),
    "128_512_upsampler.pt": Published("adm_upsample_128_512"),
    "lsun_bedroom.pt": Published("adm_lsun256"),
    "lsun_cat.pt": Published("adm_lsun256", ("trainer.max_steps=200000",)),
    "lsun_horse.pt": Published("adm_lsun256", ("trainer.max_steps=250000",)),
    "lsun_horse_nodropout.pt": Published("adm_lsun256", ("trainer.max_steps=250000", "net.dropout=0.0")),
    "64x64_classifier.pt": Published("imagenet64_classifier"),
    "128x128_classifier.pt": Published("imagenet128_classifier"),
    "256x256_classifier.pt": Published("imagenet256_classifier"),
    "512x512_classifier.pt": Published("imagenet512_classifier"),
}


def published(recipe: str | None = None, file: str | Path | None = None) -> Published:
    """Return what is known of a published file, by its own name or else by its recipe's. Raises ValueError."""
    found = FILES.get(Path(file).name) if file is not None else None
    if recipe is None and found is not None:
        return found
    if recipe is None:
        raise ValueError(f"{file} has none of the published names, {', '.join(FILES)}; say what it holds: recipe=NAME")
    if found is not None and found.recipe == recipe:
        return found
    of_recipe = [entry for entry in FILES.values() if entry.recipe == recipe]
    if not of_recipe:
        known = list(dict.fromkeys(entry.recipe for entry in FILES.values()))
        near = difflib.get_close_matches(recipe, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no published file belongs to recipe={recipe}; {hint}recipes: {', '.join(known)}")
    return of_recipe[0]


def table(net: nn.Module, *, new_attention_order: bool = False) -> KeyMap:
    """The two-way table of names for one of our UNets or classifiers; on the meta device is enough."""
    rules = classifier_rules if isinstance(net, Classifier) else unet_rules
    return KeyMap(net, rules(net, new_attention_order=new_attention_order))


def check_expressible(net: nn.Module) -> None:
    """Raise ValueError where guided-diffusion's code would compute something else from a network's weights."""
    problems = {}
    for module in net.modules():
        if isinstance(module, nn.GroupNorm) and (module.num_groups, module.eps) != (32, 1e-5):
            problems["norm"] = f"groups of {module.num_groups} with eps={module.eps:g} (it has 32 and 1e-5)"
        if getattr(module, "residual_scale", 1.0) != 1.0:
            problems["scale"] = f"residual sums times {module.residual_scale:g}"
        if isinstance(module, SpatialTransformer):
            problems["transformer"] = "spatial transformers"
        if isinstance(module, Downsample) and module.padding != 1:
            problems["padding"] = f"downsampling with padding={module.padding}"
    if net.freq_shift:
        problems["freq_shift"] = f"freq_shift={net.freq_shift:g}"
    if getattr(net, "vector_channels", None) is not None:
        problems["vector"] = "a vector condition"
    if problems:
        raise ValueError(f"guided-diffusion has no {', no '.join(problems.values())}, which this network has")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a .pt file of named tensors. Nothing else is unpickled: a file with anything else raises ValueError."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(
            f"{path} is a folder; name the .pt file in it" if path.exists() else f"there is no file {path}"
        )
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of tensors alone, or is damaged: {_reason(error)} Other contents could run code and "
            "are never unpickled here; take the published file, or save its tensors alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read as a file of torch.save ({_reason(error)}); copy or download it again"
        ) from error
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        what = f"a mapping of {', '.join(map(str, list(stored)[:4]))}, ..." if isinstance(stored, Mapping) else ""
        raise ValueError(
            f"{path} holds {what or f'a {type(stored).__name__}'} and not tensors by name; give the state dict that "
            "guided-diffusion's training writes as model*.pt or ema_*.pt"
        )
    return dict(stored)


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
