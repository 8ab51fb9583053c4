"""Which network has weights of these names and shapes, in the names that ldm, sgm and guided-diffusion share?

Widths, depths, attention and channels are read block by block; head counts, which shapes do not tell, are the caller's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from diffusion.pretrained.places import Shapes

Heads = Callable[[int, str], dict[str, int]]  # of a width and a kind of attention: num_heads or head_channels


@dataclass(frozen=True)
class Attention:
    """What follows a residual block. kind: "none", "self" or "cross"; the rest is of spatial transformers."""

    kind: str = "none"
    depth: int = 1
    inner: int = 0  # width of all heads together
    context: int | None = None
    linear: bool = False
    looks_at_itself: bool = True


@dataclass(frozen=True)
class BlockFacts:
    """A residual block's width and attention, and how its level is left behind it ("conv", "residual"), if it is."""

    width: int
    attention: Attention
    leaves: str | None = None


def has_unet(shapes: Shapes) -> bool:
    """Whether these names are those of a UNet, or of its way down (a classifier), without a prefix."""
    return "input_blocks.0.0.weight" in shapes and "time_embed.0.weight" in shapes


def numbers(shapes: Iterable[str], root: str) -> list[int]:
    """The numbers that follow `root.` in the names, in order."""
    parts = {name[len(root) + 1 :].split(".", 1)[0] for name in shapes if name.startswith(f"{root}.")}
    return sorted(int(part) for part in parts if part.isdigit() and len(part) < 6)


def width_of(shapes: Shapes, name: str, dim: int = 0) -> int:
    """One size of a tensor that must be there."""
    shape = shapes.get(name)
    if shape is None or len(shape) <= dim:
        raise ValueError(f"{name} is {'missing' if shape is None else f'shaped {list(shape)}'}")
    return shape[dim]


def unet_settings(shapes: Shapes, heads: Heads) -> dict[str, Any]:
    """Our `UNet` settings for weights in these names, without their prefix. Raises ValueError for what is no UNet."""
    down, up = _way_down(shapes), _way_up(shapes)
    if [len(level) + 1 for level in down] != [len(level) for level in up]:
        raise ValueError(
            f"the way down has levels of {[len(level) for level in down]} blocks, the way up of "
            f"{[len(level) for level in up]}; it should have one more each"
        )
    channels = width_of(shapes, "time_embed.0.weight", 1)
    context = next((b.attention.context for level in (*down, *up) for b in level if b.attention.context), None)
    stages = [_stage(level, len(level), channels, heads) for level in down]
    up_stages = [_stage(level, len(level) - 1, channels, heads) for level in up]
    for stage, level in zip(up_stages, up, strict=True):
        stage["resample"] = level[-1].leaves or stage["resample"]
    return {
        "in_channels": width_of(shapes, "input_blocks.0.0.weight", 1),
        "out_channels": width_of(shapes, "out.2.weight"),
        "channels": channels,
        "stages": stages,
        "up_stages": up_stages,
        "middle": _middle(shapes, channels, heads),
        "context_channels": context,
        "modulation": modulation(shapes),
        "embedding_channels": width_of(shapes, "time_embed.0.weight"),
        **_condition(shapes),
    }


def modulation(shapes: Shapes) -> str:
    """Whether residual blocks take the embedding as a scale and a shift, or as a shift alone."""
    name = "input_blocks.1.0.emb_layers.1.weight"
    return "scale_shift" if width_of(shapes, name) == 2 * _width(shapes, "input_blocks.1.0") else "shift"


def _condition(shapes: Shapes) -> dict[str, Any]:
    for prefix in ("label_emb.0", "label_emb"):
        if f"{prefix}.0.weight" in shapes:
            return {"vector_channels": width_of(shapes, f"{prefix}.0.weight", 1), "num_classes": None}
    if "label_emb.bias" in shapes:
        wide = width_of(shapes, "label_emb.weight", 1)
        return {"vector_channels": wide, "vector_embedding": "linear", "num_classes": None}
    return {"num_classes": width_of(shapes, "label_emb.weight") if "label_emb.weight" in shapes else None}


def vector_prefix(shapes: Shapes) -> str:
    """Below which name the embedding of a vector is."""
    return "label_emb.0" if "label_emb.0.0.weight" in shapes else "label_emb"


def linear_projections(shapes: Shapes) -> bool:
    """Whether spatial transformers project by matrices, not by 1x1 convolutions."""
    return any(len(shape) == 2 for name, shape in shapes.items() if name.endswith(".proj_in.weight"))


# ---------------------------------------------------------------------------------------------------------------------
# blocks and levels


def _width(shapes: Shapes, block: str) -> int:
    return width_of(shapes, f"{block}.in_layers.2.weight")


def _attention(shapes: Shapes, name: str) -> Attention:
    if f"{name}.qkv.weight" in shapes:
        return Attention("self")
    depth = len(numbers(shapes, f"{name}.transformer_blocks"))
    if not depth:
        return Attention()
    first = f"{name}.transformer_blocks.0"
    inner = width_of(shapes, f"{first}.attn1.to_q.weight")
    return Attention(
        "cross",
        depth,
        inner,
        width_of(shapes, f"{first}.attn2.to_k.weight", 1),
        len(shapes.get(f"{name}.proj_in.weight", ())) == 2,
        width_of(shapes, f"{first}.attn1.to_k.weight", 1) == width_of(shapes, f"{first}.attn1.to_q.weight", 1),
    )


def _block(shapes: Shapes, name: str, leaves: str | None = None) -> BlockFacts:
    return BlockFacts(_width(shapes, f"{name}.0"), _attention(shapes, f"{name}.1"), leaves)


def _way_up(shapes: Shapes) -> list[list[BlockFacts]]:
    """The levels of the way up, from the highest resolution down; the last block of all but the first leaves it."""
    levels: list[list[BlockFacts]] = [[]]
    for number in numbers(shapes, "output_blocks"):
        name = f"output_blocks.{number}"
        leaves = None
        for position in (1, 2):
            if f"{name}.{position}.conv.weight" in shapes:
                leaves = "conv"
            elif f"{name}.{position}.in_layers.2.weight" in shapes:
                leaves = "residual"
        levels[-1].append(_block(shapes, name, leaves))
        if leaves:
            levels.append([])
    found = [level for level in reversed(levels) if level]
    if len(found) == 1 and len(pooled := _split_by_gaps(shapes)) > 1:  # resampling without weights leaves no trace here
        sizes, blocks = [size + 1 for size in pooled], list(found[0])
        found = []
        for size in reversed(sizes):
            found.insert(0, blocks[:size])
            blocks = blocks[size:]
    return found


def _split_by_gaps(shapes: Shapes) -> list[int]:
    """How many blocks each level of the way down has, where levels are left by pooling, which has no weights."""
    there, sizes = set(numbers(shapes, "input_blocks")), [0]
    for number in range(1, max(there) + 1):
        if number in there:
            sizes[-1] += 1
        else:
            sizes.append(0)
    return sizes


def _way_down(shapes: Shapes) -> list[list[BlockFacts]]:
    """The levels of the way down, without the blocks that only leave one."""
    there = numbers(shapes, "input_blocks")[1:]
    ends = [number for number in there if f"input_blocks.{number}.0.op.weight" in shapes]
    leaves = "conv"
    if not ends and there:
        gaps = sorted(set(range(1, there[-1])) - set(there))
        ends, leaves = (gaps, "pool") if gaps else (_residual_ends(shapes, there), "residual")
    levels: list[list[BlockFacts]] = [[]]
    for number in sorted({*there, *ends}):
        if number in ends:
            if levels[-1]:
                last = levels[-1][-1]
                levels[-1][-1] = BlockFacts(last.width, last.attention, leaves)
            levels.append([])
        else:
            levels[-1].append(_block(shapes, f"input_blocks.{number}"))
    return levels


def _residual_ends(shapes: Shapes, there: list[int]) -> list[int]:
    """The numbers of the residual blocks that leave a level: those at equal distances that change no width.

    They look like the blocks of the level; but a level has one width, and nothing attends where it is left.
    """
    blocks = {number: _block(shapes, f"input_blocks.{number}") for number in there}
    for depth in range(1, len(there) + 1):
        if (len(there) + 1) % (depth + 1):
            continue
        levels = [there[start : start + depth] for start in range(0, len(there), depth + 1)]
        ends = [number for number in there if number % (depth + 1) == 0]
        plain = all(blocks[number].attention.kind == "none" for number in ends)
        same = all(blocks[number].width == blocks[number - 1].width for number in ends)
        even = all(len({blocks[n].width for n in level}) == 1 for level in levels)
        alike = all(len({blocks[n].attention.kind for n in level}) == 1 for level in levels)
        if plain and same and even and alike:
            return ends
    return []


def _stage(level: list[BlockFacts], depth: int, channels: int, heads: Heads) -> dict[str, Any]:
    width = level[0].width if level else channels
    if len({block.width for block in level}) > 1:
        raise ValueError(f"one level has blocks of the widths {[block.width for block in level]}")
    kinds = [block.attention.kind for block in level]
    stage: dict[str, Any] = {
        "depth": depth,
        "channel_mult": width / channels,
        "attention": kinds[0] if len(set(kinds)) == 1 else kinds,
        "resample": (level[-1].leaves if level else None) or "conv",
    }
    attends = [block.attention for block in level if block.attention.kind != "none"]
    if attends:
        depths = [block.attention.depth for block in level]
        stage["transformer_depth"] = depths[0] if len(set(depths)) == 1 else depths
        stage |= _head_settings(attends[0], width, heads)
    return stage


def _head_settings(attention: Attention, width: int, heads: Heads) -> dict[str, Any]:
    inner = attention.inner or width
    settings: dict[str, Any] = dict(heads(inner, attention.kind))
    if inner != width:
        count = settings.get("num_heads") or inner // settings["head_channels"]
        settings = {"num_heads": count, "head_channels": inner // count}
    if attention.kind == "cross" and not attention.looks_at_itself:
        settings["self_attention"] = False
    return settings


def _middle(shapes: Shapes, channels: int, heads: Heads) -> dict[str, Any]:
    """Residual blocks at even positions, attentions at odd ones."""
    there = numbers(shapes, "middle_block")
    if not there:
        return {"depth": 0, "attention": "none"}
    width = _width(shapes, "middle_block.0")
    attention = _attention(shapes, "middle_block.1")
    middle: dict[str, Any] = {
        "depth": there[-1] // 2 + 1,
        "channel_mult": width / channels,
        "attention": attention.kind,
    }
    if attention.kind != "none":
        middle |= {"transformer_depth": attention.depth, **_head_settings(attention, width, heads)}
    return middle


# ---------------------------------------------------------------------------------------------------------------------
# autoencoders, and text transformers


def autoencoder_arguments(shapes: Shapes) -> dict[str, Any]:
    """ldm's AutoencoderKL's or VQModel's keyword arguments for weights in its names, without their prefix."""
    levels = numbers(shapes, "encoder.down")
    if not levels:
        raise ValueError("the encoder has no levels (encoder.down.*)")
    widths = [width_of(shapes, f"encoder.down.{i}.block.0.conv1.weight") for i in levels]
    channels = width_of(shapes, "encoder.conv_in.weight")
    if any(width % channels for width in widths):
        raise ValueError(f"the encoder's widths {widths} are no multiples of its first, {channels}")
    resolution = 256
    attends = [resolution // 2**i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in shapes]
    codes = "quantize.embedding.weight"
    coder = {
        "double_z": codes not in shapes,
        "z_channels": width_of(shapes, "decoder.conv_in.weight", 1),
        "resolution": resolution,
        "in_channels": width_of(shapes, "encoder.conv_in.weight", 1),
        "out_ch": width_of(shapes, "decoder.conv_out.weight"),
        "ch": channels,
        "ch_mult": [width // channels for width in widths],
        "num_res_blocks": len(numbers(shapes, "encoder.down.0.block")),
        "attn_resolutions": attends,
        "resamp_with_conv": len(levels) == 1 or "encoder.down.0.downsample.conv.weight" in shapes,
        "attn_type": "vanilla" if "encoder.mid.attn_1.q.weight" in shapes else "none",
    }
    arguments = {"ddconfig": coder, "embed_dim": width_of(shapes, "post_quant_conv.weight", 1)}
    return arguments | ({"n_embed": width_of(shapes, codes)} if codes in shapes else {})


# ---------------------------------------------------------------------------------------------------------------------
# classifiers


def classifier_settings(shapes: Shapes, heads: Heads) -> dict[str, Any]:
    """Our `Classifier` settings for weights in guided-diffusion's names."""
    channels = width_of(shapes, "time_embed.0.weight", 1)
    down = _way_down(shapes)
    pool, last = _head(shapes)
    return {
        "in_channels": width_of(shapes, "input_blocks.0.0.weight", 1),
        "num_classes": width_of(shapes, last),
        "image_size": _image_size(shapes, len(down)),
        "pool": pool,
        "channels": channels,
        "stages": [_stage(level, len(level), channels, heads) for level in down],
        "middle": _middle(shapes, channels, heads),
        "modulation": modulation(shapes),
    }


def _head(shapes: Shapes) -> tuple[str, str]:
    """How the head pools, and the tensor whose rows are classes."""
    if "out.2.positional_embedding" in shapes:
        return "attention", "out.2.c_proj.weight"
    if len(shapes.get("out.3.weight", ())) == 4:
        return "adaptive", "out.3.weight"
    return ("spatial_v2", "out.3.weight") if "out.3.weight" in shapes else ("spatial", "out.2.weight")


def _image_size(shapes: Shapes, levels: int) -> int:
    """The side of the images, which only attention over positions knows; else that of as many halvings to 8."""
    if "out.2.positional_embedding" not in shapes:
        return 8 * 2 ** (levels - 1)
    return round((width_of(shapes, "out.2.positional_embedding", 1) - 1) ** 0.5) * 2 ** (levels - 1)
