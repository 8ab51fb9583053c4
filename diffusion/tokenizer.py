"""Which numbers does a text encoder see for a caption, and which words does it not see at all?

CLIP's byte pair encoding, from open_clip, which carries the vocabulary with it; padding and truncation made explicit.
"""

import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 49408  # of CLIP; its last two ids are the start and the end of a text
PADDINGS = ("end", "zero")
WARNINGS = 3  # of one tokenizer about captions cut off; training on long captions would never stop


@cache
def _clip() -> Any:
    """open_clip's tokenizer, when the first caption is there. Its module alone: the package takes 2 s, this 0.3 s."""
    package = find_spec("open_clip")
    if package is None:
        raise ImportError("captions need open_clip's tokenizer; install open-clip-torch")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = spec_from_file_location("open_clip_tokenizer", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


@lru_cache(maxsize=2**16)
def _encoded(caption: str) -> tuple[int, ...]:
    """The ids of a caption without start and end; kept, because training sees the same captions again."""
    return tuple(_clip().encode(caption))


class ClipTokenizer:
    """Captions -> ids (B, max_length) int64: start, the text, end, then padding.

    pad: "end" repeats the end token (Stable Diffusion 1, OpenAI's CLIP in transformers), "zero" writes 0 (open_clip,
    Stable Diffusion 2, SDXL's second encoder). A `vocab_size` below CLIP's folds the ids into it (the hashing trick),
    so that a small model of few words need not hold 49408 rows; start and end are always the last two.
    """

    def __init__(self, max_length: int = 77, *, pad: str = "end", vocab_size: int = VOCAB_SIZE) -> None:
        if pad not in PADDINGS:
            raise ValueError(f"pad={pad!r} is unknown; choose 'end' (Stable Diffusion 1) or 'zero' (2, open_clip)")
        if max_length < 3:
            raise ValueError(f"max_length={max_length} leaves no room for a word between start and end; at least 3")
        if vocab_size < 3:
            raise ValueError(f"vocab_size={vocab_size} leaves no id for a word beside start and end; at least 3")
        words = min(vocab_size, VOCAB_SIZE) - 2
        self.max_length, self.num_words = max_length, words
        self.start, self.end = words, words + 1
        self.padding = self.end if pad == "end" else 0
        self._reported: set[str] = set()

    @property
    def empty(self) -> Tensor:
        """The ids (max_length,) of the empty caption; needs no vocabulary."""
        return torch.tensor(self._padded(()))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        self._report([caption for caption in captions if len(_encoded(caption)) > self.max_length - 2])
        return torch.tensor([self._padded(_encoded(caption)) for caption in captions]).view(-1, self.max_length)

    def lost(self, caption: str) -> str:
        """The words of a caption that do not fit, lower-cased; one that is cut in its middle counts as lost."""
        ids = _encoded(caption)
        room = self.max_length - 2
        if len(ids) <= room:
            return ""
        pieces = [_clip().decoder[i] for i in ids]
        while room and not pieces[room - 1].endswith("</w>"):
            room -= 1
        return _clip().decode(list(ids[room:])).strip()

    def _padded(self, ids: tuple[int, ...]) -> list[int]:
        kept = [self._folded(i) for i in ids[: self.max_length - 2]]
        return [self.start, *kept, self.end] + [self.padding] * (self.max_length - 2 - len(kept))

    def _folded(self, i: int) -> int:
        special = i - (VOCAB_SIZE - 2)  # CLIP reads "<end_of_text>" within a caption as the token itself
        return i % self.num_words if special < 0 else self.start + special

    def _report(self, too_long: list[str]) -> None:
        """Warn once of each caption that is cut off, with the words lost, and not of many."""
        new = [caption for caption in dict.fromkeys(too_long) if caption not in self._reported]
        if not new or len(self._reported) >= WARNINGS:
            return
        shown = new[: WARNINGS - len(self._reported)]
        self._reported.update(shown)
        cuts = "\n".join(f"  {self._shortened(c)!r} loses {self._shortened(self.lost(c), 200)!r}" for c in shown)
        more = f"\n  and {len(new) - len(shown)} more" if len(new) > len(shown) else ""
        last = "\n(later ones are not reported)" if len(self._reported) >= WARNINGS else ""
        warnings.warn(
            f"captions longer than {self.max_length - 2} tokens are cut off, the end is not seen:\n{cuts}{more}{last}",
            stacklevel=3,
        )

    @staticmethod
    def _shortened(text: str, length: int = 40) -> str:
        return text if len(text) <= length else text[: length - 3] + "..."
