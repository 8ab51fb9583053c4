"""How far apart do two images look? LPIPS (1801.03924) by torchmetrics, which ships its linear heads.

The backbone's weights (VGG16, 528 MB) come from a file, from torchvision's cache, or by torchvision's download.
"""

import os
import pickle
import re
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# torchvision's file of each backbone, by LPIPS's name of it.
BACKBONES = {
    "vgg": ("vgg16", "VGG16_Weights"),
    "alex": ("alexnet", "AlexNet_Weights"),
    "squeeze": ("squeezenet1_1", "SqueezeNet1_1_Weights"),
}


class LPIPS:
    """distance(x, y) -> (B,): 0 for equal images (B, C, H, W) in [-1, 1] with 3 channels (or 1, which is repeated).

    `backbone`: a file of torchvision's weights (.pth or .safetensors); None takes torchvision's cache and, if
    `download`, fills it. Raises ValueError, saying where to put them, if they are not to be had.

    Not an `nn.Module`, so that its frozen weights are in no checkpoint, optimizer or averages; it follows the images
    to their device.
    """

    def __init__(self, net: str = "vgg", *, backbone: str | None = None, download: bool = True) -> None:
        if net not in BACKBONES:
            raise ValueError(f"loss.perceptual.net must be one of {', '.join(BACKBONES)}, got {net!r}")
        # The public class always downloads; this is the network inside it, built without weights.
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        weights = self._weights(net, backbone, download)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn before they are overwritten
            self.net = _NoTrainLpips(net=net, pnet_rand=True)
        wanted = self.net.net.state_dict()
        self.net.net.load_state_dict(renamed(weights, wanted, backbone or cached_file(net)))

    @staticmethod
    def _weights(net: str, backbone: str | None, download: bool) -> dict[str, Tensor]:
        path = Path(backbone).expanduser() if backbone else cached_file(net)
        if path.is_file():
            return read_weights(path)
        if backbone or not download:
            raise absent(net, path, "there is no such file")
        try:
            return published(net).get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:  # no network, a full disk, a download that was cut short
            raise absent(net, path, f"the download failed: {error}") from error

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] not in (1, 3):
            raise ValueError(
                f"LPIPS compares images of 1 or 3 channels, these have {x.shape[1]}; train without it: "
                "loss.perceptual=null"
            )
        if self.net.scaling_layer.shift.device != x.device:
            self.net.to(x.device)
        x, y = (image.expand(-1, 3, -1, -1) for image in (x, y))
        return self.net(x, y).flatten()


def published(net: str) -> Any:
    """Return torchvision's description of the published weights of a backbone."""
    import torchvision

    return getattr(torchvision.models, BACKBONES[net][1]).DEFAULT


def cached_file(net: str) -> Path:
    """Return where torchvision keeps the weights of a backbone: in torch's hub folder, which TORCH_HOME moves."""
    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(published(net).url)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without unpickling objects. Raises ValueError for a file that holds none."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, SafetensorError, EOFError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no weights that can be read ({error}); download it again") from error


def renamed(weights: dict[str, Tensor], wanted: dict[str, Tensor], source: Any) -> dict[str, Tensor]:
    """Give torchvision's tensors (features.0.weight) the names that LPIPS has them under (slice1.0.weight).

    Both number the layers alike; LPIPS cuts them into slices and leaves out the classifier. Raises ValueError for the
    weights of another network.
    """
    named = {key: weights.get(re.sub(r"^slices?\.?\d+\.", "features.", key)) for key in wanted}
    odd = [key for key, value in named.items() if value is None or value.shape != wanted[key].shape]
    if odd:
        raise ValueError(
            f"{source} does not hold this backbone's weights: {len(odd)} of {len(wanted)} tensors are missing or of "
            f"another shape, first {odd[0]}; take torchvision's file"
        )
    return named


def absent(net: str, path: Path, why: str) -> ValueError:
    """Return the error that says where the weights belong, and how to train without them."""
    return ValueError(
        f"the perceptual loss needs the weights of torchvision's {BACKBONES[net][0]}, and {why} ({path}). Download "
        f"{published(net).url} there, or anywhere with loss.perceptual.backbone=FILE; or train without the perceptual "
        "loss: loss.perceptual=null"
    )
