"""How does a caption become the context that a denoiser attends to?

CLIP's text tower (Radford et al. 2021, arXiv 2103.00020), which Stable Diffusion uses frozen; without the causal mask
it is the bidirectional transformer that latent diffusion first trained along with the denoiser (arXiv 2112.10752).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.models.layers import TokenLinear, add


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU; ViT-L/14 was trained with it, OpenCLIP's towers with the exact function."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class EncoderBlock(nn.Module):
    """Self-attention and a two-layer perceptron, each after a LayerNorm and added to its input.

    `head_channels` is the width of a head, by default channels / num_heads; `qkv_bias=False` leaves the biases of
    queries, keys and values away, all other layers have theirs.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        head_channels: int | None = None,
        qkv_bias: bool = True,
        hidden_channels: int | None = None,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_channels is None and channels % num_heads):
            raise ValueError(f"{channels} channels cannot be split into {num_heads} heads; choose a divisor")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        hidden_channels = 4 * channels if hidden_channels is None else hidden_channels
        inner = channels if head_channels is None else num_heads * head_channels
        self.num_heads, self.activation = num_heads, activation
        self.norm_attention = nn.LayerNorm(channels, eps=norm_eps)
        self.qkv = TokenLinear(channels, 3 * inner, bias=qkv_bias)
        self.out = TokenLinear(inner, channels)
        self.norm_feedforward = nn.LayerNorm(channels, eps=norm_eps)
        self.expand = TokenLinear(channels, hidden_channels)
        self.contract = TokenLinear(hidden_channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """x (B, L, C); mask broadcasts to (B, heads, L, L), True = may look. `causal` counts only without a mask."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal and mask is None)
        x = add(self.out(h.transpose(1, 2).flatten(2)), x)
        return add(self.contract(ACTIVATIONS[self.activation](self.expand(self.norm_feedforward(x)))), x)

    def initialise(self, depth: int) -> None:
        """CLIP's normal weights for a tower of `depth` blocks: what adds to the residual stream shrinks with depth."""
        width = self.qkv.in_features
        residual = (2 * depth * width) ** -0.5
        for layer, std in (
            (self.qkv, width**-0.5),
            (self.out, residual),
            (self.expand, (2 * width) ** -0.5),
            (self.contract, residual),
        ):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class TextTransformer(nn.Module):
    """Token ids (B, L) -> the hidden states after every layer.

    The defaults are OpenAI's (ViT-B/32); `causal=False` lets every token look both ways. `head_channels` and `qkv_bias`
    are the blocks'; latent diffusion's own encoder has 8 heads of 64 in 1280 channels, without biases, and looks both
    ways. `projection_channels` adds the
    linear map, without bias, that takes the pooled state to the space shared with images. `embedding_std` is that of
    the initial token embeddings, twice the positions': larger ones leave more of each word in its own hidden state,
    which small models trained from scratch need to compose words that they have not seen together.
    """

    def __init__(
        self,
        vocab_size: int = 49408,
        channels: int = 512,
        *,
        num_layers: int = 12,
        num_heads: int = 8,
        head_channels: int | None = None,
        qkv_bias: bool = True,
        max_length: int = 77,
        hidden_channels: int | None = None,
        activation: str = "quick_gelu",
        causal: bool = True,
        projection_channels: int | None = None,
        norm_eps: float = 1e-5,
        embedding_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("num_layers", num_layers), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name}={value}; a text transformer needs at least 1")
        self.vocab_size, self.channels, self.max_length, self.causal = vocab_size, channels, max_length, causal
        self.projection_channels = projection_channels
        block = {"num_heads": num_heads, "head_channels": head_channels, "qkv_bias": qkv_bias}
        block |= {"hidden_channels": hidden_channels, "activation": activation, "norm_eps": norm_eps}
        self.token_embedding = nn.Embedding(vocab_size, channels)
        self.position_embedding = nn.Embedding(max_length, channels)
        self.blocks = nn.ModuleList(EncoderBlock(channels, **block) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(channels, eps=norm_eps)
        self.projection = None
        if projection_channels is not None:
            self.projection = nn.Linear(channels, projection_channels, bias=False)
        self._initialise(embedding_std)

    def _initialise(self, embedding_std: float) -> None:
        nn.init.normal_(self.token_embedding.weight, std=embedding_std)
        nn.init.normal_(self.position_embedding.weight, std=embedding_std / 2)
        for block in self.blocks:
            block.initialise(len(self.blocks))
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.channels**-0.5)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, num_layers: int | None = None) -> list[Tensor]:
        """Hidden states [0] after the embeddings and [k] after layer k, each (B, L, C) and before `norm_out`.

        mask (B, L) is True for tokens that may be looked at. `num_layers` runs only the first so many.
        """
        self._check(tokens)
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        allowed = None if mask is None else self._allowed(mask.bool())
        states = [x]
        for block in self.blocks[:num_layers]:
            states.append(block(states[-1], allowed, causal=self.causal))
        return states

    def pool(self, last: Tensor, tokens: Tensor, *, end: int | None = None) -> Tensor:
        """The state (B, C) at each caption's end: the first token `end`, or the largest id, which is CLIP's end token.

        last: (B, L, C), usually `norm_out` of the last hidden state. A caption without `end` yields its first state.
        """
        position = (tokens if end is None else (tokens == end).int()).argmax(dim=1)
        return last[torch.arange(len(tokens), device=last.device), position]

    def _allowed(self, mask: Tensor) -> Tensor:
        """The mask of the attention, (B, 1, L, L) or (B, 1, 1, L)."""
        allowed = mask[:, None, None, :]
        if self.causal:
            allowed = allowed & torch.ones(2 * mask.shape[-1:], dtype=torch.bool, device=mask.device).tril()
        return allowed

    def _check(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be (B, L) integers, got {tuple(tokens.shape)} of {tokens.dtype}")
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f"{tokens.shape[1]} tokens a caption, but this text transformer has {self.max_length} positions; "
                "shorten the captions or build it with a larger max_length"
            )
        # On an accelerator this would wait for the device; the embedding fails there by itself.
        if tokens.device.type != "cpu" or torch.compiler.is_compiling() or tokens.numel() == 0:
            return
        low, high = tokens.aminmax()
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token ids from {int(low)} to {int(high)} given, but the vocabulary has {self.vocab_size}; "
                "use the tokenizer that belongs to this text transformer"
            )
