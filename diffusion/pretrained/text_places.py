"""Which text encoders are in a file, how large are they, and which config rebuilds each?

`text_files` finds the towers by name; here their sizes are read from shapes.
"""

from collections.abc import Sequence
from typing import Any

from diffusion.pretrained import families
from diffusion.pretrained.architecture import numbers, width_of
from diffusion.pretrained.places import Place, Shapes, table_in_names, template
from diffusion.pretrained.text_files import Tower, find_towers
from diffusion.pretrained.weight_files import WeightFile

LAYERS = {"transformers": "text_model.encoder.layers", "open_clip": "transformer.resblocks"}
EXPAND = {"transformers": "mlp.fc1.weight", "open_clip": "mlp.c_fc.weight"}
POSITIONS = {"transformers": "text_model.embeddings.position_embedding.weight", "open_clip": "positional_embedding"}
HEAD_WIDTH = 64  # of all CLIPs
ACTIVATIONS = {768: "quick_gelu", 1024: "gelu", 1280: "gelu"}


def towers_of(shapes: Shapes) -> list[Tower]:
    """The text encoders in others' names, in the file's order of numbers."""
    return sorted((t for t in find_towers(shapes) if t.layout != "ours"), key=lambda tower: tower.prefix)


def encoder_settings(tower: Tower, *, num_heads: int | None = None, activation: str | None = None) -> dict[str, Any]:
    """Our `TextTransformer` settings for a tower; heads of width 64 and CLIP's activations unless told otherwise."""
    shapes = {name: tower.shapes[key] for name, key in tower.keys.items()}
    vocab_size, channels = tower.size
    layers = LAYERS[tower.layout]
    projection = None
    if tower.layout == "open_clip" and "text_projection" in shapes:
        projection = width_of(shapes, "text_projection", 1)
    elif "text_projection.weight" in shapes:
        projection = width_of(shapes, "text_projection.weight")
    default = "gelu" if tower.layout == "open_clip" else ACTIVATIONS.get(channels, "quick_gelu")
    return families.encoder_node(
        {
            "vocab_size": vocab_size,
            "channels": channels,
            "num_layers": len(numbers(shapes, layers)),
            "num_heads": num_heads or (channels // HEAD_WIDTH if channels % HEAD_WIDTH == 0 else 1),
            "max_length": width_of(shapes, POSITIONS[tower.layout]),
            "hidden_channels": width_of(shapes, f"{layers}.0.{EXPAND[tower.layout]}"),
            "activation": activation or default,
            "projection_channels": projection,
        }
    )


def text_place(part: str, file: WeightFile, tower: Tower, node: dict[str, Any]) -> Place:
    """Where a tower's weights are, for the encoder that `node` describes."""
    table = tower.table(template(node, file.path))
    renamed = {name: key.removeprefix(tower.prefix) for name, key in tower.keys.items()}
    if any(name != key for name, key in renamed.items()):
        table = table_in_names(template(node, file.path), table.rules, renamed)
    return Place(part, file, tower.prefix, table)


def text_conditioner(towers: Sequence[Tower], structure: str) -> dict[str, Any] | None:
    """The conditioner's config node for a model of this structure with these text encoders (none: its own)."""
    encoders = [encoder_settings(tower) for tower in towers]
    if structure == "sdxl-base":
        return families.xl_text(*encoders) if len(encoders) in (0, 2) else None
    if structure == "sdxl-refiner":
        return families.refiner_text(*encoders) if len(encoders) < 2 else None
    if structure == "sd2":
        return families.sd2_text(*encoders) if len(encoders) < 2 else None
    return families.sd1_text(*encoders) if len(encoders) < 2 else None


def text_parts(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The encoders' config nodes in a conditioner's, by the part that each is."""
    if "texts" in node:
        return {f"conditioner.texts.{i}.encoder": text["encoder"] for i, text in enumerate(node["texts"])}
    return {"conditioner.encoder": node["encoder"]} if "encoder" in node else {}
