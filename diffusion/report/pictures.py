"""Which pictures does a page carry, so that runs can be compared by eye and the file stays small?

The last picture of every run comes first; earlier steps follow while there is room.
"""

import base64
import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

from diffusion.report.runs import Picture, Run

ROOM = 5_000_000  # bytes of all pictures
LARGEST = 600_000  # bytes of one
STEPS = 8  # that a reader can go through
KINDS = ("ema", "grid", "raw")  # in the order in which they are worth showing


class Shown(NamedTuple):
    """A picture as a page holds it; `width` is the original's."""

    uri: str
    width: int
    scaled: bool


def shown_pictures(runs: Sequence[Run], room: int = ROOM) -> dict[str, Any]:
    """Return {"kinds": [{"name", "last": {run: [uri, step]}, "steps": {step: {run: uri}}}], "scaled", "left_out"}."""
    kinds = {picture.kind for run in runs for picture in run.pictures}
    kinds = sorted(kinds, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind))
    found: dict[str, Any] = {"kinds": [], "scaled": False, "left_out": 0}
    for number, kind in enumerate(kinds):
        own = [[picture for picture in run.pictures if picture.kind == kind] for run in runs]
        lasts = {i: pictures[-1] for i, pictures in enumerate(own) if pictures}
        share = room * (0.7 if number == 0 else 0.5)
        last, used, scaled = _embedded(lasts, share)
        room -= used
        steps: dict[int, dict[int, str]] = {}
        for step in _earlier(own):
            here = {i: p for i, pictures in enumerate(own) for p in pictures[:-1] if p.step == step}
            at_step, used, more = _embedded(here, room, whole=True)
            if here and not at_step:
                found["left_out"] += 1
                continue
            room -= used
            scaled |= more
            steps[step] = {i: one.uri for i, one in at_step.items()}
        entry = {i: [one.uri, lasts[i].step, one.width] for i, one in last.items()}
        if entry:
            found["kinds"].append({"name": kind, "last": entry, "steps": steps})
        found["scaled"] |= scaled
    return found


def _earlier(own: Sequence[Sequence[Picture]]) -> list[int]:
    """Return steps at which pictures were drawn, evenly spaced and the latest first."""
    steps = sorted({picture.step for pictures in own for picture in pictures if picture.step is not None})
    if len(steps) > STEPS:
        steps = [steps[round(i * (len(steps) - 1) / (STEPS - 1))] for i in range(STEPS)]
    return steps[::-1] if len(steps) > 1 else []


def _embedded(pictures: dict[int, Picture], room: float, *, whole: bool = False) -> tuple[dict[int, Shown], int, bool]:
    """Embed pictures with equal shares of the room; `whole`: none at all where their files do not fit as they are."""
    if not pictures:
        return {}, 0, False
    if whole and sum(picture.path.stat().st_size for picture in pictures.values()) * 4 / 3 > room:
        return {}, 0, False
    share = int(min(LARGEST, room / len(pictures) * 3 / 4))
    found = {i: one for i, picture in pictures.items() if (one := embed(picture, share)) is not None}
    return found, sum(len(one.uri) for one in found.values()), any(one.scaled for one in found.values())


def embed(picture: Picture, most: int) -> Shown | None:
    """Return a picture as a data URI of at most about `most` bytes, scaled down as needed; None for a damaged file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            raw = picture.path.read_bytes()
            image = Image.open(io.BytesIO(raw))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    width, kind = image.width, "png"
    if len(raw) > most:
        image, raw, kind = image.convert("RGB"), _webp(image.convert("RGB")), "webp"
        while len(raw) > most and min(image.size) > 16:
            factor = max(0.3, min(0.9, (most / len(raw)) ** 0.5))
            size = (max(1, int(image.width * factor)), max(1, int(image.height * factor)))
            image = image.resize(size, Image.Resampling.LANCZOS)
            raw = _webp(image)
    uri = f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"
    return Shown(uri, width, image.width < width)


def _webp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85, method=4)
    return file.getvalue()
