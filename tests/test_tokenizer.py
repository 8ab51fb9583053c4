"""Captions as CLIP's tokens: padding, small vocabularies, what is cut off, and how little of open_clip that takes."""

import subprocess
import sys
import warnings

import pytest
import torch

from diffusion.data.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from diffusion.tokenizer import VOCAB_SIZE, ClipTokenizer, _encoded

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
