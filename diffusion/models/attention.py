"""How do positions of an image look at each other, and at a context such as a text?

ADM's self-attention block and the spatial transformer of latent diffusion (Rombach et al. 2022), both on
`scaled_dot_product_attention`; tokens are the pixels in row order, which channels_last memory already holds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.layers import TokenLinear, add, group_norm, zero_init


def head_layout(channels: int, num_heads: int | None, head_channels: int | None) -> tuple[int, int]:
    """(number of heads, width of a head) from whichever is fixed; both means exactly that, none means one head."""
    if num_heads is not None and head_channels is not None:
        return num_heads, head_channels
    if head_channels is not None:
        num_heads = channels // head_channels
    num_heads = 1 if num_heads is None else num_heads
    if not 1 <= num_heads <= channels:
        raise ValueError(
            f"{channels} channels leave no room for num_heads={num_heads}, head_channels={head_channels}; "
            "choose num_heads from 1 to the channels, or head_channels up to the channels"
        )
    return num_heads, channels // num_heads if head_channels is None else head_channels


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C); a view of channels_last memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W) in channels_last memory; a view."""
    return tokens.view(tokens.shape[0], height, width, -1).permute(0, 3, 1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """Multi-head softmax attention: query (B, L, H*D), key and value (B, M, H*D) -> (B, L, H*D).

    `mask` (B, M) is True where a key may be looked at.
    """
    query, key, value = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    if mask is None and _by_matrix_products(query, key):
        return _attend_by_rows(query, key, value).transpose(1, 2).flatten(2)
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def _by_matrix_products(query: Tensor, key: Tensor) -> bool:
    """bfloat16 inference on CPUs, where PyTorch's fused kernel does not use the processor's bfloat16 instructions.

    Measured on an AMD machine with 16 heads: 675 ms fused and 275 ms by products at 4096 tokens, 70 and 27 at 1024.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[-2] * key.shape[-2] >= 2**16
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _attend_by_rows(query: Tensor, key: Tensor, value: Tensor, *, rows: int = 256, cached: int = 2**21) -> Tensor:
    """Softmax attention of (B, H, L, D) tensors in portions whose weights, at most `cached`, stay in the cache."""
    heads = max(1, cached // (rows * key.shape[-2]))
    scaled, turned = query * query.shape[-1] ** -0.5, key.transpose(-1, -2)
    groups = zip(*(x.flatten(0, 1).split(heads) for x in (scaled, turned.contiguous(), value)), strict=True)
    parts = [torch.cat([(part @ k).softmax(-1) @ v for part in q.split(rows, dim=1)], dim=1) for q, k, v in groups]
    return torch.cat(parts).view_as(query)


class SelfAttention(nn.Module):
    """ADM's attention block: GroupNorm, one projection to query, key and value, attention, projection, residual.

    The projection's rows are ordered [3, heads, width]; weights in ADM's older order [heads, 3, width] are reordered on
    loading.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_channels: int | None = None,
        residual_scale: float = 1.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, width = head_layout(channels, num_heads, head_channels)
        if self.num_heads * width != channels:
            raise ValueError(
                f"self-attention cannot split {channels} channels into {self.num_heads} heads of width {width}; "
                f"choose num_heads or head_channels among the divisors of {channels}"
            )
        self.residual_scale = residual_scale
        self.norm = group_norm(norm_groups, channels, norm_eps)
        self.qkv = TokenLinear(channels, 3 * channels)
        self.out = zero_init(TokenLinear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W); the context arguments are ignored, so that a block may hold either kind of attention."""
        tokens = to_tokens(self.norm(x))
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        h = add(self.out(attend(query, key, value, self.num_heads)), to_tokens(x))
        h = to_image(h, *x.shape[-2:])
        return h if self.residual_scale == 1.0 else h * self.residual_scale


class Attention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves where there is none; projections without bias."""

    def __init__(self, channels: int, context_channels: int | None, *, num_heads: int, head_channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_channels
        self.query = TokenLinear(channels, inner, bias=False)
        self.key = TokenLinear(context_channels or channels, inner, bias=False)
        self.value = TokenLinear(context_channels or channels, inner, bias=False)
        self.out = TokenLinear(inner, channels)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, L, C), context (B, M, context_channels), mask (B, M) True = may be looked at."""
        if context is None:
            context, mask = x, None
        return self.out(attend(self.query(x), self.key(context), self.value(context), self.num_heads, mask))


class FeedForward(nn.Module):
    """Two-layer perceptron over tokens with exact GELU; `kind` "geglu" multiplies by a GELU gate (Shazeer 2020)."""

    portion = 1024  # tokens at once in inference on CPUs; fewer would read the weights too often

    def __init__(self, channels: int, kind: str = "geglu", *, mult: int = 4) -> None:
        super().__init__()
        self.gated = kind == "geglu"
        self.expand = TokenLinear(channels, channels * mult * (2 if self.gated else 1))
        self.contract = TokenLinear(channels * mult, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, C)."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return self._transform(x)
        # The hidden layer is eight times as wide as x; in portions it stays in the processor's cache.
        return torch.cat([self._transform(part) for part in x.flatten(0, 1).split(self.portion)]).view_as(x)

    def _transform(self, x: Tensor) -> Tensor:
        h = self.expand(x)
        if not self.gated:
            return self.contract(F.gelu(h))
        h, gate = h.chunk(2, dim=-1)
        gate = F.gelu(gate)
        return self.contract(h * gate if torch.is_grad_enabled() else gate.mul_(h))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and added to its input.

    With `self_attention` False the first attention looks at the context too. Without a context both look at x.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int | None,
        *,
        num_heads: int,
        head_channels: int,
        self_attention: bool = True,
        feedforward: str = "geglu",
    ) -> None:
        super().__init__()
        heads = {"num_heads": num_heads, "head_channels": head_channels}
        self.attends_itself = self_attention
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, None if self_attention else context_channels, **heads)
        self.norm_cross = nn.LayerNorm(channels)
        self.cross_attention = Attention(channels, context_channels, **heads)
        self.norm_feedforward = nn.LayerNorm(channels)
        self.feedforward = FeedForward(channels, feedforward)

    def forward(self, x: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        first = (None, None) if self.attends_itself else (context, context_mask)
        x = add(self.self_attention(self.norm_self(x), *first), x)
        x = add(self.cross_attention(self.norm_cross(x), context, context_mask), x)
        return add(self.feedforward(self.norm_feedforward(x)), x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x, between two projections, added to x.

    The projections are linear over tokens. Checkpoints that hold them as 1x1 convolutions mean the same thing; their
    key tables reshape the weight.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int | None,
        *,
        depth: int = 1,
        num_heads: int | None = None,
        head_channels: int | None = None,
        self_attention: bool = True,
        feedforward: str = "geglu",
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_heads, head_channels = head_layout(channels, num_heads, head_channels)
        inner = num_heads * head_channels
        self.norm = group_norm(norm_groups, channels, norm_eps)
        self.proj_in = TokenLinear(channels, inner)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                inner,
                context_channels,
                num_heads=num_heads,
                head_channels=head_channels,
                self_attention=self_attention,
                feedforward=feedforward,
            )
            for _ in range(depth)
        )
        self.proj_out = zero_init(TokenLinear(inner, channels))

    def forward(self, x: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), context (B, M, context_channels), context_mask (B, M) True = may be looked at."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for block in self.blocks:
            tokens = block(tokens, context, context_mask)
        return to_image(add(self.proj_out(tokens), to_tokens(x)), *x.shape[-2:])
