"""What do the marks in a prompt mean, and how is a long prompt divided into windows?

The grammar of AUTOMATIC1111's web UI: (word) and [word] weigh more and less, (word:1.3) as told, BREAK starts a window.
"""

import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

from diffusion.tokenizer import Tokenizer

STRONGER, WEAKER = 1.1, 1 / 1.1  # what a pair of round and of square brackets multiplies
BACKTRACK = 20  # tokens: a window that is full ends at a comma, if there is one so near to its end


class Span(NamedTuple):
    """A piece of a prompt and its weight."""

    text: str
    weight: float = 1.0


Token = tuple[int, float]  # its id and its weight


class Window(NamedTuple):
    """Ids of a text, as many as fit between start and end, and their weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


FACTORS = {"(": STRONGER, "[": WEAKER}
TOKEN = re.compile(
    r"(?P<escaped>\\[()\[\]\\]?)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])|[^\\()\[\]:]+|:"
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")
UNKNOWN = {  # what else AUTOMATIC1111 understands, and we do not
    "a prompt that changes on the way": re.compile(r"(?<!\\)\[[^\[\]]*:\s*[.\d]+\s*\]"),
    "alternating words": re.compile(r"(?<!\\)\[[^\[\]]*\|[^\[\]]*\]"),
    "prompts joined": re.compile(r"\bAND\b"),
    "a network by its name": re.compile(r"<(?:lora|lyco|hypernet):[^>]+>"),
}


def sections(prompt: str) -> list[list[Span]]:
    """The spans of a prompt by the sections that BREAK divides.

    `(x)` multiplies the weight by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3, and they nest; a
    backslash makes a bracket or a backslash an ordinary character, and vanishes before others. A bracket that is never
    closed acts to the end, one that was never opened is text. Raises ValueError for a weight that is no number.
    """
    spans: list[Span | None] = []  # None is a BREAK
    opened: list[tuple[str, int]] = []
    for match in TOKEN.finditer(prompt):
        kind, text = match.lastgroup, match[0]
        if kind == "open":
            opened.append((text, len(spans)))
            continue
        bracket = "(" if kind == "weight" else {")": "(", "]": "["}.get(text)
        begin = _last(opened, bracket) if bracket else None
        if begin is None:
            _append(spans, text[1:] if kind == "escaped" else text)
            continue
        _multiply(spans, begin, _number(match["weight"], prompt) if kind == "weight" else FACTORS[bracket])
    for bracket, begin in sorted(opened):  # round ones first, so that rounding is the same, too
        _multiply(spans, begin, FACTORS[bracket])
    return _merged(spans)


def _last(opened: list[tuple[str, int]], bracket: str) -> int | None:
    """Take away the bracket of this kind that was opened last; where it was, None if there is none."""
    for i in reversed(range(len(opened))):
        if opened[i][0] == bracket:
            return opened.pop(i)[1]
    return None


def _append(spans: list[Span | None], text: str) -> None:
    for i, part in enumerate(BREAK.split(text)):
        if i:
            spans.append(None)
        spans.append(Span(part))


def _multiply(spans: list[Span | None], begin: int, factor: float) -> None:
    for i, span in enumerate(spans[begin:], begin):
        spans[i] = span and span._replace(weight=span.weight * factor)


def _number(text: str, prompt: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the weight {text!r} in the prompt {prompt!r} is no number; write (word:1.3)") from None


def _merged(spans: Sequence[Span | None]) -> list[list[Span]]:
    """Sections, in which neighbours of one weight are one span: words are never cut where a bracket was escaped."""
    found: list[list[Span]] = [[]]
    for span in spans:
        if span is None:
            found.append([])
        elif found[-1] and found[-1][-1].weight == span.weight:
            found[-1][-1] = Span(found[-1][-1].text + span.text, span.weight)
        else:
            found[-1].append(span)
    return found


def not_understood(prompt: str) -> list[str]:
    """What of AUTOMATIC1111's grammar the prompt uses and `sections` would read as plain text or brackets."""
    return [f"{what}: {match[0]!r}" for what, pattern in UNKNOWN.items() if (match := pattern.search(prompt))]


def windows(prompt: str, tokenizer: Tokenizer, *, emphasis: bool = False, chunk: bool = False) -> list[Window]:
    """The tokens of a prompt, in one window with a warning of the words lost, or in as many as needed (`chunk`).

    Without `emphasis` brackets and BREAK are text.
    """
    if emphasis and (unknown := not_understood(prompt)):
        warnings.warn(f"this is read as text: {'; '.join(unknown)}", stacklevel=3)
    parts = sections(prompt) if emphasis else [[Span(prompt)]]
    tokens = [[(i, span.weight) for span in spans for i in tokenizer.encode(span.text)] for spans in parts]
    if chunk:
        return [_window(some) for some in divided(tokens, tokenizer.room, tokenizer.encode(",")[0])]
    if len(parts) > 1:
        raise ValueError(f"BREAK in the prompt {prompt!r} starts a further window; allow that by long_prompt=chunk")
    tokenizer.report([(prompt, _window(tokens[0]).ids)])
    return [_window(tokens[0][: tokenizer.room])]


def divided(parts: Sequence[Sequence[Token]], room: int, comma: int) -> list[list[Token]]:
    """Windows of at most `room` tokens; each of `parts` starts one, and a full one ends after a comma near its end."""
    done: list[list[Token]] = []
    window: list[Token] = []
    for number, part in enumerate(parts):
        begin = 0  # in `window`, after the last comma; 0 if there is none
        if number:
            done.append(window)
            window = []
        for token in part:
            if len(window) == room:
                near = token[0] != comma and begin > 0 and room - begin < BACKTRACK
                begin = begin if near else room
                done.append(window[:begin])
                window, begin = window[begin:], 0
            elif token[0] == comma:
                begin = len(window) + 1
            window.append(token)
    return [*done, window] if window or not done else done


def _window(tokens: Sequence[Token]) -> Window:
    return Window(tuple(i for i, _ in tokens), tuple(weight for _, weight in tokens))
