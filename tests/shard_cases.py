"""Small tar shards, whole and broken, and folders that become some: what the tests of shards share."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data.packing import pack
from diffusion.data.shards import Shards

PACKED = {"shard_size": 10, "image_size": 0, "channels": 3, "shuffle": True, "max_broken": 100}


def png(value: int, *, size: tuple[int, int] = (6, 6)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 0)).save(buffer, "png")
    return buffer.getvalue()


def jpeg(seed: int) -> bytes:
    """A picture that is broken when it is cut short."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """Write samples {key: {extension: bytes}} as GNU tar does: with headers and nothing of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples.items():
            for extension, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def shards_of(folder: Path, number: int, *, a_shard: int = 10) -> list[Path]:
    """Write `number` pictures of different colours, with their number as caption and number % 3 as label."""
    return [
        write_tar(
            folder / f"{shard:03d}.tar",
            {
                f"s{n:04d}": {"png": png(n), "txt": f"picture {n}".encode(), "cls": str(n % 3).encode()}
                for n in range(begin, min(begin + a_shard, number))
            },
        )
        for shard, begin in enumerate(range(0, number, a_shard))
    ]


def image_folder(root: Path, *, captions: bool = False, a_class: int = 12) -> Path:
    """Two class folders of coloured pictures, and captions in a metadata.jsonl where there are to be some."""
    lines = []
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(a_class):
            (root / name / f"{i}.v1.png").write_bytes(png(100 * number + i, size=(8, 6)))
            lines.append(json.dumps({"file_name": f"{name}/{i}.v1.png", "caption": f"{name} {i}"}))
    if captions:
        (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def packed(root: Path, out: Path, **settings: Any) -> Path:
    pack(root, out, PACKED | settings)
    return out


def data_of(shards: Any, **settings: Any) -> Shards:
    return Shards(
        shards if isinstance(shards, list) else str(shards), **({"image_size": 6, "batch_size": 4} | settings)
    )


def colours(batch: Mapping[str, Any]) -> list[int]:
    """Which pictures a batch shows."""
    red, green = (((batch["image"][:, channel, 0, 0] + 1) * 127.5).round().long() for channel in (0, 1))
    return (red + 256 * green).tolist()
