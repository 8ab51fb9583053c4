"""How do a caption, a label or an image become what a network is conditioned on?

A conditioner prepares what people and batches hold (text, numbers, images) as tensors and encodes those into the
network's vocabulary: `context` (B, L, D), `context_mask` (B, L), `vector` (B, D), `concat` (B, C, H, W).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.conditioner import Conditioner, JointInput, alike_parts, shown
from diffusion.denoiser import NULL_LABEL
from diffusion.models.vision import PatchEncoder
from diffusion.process import q_sample
from diffusion.randomness import Draws
from diffusion.sampling import Noise
from diffusion.schedule import Level
from diffusion.text_conditioning import TextConditioner, XLConditioner

__all__ = [
    "ClassConditioner",
    "Conditioner",
    "ImageConditioner",
    "JointConditioner",
    "JointInput",
    "LowResolutionConditioner",
    "TextConditioner",
    "XLConditioner",
    "check_noise",
]


class ClassConditioner(Conditioner):
    """A label as a context of one token, as latent diffusion's ClassEmbedder; -1 is the null label, the last row."""

    entry = "label"

    def __init__(self, num_classes: int, channels: int = 512) -> None:
        super().__init__()
        if num_classes is None or num_classes < 1:
            raise ValueError(f"num_classes={num_classes}; a class conditioner needs data with classes, at least 1")
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, channels)
        self.provides = {"context": channels}

    def prepare(self, values: Tensor | Sequence[int]) -> Tensor:
        """Labels (B,) int64, of 0 to num_classes - 1 or -1 for none."""
        try:
            label = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            label = torch.empty(0)
        if label.ndim != 1 or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise ValueError(
                f"this model is conditioned on class labels, integers of 0 to {self.num_classes - 1}, "
                f"but got {shown(values)}; a text needs a model trained on captions"
            )
        # On an accelerator this would wait for the device; the embedding fails there by itself.
        if label.device.type == "cpu" and label.numel() and not -1 <= label.min() <= label.max() < self.num_classes:
            raise ValueError(
                f"labels from {int(label.min())} to {int(label.max())} given, but this model knows the classes 0 to "
                f"{self.num_classes - 1} and -1 for no class"
            )
        return label.long()

    def null_like(self, prepared: Tensor) -> Tensor:
        return torch.full_like(prepared, NULL_LABEL)

    def encode(self, prepared: Tensor) -> dict[str, Tensor]:
        label = torch.where(prepared < 0, self.num_classes, prepared)
        return {"context": self.embedding(label)[:, None]}


class ImageConditioner(Conditioner):
    """An image as context tokens, one a patch, by an encoder trained along with the denoiser; null is a learned token.

    Without other data the image is the one to be denoised itself (variations of it); `entry` names another one.
    """

    def __init__(self, encoder: PatchEncoder, *, entry: str = "image") -> None:
        super().__init__()
        self.entry, self.encoder = entry, encoder
        self.null = nn.Parameter(0.02 * torch.randn(1, 1, encoder.channels))
        self.provides = {"context": encoder.channels}

    def prepare(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        """Images (B, C, H, W), or a list of (C, H, W), in [-1, 1]; of any size, the encoder resizes them to its own."""
        return _images(values, self.encoder.in_channels)

    def null_like(self, prepared: Tensor) -> Tensor:
        return torch.full_like(prepared, torch.nan)  # no picture looks like this; `encode` never computes with it

    def encode(self, prepared: Tensor) -> dict[str, Tensor]:
        absent = prepared.isnan().flatten(1).any(dim=1)
        tokens = self.encoder(prepared.masked_fill(absent[:, None, None, None], 0.0))
        return {"context": torch.where(absent[:, None, None], self.null.to(tokens.dtype), tokens)}


class LowResolutionConditioner(Conditioner):
    """A smaller version of the image as further input channels, for super-resolution (arXiv 2104.07636, 2112.10752).

    image_size: H = W of the full image, or (H, W); the condition has 1/factor of that. `prepare` reduces what is larger
    (in training, the image to be denoised) and takes as it is what has that size already. size: H = W, or (H, W), of
    the denoiser's x, to which the condition is resized: the image's in pixel space (the default), the latents' in a
    latent model. kernel: "bicubic" or "bilinear", both antialiased, or "area"; `blur` is the standard deviation, in
    pixels of the full image, of a Gaussian blur before it. `droppable=False` keeps the image where guidance and
    condition dropout ask for a null condition (a text-guided upscaler's); otherwise null is zeros.

    Noise conditioning augmentation (arXiv 2106.15282, section 4): the small image z becomes alpha z + sigma eps with
    alpha^2 + sigma^2 = 1, so that what an earlier stage gets wrong does no harm. `noise` is sigma when sampling,
    `train_noise` when training: one number, or (low, high) for one a sample, uniform between them; None is `noise`.
    `tell_noise` adds a channel that holds sigma, so that one model serves all levels.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        factor: int,
        *,
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        kernel: str = "bicubic",
        blur: float = 0.0,
        droppable: bool = True,
        noise: float = 0.0,
        train_noise: float | Sequence[float] | None = None,
        tell_noise: bool = False,
        entry: str = "image",
    ) -> None:
        super().__init__()
        if kernel not in ("bicubic", "bilinear", "area"):
            raise ValueError(f"kernel={kernel!r} is unknown; choose 'bicubic', 'bilinear' or 'area'")
        full = _pair(image_size)
        if factor < 1 or any(side % factor for side in full):
            raise ValueError(f"factor={factor} does not divide image_size={full}; choose a divisor of both sides")
        if not 0 <= 3 * blur < min(full) - 1:
            raise ValueError(
                f"blur={blur} is a standard deviation in pixels; choose 0 to a third of the image's side, {min(full)}"
            )
        self.low_size = tuple(side // factor for side in full)
        self.size = full if size is None else _pair(size)
        self.channels, self.kernel, self.blur = channels, kernel, blur
        self.droppable, self.entry = droppable, entry
        self.noise, self.train_noise, self.tell_noise = noise, _range(noise, train_noise), tell_noise
        self.provides = {"concat": channels + tell_noise}
        self.register_buffer("place", torch.empty(0), persistent=False)  # knows the device, as weights would

    def prepare(self, values: Tensor | Sequence[Tensor]) -> Tensor:
        """Images of the low resolution from (B, C, H, W), or a list of (C, H, W), in [-1, 1] and of any size."""
        images = _images(values, self.channels)
        if images.shape[-2:] != self.low_size:
            images = _blurred(images, self.blur) if self.blur else images
            images = _resized(images, self.low_size, self.kernel).clamp(-1, 1)
        return torch.cat([images, torch.zeros_like(images[:, :1])], dim=1) if self.tell_noise else images

    def augmented(self, prepared: Tensor, draws: Draws) -> Tensor:
        low, high = self.train_noise
        if not high:
            return prepared
        level = low + (high - low) * draws.uniform("noise level").view(-1, 1, 1, 1)
        images = prepared[:, : self.channels]
        return self._noised(images, level, draws.normal("noise", images.shape[1:]))

    def corrupted(self, prepared: Tensor, noise: Noise, level: float | None = None) -> Tensor:
        level = self.noise if level is None else level
        if not level:
            return prepared
        images = prepared[:, : self.channels]
        return self._noised(images, images.new_full((len(images), 1, 1, 1), level), noise(images))

    def _noised(self, images: Tensor, level: Tensor, eps: Tensor) -> Tensor:
        level, eps = level.to(images), eps.to(images)
        noisy = q_sample(images, eps, Level((1 - level.square()).sqrt(), level))
        return torch.cat([noisy, level.expand_as(noisy[:, :1])], dim=1) if self.tell_noise else noisy

    def null_like(self, prepared: Tensor) -> Tensor:
        return torch.zeros_like(prepared) if self.droppable else prepared

    def encode(self, prepared: Tensor) -> dict[str, Tensor]:
        return {"concat": _resized(prepared, self.size, "bilinear")}


class JointConditioner(Conditioner):
    """Several conditioners at once. Contexts follow one another; vectors and concatenated channels stand side by side.

    `prepare` takes one value a conditioner, in their order; a dropped sample loses all of them.
    """

    def __init__(self, conditioners: Sequence[Conditioner]) -> None:
        super().__init__()
        if not conditioners:
            raise ValueError("JointConditioner needs at least one conditioner; use conditioner=none for none")
        self.conditioners = nn.ModuleList(conditioners)
        self.num_classes = next((part.num_classes for part in conditioners if part.num_classes), None)
        self.low_size = next((part.low_size for part in conditioners if part.low_size), None)
        self.train_noise = max((part.train_noise for part in conditioners), key=lambda levels: levels[1])
        self.provides = {}
        for part in conditioners:
            for name, width in part.provides.items():
                if name == "context" and self.provides.get(name, width) != width:
                    raise ValueError(
                        f"contexts of {self.provides[name]} and of {width} channels cannot follow one another; "
                        "give the conditioners equal widths"
                    )
                self.provides[name] = width if name == "context" else self.provides.get(name, 0) + width

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry for part in self.conditioners for entry in part.entries))

    def prepare(self, values: Sequence[Any]) -> JointInput:
        if len(values) != len(self.conditioners):
            raise ValueError(f"{len(values)} inputs for {len(self.conditioners)} conditioners; give one each")
        return JointInput(tuple(part.prepare(value) for part, value in zip(self.conditioners, values, strict=True)))

    def prepare_batch(self, batch: Mapping[str, Any]) -> JointInput:
        return JointInput(tuple(part.prepare_batch(batch) for part in self.conditioners))

    def null_like(self, prepared: JointInput) -> JointInput:
        return JointInput(tuple(c.null_like(part) for c, part in zip(self.conditioners, prepared.parts, strict=True)))

    def augmented(self, prepared: JointInput, draws: Draws) -> JointInput:
        pairs = zip(self.conditioners, prepared.parts, strict=True)
        shown = (c.augmented(part, draws.within(f"part {i}")) for i, (c, part) in enumerate(pairs))
        return JointInput(tuple(shown))

    def corrupted(self, prepared: JointInput, noise: Noise, level: float | None = None) -> JointInput:
        pairs = zip(self.conditioners, prepared.parts, strict=True)
        return JointInput(tuple(c.corrupted(part, noise, level) for c, part in pairs))

    def alike(self, one: JointInput, other: JointInput) -> tuple[JointInput, JointInput]:
        return alike_parts(self.conditioners, one, other)

    def forward(self, prepared: JointInput, drop: Tensor | None = None) -> dict[str, Tensor]:
        return _merged([c(part, drop) for c, part in zip(self.conditioners, prepared.parts, strict=True)])

    def encode(self, prepared: JointInput) -> dict[str, Tensor]:
        return self(prepared)


def _merged(conditions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One condition from several; without a mask of its own, a context is looked at entirely."""
    if any("context_mask" in condition for condition in conditions):
        for condition in conditions:
            if "context" in condition and "context_mask" not in condition:
                context = condition["context"]
                condition["context_mask"] = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    names = dict.fromkeys(name for condition in conditions for name in condition)
    return {name: torch.cat([c[name] for c in conditions if name in c], dim=1) for name in names}


def check_noise(name: str, level: float, train_noise: tuple[float, float]) -> None:
    """Raise ValueError for a level of noise on the condition that training does not show."""
    low, high = train_noise
    if not high and level:
        raise ValueError(f"{name}={level}, but this model is trained without noise on its condition; leave it out")
    if not low <= level <= high:
        raise ValueError(f"{name}={level} is outside of the levels {low} to {high} that training shows; choose between")


def _range(noise: float, train_noise: float | Sequence[float] | None) -> tuple[float, float]:
    """The levels (low, high) of training, after checks."""
    given = noise if train_noise is None else train_noise
    low, high = (given, given) if isinstance(given, int | float) else given
    if not 0 <= low <= high <= 1:
        raise ValueError(f"train_noise={given} must be a standard deviation, or two in rising order, from 0 to 1")
    check_noise("noise", noise, (low, high))
    return low, high


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _images(values: Any, channels: int) -> Tensor:
    """Check images (B, channels, H, W) in [-1, 1]; on an accelerator only their shape, which asks for no waiting."""
    if isinstance(values, Sequence) and values and all(isinstance(value, Tensor) for value in values):
        if len(shapes := {tuple(value.shape) for value in values}) > 1:
            raise ValueError(f"images to condition on must have one shape; these have {sorted(shapes)}")
        values = torch.stack(list(values))
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 4:
        raise ValueError(
            f"this model is conditioned on images, a float tensor (B, {channels}, H, W) in [-1, 1], "
            f"but got {shown(values)}"
        )
    if values.shape[1] != channels:
        raise ValueError(f"this model is conditioned on images of {channels} channels, but got {values.shape[1]}")
    if values.device.type == "cpu" and values.numel():
        low, high = values.aminmax()
        if not (low >= -1.01 and high <= 1.01):  # NaN is neither
            raise ValueError(f"images to condition on must be in [-1, 1]; these are from {low:.4g} to {high:.4g}")
    return values


def _resized(images: Tensor, size: tuple[int, int], kernel: str) -> Tensor:
    if images.shape[-2:] == size:
        return images
    if kernel == "area":
        return F.interpolate(images, size, mode="area")
    return F.interpolate(images, size, mode=kernel, align_corners=False, antialias=True)


def _blurred(images: Tensor, std: float) -> Tensor:
    """Gaussian blur, separable, with mirrored borders, to three standard deviations."""
    reach = max(1, round(3 * std))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / std) ** 2).to(images.dtype)
    weights = (weights / weights.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, weights[:, :, None], groups=images.shape[1])
    return F.conv2d(rows, weights[..., None], groups=images.shape[1])
