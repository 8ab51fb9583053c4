"""Which numbers does a text encoder see for a caption, and which words does it not see at all?

CLIP's byte pair encoding, from open_clip, which carries the vocabulary with it, and BERT's word pieces, from a
vocabulary that is given; padding and truncation made explicit.
"""

import gzip
import re
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 49408  # of CLIP; its last two ids are the start and the end of a text
PADDINGS = ("end", "zero")
WARNINGS = 3  # of one tokenizer about captions cut off; training on long captions would never stop


class Tokenizer(ABC):
    """Captions -> ids (B, max_length) int64: start, the text, end, then padding.

    `encode` gives a text's ids alone, without start and end; there may be as many as there are.
    """

    def __init__(self, max_length: int, *, start: int, end: int, padding: int) -> None:
        if max_length < 3:
            raise ValueError(f"max_length={max_length} leaves no room for a word between start and end; at least 3")
        self.max_length, self.start, self.end, self.padding = max_length, start, end, padding
        self._reported: set[str] = set()

    @abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text without start and end."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids from `encode`, lower-cased."""

    @abstractmethod
    def word_ends(self, ids: Sequence[int]) -> list[bool]:
        """Where among ids from `encode` a word ends."""

    @property
    def room(self) -> int:
        """How many ids of a text fit."""
        return self.max_length - 2

    @property
    def empty(self) -> Tensor:
        """The ids (max_length,) of the empty caption; needs no vocabulary."""
        return torch.tensor(self.padded(()))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        rows = [self.encode(caption) for caption in captions]
        self.report((caption, row) for caption, row in zip(captions, rows, strict=True))
        return torch.tensor([self.padded(row) for row in rows], dtype=torch.long).view(-1, self.max_length)

    def padded(self, ids: Sequence[int]) -> list[int]:
        """Ids from `encode`, as many as fit, between start and end, and padding."""
        kept = [self._folded(i) for i in ids[: self.room]]
        return [self.start, *kept, self.end] + [self.padding] * (self.room - len(kept))

    def _folded(self, i: int) -> int:
        return i

    def lost(self, caption: str | Sequence[int]) -> str:
        """The words of a caption, or of its ids, that do not fit; one that is cut in its middle counts as lost."""
        ids = self.encode(caption) if isinstance(caption, str) else tuple(caption)
        room = self.room
        if len(ids) <= room:
            return ""
        ends = self.word_ends(ids)
        while room and not ends[room - 1]:
            room -= 1
        return self.decode(ids[room:]).strip()

    def report(self, encoded: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Warn once of each caption that is cut off, with the words lost, and not of many."""
        new = {caption: ids for caption, ids in encoded if len(ids) > self.room and caption not in self._reported}
        if not new or len(self._reported) >= WARNINGS:
            return
        names = list(new)[: WARNINGS - len(self._reported)]
        self._reported.update(names)
        cuts = "\n".join(f"  {_shortened(name)!r} loses {_shortened(self.lost(new[name]), 200)!r}" for name in names)
        more = f"\n  and {len(new) - len(names)} more" if len(new) > len(names) else ""
        last = "\n(later ones are not reported)" if len(self._reported) >= WARNINGS else ""
        warnings.warn(
            f"captions longer than {self.room} tokens are cut off, the end is not seen (long_prompt=chunk reads it, "
            f"too):\n{cuts}{more}{last}",
            stacklevel=3,
        )


def _shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _open_clip() -> Path:
    """The folder of open_clip, which is not imported: its tokenizer's module and vocabulary are all that is used."""
    package = find_spec("open_clip")
    if package is None:
        raise ImportError("captions need open_clip's tokenizer; install open-clip-torch")
    return Path(package.submodule_search_locations[0])


@cache
def _clip() -> Any:
    """open_clip's tokenizer, when the first caption is there. Its module alone: the package takes 2 s, this 0.3 s."""
    spec = spec_from_file_location("open_clip_tokenizer", _open_clip() / "tokenizer.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their ids, and its merges in order, as in transformers' vocab.json and merges.txt.

    Read from the vocabulary's own file: open_clip's tokenizer takes ten times the memory of what is written of it.
    """
    text = gzip.decompress((_open_clip() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    merges = text.split("\n")[1 : VOCAB_SIZE - 2 * 256 - 2 + 1]
    # GPT-2's bytes: the printable ones first, then the others, which are written with the letters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}, merges


@lru_cache(maxsize=2**16)
def _encoded(caption: str) -> tuple[int, ...]:
    """The ids of a caption without start and end; kept, because training sees the same captions again."""
    return tuple(_clip().encode(caption))


class ClipTokenizer(Tokenizer):
    """CLIP's tokens; ftfy mends the text first (curly quotes, ligatures), as in open_clip and, if there, transformers.

    pad: "end" repeats the end token (Stable Diffusion 1, OpenAI's CLIP in transformers), "zero" writes 0 (open_clip,
    Stable Diffusion 2, SDXL's second encoder). A `vocab_size` below CLIP's folds the ids into it (the hashing trick),
    so that a small model of few words need not hold 49408 rows; start and end are always the last two.
    """

    def __init__(self, max_length: int = 77, *, pad: str = "end", vocab_size: int = VOCAB_SIZE) -> None:
        if pad not in PADDINGS:
            raise ValueError(f"pad={pad!r} is unknown; choose 'end' (Stable Diffusion 1) or 'zero' (2, open_clip)")
        if vocab_size < 3:
            raise ValueError(f"vocab_size={vocab_size} leaves no id for a word beside start and end; at least 3")
        words = min(vocab_size, VOCAB_SIZE) - 2
        super().__init__(max_length, start=words, end=words + 1, padding=words + 1 if pad == "end" else 0)
        self.num_words = words

    def encode(self, text: str) -> tuple[int, ...]:
        return _encoded(text)

    def decode(self, ids: Sequence[int]) -> str:
        return _clip().decode(list(ids))

    def word_ends(self, ids: Sequence[int]) -> list[bool]:
        return [_clip().decoder[i].endswith("</w>") for i in ids]

    def _folded(self, i: int) -> int:
        special = i - (VOCAB_SIZE - 2)  # CLIP reads "<end_of_text>" within a caption as the token itself
        return i % self.num_words if special < 0 else self.start + special


BERT_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
LONGEST_WORD = 100  # characters; longer ones are unknown
LARGEST_VOCABULARY = 16 * 2**20  # bytes; BERT's has a quarter of a million


class WordPieceTokenizer(Tokenizer):
    """BERT's word pieces (arXiv 1609.08144), lower-cased and without accents, as latent diffusion's text models read.

    vocabulary: BERT's vocab.txt, one token a line (that of bert-base-uncased for the published model), read when the
    first caption is there; it may be set later, and the empty caption needs none.
    """

    def __init__(self, max_length: int = 77, *, vocabulary: str | Path | None = None) -> None:
        special = {"start": BERT_SPECIAL["[CLS]"], "end": BERT_SPECIAL["[SEP]"], "padding": BERT_SPECIAL["[PAD]"]}
        super().__init__(max_length, **special)
        self.vocabulary = vocabulary

    def encode(self, text: str) -> tuple[int, ...]:
        vocabulary = self._read()
        ids: list[int] = []
        for word in _bert_words(text):
            ids += [BERT_SPECIAL[word]] if word in BERT_SPECIAL else _pieces(word, vocabulary)
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        tokens = list(self._read())
        return " ".join(tokens[i] for i in ids).replace(" ##", "")

    def word_ends(self, ids: Sequence[int]) -> list[bool]:
        tokens = list(self._read())
        return [not tokens[i].startswith("##") for i in ids[1:]] + [True]

    def _read(self) -> Mapping[str, int]:
        if self.vocabulary is None:
            raise ValueError(
                "this model's captions are word pieces of BERT's vocabulary, which its weights do not hold; give the "
                "vocab.txt of bert-base-uncased: tokenizer=FILE"
            )
        return _vocabulary(str(self.vocabulary))


@cache
def _vocabulary(path: str) -> Mapping[str, int]:
    """Token -> id, in the order of the file's lines. Raises ValueError for what is no vocabulary of BERT's kind."""
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "vocab.txt"
    if not file.is_file() or file.stat().st_size > LARGEST_VOCABULARY:
        raise ValueError(
            f"{file} is no vocabulary; tokenizer=FILE is a text file of one token a line (BERT's vocab.txt)"
        )
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text ({error}); tokenizer=FILE is BERT's vocab.txt") from error
    tokens = {token.rstrip("\r"): number for number, token in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    if wrong := [f"{token} is {tokens.get(token)}" for token, i in BERT_SPECIAL.items() if tokens.get(token) != i]:
        raise ValueError(
            f"{file} is not the vocabulary that the model was trained with: {', '.join(wrong)}; take the vocab.txt of "
            "bert-base-uncased"
        )
    return tokens


def _bert_words(text: str) -> Iterator[str]:
    """Words and punctuation marks, lower-cased, without accents and control characters; special tokens as they are."""
    for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text):
        if part in BERT_SPECIAL:
            yield part
            continue
        kept = "".join(_spaced(character) for character in part)
        plain = unicodedata.normalize("NFD", kept.lower())
        plain = "".join(character for character in plain if unicodedata.category(character) != "Mn")
        yield from "".join(f" {c} " if _is_mark(c) else c for c in plain).split()


def _spaced(character: str) -> str:
    """A character as BERT cleans it: controls vanish, white space is a blank, each Chinese character is a word."""
    if character in "\t\n\r" or unicodedata.category(character) == "Zs":
        return " "
    if character in "\0\ufffd" or unicodedata.category(character).startswith("C"):
        return ""
    chinese = any(low <= ord(character) <= high for low, high in CHINESE)
    return f" {character} " if chinese else character


CHINESE = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


def _is_mark(character: str) -> bool:
    ascii_mark = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return ascii_mark or unicodedata.category(character).startswith("P")


def _pieces(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The longest pieces from the left; a word of which some part is in no piece is one unknown token."""
    if len(word) > LONGEST_WORD:
        return [BERT_SPECIAL["[UNK]"]]
    ids, start = [], 0
    while start < len(word):
        mark = "##" if start else ""
        ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in vocabulary)
        end = next(ends, None)
        if end is None:
            return [BERT_SPECIAL["[UNK]"]]
        ids.append(vocabulary[mark + word[start:end]])
        start = end
    return ids
