"""Tiny autoencoders and data whose latents are cached: what the tests of the latent cache share."""

import torch
from torch import nn

from diffusion.data.base import ImageData
from diffusion.data.images import TensorImages
from diffusion.latents import encode_moments
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.conv_vae import ConvVAE

STAGES = [{"depth": 1}, {"depth": 1}]
NODE = {  # of a config: an autoencoder of grey images
    "_target_": "diffusion.models.autoencoder.AutoencoderKL",
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "channels": 8,
    "norm_groups": 4,
    "stages": STAGES,
}


def autoencoder(kind=AutoencoderKL, *, seed: int = 0, in_channels: int = 3, **settings) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind is not ConvVAE:
            settings = {"latent_channels": 2, "channels": 8, "norm_groups": 4, "stages": STAGES, **settings}
            settings["out_channels"] = in_channels
        return kind(in_channels, **settings).eval().requires_grad_(False)


class Mirrored(ImageData):
    """30 random RGB images of 8x8, mirrored in half of the epochs, with labels; 7 to validate."""

    def __init__(self, *, num_train: int = 30, content: int = 0, flip: bool = True, image_size: int = 8, **settings):
        super().__init__(channels=3, image_size=image_size, num_classes=10, **({"batch_size": 4} | settings))
        self.num_train, self.content, self.flip = num_train, content, flip

    def setup(self, stage=None):
        source = torch.Generator().manual_seed(self.content)
        shape = (self.num_train + 7, 3, self.image_size, self.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=source)
        labels = torch.arange(len(images)) % 10
        cut = self.num_train
        self.train_set = TensorImages(images[:cut], labels[:cut], seed=self.seed, horizontal_flip=self.flip)
        self.val_set = TensorImages(images[cut:], labels[cut:], seed=self.seed)


def assert_same_batches(ours, theirs, model: nn.Module, *, atol: float = 1e-6) -> None:
    """The batches of a cache are those of the images, encoded."""
    compared = 0
    for got, expected in zip(ours, theirs, strict=True):
        moments = got.pop("moments")
        assert moments.dtype == torch.float32
        torch.testing.assert_close(moments, encode_moments(model, expected.pop("image")), atol=atol, rtol=0)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(got[name], value) if torch.is_tensor(value) else got[name] == value, name
        compared += 1
    assert compared
