"""Does a network predict eps or v, where its file does not say? It is asked about an image of nothing but noise.

There eps is the image itself, and v = alpha eps - sigma x0 is little but what the network takes for its data's mean.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion.denoiser import NULL_LABEL
from diffusion.devices import in_own_precision, resident
from diffusion.generate import autocast_for, conditions
from diffusion.image_tasks import EDITING, INPAINTING, picture_task
from diffusion.sampling import SampleNoise

PARAMETERIZATIONS = ("eps", "v")  # those that are told apart
SIDE = 32  # of the image of noise, at most


@torch.no_grad()
def answer_to_noise(model: Any, device: torch.device, dtype: torch.dtype, offload: str | None = None) -> float:
    """Return the correlation of the network's answer at the last timestep with its input: 1 for eps, near 0 for v.

    It is told nothing, neither by texts nor by pictures; the image of noise is small.
    """
    unit = getattr(model.net, "size_factor", 1)
    side = max(unit, SIDE // unit * unit)
    channels = model.facts["shape"][0] if model.autoencoder is None else model.autoencoder.latent_channels
    x = SampleNoise([0]).initial((channels, side, side)).to(device)
    with resident(model.conditioner, device, offload):
        told = {"seeds": [0], "device": device, "dtype": torch.float32}
        condition, _ = conditions(model.net, model.conditioner, None, nothing(model), None, **told)
    if (blank := blank_picture(model, x)) is not None:
        condition["concat"] = blank
    t = model.diffusion.time(x, model.diffusion.num_train_timesteps - 1)
    with resident(model.net, device, offload), autocast_for(model.net, device, dtype):
        if next(model.net.parameters()).dtype == torch.float64:
            x, condition = x.double(), {name: value.double() for name, value in condition.items()}
        answer = in_own_precision(model.net)(x, t, **condition)[:, :channels]
    pair = torch.stack([part.float().flatten() for part in (x, answer)])
    return float(torch.corrcoef(pair)[0, 1].nan_to_num())


def nothing(model: Any) -> dict[str, Any] | None:
    """Return inputs that say nothing, for a conditioner of texts, sizes and classes."""
    if model.conditioner is None:
        return None
    size = model.facts["shape"][-2:]
    say = {"caption": lambda: "", "label": lambda: NULL_LABEL, "sizes": lambda: model.conditioner.sizes_of(*size)}
    return {entry: [say[entry]()] for entry in model.conditioner.entries}


def blank_picture(model: Any, x: Tensor) -> Tensor | None:
    """Return what a network that reads pictures sees of a blank one, to be painted all over."""
    task = picture_task(model.net, x.shape[1], model.conditioner)
    if task == INPAINTING:
        return torch.cat([torch.ones_like(x[:, :1]), torch.zeros_like(x)], dim=1)
    return torch.zeros_like(x) if task == EDITING else None


def likely(correlation: float) -> str:
    """Return the parameterization of a network that answers noise so."""
    return "eps" if correlation > 0.5 else "v"
