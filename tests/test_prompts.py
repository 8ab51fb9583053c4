"""Marks in prompts: AUTOMATIC1111's brackets and BREAK, and where a long prompt is divided into windows."""

import re
import warnings

import pytest

from diffusion.prompts import Span, divided, not_understood, sections, windows
from diffusion.tokenizer import ClipTokenizer, _encoded

COMMA = _encoded(",")[0]


def spans(prompt: str) -> list[tuple[str, float]]:
    (only,) = sections(prompt)
    return [(span.text, pytest.approx(span.weight)) for span in only]


# --- brackets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((a)) [b] [[c]]", [("a", 1.1**2), (" ", 1), ("b", 1 / 1.1), (" ", 1), ("c", 1.1**-2)]),
        ("(a:1.3)b(c:0)", [("a", 1.3), ("b", 1), ("c", 0)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-.5)(b:+2)", [("a", -0.5), ("b", 2)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("([a])", [("a", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        (r"cat \(animal\) \[x\]", [("cat (animal) [x]", 1)]),
        (r"a\\b \c", [(r"a\b c", 1)]),
        ("(never closed", [("never closed", 1.1)]),
        ("[(both", [("both", 1)]),
        ("never opened) ]", [("never opened) ]", 1)]),
        ("16:9 and b:1.2) c", [("16:9 and b:1.2) c", 1)]),
        ("(x:y)", [("x:y", 1.1)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("(one)(part)", [("onepart", 1.1)]),
    ],
)
def test_brackets_weigh_words(prompt, expected):
    assert [span for span in spans(prompt) if span[0]] == expected


def test_break_divides_and_takes_its_blanks_with_it():
    assert sections("a  BREAK\n b") == [[Span("a")], [Span("b")]]
    assert sections("BREAK a BREAK") == [[Span("")], [Span("a")], [Span("")]]
    assert [[span.weight for span in part] for part in sections("(a BREAK b:2)")] == [[2.0], [2.0]]
    assert sections("BREAKFAST and break") == [[Span("BREAKFAST and break")]]


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=re.escape("the weight '1.2.3' in the prompt 'a (b:1.2.3)' is no number")):
        sections("a (b:1.2.3)")


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a [cat:dog:0.5]", "changes on the way"),
        ("a [cat:10] x", "changes on the way"),
        ("[cat|dog] in a hat", "alternating"),
        ("a cat AND a dog", "joined"),
        ("a cat <lora:style:0.8>", "network"),
    ],
)
def test_what_is_not_understood_is_said(prompt, what):
    (found,) = not_understood(prompt)
    assert what in found
    with pytest.warns(UserWarning, match=f"read as text: .*{what}"):
        windows(prompt, ClipTokenizer(), emphasis=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows(prompt, ClipTokenizer())


def test_ordinary_prompts_are_understood():
    for prompt in ("a (cat:1.3) [dog], 16:9", r"\[a|b\]", "ANDROID: sand", "(a [b] c)"):
        assert not_understood(prompt) == []


# --- windows ---------------------------------------------------------------------------------------------------------


def lengths(words: list[int], room: int = 75) -> list[int]:
    """How many tokens each window has of a text in which -1 stands for a comma."""
    done = divided([[(word, 1.0) for word in words]], room, -1)
    assert [token for window in done for token, _ in window] == words
    return [len(window) for window in done]


def text(length: int, *commas: int) -> list[int]:
    """Tokens 1, 2, ... with commas at these places, counted from 1."""
    return [-1 if i in commas else i for i in range(1, length + 1)]


def test_without_commas_windows_are_full():
    assert lengths([]) == [0]
    assert lengths(text(75)) == [75]
    assert lengths(text(76)) == [75, 1]
    assert lengths(text(200)) == [75, 75, 50]


def test_a_full_window_ends_at_a_comma_if_that_is_near():
    assert lengths(text(80, 60)) == [60, 20]
    assert lengths(text(80, 56)) == [56, 24]
    assert lengths(text(80, 55)) == [75, 5]  # twenty tokens from its end, not nearer
    assert lengths(text(80, 60, 70)) == [70, 10]
    assert lengths(text(80, 75)) == [75, 5]
    assert lengths(text(75, 60)) == [75]
    assert lengths(text(80, 60, 76)) == [75, 5]  # the token that does not fit is a comma itself
    assert lengths(text(160, 60, 130)) == [60, 70, 30]
    assert lengths(text(160, 60)) == [60, 75, 25]


def test_a_break_starts_a_window_even_an_empty_one():
    parts = [[], [(1, 1.0)] * 3, [], [(2, 1.0)] * 80]
    assert [len(window) for window in divided(parts, 75, -1)] == [0, 3, 0, 75, 5]
    assert [len(window) for window in divided([[(1, 1.0)], []], 75, -1)] == [1]


def test_tokens_carry_the_weights_of_their_words():
    (only,) = windows("a (red:1.5) cat", ClipTokenizer(), emphasis=True)
    assert only.ids == _encoded("a red cat") and only.weights == (1.0, 1.5, 1.0)
    (plain,) = windows("a (red:1.5) cat", ClipTokenizer())
    assert plain.ids == _encoded("a (red:1.5) cat") and set(plain.weights) == {1.0}


def test_a_long_prompt_is_cut_or_divided():
    prompt = "red, " * 50 + "(end:2)"
    with pytest.warns(UserWarning, match=r"(?s)longer than 75 tokens.*loses ', red , .*end'"):
        (cut,) = windows(prompt, ClipTokenizer(), emphasis=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = windows(prompt, ClipTokenizer(), emphasis=True, chunk=True)
    assert len(cut.ids) == 75 and len(first.ids) == 75 and len(second.ids) == 26
    assert second.weights[-1] == 2 and first.ids + second.ids == _encoded("red, " * 50 + "end")


def test_break_needs_further_windows():
    with pytest.raises(
        ValueError, match=r"BREAK in the prompt 'a BREAK b' starts a further window; .*long_prompt=chunk"
    ):
        windows("a BREAK b", ClipTokenizer(), emphasis=True)
    assert [w.ids for w in windows("a BREAK b", ClipTokenizer(), emphasis=True, chunk=True)] == [
        _encoded("a"),
        _encoded("b"),
    ]
    assert len(windows("a BREAK b", ClipTokenizer(), chunk=True)) == 1
