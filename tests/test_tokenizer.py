"""Tokens of CLIP and BERT: padding, small vocabularies, what is cut off, how little of open_clip is needed."""

import subprocess
import sys
import warnings

import pytest
import torch

from diffusion.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from diffusion.tokenizer import VOCAB_SIZE, ClipTokenizer, WordPieceTokenizer, _encoded, clip_vocabulary

CAPTIONS = ["a red circle", "two blue squares"]


def test_tokens_are_open_clips_but_for_the_padding():
    from open_clip import tokenize

    captions = ["A  photo of a cat&amp;dog!", "", "ünïcödé 12345", "<end_of_text> inside"]
    theirs = tokenize(captions)
    assert torch.equal(ClipTokenizer(pad="zero")(captions), theirs)
    ended = ClipTokenizer()(captions)
    lengths = (ended == 49407).int().argmax(1)
    assert ended[0, 0] == 49406 and (ended[0, lengths[0] :] == 49407).all()
    assert torch.equal(ended[1:3][theirs[1:3] != 0], theirs[1:3][theirs[1:3] != 0])


PROMPTS = [
    "a photo of an astronaut riding a horse on mars, (masterpiece:1.2), [bad], \\(x\\)",
    "A  Photo, of a CAT's dog!!! don't we'll -- 12345 6.7 #1 100%",
    "\u00fcn\u00efc\u00f6d\u00e9 e\u0301tude \u4e2d\u6587 \u2603 \U0001f600",
    "tab\tnew\nline snow_white 3d-model",
    "a" * 60,
    "",
]


@pytest.mark.parametrize("pad", ["end", "zero"])
def test_tokens_are_transformers_but_for_what_ftfy_mends(pad):
    from sd_cases import tokenizer

    peer = tokenizer("<|endoftext|>" if pad == "end" else "!")
    # Where "!" is its padding, transformers reads it as padding in a text, too; open_clip's, the original, does not.
    prompts = PROMPTS if pad == "end" else [prompt.replace("!", "") for prompt in PROMPTS]
    theirs = peer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ClipTokenizer(pad=pad)(prompts), theirs)
    curly = "it\u2019s"  # transformers without ftfy reads it as three bytes, open_clip as an apostrophe
    assert _encoded(curly) == _encoded("it's") and peer(curly).input_ids[1:-1] != list(_encoded("it's"))


def test_a_small_vocabulary_folds_the_words_and_ends_with_start_and_end():
    full, small = ClipTokenizer(16), ClipTokenizer(16, vocab_size=1000)
    ids, folded = full(CAPTIONS), small(CAPTIONS)
    special = ids >= VOCAB_SIZE - 2
    assert torch.equal(folded[~special], ids[~special] % 998)
    assert torch.equal(folded[special], ids[special] - VOCAB_SIZE + 1000)
    assert ClipTokenizer(16, vocab_size=60_000)(CAPTIONS).equal(ids)


def test_the_words_of_the_shapes_stay_apart_in_4096_rows():
    words = {word for table in (SHAPES, COLOURS, SIZES, BACKGROUNDS, ("a", "on", "background")) for word in table}
    pieces = {piece for word in words for piece in _encoded(word)}
    folded = ClipTokenizer(9, vocab_size=4096)(sorted(words)).unique()
    assert len(folded) == len(pieces) + 2  # and start and end


def test_a_caption_that_is_cut_off_is_reported_once_with_the_words_lost():
    tokenizer = ClipTokenizer(6)
    long = "A red circle on a white Background"
    with pytest.warns(UserWarning) as caught:
        ids = tokenizer([long, "a circle"])
    message = str(caught[0].message)
    assert len(caught) == 1 and "longer than 4 tokens" in message
    assert "'A red circle on a white Background' loses 'a white background'" in message
    assert ids[0].tolist() == [49406, *_encoded("a red circle on"), 49407]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([long, long])
        ClipTokenizer(9)([long])


def test_reports_of_captions_cut_off_come_to_an_end():
    tokenizer = ClipTokenizer(4)
    with pytest.warns(UserWarning) as caught:
        for number in range(50):
            tokenizer([f"a red circle number {number}"])
    assert len(caught) == 3 and "later ones are not reported" in str(caught[-1].message)
    with pytest.warns(UserWarning, match="and 7 more") as caught:
        ClipTokenizer(4)([f"a red circle number {number}" for number in range(10)])
    assert len(caught) == 1


def test_a_word_cut_in_its_middle_counts_as_lost():
    caption = "one supercalifragilisticexpialidocious two"
    assert len(_encoded(caption)) > 6
    assert ClipTokenizer(6).lost(caption) == "supercalifragilisticexpialidocious two"
    assert ClipTokenizer(6).lost("one two") == ""


def test_captions_are_encoded_once():
    tokenizer, caption = ClipTokenizer(), "a caption that no other test has"
    before = _encoded.cache_info().misses
    for _ in range(5):
        tokenizer([caption] * 4)
    assert _encoded.cache_info().misses == before + 1


def test_captions_need_no_more_of_open_clip_than_its_tokenizer():
    code = """
import sys
from diffusion.conditioning import TextConditioner
from diffusion.models.text import TextTransformer
conditioner = TextConditioner(TextTransformer(300, 16, num_layers=1, num_heads=2))
tokens = conditioner.tokenizer.empty[None]
conditioner(conditioner.null_like(tokens))
assert not {"open_clip", "ftfy", "regex", "torchvision", "lightning", "hydra"} & set(sys.modules), "imported too early"
assert conditioner.prepare(["a cat"]).shape == (1, 77)
assert "ftfy" in sys.modules and not {"open_clip", "torchvision", "timm"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- BERT's word pieces ----------------------------------------------------------------------------------------------

WORDS = [*"abcdefghilnorstu12,.!?'-()$^\u4e2d", "cat", "dog", "red", "un", "able", "play", "on", "house", "the"]
PIECES = [f"##{piece}" for piece in (*"abcdefghilnorstu12", "ing", "able", "house", "ed")]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A file as BERT's: special tokens where they are in its 30,522, then words and pieces."""
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


TEXTS = [
    "a red cat, on the house!",
    "",
    "  Un-playable\tDOGHOUSE\nplaying  ",
    "Caf\u00e9 \u00fcn\u0131c\u00f6d\u00e9 Z\u00fcrich",
    "\u4e2d\u56fd cat\u4e2dcat",
    "$1^2 (dog)?",
    "cat\u200bcat \u2014 \u201cdog\u201d \x07 \ufffd",
    "[SEP] in [MASK] and [UNKNOWN] [sep]",
    "a" * 101 + " dog",
    "a" * 100,
    "dog" * 40,
    "the cat " * 60,
]


def test_word_pieces_are_transformers(vocabulary):
    from transformers import BertTokenizer

    theirs = BertTokenizer(vocab=str(vocabulary))
    expected = theirs(TEXTS, truncation=True, max_length=77, padding="max_length", return_tensors="pt")["input_ids"]
    with pytest.warns(UserWarning, match="cut off"):
        ours = WordPieceTokenizer(vocabulary=vocabulary)(TEXTS)
    for text, one, other in zip(TEXTS, ours, expected, strict=True):
        assert torch.equal(one, other), (text, theirs.convert_ids_to_tokens(one), theirs.convert_ids_to_tokens(other))
    assert torch.equal(WordPieceTokenizer().empty, expected[1])  # without a vocabulary
    folder = WordPieceTokenizer(vocabulary=vocabulary.parent)
    assert torch.equal(folder(TEXTS[:1]), ours[:1])


def test_word_pieces_lost_are_whole_words(vocabulary):
    tokenizer = WordPieceTokenizer(6, vocabulary=vocabulary)
    assert tokenizer.lost("The red cat, playing on") == "playing on"
    assert tokenizer.lost("red cat playing") == ""
    with pytest.warns(UserWarning, match=r"(?s)longer than 4 tokens.*'The red cat, playing on' loses 'playing on'"):
        tokenizer(["The red cat, playing on"])


def test_a_vocabulary_that_is_none_is_refused(tmp_path, vocabulary):
    words = vocabulary.read_text(encoding="utf-8").split("\n")
    (tmp_path / "short.txt").write_text("\n".join(words[1:]))
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "large.txt").write_bytes(b"a\n" * 2**24)
    for given, message in (
        (None, "word pieces of BERT's vocabulary.*tokenizer=FILE"),
        (tmp_path / "nowhere.txt", "nowhere.txt is no vocabulary; tokenizer=FILE is a text file"),
        (tmp_path, "vocab.txt is no vocabulary"),
        (tmp_path / "short.txt", r"not the vocabulary that the model was trained with: \[PAD\] is None, \[UNK\] is 99"),
        (tmp_path / "model.bin", "model.bin is no text"),
        (tmp_path / "large.txt", "large.txt is no vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            WordPieceTokenizer(vocabulary=given)(["a cat"])
    tokenizer = WordPieceTokenizer()
    tokenizer.vocabulary = vocabulary  # may be given later
    assert tokenizer(["cat"])[0, 1] == words.index("cat")
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        WordPieceTokenizer(2)


def test_the_vocabulary_that_is_written_is_the_one_that_open_clip_reads_with():
    from open_clip.tokenizer import SimpleTokenizer

    ids, merges = clip_vocabulary()
    clip = SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert ids == {special.get(word, word): number for word, number in clip.encoder.items()}
    assert merges == [" ".join(pair) for pair in clip.bpe_ranks]
