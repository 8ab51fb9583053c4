"""Which files are no models by themselves: LoRA, textual inversions, and networks that are not built here?"""

from diffusion.pretrained.places import Recognised
from diffusion.pretrained.weight_files import WeightFile


def recognise_other(file: WeightFile) -> Recognised | None:
    """What a file is, if it is one of these."""
    return None
