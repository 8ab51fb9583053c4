"""Pictures of A1111 and ComfyUI, made here with the texts that those programs store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save_with_texts(path: Path, size: tuple[int, int] = (8, 8), **texts: str) -> Path:
    """Write a grey PNG of (height, width) that carries these texts."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.fromarray(np.full((*size, 3), 128, dtype=np.uint8)).save(path, pnginfo=info)
    return path


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}


def default_graph(**sampler: Any) -> dict[str, Any]:
    """ComfyUI's default workflow in its API format, as it is stored in every picture."""
    settings = {"seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal"}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": node("KSampler", **{**settings, "denoise": 1, **links, **sampler}),
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly.safetensors"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="beautiful scenery, purple galaxy bottle", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", filename_prefix="ComfyUI", images=["8", 0]),
    }


def custom_graph() -> dict[str, Any]:
    """A workflow of SamplerCustomAdvanced, where sampler, grid, noise and guidance are nodes of their own."""
    graph = default_graph()
    graph["3"] = node(
        "SamplerCustomAdvanced",
        noise=["20", 0],
        guider=["21", 0],
        sampler=["22", 0],
        sigmas=["23", 0],
        latent_image=["5", 0],
    )
    graph["20"] = node("RandomNoise", noise_seed=7)
    graph["21"] = node("CFGGuider", model=["30", 0], positive=["6", 0], negative=["7", 0], cfg=5.5)
    graph["22"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    graph["23"] = node("KarrasScheduler", steps=12, sigma_max=14.6, sigma_min=0.03, rho=6.5)
    graph["30"] = node("LoraLoader", lora_name="detail.safetensors", model=["4", 0], clip=["4", 1])
    return graph


def picture_of(path: Path, graph: dict[str, Any]) -> Path:
    """Write a picture as ComfyUI does."""
    return save_with_texts(path, prompt=json.dumps(graph), workflow=json.dumps({"nodes": []}))
