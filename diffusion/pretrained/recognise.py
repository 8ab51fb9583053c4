"""What is this file or folder: which model, in whose names, and where are the weights of each of our modules?

Names, shapes, configs and a few small buffers are read, never the weights; `Recognised` says what was found.
"""

from pathlib import Path

from diffusion.pretrained.folders import is_diffusers_folder, recognise_folder
from diffusion.pretrained.places import Place, Recognised
from diffusion.pretrained.single_files import recognise_file
from diffusion.pretrained.weight_files import open_weights

__all__ = ["Place", "Recognised", "recognise"]

WEIGHTS = ("auto", "ema", "raw")


def recognise(path: str | Path, *, weights: str = "auto") -> Recognised:
    """Say what a file or folder of weights is.

    weights: "ema" or "raw" where both are there; "auto" takes what the model's original code samples with. Raises
    FileNotFoundError, and ValueError for damaged files and for what is no model that we know, naming the nearest one
    and what differs.
    """
    path = Path(path).expanduser()
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}; choose one of {', '.join(WEIGHTS)}")
    if is_diffusers_folder(path):
        return recognise_folder(path, weights=weights)
    return recognise_file(open_weights(path), weights=weights)
