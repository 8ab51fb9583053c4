"""Which UNet: ADM, Stable Diffusion 1, 2 or XL, or your own? One class, told apart by the specs of its stages.

Ronneberger et al. 2015, as DDPM (Ho et al. 2020), ADM (Dhariwal & Nichol 2021) and latent diffusion (2022) use it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.models.attention import SelfAttention, SpatialTransformer
from diffusion.models.layers import (
    Downsample,
    EmbeddingMLP,
    ResidualBlock,
    Upsample,
    group_norm,
    timestep_embedding,
    zero_init,
)


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
            _choose("stage attention", kind, ("none", "self", "cross"))
        _choose("stage resample", self.resample, (None, "conv", "pool", "residual"))

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


class Block(nn.Module):
    """A residual block and the attention that follows it, if any."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        x = self.residual(x, embedding)
        return x if self.attention is None else self.attention(x, context, context_mask)


class Level(nn.Module):
    """The blocks at one resolution on one way, and the module that leaves it (None at the end of the way)."""

    def __init__(self, blocks: Sequence[Block], resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(nn.Module):
    """Predicts from x_t (B, C, H, W) and t (B,) an image-shaped target; `net(x, t, label=..., context=...)`.

    in_channels: of x and `concat` together (9 for Stable Diffusion inpainting, 8 for InstructPix2Pix).
    out_channels: twice the image's for a learned variance.
    channels: base width; the time embedding has `embedding_channels` (default 4 * channels).
    stages: from the highest resolution down, as `Stage` or plain dicts; H and W halve between two.
    up_stages: the way up, in the same order, where it is not the mirror image of `stages`; same depths and widths.
    middle: the lowest point: `depth` residual blocks with attention between them. Default: two, with self-attention, or
        with cross-attention as deep as the last stage's if any stage has some. Its width is the last stage's.
    num_classes: size of the label table; label -1 adds nothing.
    vector_channels, vector_embedding: width of `vector` and how it joins the time embedding: "mlp" (SDXL), "linear" or
        "identity".
    context_channels: width of `context`'s tokens.
    modulation: "scale_shift" (AdaGN) or "shift" (additive), how residual blocks take the embedding.
    freq_shift: of the time embedding, see `timestep_embedding`; downsample_padding: see `Downsample`.
    checkpointing: recompute blocks in the backward pass instead of storing their activations; settable later.

    Convolution weights are kept in channels_last memory: on CPUs that is faster, and pixels become tokens for free.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        channels: int = 128,
        stages: Sequence[Stage | Mapping[str, Any]],
        up_stages: Sequence[Stage | Mapping[str, Any]] | None = None,
        middle: Stage | Mapping[str, Any] | None = None,
        num_classes: int | None = None,
        vector_channels: int | None = None,
        vector_embedding: str = "mlp",
        context_channels: int | None = None,
        modulation: str = "scale_shift",
        resample: str = "conv",
        num_heads: int | None = None,
        head_channels: int | None = None,
        feedforward: str = "geglu",
        dropout: float = 0.0,
        residual_scale: float = 1.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        embedding_channels: int | None = None,
        freq_shift: float = 0.0,
        downsample_padding: int = 1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _choose("modulation", modulation, ("scale_shift", "shift"))
        _choose("resample", resample, ("conv", "pool", "residual"))
        _choose("feedforward", feedforward, ("geglu", "gelu"))
        _choose("vector_embedding", vector_embedding, ("mlp", "linear", "identity"))
        down = tuple(map(Stage.parse, stages))
        up = down if up_stages is None else tuple(map(Stage.parse, up_stages))
        _check_stages(down, up)
        self.in_channels, self.out_channels, self.channels = in_channels, out_channels, channels
        self.num_classes, self.vector_channels, self.context_channels = num_classes, vector_channels, context_channels
        self.freq_shift, self.checkpointing = freq_shift, checkpointing
        self.size_factor = 2 ** (len(down) - 1)
        self._defaults = Stage(
            num_heads=num_heads, head_channels=head_channels, resample=resample, residual_scale=residual_scale
        )
        self._feedforward, self._downsample_padding = feedforward, downsample_padding
        emb = 4 * channels if embedding_channels is None else embedding_channels
        norm = {"norm_groups": norm_groups, "norm_eps": norm_eps}
        self._residual = {"embedding_channels": emb, "modulation": modulation, "dropout": dropout, **norm}

        self.time_embedding = EmbeddingMLP(channels, emb)
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes, emb)
        self.vector_embedding = _vector_embedding(vector_embedding, vector_channels, emb)
        widths = [round(channels * stage.channel_mult) for stage in down]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down, skips = self._down(down, widths)
        self.middle = self._middle(_default_middle(down) if middle is None else Stage.parse(middle), widths[-1])
        self.up = self._up(up, widths, skips)
        self.norm_out = group_norm(norm_groups, widths[0], norm_eps)
        self.conv_out = zero_init(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

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

    def _up(self, stages: Sequence[Stage], widths: Sequence[int], skips: list[int]) -> nn.ModuleList:
        """The levels of the way up, in the order of the stages; the forward pass takes them from last to first."""
        levels, width, skips = [], widths[-1], list(skips)
        for number, (stage, out) in reversed(list(enumerate(zip(stages, widths, strict=True)))):
            blocks = []
            for i in range(stage.depth + 1):
                blocks.append(self._block(stage, i, width + skips.pop(), out))
                width = out
            levels.append(Level(blocks, self._resample(stage, "up", out) if number else None))
        return nn.ModuleList(reversed(levels))

    def _block(self, stage: Stage, number: int, in_channels: int, out_channels: int, *, attend: bool = True) -> Block:
        scale = self._scale(stage)
        residual = ResidualBlock(in_channels, out_channels, residual_scale=scale, **self._residual)
        kind = stage.attention_at(number) if attend else "none"
        heads = stage if (stage.num_heads, stage.head_channels) != (None, None) else self._defaults
        layout = {"num_heads": heads.num_heads, "head_channels": heads.head_channels}
        groups, eps = self._residual["norm_groups"], self._residual["norm_eps"]
        attention = None
        if kind == "self":
            attention = SelfAttention(out_channels, residual_scale=scale, norm_groups=groups, norm_eps=eps, **layout)
        elif kind == "cross":
            attention = SpatialTransformer(
                out_channels,
                self.context_channels,
                depth=stage.transformer_depth_at(number),
                self_attention=stage.self_attention,
                feedforward=self._feedforward,
                norm_groups=groups,
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

    def _scale(self, stage: Stage) -> float:
        return self._defaults.residual_scale if stage.residual_scale is None else stage.residual_scale

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        context: Tensor | None = None,
        vector: Tensor | None = None,
        concat: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, out_channels, H, W) from x (B, C, H, W) and timesteps t (B,), integer or fractional.

        label: (B,) int64, -1 for no class. context: (B, L, context_channels); without one, cross-attention looks at x.
        vector: (B, vector_channels). concat: (B, C', H, W), joined to x's channels. context_mask: (B, L), True = keep.
        """
        x = self._join(x, concat)
        emb = F.silu(self._embed(x, t, label, vector))
        condition = (emb, context, context_mask)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = self._run(block, h, *condition)
                skips.append(h)
            if level.resample is not None:
                h = self._leave(level.resample, h, emb)
                skips.append(h)
        for block in self.middle:
            h = self._run(block, h, *condition)
        for level in reversed(self.up):
            for block in level.blocks:
                h = self._run(block, torch.cat([h, skips.pop()], dim=1), *condition)
            if level.resample is not None:
                h = self._leave(level.resample, h, emb)
        h = F.silu(self.norm_out(h), inplace=not torch.is_grad_enabled())
        return self.conv_out(h).contiguous()

    def _run(self, module: nn.Module, *args: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    def _leave(self, resample: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        return self._run(resample, h, emb) if isinstance(resample, ResidualBlock) else resample(h)

    def _join(self, x: Tensor, concat: Tensor | None) -> Tensor:
        """x with the concatenated channels, after the checks of its shape."""
        if concat is not None:
            x = torch.cat([x, concat], dim=1)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"the network takes {self.in_channels} input channels, x and concat together, but got {x.shape[1]}; "
                "pass the missing ones as concat or build the network with matching in_channels"
            )
        for name, size in zip("HW", x.shape[-2:], strict=True):
            if size % self.size_factor or size == 0:
                below = size // self.size_factor * self.size_factor
                nearest = " or ".join(str(s) for s in (below, below + self.size_factor) if s)
                raise ValueError(
                    f"{name}={size} is not a multiple of {self.size_factor}, by which the network divides it; "
                    f"the nearest sizes that work: {nearest}"
                )
        return x

    def _embed(self, x: Tensor, t: Tensor, label: Tensor | None, vector: Tensor | None) -> Tensor:
        """The sum of the embeddings of time, label and vector, (B, E)."""
        t = t.expand(x.shape[0]) if t.ndim == 0 else t
        dtype = self.time_embedding.linear_in.weight.dtype
        emb = self.time_embedding(timestep_embedding(t, self.channels, freq_shift=self.freq_shift).to(dtype))
        for name, value, size in (("label", label, self.num_classes), ("vector", vector, self.vector_channels)):
            if (value is None) != (size is None):
                raise ValueError(_condition_message(name, size))
        if label is not None:
            self._check_labels(label)
            known = self.label_embedding(label.clamp(min=0))
            emb = emb + known.masked_fill((label < 0)[:, None], 0.0)
        if vector is not None:
            emb = emb + self.vector_embedding(vector.to(dtype))
        return emb

    def _check_labels(self, label: Tensor) -> None:
        # On an accelerator this would wait for the device at every step; the embedding fails there by itself.
        if label.device.type != "cpu" or torch.compiler.is_compiling() or label.numel() == 0:
            return
        low, high = label.aminmax()
        if low < -1 or high >= self.num_classes:
            raise ValueError(
                f"labels from {int(low)} to {int(high)} given, but this network knows the classes 0 to "
                f"{self.num_classes - 1} and -1 for no class"
            )


class SuperResolutionUNet(UNet):
    """A UNet whose `concat` is a smaller image of any size, enlarged bilinearly to x's size (ADM's upsamplers)."""

    def forward(self, x: Tensor, t: Tensor, *, concat: Tensor, **condition: Tensor | None) -> Tensor:
        """As `UNet.forward`; concat (B, C', h, w)."""
        concat = F.interpolate(concat, x.shape[-2:], mode="bilinear", align_corners=False)
        return super().forward(x, t, concat=concat, **condition)


def _choose(name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(repr(a) for a in allowed)}")


def _check_stages(down: Sequence[Stage], up: Sequence[Stage]) -> None:
    if not down:
        raise ValueError("stages is empty; give at least one stage, such as Stage(depth=2)")
    shapes = [[(stage.depth, stage.channel_mult) for stage in way] for way in (down, up)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "up_stages must have the depths and channel_mults of stages, in the same order: "
            f"{shapes[1]} is not {shapes[0]}"
        )


def _default_middle(stages: Sequence[Stage]) -> Stage:
    crosses = any(stage.attention_at(i) == "cross" for stage in stages for i in range(stage.depth + 1))
    depth = stages[-1].transformer_depth_at(stages[-1].depth)
    last = replace(stages[-1], depth=2, attention="cross" if crosses else "self", transformer_depth=depth)
    return replace(last, self_attention=True)


def _vector_embedding(kind: str, vector_channels: int | None, embedding_channels: int) -> nn.Module | None:
    if vector_channels is None:
        return None
    if kind == "identity":
        if vector_channels != embedding_channels:
            raise ValueError(
                f"an identity vector embedding needs vector_channels={embedding_channels}, not {vector_channels}"
            )
        return nn.Identity()
    return (EmbeddingMLP if kind == "mlp" else nn.Linear)(vector_channels, embedding_channels)


def _condition_message(name: str, size: int | None) -> str:
    if size is None:
        setting = {"label": "num_classes", "vector": "vector_channels"}[name]
        return f"this network was built without {setting}, so it takes no {name}; leave it out or set {setting}"
    if name == "label":
        return (
            f"this network knows {size} classes; pass label=(B,) int64 with values 0 to {size - 1}, or -1 for no class"
        )
    return f"this network needs vector=(B, {size})"
