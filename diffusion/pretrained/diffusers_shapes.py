"""Which network has weights of these names and shapes, in diffusers' names and without the config that belongs to them?

What shapes do not tell (heads, activations) is what Stable Diffusion has.
"""

from typing import Any

from diffusion.pretrained.architecture import numbers, width_of
from diffusion.pretrained.places import Shapes

UNET = "down_blocks.0.resnets.0.conv1.weight"
CODER = "encoder.down_blocks.0.resnets.0.conv1.weight"


def _depths(shapes: Shapes, block: str) -> list[int]:
    """How many transformer blocks each attention of a block has."""
    return [
        len(numbers(shapes, f"{block}.attentions.{i}.transformer_blocks"))
        for i in numbers(shapes, f"{block}.attentions")
    ]


def _kind(shapes: Shapes, block: str, way: str) -> str:
    if not numbers(shapes, f"{block}.attentions"):
        return f"{way}Block2D"
    return f"CrossAttn{way}Block2D" if any(_depths(shapes, block)) else f"Attn{way}Block2D"


def unet_arguments(shapes: Shapes) -> dict[str, Any]:
    """UNet2DConditionModel's config for weights in its names. Raises ValueError for what is no such network."""
    down, up = numbers(shapes, "down_blocks"), numbers(shapes, "up_blocks")
    if not down or len(down) != len(up):
        raise ValueError(f"there are {len(down)} down_blocks and {len(up)} up_blocks; a UNet has as many of both")
    widths = [width_of(shapes, f"down_blocks.{i}.resnets.0.conv1.weight") for i in down]
    linear = any(len(shape) == 2 for name, shape in shapes.items() if name.endswith(".proj_in.weight"))
    crossed = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    arguments: dict[str, Any] = {
        "in_channels": width_of(shapes, "conv_in.weight", 1),
        "out_channels": width_of(shapes, "conv_out.weight"),
        "block_out_channels": widths,
        "layers_per_block": [len(numbers(shapes, f"down_blocks.{i}.resnets")) for i in down],
        "down_block_types": [_kind(shapes, f"down_blocks.{i}", "Down") for i in down],
        "up_block_types": [_kind(shapes, f"up_blocks.{i}", "Up") for i in up],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if numbers(shapes, "mid_block.resnets") else None,
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
    }
    if crossed:
        arguments["cross_attention_dim"] = shapes[crossed[0]][1]
        arguments |= _transformers(shapes, len(down))
    if "add_embedding.linear_1.weight" in shapes:
        wide = width_of(shapes, "add_embedding.linear_1.weight", 1)
        arguments |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": wide}
    return arguments


def _transformers(shapes: Shapes, levels: int) -> dict[str, Any]:
    down = [_depths(shapes, f"down_blocks.{i}") or [1] for i in range(levels)]
    up = [_depths(shapes, f"up_blocks.{i}") or [1] for i in range(levels)]
    middle = (_depths(shapes, "mid_block") or [1])[0]
    plain = all(len(set(depths)) == 1 for depths in (*down, *up))
    if plain and [depths[0] for depths in down] == [depths[0] for depths in reversed(up)]:
        single = [depths[0] for depths in down]
        if middle == single[-1] or not any(_depths(shapes, f"down_blocks.{levels - 1}")):
            return {"transformer_layers_per_block": [*single[:-1], middle]}
    down[-1] = [middle] if len(down[-1]) == 1 else down[-1]
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}


def autoencoder_arguments(shapes: Shapes) -> dict[str, Any]:
    """AutoencoderKL's or VQModel's config for weights in their names, of today or before 2023."""
    down = numbers(shapes, "encoder.down_blocks")
    if not down:
        raise ValueError("there are no encoder.down_blocks; this is no autoencoder")
    attends = [bool(numbers(shapes, f"encoder.down_blocks.{i}.attentions")) for i in down]
    rises = [bool(numbers(shapes, f"decoder.up_blocks.{i}.attentions")) for i in down]
    arguments: dict[str, Any] = {
        "in_channels": width_of(shapes, "encoder.conv_in.weight", 1),
        "out_channels": width_of(shapes, "decoder.conv_out.weight"),
        "block_out_channels": [width_of(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in down],
        "layers_per_block": len(numbers(shapes, "encoder.down_blocks.0.resnets")),
        "down_block_types": ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if there else "UpDecoderBlock2D" for there in rises],
        "latent_channels": width_of(shapes, "decoder.conv_in.weight", 1),
        "mid_block_add_attention": bool(numbers(shapes, "encoder.mid_block.attentions")),
    }
    if "quantize.embedding.weight" in shapes:
        codes, width = shapes["quantize.embedding.weight"]
        return arguments | {"_class_name": "VQModel", "num_vq_embeddings": codes, "vq_embed_dim": width}
    return arguments | {
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
