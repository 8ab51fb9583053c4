"""Where in a file are the weights of a text transformer, and in whose names?

A file may be a text encoder alone, a whole CLIP, a Stable Diffusion checkpoint or one of our own models; only the
tensors of the text transformer are read from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffusion.models.text import TextTransformer
from diffusion.pretrained import open_clip, transformers
from diffusion.pretrained.keymap import KeyMap, Rule

Shapes = Mapping[str, tuple[int, ...]]
TOKENS = "token_embedding.weight"
IMAGE_HALF = ("visual.", "vision_model.", "visual_projection.")


@dataclass(frozen=True)
class Tower:
    """A text transformer within a file: `keys` leads from its names, as the tables know them, to the file's."""

    layout: str  # "transformers", "open_clip" or "ours"
    prefix: str
    keys: Mapping[str, str]
    shapes: Shapes  # by the file's names

    def __str__(self) -> str:
        vocab_size, channels = self.size
        where = f" below {self.prefix}" if self.prefix else ""
        return f"{self.layout} names{where}: {self.num_layers} layers of {channels} channels, {vocab_size} tokens"

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and channels."""
        return self.shapes[next(key for key in self.keys.values() if key.endswith(TOKENS))]

    @property
    def num_layers(self) -> int:
        norm = {"transformers": "layer_norm1", "open_clip": "ln_1", "ours": "norm_attention"}[self.layout]
        return sum(key.endswith(f".{norm}.weight") for key in self.keys)

    @property
    def harmless(self) -> tuple[str, ...]:
        """Known keys that are no weights of a text transformer."""
        modules = {"transformers": transformers, "open_clip": open_clip}
        return modules[self.layout].HARMLESS_KEYS if self.layout in modules else ()

    def table(self, net: TextTransformer) -> KeyMap:
        if self.layout == "ours":
            return KeyMap(net, (Rule(name, (name,)) for name in net.state_dict()))
        return KeyMap(net, {"transformers": transformers, "open_clip": open_clip}[self.layout].text_rules(net))


def find_towers(shapes: Shapes) -> list[Tower]:
    """All text transformers among a file's tensors, recognised by the names of their embeddings."""
    towers = []
    for name in shapes:
        prefix = name.removesuffix(TOKENS)
        if not name.endswith(TOKENS) or (prefix and not prefix.endswith(".")):
            continue
        if prefix.endswith("embeddings.") and f"{prefix}position_embedding.weight" in shapes:
            root = prefix.removesuffix("embeddings.")
            # transformers 5 drops `text_model.` from the names of a model in memory.
            layout, prefix, named = "transformers", root.removesuffix("text_model."), root.endswith("text_model.")
        elif f"{prefix}positional_embedding" in shapes:
            layout, named = "open_clip", True
        elif f"{prefix}position_embedding.weight" in shapes:
            layout, named = "ours", True
        else:
            continue
        keys = {}
        for key in shapes:
            rest = key.removeprefix(prefix)
            if key.startswith(prefix) and not rest.startswith(IMAGE_HALF):
                keys[rest if named or rest == "text_projection.weight" else f"text_model.{rest}"] = key
        towers.append(Tower(layout, prefix, keys, shapes))
    return towers


def load_text_weights(net: TextTransformer, path: str | Path) -> list[str]:
    """Fill `net` from a .safetensors file, strictly; return the file's keys of that tower that are not used.

    Those are position_ids, logit_scale and the like, and a projection where `net` has none. Raises ValueError with
    every key that does not fit, or if the file holds no text transformer or several of this size.
    """
    path = _checked(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            tower = _choose(find_towers(shapes), net, path)
            unused = set(tower.harmless)
            if net.projection is None:
                unused |= {"text_projection", "text_projection.weight", "projection.weight"}
            weights = {name: file.get_tensor(key) for name, key in tower.keys.items() if name not in unused}
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}); take another copy of it") from error
    try:
        net.load_state_dict(tower.table(net).to_ours(weights))
    except ValueError as error:
        raise ValueError(
            f"{path} holds a text transformer in {tower}; the encoder has {len(net.blocks)} layers of {net.channels} "
            f"channels, {net.vocab_size} tokens, {net.max_length} positions: {error}"
        ) from error
    return [key for name, key in tower.keys.items() if name in unused]


def _checked(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the .safetensors file in it")
    if not path.exists():
        raise ValueError(f"there is no {path}, from which the text encoder's weights were to be read")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file; others can run code when read and are not taken")
    return path


def _choose(towers: list[Tower], net: TextTransformer, path: Path) -> Tower:
    """The only tower, or the only one of this size."""
    fits = [tower for tower in towers if tower.size == (net.vocab_size, net.channels)]
    chosen = towers if len(towers) == 1 else fits
    if len(chosen) == 1:
        return chosen[0]
    if not towers:
        raise ValueError(
            f"{path} holds no text transformer in the names of transformers (text_model.embeddings...), open_clip "
            "(token_embedding, positional_embedding) or ours"
        )
    found = "; ".join(map(str, towers))
    raise ValueError(
        f"{path} holds {len(fits)} text transformers of {net.channels} channels and {net.vocab_size} tokens ({found}); "
        "give a file with the wanted one alone"
    )
