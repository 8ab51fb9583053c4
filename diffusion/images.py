"""How do tensors become pictures that people can look at and tools can read?

The one place where [-1, 1] becomes 0..255, and where grids, PNG files with their history, and samples.npz are written.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion.checkpoint import atomic_write

TEXT_KEY = "diffusion"  # the PNG text entry that holds the JSON of how an image was made
GAP = 2  # pixels between the cells of a grid
STRIP = 16  # pixels for a row of captions
PAPER, INK = (255, 255, 255), (40, 40, 40)


def to_uint8(images: Tensor) -> np.ndarray:
    """Turn (B, C, H, W) in [-1, 1] into uint8 (B, H, W, C): -1 is 0, 1 is 255, clamped and rounded to the nearest.

    Rounding makes this the exact inverse of v / 127.5 - 1 (guided-diffusion truncates, which can lose one level).
    """
    levels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return levels.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(image: np.ndarray) -> Image.Image:
    """Turn uint8 (H, W, C) with one channel (grey) or three (RGB) into a PIL image."""
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"pictures have 1 (grey) or 3 (RGB) channels, this image has {image.shape[-1]}")
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(
    images: np.ndarray, columns: int | None = None, scale: int | None = None, *, captions: Sequence[str] | None = None
) -> Image.Image:
    """Lay uint8 (N, H, W, C) out in rows. Small images are enlarged by whole pixels, so that 8x8 digits show.

    `columns` None makes a square, `scale` None makes cells of about 64 pixels; captions get a strip of text.
    """
    count, height, width, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    scale = scale or max(1, 64 // max(height, width))
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    strips = [STRIP if captions and any(captions[i] for i in row) else 0 for row in rows]
    cell_width, cell_height = width * scale + GAP, height * scale + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, sum(strips) + len(rows) * cell_height + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    y = GAP
    for row, strip in zip(rows, strips, strict=True):
        for place, i in enumerate(row):
            x = GAP + place * cell_width
            if strip:
                draw.text((x, y), _fitted(captions[i], font, cell_width - GAP), fill=INK, font=font)
            cell = to_pil(images[i]).convert("RGB").resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(cell, (x, y + strip))
        y += strip + cell_height
    return sheet


def _fitted(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """Cut a caption that is wider than its cell."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text


def label_layout(
    labels: Sequence[int] | None, class_names: Sequence[str] | None
) -> tuple[int | None, list[str] | None]:
    """Return (columns, captions) for `grid`: a column a class where few labels take turns, else a caption an image."""
    if labels is None:
        return None, None
    names = [class_names[label] if class_names else str(label) for label in labels]
    period = next(p for p in range(1, len(labels) + 1) if all(labels[i] == labels[i % p] for i in range(len(labels))))
    if 1 < period <= 16 and period * 2 <= len(labels):
        return period, [name if i < period else "" for i, name in enumerate(names)]
    return None, names


def save_png(image: np.ndarray | Image.Image, path: str | Path, text: dict[str, Any] | None = None) -> None:
    """Write a PNG; `text` is stored in it as JSON under the key "diffusion" (`read_text` reads it back)."""
    info = PngInfo()
    if text is not None:
        info.add_text(TEXT_KEY, json.dumps(text))
    picture = to_pil(image) if isinstance(image, np.ndarray) else image
    with atomic_write(path, durable=False) as partial:
        picture.save(partial, format="PNG", pnginfo=info)


def read_text(path: str | Path) -> dict[str, Any]:
    """Return how a PNG of ours was made. Raises ValueError for a picture that does not say."""
    with Image.open(path) as picture:
        stored = getattr(picture, "text", {}).get(TEXT_KEY)
    if stored is None:
        raise ValueError(f"{os.fspath(path)} does not say how it was made: it has no PNG text named {TEXT_KEY!r}")
    return json.loads(stored)


def save_npz(path: str | Path, images: np.ndarray, labels: Sequence[int] | None = None) -> None:
    """Write guided-diffusion's sample format: arr_0 uint8 (N, H, W, C), arr_1 int64 (N,) where there are labels."""
    arrays = [images] if labels is None else [images, np.asarray(labels, dtype=np.int64)]
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(file, *arrays)
