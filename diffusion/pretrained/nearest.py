"""Which known model is a file most like that is none of them, and what decided against it?

Each kind of network has a few tensors that every one of it has; the nearest is the kind of which the most are there.
"""

from collections import Counter

from diffusion.pretrained.weight_files import WeightFile

SIGNS = {
    "a UNet in the names of CompVis or guided-diffusion": (
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.in_layers.2.weight",
        "middle_block.0.in_layers.2.weight",
        "output_blocks.0.0.in_layers.2.weight",
        "out.2.weight",
    ),
    "a UNet in diffusers' names": (
        "time_embedding.linear_1.weight",
        "conv_in.weight",
        "down_blocks.0.resnets.0.conv1.weight",
        "mid_block.resnets.0.conv1.weight",
        "up_blocks.0.resnets.0.conv1.weight",
        "conv_norm_out.weight",
    ),
    "an autoencoder in CompVis' names": (
        "encoder.conv_in.weight",
        "encoder.down.0.block.0.conv1.weight",
        "decoder.conv_in.weight",
        "decoder.up.0.block.0.conv1.weight",
        "post_quant_conv.weight",
    ),
    "an autoencoder in diffusers' names": (
        "encoder.conv_in.weight",
        "encoder.down_blocks.0.resnets.0.conv1.weight",
        "decoder.conv_in.weight",
        "decoder.up_blocks.0.resnets.0.conv1.weight",
    ),
    "a CLIP text encoder in transformers' names": (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "final_layer_norm.weight",
    ),
    "a CLIP text encoder in open_clip's names": (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.0.attn.in_proj_weight",
        "ln_final.weight",
    ),
}


def describe_unknown(file: WeightFile) -> str:
    """Words for a file that is no known model: what it is most like, what it lacks, and what is in it instead."""
    tops = Counter(name.split(".")[0] for name in file)
    inside = ", ".join(f"{top} ({count})" for top, count in tops.most_common(5))
    lacking = {what: tuple(sign for sign in signs if not _has(file, sign)) for what, signs in SIGNS.items()}
    shares = {what: 1 - len(lacking[what]) / len(signs) for what, signs in SIGNS.items()}
    nearest = max(shares, key=lambda what: shares[what])
    start = f"{file.path} is no model that is known here; its {len(file)} tensors are below {inside or 'no name'}"
    if not shares[nearest]:
        return f"{start}, and no UNet, autoencoder, CLIP text encoder, LoRA or textual inversion has names like these"
    if not lacking[nearest]:
        return f"{start}. The nearest is {nearest}, but not all of its names are below one prefix"
    return f"{start}. The nearest is {nearest}, but it lacks {', '.join(lacking[nearest])}"


def _has(file: WeightFile, sign: str) -> bool:
    return any(name == sign or name.endswith(f".{sign}") for name in file)
