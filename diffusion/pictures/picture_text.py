"""Which texts are in a picture, and what do we write into ours for the readers of A1111's?

Nothing here imports torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.pictures import parameters
from diffusion.pictures.parameters import SHORT_HASH, Parameters, number_text
from diffusion.sampler_list import a1111_name

TEXT_KEY = "diffusion"  # the PNG text entry that holds the JSON of how an image was made
FROM = "from"  # the setting that names a picture; of the words that it stands for, the last one
GROUPS = ("sampler", "guidance")
PICTURES = ("condition_image", "image", "mask")
FILES = ("autoencoder", "vae", "text_encoder", "tokenizer", *PICTURES)
# The settings of configs/sample.yaml that a sample depends on, besides GROUPS and its own seed and label.
SETTINGS = (
    *("prompt", "negative_prompt", "condition_noise", "height", "width", "strength", "paste", "image_guidance_scale"),
    *("parameterization", "clip_skip", "long_prompt", "emphasis", "original_size", "crop", "offload"),
    *("dtype", "pad_to", "tile", *FILES),
)
USER_COMMENT, EXIF = 0x9286, 0x8769  # where A1111 writes its text into JPEG and WebP
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def picture_texts(path: Path) -> dict[str, str]:
    """Return the texts in a picture, by name; of JPEG and WebP the one where A1111 keeps its parameters.

    Raises ValueError for a file that is no picture.
    """
    try:
        with Image.open(path) as picture:
            picture.load()  # texts may follow the pixels
            found = {key: str(value) for key, value in getattr(picture, "text", {}).items()}
            comment = picture.getexif().get_ifd(EXIF).get(USER_COMMENT)
    except FileNotFoundError:
        raise ValueError(f"from={path} does not exist") from None
    except UNREADABLE as error:
        raise ValueError(f"from={path} cannot be read as a picture ({error})") from error
    if comment and not found:
        found[parameters.KEY] = comment if isinstance(comment, str) else _decoded(comment)
    return found


def _decoded(comment: bytes) -> str:
    """Decode EXIF's UserComment: eight bytes name the encoding. A1111 writes UTF-16, the high byte first."""
    code, body = comment[:8], comment[8:]
    if code.startswith(b"UNICODE"):
        low_byte_first = body[1::2].count(0) > body[::2].count(0)
        return body.decode("utf-16-le" if low_byte_first else "utf-16-be", errors="replace")
    return (body if code.startswith((b"ASCII", b"\0")) else comment).decode("utf-8", errors="replace")


def parameters_of(made: Mapping[str, Any], size: tuple[int, int]) -> Parameters:
    """Return what A1111 would say of a picture of ours, from the JSON of how it was made and its (height, width).

    Samplers have A1111's name where A1111 has them. What it has no field for is in the JSON alone.
    """
    sampler, guidance = made["sampler"], made["guidance"]
    name, schedule = a1111_name(sampler)
    fields = {
        "Steps": sampler.get("num_steps"),
        "Sampler": name,
        "Schedule type": schedule,
        "CFG scale": number_text(guidance.get("guidance_scale", 1)),
        "Image CFG scale": made.get("image_guidance_scale"),
        "Seed": made["seed"],
        "Size": f"{size[1]}x{size[0]}",
        "Model hash": made["checkpoint_sha256"][:SHORT_HASH],
        "Model": Path(made["checkpoint"]).stem,
        "VAE hash": (made.get("vae_sha256") or "")[:SHORT_HASH] or None,
        "VAE": Path(made["vae"]).name if made.get("vae") else None,
        "Denoising strength": made.get("strength"),
        "Clip skip": made.get("clip_skip"),
        "Eta": number_text(sampler["eta"]) if sampler.get("eta") else None,
        "Class": made.get("label"),
        "Version": f"diffusion {made['package_version']}",
    }
    shown = {name: str(value) for name, value in fields.items() if value is not None}
    return Parameters(made.get("prompt") or "", made.get("negative_prompt") or "", shown)
