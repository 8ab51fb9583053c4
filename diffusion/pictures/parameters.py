"""What did A1111 write into its pictures, and its many readers read? The `parameters` text, both ways.

The prompt, a line "Negative prompt: ...", and a last line "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, ...".
Nothing here imports torch.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEY = "parameters"  # the PNG text entry that holds it
NEGATIVE = "Negative prompt:"
FEWEST = 3  # fields that make a last line one of settings and not of the prompt
FIELD = re.compile(r'\s*(\w[\w \-/+]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
SHORT_HASH = 10  # A1111's length of a model's SHA-256


@dataclass(frozen=True)
class Parameters:
    """A picture's texts and its fields, by the names of A1111 ("CFG scale"), values as they were written."""

    prompt: str = ""
    negative_prompt: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str, kind: type = float) -> Any:
        """Return a field as a number, None where there is none. Raises ValueError for what is not a number."""
        text = self.fields.get(name)
        if text is None:
            return None
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"the picture's text says {name}: {text}, which is no number")
        return value

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, of the field "Size: WIDTHxHEIGHT"."""
        found = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", self.fields.get("Size", ""))
        return (int(found[2]), int(found[1])) if found else None


def parse(text: str) -> Parameters:
    """Read the text, as A1111 itself reads it: any prompt, with or without a negative one, over several lines or none.

    A last line with fewer than three fields belongs to the prompt.
    """
    *lines, last = text.strip().split("\n")
    found = FIELD.findall(last)
    if len(found) < FEWEST:
        lines, found = [*lines, last], []
    prompts: list[list[str]] = [[], []]
    place = 0
    for line in lines:
        line = line.strip()
        if not place and line.startswith(NEGATIVE):
            place, line = 1, line.removeprefix(NEGATIVE).strip()
        prompts[place].append(line)
    prompt, negative = ("\n".join(part).strip() for part in prompts)
    return Parameters(prompt, negative, {name.strip(): unquoted(value) for name, value in found})


def written(parameters: Parameters) -> str:
    """Return the text; `parse` reads it back, but for a prompt that itself holds lines of that form."""
    lines = [parameters.prompt] if parameters.prompt else []
    lines += [f"{NEGATIVE} {parameters.negative_prompt}"] if parameters.negative_prompt else []
    settings = ", ".join(f"{name}: {quoted(value)}" for name, value in parameters.fields.items())
    return "\n".join([*lines, settings])


def quoted(value: str) -> str:
    """Quote a value that would end too early: one with a comma, a colon or a line break in it."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:\n"') or value != value.strip() else value


def unquoted(value: str) -> str:
    """Undo `quoted`; what only looks quoted stays as it is."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def number_text(value: float) -> str:
    """Return a number as A1111 writes it: 7 and not 7.0."""
    return str(int(value)) if float(value).is_integer() else repr(value)
