"""How do tensors become pictures that people can look at and tools can read?

The one place where [-1, 1] becomes 0..255, and where grids, PNG files with their history, and samples.npz are written.
"""

import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion.files import atomic_write
from diffusion.pictures import parameters
from diffusion.pictures.picture_text import TEXT_KEY

GAP = 2  # pixels between the cells of a grid
LINE = 14  # pixels for a line of captions
LINES = 4  # at most, in one caption
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

    `columns` None makes a square, `scale` None makes cells of about 64 pixels, or 128 where a caption is a sentence.
    A caption is broken into lines, over its own cell and the ones after it whose captions are empty.
    """
    count, height, width, _ = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    sentences = any(len(caption) > 20 for caption in captions or ())
    scale = scale or max(1, (128 if sentences else 64) // max(height, width))
    cell_width, cell_height = width * scale + GAP, height * scale + GAP
    font = ImageFont.load_default(size=11)
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    texts = [_broken(row, captions, font, cell_width) for row in rows]
    strips = [2 + LINE * max((len(lines) for lines in row.values()), default=0) if row else 0 for row in texts]
    sheet = Image.new("RGB", (columns * cell_width + GAP, sum(strips) + len(rows) * cell_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = GAP
    for row, strip, text in zip(rows, strips, texts, strict=True):
        for place, i in enumerate(row):
            x = GAP + place * cell_width
            for number, line in enumerate(text.get(i, ())):
                draw.text((x, y + number * LINE), line, fill=INK, font=font)
            cell = to_pil(images[i]).convert("RGB").resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(cell, (x, y + strip))
        y += strip + cell_height
    return sheet


def _broken(
    row: range, captions: Sequence[str] | None, font: ImageFont.ImageFont, cell_width: int
) -> dict[int, list[str]]:
    """Return the lines of each caption in a row, by the number of its image; {} for a row without any."""
    named = [i for i in row if captions and captions[i]]
    return {
        i: _lines(captions[i], font, (end - i) * cell_width - GAP)
        for i, end in zip(named, [*named[1:], row.stop], strict=False)
    }


def _lines(text: str, font: ImageFont.ImageFont, width: int) -> list[str]:
    """Break a text into at most `LINES` lines at spaces, and cut what is still too wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fitted(line, font, width) for line in lines[:LINES]]


def _fitted(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """Cut a line that is wider than its cell."""
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


def save_png(
    image: np.ndarray | Image.Image, path: str | Path, text: dict[str, Any] | None = None, *, also: str | None = None
) -> None:
    """Write a PNG; `text` is stored in it as JSON under the key "diffusion" (`read_text` reads it back).

    `also` is a text for others to read: what A1111 would say, under the key "parameters".
    """
    info = PngInfo()
    if also is not None:
        info.add_text(parameters.KEY, also)
    if text is not None:
        info.add_text(TEXT_KEY, strict_json(text))
    picture = to_pil(image) if isinstance(image, np.ndarray) else image
    with atomic_write(path, durable=False) as partial:
        picture.save(partial, format="PNG", pnginfo=info)


def strict_json(content: Any) -> str:
    """Return JSON with infinity as 1e999, which every reader takes for it; Python's own `Infinity` is no JSON."""
    mark = "\0inf"

    def marked(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: marked(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [marked(child) for child in node]
        return mark if node == math.inf else node

    return json.dumps(marked(content)).replace(json.dumps(mark), "1e999")


def read_text(path: str | Path) -> dict[str, Any]:
    """Return how a PNG of ours was made. Raises ValueError for a picture that does not say."""
    with Image.open(path) as picture:
        stored = getattr(picture, "text", {}).get(TEXT_KEY)
    if stored is None:
        raise ValueError(f"{os.fspath(path)} does not say how it was made: it has no PNG text named {TEXT_KEY!r}")
    return json.loads(stored)


def save_npz(
    path: str | Path,
    images: np.ndarray | Iterable[np.ndarray],
    labels: Sequence[int] | None = None,
    *,
    count: int | None = None,
) -> None:
    """Write guided-diffusion's sample format: arr_0 uint8 (N, H, W, C), arr_1 int64 (N,) where there are labels.

    The images may come block by block, so that one block at a time is in memory; `count` then says how many will come.
    The bytes are those of `np.savez`.
    """
    blocks = [images] if isinstance(images, np.ndarray) else images
    count = len(images) if count is None else count
    with atomic_write(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            written = 0
            for block in blocks:
                if not written:
                    header = {"descr": block.dtype.str, "fortran_order": False, "shape": (count, *block.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(block).data)
                written += len(block)
        if written != count:
            raise ValueError(f"{count} images were announced for {path}, and {written} came")
        if labels is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
