"""What are networks made of stages? The specs of their resolutions, and the half of a UNet that goes down them.

`UNet` adds the way up to it, `Classifier` a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.models.attention import SelfAttention, SpatialTransformer
from diffusion.models.layers import Downsample, EmbeddingMLP, ResidualBlock, Upsample, timestep_embedding


@dataclass(frozen=True)
class Stage:
    """What happens at one resolution. `None` means the network's own setting.

    depth: residual blocks on the way down; the way up has one more, because it also takes the stage's input.
    channel_mult: width as a multiple of the network's `channels`; may be fractional.
    attention: after each residual block "none", "self" (ADM's block) or "cross" (spatial transformer). A tuple names
        one kind a block; `depth` or `depth + 1` entries, the last for the extra block of the way up.
    transformer_depth: transformer blocks in each spatial transformer; likewise a number or a tuple.
    self_attention: whether the first attention of a transformer block looks at x; if not, both look at the context.
    num_heads, head_channels: of each attention; fix one, or both for transformers narrower or wider than the stage.
    resample: how a stage is left for the next: "conv", "pool" (no parameters) or "residual" (BigGAN block).
    residual_scale: factor on each residual sum.
    """

    depth: int = 2
    channel_mult: float = 1.0
    attention: str | tuple[str, ...] = "none"
    transformer_depth: int | tuple[int, ...] = 1
    self_attention: bool = True
    num_heads: int | None = None
    head_channels: int | None = None
    resample: str | None = None
    residual_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("attention", "transformer_depth"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
                if len(value) not in (self.depth, self.depth + 1):
                    raise ValueError(
                        f"stage {name}={tuple(value)} has {len(value)} entries; a stage of depth {self.depth} takes "
                        f"one value, or {self.depth} or {self.depth + 1} of them"
                    )
        kinds = (self.attention,) if isinstance(self.attention, str) else self.attention
        for kind in kinds:
            choose("stage attention", kind, ("none", "self", "cross"))
        choose("stage resample", self.resample, (None, "conv", "pool", "residual"))

    @classmethod
    def parse(cls, spec: "Stage | Mapping[str, Any]") -> "Stage":
        """A stage from a stage or from plain data such as a checkpoint's config."""
        if isinstance(spec, cls):
            return spec
        allowed = [field.name for field in fields(cls)]
        if unknown := sorted(set(spec) - set(allowed)):
            raise ValueError(f"unknown stage settings {unknown}; a stage takes {allowed}")
        return cls(**spec)

    def attention_at(self, block: int) -> str:
        """The kind of attention after residual block number `block`."""
        return (
            self.attention if isinstance(self.attention, str) else self.attention[min(block, len(self.attention) - 1)]
        )

    def transformer_depth_at(self, block: int) -> int:
        """The number of transformer blocks after residual block number `block`."""
        depth = self.transformer_depth
        return depth[min(block, len(depth) - 1)] if isinstance(depth, tuple) else depth


# The widths of ADM's networks by image size, and below 64 those of its kind.
CHANNEL_MULTS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
    28: (1, 2, 2),
    16: (1, 2, 2),
    8: (1, 2),
}


def equal_stages(
    image_size: int, *, channel_mults: Sequence[float] | None = None, depth: int = 2, attention: Sequence[int] = ()
) -> list[Stage]:
    """Stages that differ in width and attention only, so that one number says what an ablation changes.

    channel_mults: one a stage; None for those of `CHANNEL_MULTS` at this image size. attention: the stages with
    self-attention; -1 is the lowest, -2 the one above it; those above the highest count for none.
    """
    mults = CHANNEL_MULTS.get(image_size) if channel_mults is None else channel_mults
    if mults is None:
        raise ValueError(
            f"image_size={image_size} has no channel_mults of its own; give them, one a stage, such as "
            f"net.stages.channel_mults=[1,2,2] (known sizes: {', '.join(map(str, sorted(CHANNEL_MULTS)))})"
        )
    if wrong := [number for number in attention if number >= 0]:
        raise ValueError(f"attention={list(attention)} counts stages from the lowest, -1; {wrong} are not negative")
    kinds = ["self" if number - len(mults) in attention else "none" for number in range(len(mults))]
    return [Stage(depth=depth, channel_mult=m, attention=kind) for m, kind in zip(mults, kinds, strict=True)]


class Block(nn.Module):
    """A residual block and the attention that follows it, if any."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(
        self, x: Tensor, embedding: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        x = self.residual(x, embedding)
        return x if self.attention is None else self.attention(x, context, context_mask)


class Level(nn.Module):
    """The blocks at one resolution on one way, and the module that leaves it (None at the end of the way)."""

    def __init__(self, blocks: Sequence[Block], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class StageNetwork(nn.Module):
    """The way down: time embedding, first convolution, levels and middle; see `UNet` for the settings.

    A subclass calls `_add_way_down` where its own construction has come that far, so that initial weights are drawn in
    the order of the forward pass.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        context_channels: int | None = None,
        modulation: str,
        resample: str,
        num_heads: int | None,
        head_channels: int | None,
        feedforward: str = "geglu",
        dropout: float,
        residual_scale: float,
        norm_groups: int,
        norm_eps: float,
        embedding_channels: int | None,
        freq_shift: float,
        downsample_padding: int,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        choose("modulation", modulation, ("scale_shift", "shift"))
        choose("resample", resample, ("conv", "pool", "residual"))
        choose("feedforward", feedforward, ("geglu", "gelu"))
        self.in_channels, self.channels, self.context_channels = in_channels, channels, context_channels
        self._embedding_channels = 4 * channels if embedding_channels is None else embedding_channels
        self.freq_shift, self.checkpointing = freq_shift, checkpointing
        self._defaults = Stage(
            num_heads=num_heads, head_channels=head_channels, resample=resample, residual_scale=residual_scale
        )
        self._feedforward, self._downsample_padding = feedforward, downsample_padding
        self._norm = {"norm_groups": norm_groups, "norm_eps": norm_eps}
        emb = {"embedding_channels": self._embedding_channels, "modulation": modulation}
        self._residual = {**emb, "dropout": dropout, **self._norm}
        self.time_embedding = EmbeddingMLP(channels, self._embedding_channels)

    # -- construction --------------------------------------------------------------------------------------------------

    def _add_way_down(self, stages: Sequence[Stage], middle: Stage | Mapping[str, Any] | None) -> list[int]:
        """Build the first convolution, the levels and the middle; return the widths of all activations above it."""
        if not stages:
            raise ValueError("stages is empty; give at least one stage, such as Stage(depth=2)")
        self.size_factor = 2 ** (len(stages) - 1)
        widths = self._widths(stages)
        self.conv_in = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.down, skips = self._down(stages, widths)
        self.middle = self._middle(default_middle(stages) if middle is None else Stage.parse(middle), widths[-1])
        return skips

    def _widths(self, stages: Sequence[Stage]) -> list[int]:
        return [round(self.channels * stage.channel_mult) for stage in stages]

    def _down(self, stages: Sequence[Stage], widths: Sequence[int]) -> tuple[nn.ModuleList, list[int]]:
        """The levels of the way down, and the widths of the activations they leave for the way up."""
        levels, skips, width = nn.ModuleList(), [widths[0]], widths[0]
        for number, (stage, out) in enumerate(zip(stages, widths, strict=True)):
            blocks = [self._block(stage, i, width if i == 0 else out, out) for i in range(stage.depth)]
            resample = self._resample(stage, "down", out) if number + 1 < len(stages) else None
            levels.append(Level(blocks, resample))
            skips += [out] * (stage.depth + (resample is not None))
            width = out
        return levels, skips

    def _middle(self, stage: Stage, width: int) -> nn.ModuleList:
        blocks = [self._block(stage, i, width, width, attend=i + 1 < stage.depth) for i in range(stage.depth)]
        return nn.ModuleList(blocks)

    def _block(self, stage: Stage, number: int, in_channels: int, out_channels: int, *, attend: bool = True) -> Block:
        scale = self._scale(stage)
        residual = ResidualBlock(in_channels, out_channels, residual_scale=scale, **self._residual)
        kind = stage.attention_at(number) if attend else "none"
        layout = self._heads(stage)
        attention = None
        if kind == "self":
            attention = SelfAttention(out_channels, residual_scale=scale, **self._norm, **layout)
        elif kind == "cross":
            attention = SpatialTransformer(
                out_channels,
                self.context_channels,
                depth=stage.transformer_depth_at(number),
                self_attention=stage.self_attention,
                feedforward=self._feedforward,
                norm_groups=self._norm["norm_groups"],
                **layout,
            )
        return Block(residual, attention)

    def _resample(self, stage: Stage, direction: str, width: int) -> nn.Module:
        kind = self._defaults.resample if stage.resample is None else stage.resample
        if kind == "residual":
            scale = self._scale(stage)
            return ResidualBlock(width, width, resample=direction, residual_scale=scale, **self._residual)
        if direction == "up":
            return Upsample(width, kind)
        return Downsample(width, kind, padding=self._downsample_padding)

    def _heads(self, stage: Stage) -> dict[str, int | None]:
        """The heads of a stage's attention, its own or the network's."""
        heads = self._defaults if stage.num_heads is None and stage.head_channels is None else stage
        return {"num_heads": heads.num_heads, "head_channels": heads.head_channels}

    def _scale(self, stage: Stage) -> float:
        return self._defaults.residual_scale if stage.residual_scale is None else stage.residual_scale

    # -- what a forward pass is made of --------------------------------------------------------------------------------

    def _embed_time(self, x: Tensor, t: Tensor) -> Tensor:
        """The embedding (B, E) of t, () or (B,), before the SiLU that all blocks share."""
        t = t.expand(x.shape[0]) if t.ndim == 0 else t
        dtype = self.time_embedding.linear_in.weight.dtype
        return self.time_embedding(timestep_embedding(t, self.channels, freq_shift=self.freq_shift).to(dtype))

    def _way_down(self) -> list[nn.Module]:
        """The blocks and resampling modules between the first convolution and the middle, in their order."""
        return [part for level in self.down for part in (*level.blocks, level.resample) if part is not None]

    def _step(self, part: nn.Module, h: Tensor, *condition: Tensor | None) -> Tensor:
        """h after one part of the network; the condition is the embedding, the context and its mask."""
        if not isinstance(part, Block | ResidualBlock):
            return part(h)
        args = condition if isinstance(part, Block) else condition[:1]
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(part, h, *args, use_reentrant=False)
        return part(h, *args)

    def _check_size(self, height: int, width: int) -> None:
        for name, size in (("H", height), ("W", width)):
            if size % self.size_factor or size == 0:
                below = size // self.size_factor * self.size_factor
                nearest = " or ".join(str(s) for s in (below, below + self.size_factor) if s)
                raise ValueError(
                    f"{name}={size} is not a multiple of {self.size_factor}, by which the network divides it; "
                    f"the nearest sizes that work: {nearest}"
                )


def choose(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError for a value that is not one of those allowed, naming them."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(repr(a) for a in allowed)}")


def default_middle(stages: Sequence[Stage]) -> Stage:
    """Two residual blocks with one attention between them, with cross-attention if any stage has some."""
    crosses = any(stage.attention_at(i) == "cross" for stage in stages for i in range(stage.depth + 1))
    depth = stages[-1].transformer_depth_at(stages[-1].depth)
    last = replace(stages[-1], depth=2, attention="cross" if crosses else "self", transformer_depth=depth)
    return replace(last, self_attention=True)
