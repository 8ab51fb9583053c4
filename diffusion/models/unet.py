"""Which UNet: ADM, Stable Diffusion 1, 2 or XL, or your own? One class, told apart by the specs of its stages.

Ronneberger et al. 2015, as DDPM (Ho et al. 2020), ADM (Dhariwal & Nichol 2021) and latent diffusion (2022) use it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.layers import Downsample, EmbeddingMLP, Upsample, group_norm, zero_init
from diffusion.models.stages import Block, Level, Stage, StageNetwork, choose

__all__ = ["Block", "Level", "Stage", "SuperResolutionUNet", "UNet"]


class UNet(StageNetwork):
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
        super().__init__(
            in_channels=in_channels,
            channels=channels,
            context_channels=context_channels,
            modulation=modulation,
            resample=resample,
            num_heads=num_heads,
            head_channels=head_channels,
            feedforward=feedforward,
            dropout=dropout,
            residual_scale=residual_scale,
            norm_groups=norm_groups,
            norm_eps=norm_eps,
            embedding_channels=embedding_channels,
            freq_shift=freq_shift,
            downsample_padding=downsample_padding,
            checkpointing=checkpointing,
        )
        choose("vector_embedding", vector_embedding, ("mlp", "linear", "identity"))
        down = tuple(map(Stage.parse, stages))
        up = down if up_stages is None else tuple(map(Stage.parse, up_stages))
        check_mirror(down, up)
        self.out_channels, self.num_classes, self.vector_channels = out_channels, num_classes, vector_channels
        emb = self._embedding_channels
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes, emb)
        self.vector_embedding = _vector_embedding(vector_embedding, vector_channels, emb)
        skips = self._add_way_down(down, middle)
        widths = self._widths(down)
        self.up = self._up(up, widths, skips)
        self.norm_out = group_norm(norm_groups, widths[0], norm_eps)
        self.conv_out = zero_init(nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

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
        condition = (F.silu(self._embed(x, t, label, vector)), context, context_mask)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for part in self._way_down():
            h = self._step(part, h, *condition)
            skips.append(h)
        for block in self.middle:
            h = self._step(block, h, *condition)
        for level in reversed(self.up):
            for block in level.blocks:
                h = self._step(block, torch.cat([h, skips.pop()], dim=1), *condition)
            if isinstance(level.resample, Upsample):
                h = level.resample(h, skips[-1].shape[-2:])
            elif level.resample is not None:
                h = self._step(level.resample, h, *condition)
        h = F.silu(self.norm_out(h), inplace=not torch.is_grad_enabled())
        return self.conv_out(h).contiguous()

    def allow_any_size(self) -> None:
        """Take images of any size from now on, where all halving is done by convolutions padded on all sides.

        Odd sizes are rounded up on the way down and cut off on the way up, as diffusers and AUTOMATIC1111 do for
        Stable Diffusion.
        """
        halving = [level.resample for level in self.down if level.resample is not None]
        if all(isinstance(part, Downsample) and part.conv is not None and part.padding for part in halving):
            self.size_factor = 1

    def _join(self, x: Tensor, concat: Tensor | None) -> Tensor:
        """x with the concatenated channels, after the checks of its shape."""
        if concat is not None:
            x = torch.cat([x, concat], dim=1)
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"the network takes {self.in_channels} input channels, x and concat together, but got {x.shape[1]}; "
                "pass the missing ones as concat or build the network with matching in_channels"
            )
        self._check_size(*x.shape[-2:])
        return x

    def _embed(self, x: Tensor, t: Tensor, label: Tensor | None, vector: Tensor | None) -> Tensor:
        """The sum of the embeddings of time, label and vector, (B, E)."""
        emb = self._embed_time(x, t)
        for name, value, size in (("label", label, self.num_classes), ("vector", vector, self.vector_channels)):
            if (value is None) != (size is None):
                raise ValueError(_condition_message(name, size))
        if label is not None:
            self._check_labels(label)
            known = self.label_embedding(label.clamp(min=0))
            emb = emb + known.masked_fill((label < 0)[:, None], 0.0)
        if vector is not None:
            emb = emb + self.vector_embedding(vector.to(emb.dtype))
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


def check_mirror(down: Sequence[Stage], up: Sequence[Stage]) -> None:
    """Raise ValueError for a way up that does not meet the way down at each resolution."""
    shapes = [[(stage.depth, stage.channel_mult) for stage in way] for way in (down, up)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "up_stages must have the depths and channel_mults of stages, in the same order: "
            f"{shapes[1]} is not {shapes[0]}"
        )


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
