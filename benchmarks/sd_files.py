"""Which files do the benchmarks of Stable Diffusion read? Full-size ones with random weights, made once, and tiny ones.

`single_file` is a checkpoint in CompVis layout in float16, named tensor by tensor as the published ones are;
`configs` the folder without weights that diffusers' `from_single_file` takes its settings from.
"""

import functools
import json
import math
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # the tiny models, the schedulers' configs and CLIP's tokenizer

import golden_cases  # noqa: E402
import sd_cases  # noqa: E402

LISTS = {"sd1": "sd15_checkpoint", "sdxl-base": "sdxl_base_checkpoint"}
WEIGHTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
CROSS, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
CLIP_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "quick_gelu"}
BIG_G = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
UNET_1 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (CROSS, CROSS, CROSS, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
UNET_XL = {
    **sd_cases.UNET_XL,
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    "sample_size": 128,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXTS = {
    "sd1": {"": (CLIP_L, sd_cases.END)},
    "sdxl-base": {"": (CLIP_L, sd_cases.END), "_2": (BIG_G, sd_cases.ZERO)},
}


def full_size(name: str) -> sd_cases.Kind:
    """The published model that the tiny one of this name is modelled on, as diffusers builds it."""
    tiny = sd_cases.KINDS[name]
    return replace(tiny, unet={"sd1": UNET_1, "sdxl-base": UNET_XL}[name], texts=TEXTS[name], vae={**VAE, **tiny.vae})


def single_file(folder: Path, name: str = "sd1", size: str = "full") -> Path:
    """A float16 safetensors file in CompVis layout with random weights; made if the folder does not hold it yet."""
    path = folder / f"{name}_{size}_float16.safetensors"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if size == "full":
        print(f"writing {path}", file=sys.stderr, flush=True)
        write_random(path, {key: tuple(value[:-1]) for key, value in golden_cases.key_list(LISTS[name]).items()})
        return path
    from diffusion.conversion.convert import convert

    convert(sd_cases.folder(name), path, layout="compvis", dtype="float16")
    return path


def configs(folder: Path, name: str = "sd1", size: str = "full") -> Path:
    """A folder in diffusers' layout, without weights; made if it is not there yet."""
    path = folder / f"{name}_{size}_configs"
    if size != "full":
        return sd_cases.folder(name)
    if not (path / "model_index.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        write_configs(path, full_size(name))
    return path


def write_configs(path: Path, kind: sd_cases.Kind) -> None:
    """What `save_pretrained` writes beside the weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig

    index = {"_class_name": kind.pipeline, "_diffusers_version": "0.36.0"}
    index |= {name: value if isinstance(value, bool) else [None, None] for name, value in kind.extra.items()}
    parts = {"unet": (UNet2DConditionModel, kind.unet), "vae": (AutoencoderKL, kind.vae)}
    for name, (model, config) in parts.items():
        with torch.device("meta"):
            model(**config).save_config(path / name)
        index[name] = ["diffusers", model.__name__]
    for end, (config, pad) in kind.texts.items():
        model = "CLIPTextModelWithProjection" if "projection_dim" in config else "CLIPTextModel"
        settings = {"intermediate_size": 4 * config["hidden_size"], "architectures": [model], "eos_token_id": 49407}
        CLIPTextConfig(**settings, **config).save_pretrained(path / f"text_encoder{end}")
        sd_cases.tokenizer(pad).save_pretrained(path / f"tokenizer{end}")
        index |= {f"text_encoder{end}": ["transformers", model], f"tokenizer{end}": ["transformers", "CLIPTokenizer"]}
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(kind.scheduler))
    index["scheduler"] = ["diffusers", kind.scheduler["_class_name"]]
    (path / "model_index.json").write_text(json.dumps(index, indent=2))


def write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float16 weights that neither explode nor vanish, written tensor by tensor."""
    shapes = {name: shape for name, shape in shapes.items() if name.startswith(WEIGHTS)}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * (8 if name.endswith("position_ids") else 2)
        kind = "I64" if name.endswith("position_ids") else "F16"
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            write_tensor(file, name, shape)
    part.rename(path)


def write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...]) -> None:
    """Normal weights that keep the size of what flows through, one row of draws over and over; norms 1, biases 0."""
    if name.endswith("position_ids"):
        file.write(torch.arange(shape[-1]).numpy().tobytes())
        return
    if len(shape) < 2:
        file.write(torch.full(shape, float(name.endswith(("weight", "logit_scale")))).half().numpy().tobytes())
        return
    row = draws(0.02 if "embedding" in name else math.prod(shape[1:]) ** -0.5)
    whole, rest = divmod(2 * math.prod(shape), len(row))
    for _ in range(whole):
        file.write(row)
    file.write(row[:rest])


@functools.cache
def draws(std: float) -> bytes:
    """The bytes of 4 million float16 numbers; not a power of two, so that rows of weights differ."""
    return (torch.randn(2**22 + 1, generator=torch.Generator().manual_seed(0)) * std).half().numpy().tobytes()
