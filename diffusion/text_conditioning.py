"""How does a caption become what a network is conditioned on?

Through one text transformer (Stable Diffusion 1 and 2, latent diffusion), or through two and the image's sizes (XL).
Captions become token ids in windows of the tokenizer's length, which `encode` reads one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion import prompts
from diffusion.conditioner import Conditioner, JointInput, Prepared, alike_parts, shown
from diffusion.models.layers import timestep_embedding
from diffusion.models.text import TextTransformer
from diffusion.tokenizer import ClipTokenizer, Tokenizer

LONG_PROMPTS = ("cut", "chunk")
ABSENT = -1  # instead of ids: a window that this row has not, while its neighbours have one; nobody looks at it
NULL = -2  # instead of ids: the null condition, where that is zeros
SCORE, NULL_SCORE = 6.0, 2.5  # the aesthetic scores that XL's refiner is asked for and steered away from


class TextConditioner(Conditioner):
    """Captions through a text transformer: `context` is one of its hidden states, token by token.

    layer: "last", "penultimate" or a negative index into the hidden states; `final_norm` applies the transformer's last
    norm to it. Stable Diffusion 1 is ("last", True, pad "end"), 2 ("penultimate", True, "zero"), XL ("penultimate",
    False). `pooled` adds `vector`: the (projected) state at the caption's end. `masked` adds `context_mask`, False on
    the padding, and hides that from the encoder too. `max_length` below the encoder's makes shorter contexts.
    tokenizer: CLIP's with `max_length` and `pad` unless another is given. `zero_null` makes the null condition zeros
    instead of the empty caption (XL).

    What a user may choose, here or later by setting the attribute: `clip_skip` counts the layers from the end whose
    state is taken, 1 as trained; as AUTOMATIC1111 and ComfyUI count, so that 2 changes nothing where the model is
    trained on the penultimate layer. long_prompt "cut" drops what does not fit, with a warning that shows the words;
    "chunk" makes the contexts of as many windows as are needed, one after the other. `emphasis` reads the weights of
    `(word:1.3)`, see `prompts.py`; both do as AUTOMATIC1111 does. They are off by default.

    frozen: never trained, always in eval mode, no gradients. weights: a .safetensors file in the names of transformers
    or open_clip, or a whole checkpoint that holds them; it is read once, here, and not on the meta device. A model
    rebuilt from its own checkpoint has weights=None.
    """

    entry = "caption"

    def __init__(
        self,
        encoder: TextTransformer,
        *,
        max_length: int | None = None,
        pad: str = "end",
        layer: str | int = "last",
        final_norm: bool = True,
        pooled: bool = False,
        masked: bool = False,
        frozen: bool = False,
        weights: str | Path | None = None,
        tokenizer: Tokenizer | None = None,
        zero_null: bool = False,
        clip_skip: int = 1,
        long_prompt: str = "cut",
        emphasis: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            length = encoder.max_length if max_length is None else max_length
            tokenizer = ClipTokenizer(length, pad=pad, vocab_size=encoder.vocab_size)
        if tokenizer.max_length > encoder.max_length:
            raise ValueError(
                f"max_length={tokenizer.max_length}, but the text transformer has {encoder.max_length} positions; "
                "lower it, or raise the encoder's max_length"
            )
        self.tokenizer = tokenizer
        self.layer = _layer_index(layer, len(encoder.blocks))
        self.encoder = encoder
        self.final_norm, self.pooled, self.masked, self.frozen = final_norm, pooled, masked, frozen
        self.zero_null = zero_null
        self.clip_skip, self.long_prompt, self.emphasis = clip_skip, long_prompt, emphasis
        self.provides = {"context": encoder.channels}
        if pooled:
            self.provides["vector"] = encoder.projection_channels or encoder.channels
        _read(encoder, weights)
        if frozen:
            encoder.requires_grad_(False).eval()

    @property
    def clip_skip(self) -> int:
        return self._clip_skip

    @clip_skip.setter
    def clip_skip(self, value: int) -> None:
        depth = len(self.encoder.blocks)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= depth:
            raise ValueError(f"clip_skip={value!r}; choose 1 (as trained) to {depth}, the text transformer's layers")
        self._clip_skip = value

    @property
    def long_prompt(self) -> str:
        return self._long_prompt

    @long_prompt.setter
    def long_prompt(self, value: str) -> None:
        if value not in LONG_PROMPTS:
            raise ValueError(f"long_prompt={value!r} is unknown; choose 'cut' or 'chunk'")
        self._long_prompt = value

    @property
    def emphasis(self) -> bool:
        return self._emphasis

    @emphasis.setter
    def emphasis(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"emphasis={value!r}; choose true or false")
        self._emphasis = value

    def train(self, mode: bool = True) -> "TextConditioner":
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def prepare(self, values: str | Sequence[str]) -> Prepared:
        """Token ids (B, windows * max_length) of captions, with their weights where `emphasis` is on.

        Words that do not fit are reported by a warning.
        """
        captions = [values] if isinstance(values, str) else values
        if isinstance(captions, Tensor) or not isinstance(captions, Sequence):
            raise ValueError(_not_text(captions))
        for number, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"caption {number} is not text: {_not_text(caption)}")
        if not self.emphasis and self.long_prompt == "cut":
            return self.tokenizer(captions)
        chunk = self.long_prompt == "chunk"
        rows = [prompts.windows(c, self.tokenizer, emphasis=self.emphasis, chunk=chunk) for c in captions]
        return self._stacked(rows)

    def _stacked(self, rows: Sequence[Sequence[prompts.Window]]) -> Prepared:
        """One row a caption, of as many windows as the longest has."""
        count, length = max(map(len, rows), default=1), self.tokenizer.max_length
        ids = torch.full((len(rows), count, length), ABSENT)
        weights = torch.ones(ids.shape)
        for i, row in enumerate(rows):
            for j, window in enumerate(row):
                ids[i, j] = torch.tensor(self.tokenizer.padded(window.ids))
                weights[i, j, 1 : 1 + len(window.weights)] = torch.tensor(window.weights)
        return JointInput((ids.flatten(1), weights.flatten(1))) if self.emphasis else ids.flatten(1)

    def null_like(self, prepared: Prepared) -> Prepared:
        if isinstance(prepared, JointInput):
            ids, weights = prepared.parts
            return JointInput((self.null_like(ids), torch.ones_like(weights)))
        length = self.tokenizer.max_length
        null = torch.full_like(prepared, ABSENT)
        null[:, :length] = NULL if self.zero_null else self.tokenizer.empty[: prepared.shape[1]].to(prepared.device)
        return null

    def alike(self, one: Prepared, other: Prepared) -> tuple[Prepared, Prepared]:
        """Windows that nobody looks at fill the shorter one up."""
        if isinstance(one, JointInput):
            (ids, weights), (others, other_weights) = one.parts, other.parts
            pairs = _filled(ids, others, ABSENT), _filled(weights, other_weights, 1.0)
            return tuple(JointInput(parts) for parts in zip(*pairs, strict=True))
        return _filled(one, other, ABSENT)

    def encode(self, prepared: Prepared) -> dict[str, Tensor]:
        ids, weights = prepared.parts if isinstance(prepared, JointInput) else (prepared, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if ids.device.type == "cpu" and len(ids) and bool((ids[:, 0] == NULL).all()):
                return self._zeros(ids)  # elsewhere the question would wait for the device
            return self._encode(ids, weights)

    def _zeros(self, ids: Tensor) -> dict[str, Tensor]:
        like = self.encoder.norm_out.weight
        condition = {"context": like.new_zeros((*ids.shape, self.provides["context"]))}
        if self.pooled:
            condition["vector"] = like.new_zeros((len(ids), self.provides["vector"]))
        return condition | self._seen(ids, torch.ones_like(ids, dtype=torch.bool) if self.masked else None)

    def _encode(self, ids: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        length = min(ids.shape[1], self.tokenizer.max_length)
        tokens = ids.clamp(min=0).view(-1, length)
        mask = self._mask(tokens) if self.masked else None
        depth, layer = len(self.encoder.blocks), min(self.layer, -self.clip_skip)
        states = self.encoder(tokens, mask, num_layers=depth if self.pooled else depth + 1 + layer)
        context = states[layer if self.pooled else -1]
        context = self.encoder.norm_out(context) if self.final_norm else context
        if weights is not None:
            context = emphasised(context, weights.view(-1, length))
        condition = {"context": context.reshape(*ids.shape, -1)} | self._seen(ids, mask)
        if self.pooled:
            firsts = slice(None, None, ids.shape[1] // length)
            last = self.encoder.norm_out(states[-1][firsts])
            vector = self.encoder.pool(last, tokens[firsts], end=self.tokenizer.end)
            condition["vector"] = vector if self.encoder.projection is None else self.encoder.projection(vector)
        if self.zero_null:
            null = ids[:, :1] == NULL
            condition["context"] = condition["context"].masked_fill(null[..., None], 0)
            if self.pooled:
                condition["vector"] = condition["vector"].masked_fill(null, 0)
        return condition

    def _seen(self, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The mask of the context: of the caption without its padding, and of windows that are there."""
        if ids.shape[1] > self.tokenizer.max_length:
            present = ids != ABSENT
            return {"context_mask": present if mask is None else present & mask.view(ids.shape)}
        return {} if mask is None else {"context_mask": mask.view(ids.shape)}

    def _mask(self, tokens: Tensor) -> Tensor:
        """True up to the first end token and on it."""
        ends = (tokens == self.tokenizer.end).int()
        return ends.cumsum(dim=1) == ends


def emphasised(context: Tensor, weights: Tensor) -> Tensor:
    """States (B, L, C) times their tokens' weights (B, L), and each window scaled to the mean that it had.

    AUTOMATIC1111's "Original" emphasis; it encodes one text at a time.
    """
    weighted = context * weights[..., None].to(context.dtype)
    dtype = torch.promote_types(context.dtype, torch.float32)
    before, after = (states.mean(dim=(1, 2), keepdim=True, dtype=dtype) for states in (context, weighted))
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, weighted * (before / after).to(context.dtype), context)


def _of_all(name: str) -> property:
    """A setting that `texts` share."""

    def change(self: nn.Module, value: Any) -> None:
        for text in self.texts:
            setattr(text, name, value)

    return property(lambda self: getattr(self.texts[0], name), change)


class XLConditioner(Conditioner):
    """Stable Diffusion XL's conditions: the contexts of `texts` side by side, and what is known of the picture.

    `vector` is the pooled text of the last of `texts`, the only pooled one, and after it, `size_channels` sinusoids
    for each number of "sizes": height and width of the original picture, top and left of the crop, then height and
    width asked for or, with `aesthetic` (the refiner), a score from 0 to 10. See `sizes_of`.

    zero_null: without a caption, contexts and pooled text are zeros instead of the empty caption's. `clip_skip`,
    `long_prompt` and `emphasis` are those of all texts. image_size: H = W, or (H, W), for `prepare` without sizes.
    weights: a .safetensors file that has the towers of all texts, as in `TextConditioner`.
    """

    entry = "caption"

    def __init__(
        self,
        texts: Sequence[TextConditioner],
        *,
        size_channels: int = 256,
        aesthetic: bool = False,
        zero_null: bool = True,
        image_size: int | Sequence[int] = 1024,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if [text.pooled for text in texts] != [False] * (len(texts) - 1) + [True]:
            raise ValueError("XL takes its vector from its last text transformer: set pooled=True there and only there")
        if len({text.tokenizer.max_length for text in texts}) > 1:
            raise ValueError("contexts stand side by side: give all text transformers one max_length")
        self.texts = nn.ModuleList(texts)
        self.size_channels, self.aesthetic, self.zero_null = size_channels, aesthetic, zero_null
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        for text in texts:
            text.zero_null = zero_null
            _read(text.encoder, weights)
        self.num_sizes = 5 if aesthetic else 6
        self.provides = {
            "context": sum(text.provides["context"] for text in texts),
            "vector": texts[-1].provides["vector"] + self.num_sizes * size_channels,
        }

    clip_skip, long_prompt, emphasis = _of_all("clip_skip"), _of_all("long_prompt"), _of_all("emphasis")

    @property
    def entries(self) -> tuple[str, ...]:
        return ("caption", "sizes")

    def sizes_of(
        self,
        height: int,
        width: int,
        *,
        original: Sequence[int] | None = None,
        crop: Sequence[int] = (0, 0),
        score: float | None = None,
        negative: bool = False,
    ) -> list[float]:
        """The "sizes" of one picture: `original` (H, W) is as the picture itself unless given, `crop` (top, left).

        score: the aesthetic one of the refiner, by default 6, or 2.5 if the picture is one to steer away from.
        """
        original = (height, width) if original is None else original
        if self.aesthetic:
            default = NULL_SCORE if negative else SCORE
            return [*map(float, (*original, *crop)), default if score is None else float(score)]
        return [*map(float, (*original, *crop, height, width))]

    def prepare(self, values: str | Sequence[str], sizes: Any = None) -> JointInput:
        """Token ids for each text transformer, then sizes (B, 6), or (B, 5) with a score; one row of them is for all.

        Without sizes, pictures of `image_size` are asked for, uncropped.
        """
        texts = [text.prepare(values) for text in self.texts]
        sizes = self.sizes_of(*self.image_size) if sizes is None else sizes
        sizes = torch.as_tensor(sizes, dtype=torch.float32)
        if sizes.shape not in ((self.num_sizes,), (len(texts[0]), self.num_sizes)):
            last = "an aesthetic score" if self.aesthetic else "height and width asked for"
            raise ValueError(
                f"sizes must be {self.num_sizes} numbers a sample (original height and width, crop top and left, "
                f"{last}), got {shown(sizes)} for {len(texts[0])} captions"
            )
        return JointInput((*texts, sizes.expand(len(texts[0]), -1)))

    def null_like(self, prepared: JointInput) -> JointInput:
        *texts, sizes = prepared.parts
        if self.aesthetic:
            sizes = torch.cat([sizes[:, :-1], torch.full_like(sizes[:, -1:], NULL_SCORE)], dim=1)
        return JointInput((*(text.null_like(part) for text, part in zip(self.texts, texts, strict=True)), sizes))

    def alike(self, one: JointInput, other: JointInput) -> tuple[JointInput, JointInput]:
        texts = alike_parts(self.texts, JointInput(one.parts[:-1]), JointInput(other.parts[:-1]))
        pairs = zip(texts, (one, other), strict=True)
        return tuple(JointInput((*text.parts, whole.parts[-1])) for text, whole in pairs)

    def encode(self, prepared: JointInput) -> dict[str, Tensor]:
        *parts, sizes = prepared.parts
        conditions = [text.encode(part) for text, part in zip(self.texts, parts, strict=True)]
        pooled = conditions[-1]["vector"]
        embedded = timestep_embedding(sizes.flatten(), self.size_channels).view(len(sizes), -1)
        context = torch.cat([condition["context"] for condition in conditions], dim=2)
        vector = torch.cat([pooled, embedded.to(pooled.dtype)], dim=1)
        return conditions[-1] | {"context": context, "vector": vector}


def text_parts(conditioner: nn.Module) -> list[TextConditioner]:
    """All conditioners within this one that read captions, to set their `clip_skip`, `long_prompt` or `emphasis`."""
    return [part for part in conditioner.modules() if isinstance(part, TextConditioner)]


def _filled(one: Tensor, other: Tensor, value: float) -> tuple[Tensor, Tensor]:
    """Both of the longer one's length (B, L)."""
    length = max(one.shape[1], other.shape[1])
    return tuple(F.pad(part, (0, length - part.shape[1]), value=value) for part in (one, other))


def _read(encoder: TextTransformer, weights: str | Path | None) -> None:
    """Fill an encoder from a file, if there is one to read and memory to fill."""
    if weights is not None and not encoder.token_embedding.weight.is_meta:
        from diffusion.pretrained.text_files import load_text_weights

        load_text_weights(encoder, weights)


def _layer_index(layer: str | int, num_layers: int) -> int:
    index = {"last": -1, "penultimate": -2}.get(layer, layer)
    if not isinstance(index, int) or not -num_layers - 1 <= index <= -1:
        raise ValueError(
            f"layer={layer!r} is not one of a text transformer of {num_layers} layers; choose 'last', 'penultimate' "
            f"or -1 (the last) to -{num_layers + 1} (the embeddings)"
        )
    return index


def _not_text(value: Any) -> str:
    return (
        f"this model is conditioned on captions, but got {shown(value)}; "
        'give texts (prompt="..." when sampling, data with captions when training)'
    )
