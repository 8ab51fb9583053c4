"""Would foreign code compute the same from our weights? Two networks of ours compared, setting by setting.

What is exported is described in foreign settings, these are read back by the tables that loading uses, and the network
they describe must be the one that was to be exported: nothing is expressible by assertion alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffusion.pretrained.keymap import without_memory

PLAIN = (int, float, str, bool, tuple, type(None))
IRRELEVANT = (
    "training",
    "size_factor",
    "checkpointing",
    "scale_factor",
    "shift",
    "split",
    "max_length",
    "projection_channels",
)


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Every plain setting of a network and its layers, by dotted name: widths, heads, norms, kinds."""
    found = {}
    for name, layer in module.named_modules():
        found[f"{name}: kind" if name else "kind"] = _kind(layer)
        for key, value in vars(layer).items():
            if not key.startswith("_") and key not in IRRELEVANT and isinstance(value, PLAIN):
                found[f"{name}: {key}" if name else key] = value
    return found


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__


def differences(ours: nn.Module, theirs: nn.Module) -> list[str]:
    """What would be computed otherwise, in words; none for two networks that compute the same."""
    mine, other = settings_of(ours), settings_of(theirs)
    return [
        f"{name}={_said(mine, name)}, there {_said(other, name)}"
        for name in dict.fromkeys((*mine, *other))
        if not _same(mine.get(name, mine), other.get(name, other))
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, (int, float)) and isinstance(other, (int, float)) and abs(one - other) < 1e-12
    return one == other


def _said(settings: Mapping[str, Any], name: str) -> Any:
    return settings.get(name, "none")


def check_same(ours: nn.Module, build: Any, settings: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless `build(**settings)` computes what `ours` does; `what` names the foreign code."""
    try:
        with without_memory():
            theirs = build(**settings)
    except (TypeError, ValueError) as error:  # widths that its groups, heads or whole numbers cannot express
        raise ValueError(f"{what} has no network like this one ({str(error).splitlines()[0]})") from error
    if problems := differences(ours, theirs):
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ValueError(f"{what} has no network like this one: {shown}")
