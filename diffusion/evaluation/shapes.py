"""Does an image of a shape show what its caption asks for? Colours are read off, the shape is matched by templates.

    uv run python -m diffusion.evaluation.shapes checkpoint=FILE      # sample 200 captions and judge them
    uv run python -m diffusion.evaluation.shapes samples=FILE.npz captions=FILE.txt

The judge knows how the data are drawn and nothing of any model. `captions` has one caption a line; without it the
samples are those of the 200. Further settings: see SETTINGS.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.cli import read_words, run_words
from diffusion.data.shapes import BACKGROUNDS, COLOURS, HELD_OUT, SEEN, SHAPES, SIZES
from diffusion.images import to_uint8
from diffusion.randomness import generator

NAMES = tuple(BACKGROUNDS)
PALETTE = np.array(list(BACKGROUNDS.values()), float)
ATTRIBUTES = ("shape", "colour", "background", "size")
LARGE = (SIZES["small"][1] + SIZES["large"][0]) / 2  # the radius that divides small from large, in image widths
MAX_TILT = 0.25  # radians; the data tilt by up to 0.2
SMALLEST_IMAGE = 12  # pixels; below, a small star is a circle
SETTINGS = {
    "checkpoint": None,  # a model trained on captions
    "samples": None,  # or samples.npz of sample.py (arr_0: uint8 NHWC)
    "captions": None,  # of the samples, one a line
    "count": 200,
    "held_out": 40,  # how many of the captions ask for pairs of shape and colour that training never shows
    "seed": 0,  # of the captions and of the samples
    "guidance_scale": 3.0,
    "num_steps": 100,
    "eta": 1.0,  # 0 is DDIM, 1 is DDPM
    "batch_size": 100,
    "grid": None,  # a PNG file for the samples with their captions
}


# ---------------------------------------------------------------------------------------------------------------------
# one image


class Verdict(NamedTuple):
    """What an image shows. Colours are the nearest of the palette, so "white" is possible as a shape's, too.

    `error` is the root mean square difference of the coverage from that of the best template: under 0.01 for drawn
    images, about 0.1 for a blob that is hardly a shape.
    """

    shape: str
    colour: str
    background: str
    size: str
    error: float


class Fit(NamedTuple):
    """A template: its mean square difference, and (x, y, radius, angle) in image widths and radians."""

    error: float
    place: np.ndarray

    @property
    def radius(self) -> float:
        return self.place[2]


def judge(image: np.ndarray | Tensor) -> Verdict:
    """Say what an image shows: uint8 (H, W, 3), or a tensor (3, H, W) in [-1, 1]; square, of 12 pixels or more."""
    pixels = to_pixels(image).astype(float)
    ground, paint, coverage = separate(pixels)
    fits = {shape: match(shape, coverage) for shape in SHAPES}
    shape = min(fits, key=lambda name: fits[name].error)
    size = "small" if fits[shape].radius < LARGE else "large"
    return Verdict(shape, nearest_name(paint), nearest_name(ground), size, math.sqrt(fits[shape].error))


def to_pixels(image: np.ndarray | Tensor) -> np.ndarray:
    """Check an image and return it as uint8 (H, W, 3)."""
    pixels = to_uint8(image[None])[0] if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"the judge takes square RGB images, uint8 (H, W, 3) or a tensor (3, H, W) in [-1, 1]; got "
            f"{tuple(image.shape)} of {image.dtype}"
        )
    if len(pixels) < SMALLEST_IMAGE:
        raise ValueError(f"{len(pixels)} pixels are too few to tell the shapes apart; give at least {SMALLEST_IMAGE}")
    return pixels


def nearest_name(colour: np.ndarray) -> str:
    return NAMES[int(((PALETTE - colour) ** 2).sum(1).argmin())]


def separate(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the colours of ground and shape, and how much of each pixel the shape covers (H, W), in [0, 1].

    The ground is the border's median, which no shape touches; the shape's colour the median of the pixels that are
    furthest from it, all but full cover. The third furthest sets the scale, so that two stray pixels do not.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    paint = np.median(pixels[distance >= 0.8 * np.sort(distance, axis=None)[-3]], axis=0)
    axis = paint - ground
    coverage = (pixels - ground) @ axis / max(axis @ axis, 1e-6)
    return ground, paint, coverage.clip(0, 1)


def match(shape: str, coverage: np.ndarray) -> Fit:
    """The template of this shape that is nearest to the coverage (H, W), by least squares.

    It starts from the coverage's area and centre of mass, at a few radii and tilts, and descends by shrinking steps.
    """
    places = _first_guesses(shape, coverage)
    errors = _errors(shape, places, coverage)
    best, error = places[errors.argmin()], errors.min()
    stride = np.array([0.4, 0.4, 0.4, 0.05 * len(coverage)]) / len(coverage)
    directions = np.concatenate([np.eye(4), -np.eye(4)])
    for _ in range(10):
        places = best + directions * stride
        places[:, 3] = places[:, 3].clip(-MAX_TILT, MAX_TILT)
        errors = _errors(shape, places, coverage)
        if errors.min() < error - 1e-9:
            best, error = places[errors.argmin()], errors.min()
        else:
            stride = stride / 2
    return Fit(float(error), best)


def render(shape: str, places: np.ndarray, image_size: int) -> np.ndarray:
    """The coverage (N, H, W) of templates at `places` (N, 4), with the edges of `diffusion.data.shapes.draw`."""
    x, y, radius, angle = (column[:, None, None] for column in places.T)
    at = (np.arange(image_size) + 0.5) / image_size
    right, down = np.broadcast_arrays(at[None, None, :] - x, at[None, :, None] - y)
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    distance = SHAPES[shape](cos * right + sin * down, cos * down - sin * right) * radius * image_size
    return (0.5 - distance).clip(0, 1)


def _errors(shape: str, places: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    return ((render(shape, places, len(coverage)) - coverage) ** 2).mean((1, 2))


def _first_guesses(shape: str, coverage: np.ndarray) -> np.ndarray:
    """Places (25, 4) that have about the coverage's area and exactly its centre of mass."""
    area, right, down = _moments(shape)
    size = len(coverage)
    at = (np.arange(size) + 0.5) / size
    sure = np.where(coverage > 0.15, coverage, 0)  # a noisy ground would add up
    total = max(sure.sum(), 1e-6)
    radius = np.clip(math.sqrt(total / area) / size, 0.1, 0.6)
    tilts = np.linspace(-0.2, 0.2, 5)
    radius, angle = (axis.ravel() for axis in np.meshgrid(radius * np.array([0.85, 0.93, 1, 1.07, 1.15]), tilts))
    x = sure.sum(0) @ at / total - radius * (np.cos(angle) * right - np.sin(angle) * down)
    y = sure.sum(1) @ at / total - radius * (np.sin(angle) * right + np.cos(angle) * down)
    return np.stack([x, y, radius, angle], axis=1)


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass of a shape of unit radius."""
    at = (np.arange(512) + 0.5) / 128 - 2
    x, y = np.meshgrid(at, at)
    inside = SHAPES[shape](x, y) < 0
    return inside.sum() / 128**2, x[inside].mean(), y[inside].mean()


# ---------------------------------------------------------------------------------------------------------------------
# many images


class Wanted(NamedTuple):
    """What a caption asks for."""

    shape: str
    colour: str
    background: str
    size: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether training never shows this shape in this colour."""
        return (self.shape, self.colour) in HELD_OUT


class Judgement(NamedTuple):
    """A caption's demand beside what its image shows; `agrees` wants shape and both colours right, not the size."""

    wanted: Wanted
    verdict: Verdict

    @property
    def right(self) -> dict[str, bool]:
        return {name: getattr(self.wanted, name) == getattr(self.verdict, name) for name in ATTRIBUTES}

    @property
    def agrees(self) -> bool:
        return all(self.right[name] for name in ("shape", "colour", "background"))


def read_caption(caption: str) -> Wanted:
    """Read "a small red star on a blue background"; ValueError for any other form or word."""
    words = caption.split()
    if len(words) == 8 and [words[i] for i in (0, 4, 5, 7)] == ["a", "on", "a", "background"]:
        wanted = Wanted(shape=words[3], colour=words[2], background=words[6], size=words[1])
        known = zip(wanted, (SHAPES, COLOURS, BACKGROUNDS, SIZES), strict=True)
        if all(word in among for word, among in known):
            return wanted
    raise ValueError(
        f"cannot judge {caption!r}: captions read 'a SIZE COLOUR SHAPE on a BACKGROUND background' with the sizes "
        f"{', '.join(SIZES)}; colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; backgrounds {', '.join(NAMES)}"
    )


def evaluation_captions(seed: int = 0, count: int = 200, held_out: int = 40) -> list[str]:
    """`count` different captions in random order, `held_out` of them pairs of shape and colour unseen in training."""
    chosen: list[str] = []
    for pairs, number in ((SEEN, count - held_out), (HELD_OUT, held_out)):
        every = [
            Wanted(shape, colour, ground, size).caption
            for shape, colour in pairs
            for ground in BACKGROUNDS
            for size in SIZES
            if ground != colour
        ]
        if not 0 <= number <= len(every):
            raise ValueError(f"{number} of {len(every)} captions were asked for; choose count and held_out to fit")
        order = torch.randperm(len(every), generator=generator(seed, "captions", len(pairs)))
        chosen += [every[i] for i in order[:number]]
    return [chosen[i] for i in torch.randperm(count, generator=generator(seed, "captions"))]


def judgements(images: Iterable[np.ndarray | Tensor], captions: Sequence[str]) -> list[Judgement]:
    """Judge every image beside its caption."""
    images = list(images)
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images, but {len(captions)} captions; each image needs its own")
    return [Judgement(read_caption(text), judge(image)) for text, image in zip(captions, images, strict=True)]


def rates(judged: Sequence[Judgement]) -> dict[str, dict[str, float]]:
    """Of "all", "seen" and "held-out" captions: their count, the share that agrees, each attribute's, the mean error.

    Groups without a caption are left out.
    """
    groups = {
        "all": judged,
        "seen": [one for one in judged if not one.wanted.held_out],
        "held-out": [one for one in judged if one.wanted.held_out],
    }
    return {name: _shares(group) for name, group in groups.items() if group}


def _shares(group: Sequence[Judgement]) -> dict[str, float]:
    right = {name: float(np.mean([one.right[name] for one in group])) for name in ATTRIBUTES}
    error = float(np.mean([one.verdict.error for one in group]))
    return {"count": len(group), "agrees": float(np.mean([one.agrees for one in group])), **right, "error": error}


def agreement(images: Iterable[np.ndarray | Tensor], captions: Sequence[str]) -> dict[str, dict[str, float]]:
    """The rates (see `rates`) at which images show what their captions ask for."""
    return rates(judgements(images, captions))


def report(judged: Sequence[Judgement]) -> str:
    """The rates as a table, then every image that does not agree."""
    table = rates(judged)
    columns = ("agrees", *ATTRIBUTES)
    lines = [f"{'':9}{'count':>6}" + "".join(f"{name:>12}" for name in columns) + f"{'error':>9}"]
    for name, row in table.items():
        shares = "".join(f"{100 * row[column]:10.1f} %" for column in columns)
        lines.append(f"{name:9}{row['count']:6}{shares}{row['error']:9.3f}")
    wrong = [(number, one) for number, one in enumerate(judged) if not one.agrees]
    lines += ["", f"{len(wrong)} do not agree" + (":" if wrong else "")]
    for number, (wanted, verdict) in wrong:
        shown = Wanted(*verdict[:4]).caption
        lines.append(f"  {number:4} {wanted.caption}{' (held out)' if wanted.held_out else ''}: shows {shown}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# the command


def draw_samples(settings: Mapping[str, Any], captions: Sequence[str]) -> np.ndarray:
    """Sample a checkpoint's answer to each caption, uint8 (N, H, W, 3); sample i depends on seed + i alone."""
    from diffusion.checkpoint import load_model
    from diffusion.generate import batches
    from diffusion.guidance import ClassifierFreeGuidance
    from diffusion.sampling import Sampler

    model = load_model(settings["checkpoint"])
    if model.conditioner is None or "caption" not in model.conditioner.entries:
        raise ValueError(f"{settings['checkpoint']} was not trained on captions; the judge samples text models only")
    drawn = batches(
        model.net,
        model.diffusion,
        Sampler(num_steps=settings["num_steps"], eta=settings["eta"]),
        ClassifierFreeGuidance(settings["guidance_scale"]),
        num_samples=len(captions),
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        inputs={"caption": list(captions)},
        conditioner=model.conditioner,
        autoencoder=model.autoencoder,
        shape=model.facts["shape"],
        pad_to=16,
    )
    return np.concatenate([to_uint8(batch.images) for batch in drawn])


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `name=value` words into SETTINGS; ValueError for what is not one of them, or does not go together."""
    settings = read_words(list(arguments), SETTINGS)
    if (settings["checkpoint"] is None) == (settings["samples"] is None):
        raise ValueError("give either checkpoint=FILE to sample from or samples=FILE.npz to judge")
    if settings["captions"] is not None and settings["samples"] is None:
        raise ValueError(
            "captions=FILE belongs to samples=FILE.npz; a checkpoint is asked for the judge's own captions"
        )
    return settings


def main(arguments: Sequence[str]) -> None:
    """Judge samples, drawn or given, as the `name=value` words say, and print the report."""
    settings = read_settings(arguments)
    captions = evaluation_captions(settings["seed"], settings["count"], settings["held_out"])
    if settings["captions"] is not None:
        captions = Path(settings["captions"]).read_text(encoding="utf-8").split("\n")
        captions = [caption for caption in captions if caption.strip()]
    if settings["samples"] is None:
        images = draw_samples(settings, captions)
    else:
        images = np.load(settings["samples"])["arr_0"]
    print(report(judgements(images, captions)))
    if settings["grid"] is not None:
        from diffusion.images import grid, save_png

        save_png(grid(images, 10, captions=captions), settings["grid"])


if __name__ == "__main__":
    run_words(main, __doc__)
