"""Which settings of sample.py does it fill in by itself: how many samples, in which batches, of which texts?

What is one prompt a line becomes a list of prompts, and null becomes a number that fits the size of the images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NUM_SAMPLES = 64
SMALL, MEDIUM = 128 * 128, 256 * 256  # pixels: up to these, batches of 64 and of 16; larger images come one by one
PAD_TO = 16


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a text file, one a line; empty lines and those that begin with "#" are none.

    Raises ValueError for a file that holds no prompt or is no text.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path} is no text in UTF-8 ({error})") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f'prompts={path} holds no prompt; write one a line, without "#" in front')
    return prompts


def with_prompts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config with the prompts of a file as its prompt, each once unless `num_samples` says how many."""
    if config.get("prompts") is None:
        return dict(config)
    if config.get("prompt") is not None:
        raise ValueError(f"prompts={config['prompts']} and prompt={config['prompt']!r} both give texts; leave one out")
    prompts = read_prompts(config["prompts"])
    count = len(prompts) if config["num_samples"] is None else config["num_samples"]
    return {**config, "prompt": prompts, "num_samples": count}


def with_counts(
    config: Mapping[str, Any], shape: Sequence[int] | None = None, *, published: bool = False
) -> dict[str, Any]:
    """Return the config with numbers for null in num_samples, batch_size and pad_to; `shape` (C, H, W) is an image's.

    Images of `published` models, and of more than 256x256 pixels, are drawn one by one: then each depends on its own
    seed and on nothing else, as batches of 16 make sure of smaller ones. Raises ValueError for what is no whole number.
    """
    for name in ("num_samples", "batch_size", "pad_to"):
        value = config[name]
        if value is not None and type(value) is not int:
            raise ValueError(f"{name}={value} does not fit; it must be of type int")
    pixels = 0 if shape is None else shape[-2] * shape[-1]
    single = published or pixels > MEDIUM
    texts = config.get("prompt")
    asked = len(texts) if isinstance(texts, list) else 1
    usual = {
        "num_samples": asked if texts is not None and (single or pixels > SMALL) else NUM_SAMPLES,
        "batch_size": 1 if single else 64 if pixels <= SMALL else 16,
        "pad_to": 1 if single else PAD_TO,
    }
    return {**config, **{name: value for name, value in usual.items() if config[name] is None}}


def files_given(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `load_model` is to be told of the parts of a model: `vae` and `autoencoder` are one setting."""
    if config["vae"] is not None and config["autoencoder"] is not None:
        raise ValueError("vae and autoencoder name the same part of a model; give one of them")
    autoencoder = config["autoencoder"] if config["vae"] is None else config["vae"]
    names = ("text_encoder", "tokenizer", "parameterization", "weights")
    return {"autoencoder": autoencoder, **{name: config[name] for name in names}}
