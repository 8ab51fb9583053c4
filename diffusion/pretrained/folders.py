"""What is in a folder in diffusers' layout: unet/, vae/, text_encoder/, and the configs beside the weights?"""

from pathlib import Path

from diffusion.pretrained.places import Recognised


def is_diffusers_folder(path: Path) -> bool:
    """Whether this is a pipeline's folder, or that of one of its networks."""
    return path.is_dir() and any((path / name).exists() for name in ("model_index.json", "unet", "config.json"))


def recognise_folder(path: Path, *, weights: str = "auto") -> Recognised:
    """What a folder is."""
    raise ValueError(f"{path}: not yet")
