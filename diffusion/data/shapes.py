"""Coloured shapes on coloured grounds: data without a file, at any number and resolution, whose truth is known.

Each image is a function of (seed, split, index) alone. Some combinations of shape and colour never occur in training,
so that one can measure whether a model composes what it has only seen apart.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.data.base import ImageData
from diffusion.data.images import ImageSet
from diffusion.randomness import fold

# Far apart, so that the nearest of these names a sample's colour: no two, grounds included, are closer than 130 in RGB.
COLOURS = {
    "red": (220, 50, 47),
    "yellow": (247, 201, 46),
    "green": (56, 158, 72),
    "cyan": (84, 212, 222),
    "blue": (45, 83, 196),
    "purple": (176, 66, 190),
}
BACKGROUNDS = {**COLOURS, "white": (245, 245, 240), "black": (28, 28, 34)}
SIZES = {"small": (0.20, 0.26), "large": (0.34, 0.40)}  # the radius's range, in image widths


# Signed distances (negative inside) from points (x, y) to a shape of about unit radius, y downwards.


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.74) - 0.26


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return box(x, y, 0.84, 0.84)


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(box(x, y, 1.0, 0.32), box(x, y, 0.32, 1.0))


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return polygon(x, y, [(1.12 * math.sin(a), 0.14 - 1.12 * math.cos(a)) for a in (0, math.tau / 3, 2 * math.tau / 3)])


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radii = (1.1, 0.48) * 5
    points = [(r * math.sin(k * math.pi / 5), 0.04 - r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    return polygon(x, y, points)


def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    right, below = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(right.clip(0), below.clip(0)) + np.maximum(right, below).clip(max=0)


def polygon(x: np.ndarray, y: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
    """Distance to the nearest edge, negative where a ray crosses the outline an odd number of times."""
    nearest, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        along = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)
        along = along.clip(0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
        if ay != by:
            inside ^= ((y < ay) != (y < by)) & (x < ax + (y - ay) / (by - ay) * (bx - ax))
    return np.where(inside, -nearest, nearest)


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "ring": ring,
}
COMBINATIONS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
# One of each shape and of each colour: all 12 words occur in training, these six pairs of them do not.
HELD_OUT = (
    ("circle", "purple"),
    ("square", "cyan"),
    ("triangle", "red"),
    ("star", "blue"),
    ("cross", "yellow"),
    ("ring", "green"),
)
SEEN = tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT)
LABELS = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "shape_colour": tuple(f"{colour} {shape}" for shape, colour in COMBINATIONS),
}
SPLITS = ("train", "validation", "held_out")
KEPT_BYTES = 2**28  # of drawn images, a dataset


class Scene(NamedTuple):
    """What one image shows; positions and radius in image widths, angle in radians."""

    shape: str
    colour: str
    size: str
    background: str
    x: float
    y: float
    radius: float
    angle: float

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    def class_name(self, label: str) -> str:
        return {"shape": self.shape, "colour": self.colour, "shape_colour": f"{self.colour} {self.shape}"}[label]


def scene(seed: int, split: str, index: int) -> Scene:
    """Draw the scene of one sample: all choices uniform and independent, the background never of the shape's colour."""

    def choose(what: str, among: Sequence[Any]) -> Any:
        return among[fold(seed, "shapes", split, index, what) % len(among)]

    def uniform(what: str, low: float, high: float) -> float:
        return low + (high - low) * fold(seed, "shapes", split, index, what) / 2**63

    shape, colour = choose("pair", HELD_OUT if split == "held_out" else SEEN)
    size = choose("size", tuple(SIZES))
    background = choose("background", [name for name in BACKGROUNDS if name != colour])
    radius = uniform("radius", *SIZES[size])
    margin = 1.12 * radius + 0.02  # the furthest corner of any shape, and a little air
    x, y = uniform("x", margin, 1 - margin), uniform("y", margin, 1 - margin)
    return Scene(shape, colour, size, background, x, y, radius, uniform("angle", -0.2, 0.2))


def draw(what: Scene, image_size: int) -> np.ndarray:
    """Render a scene as (3, image_size, image_size) uint8; edges are one pixel's width of the signed distance."""
    at = (np.arange(image_size) + 0.5) / image_size
    right, down = np.meshgrid(at - what.x, at - what.y)
    cos, sin = math.cos(what.angle) / what.radius, math.sin(what.angle) / what.radius
    distance = SHAPES[what.shape](cos * right + sin * down, cos * down - sin * right) * what.radius * image_size
    coverage = (0.5 - distance).clip(0, 1)
    inside, outside = (
        np.array(table, float)[:, None, None] for table in (COLOURS[what.colour], BACKGROUNDS[what.background])
    )
    return np.rint(outside + coverage * (inside - outside)).astype(np.uint8)


class ShapeImages(ImageSet):
    """`num_samples` images of one split ("train", "validation" or "held_out"), drawn when they are first asked for."""

    def __init__(
        self, num_samples: int, image_size: int, *, split: str = "train", label: str = "shape", seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        if label not in LABELS:
            raise ValueError(f"data.label is {label!r}; choose one of {', '.join(LABELS)}")
        self.num_samples, self.image_size, self.split, self.label = num_samples, image_size, split, label
        self._drawn: dict[int, tuple[np.ndarray, int, str]] = {}

    def __len__(self) -> int:
        return self.num_samples

    def scene(self, index: int) -> Scene:
        return scene(self.seed, self.split, index)

    def load(self, indices: Sequence[int]) -> dict[str, Any]:
        """Draw images (B, 3, H, W) uint8 with their labels and captions."""
        images, labels, captions = zip(*map(self._sample, indices), strict=True)
        return {"image": torch.from_numpy(np.stack(images)), "label": torch.tensor(labels), "caption": list(captions)}

    def _sample(self, index: int) -> tuple[np.ndarray, int, str]:
        """Image, label and caption; drawing costs more than a small network's layer, so what fits in memory is kept."""
        if index in self._drawn:
            return self._drawn[index]
        what = self.scene(index)
        label = LABELS[self.label].index(what.class_name(self.label))
        sample = draw(what, self.image_size), label, what.caption
        if len(self._drawn) * sample[0].nbytes < KEPT_BYTES:
            self._drawn[index] = sample
        return sample

    def description(self) -> dict[str, Any]:
        return super().description() | {"split": self.split, "label": self.label, "seed": self.seed}


class Shapes(ImageData):
    """Shape (6) x colour (6) x size (2) x background (7 of 8), with position, radius and tilt drawn besides.

    `label` names the class: "shape", "colour" or "shape_colour" (36 classes, the held-out ones included: their labels
    keep their numbers, training never shows them). `num_classes=None` means what `label` has. `held_out` lists the
    (shape, colour) pairs that train and validation lack; `dataset("held_out", n)` draws from those only.
    """

    held_out = HELD_OUT

    def __init__(
        self,
        *,
        channels: int = 3,
        image_size: int = 32,
        num_classes: int | None = None,
        label: str = "shape",
        num_train: int = 20_000,
        num_val: int = 1_000,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        if label not in LABELS:
            raise ValueError(f"data.label is {label!r}; choose one of {', '.join(LABELS)}")
        names = LABELS[label]
        if num_classes not in (None, len(names)):
            raise ValueError(f"data.num_classes is {num_classes}, but data.label={label} has {len(names)} classes")
        if channels != 3:
            raise ValueError(f"data.channels is {channels}, but the shapes are coloured; set data.channels=3")
        for name, value in (("num_train", num_train), ("num_val", num_val)):
            if value < 1:
                raise ValueError(f"data.{name} is {value}; it must be at least 1")
        super().__init__(
            channels=channels,
            image_size=image_size,
            num_classes=len(names),
            class_names=names,
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        self.label, self.num_train, self.num_val = label, num_train, num_val

    def dataset(self, split: str, num_samples: int) -> ShapeImages:
        """Return the first `num_samples` images of "train", "validation" or "held_out"."""
        return ShapeImages(num_samples, self.image_size, split=split, label=self.label, seed=self.seed)

    def setup(self, stage: str | None = None) -> None:
        """Make both sets; nothing is drawn yet."""
        self.train_set = self.dataset("train", self.num_train)
        self.val_set = self.dataset("validation", self.num_val)
