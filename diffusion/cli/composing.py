"""What do the words of a command make of the configs? Composing them, and listing what can be chosen.

Nothing here imports torch.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.latent_facts import facts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Groups whose options a function makes a table of, for `group=` alone.
LISTS = {"sampler": ("sampler_list", "listing"), "sweep": ("sweep.words", "listing")}


def composed(config_name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the overrides make of a primary config, as plain data, for code that is no command of Hydra's.

    References are filled in; a value that only a user can give stays "???".
    """
    return plain(compose(config_name, list(overrides)))


def plain(cfg: Any) -> dict[str, Any]:
    """Return a composed config as plain data, with its references filled in."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value} of nested mappings."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    children = (flat(child, f"{prefix}.{key}" if prefix else str(key)) for key, child in node.items())
    return {key: value for child in children for key, value in child.items()}


def in_quotes(value: str) -> str:
    """Return a value in quotes, so that it means itself in Hydra's grammar."""
    # Hydra reads a backslash as itself, except in front of a quote.
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', value))
    return f'"{escaped}"'


def in_grammar(value: Any) -> str:
    """Return a plain value of a config as a word of the command line has it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{in_grammar(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(in_grammar, value)) + "]"
    if isinstance(value, str):
        return value if value.startswith("${") else in_quotes(value)
    return "null" if value is None else str(value)


def compose(config_name: str, overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_latents()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config_name, overrides=overrides)


def register_latents() -> None:
    """Let configs refer to what cached latents say: `${latents:channels}`, of the folder that `root` beside it names.

    What is not to be had is None, and the datamodule says why.
    """
    from omegaconf import DictConfig, OmegaConf

    def fact(name: str, *, _parent_: DictConfig) -> Any:
        missing = OmegaConf.is_missing(_parent_, "root") or _parent_.root is None
        return None if missing else facts(Path(str(_parent_.root)).expanduser()).get(name)

    OmegaConf.register_new_resolver("latents", fact, replace=True)


def defaults_of(config_name: str) -> dict[str, str | None]:
    """Return {group: chosen option} of a primary config, read from its defaults list."""
    from omegaconf import OmegaConf

    entries = OmegaConf.load(CONFIGS / f"{config_name}.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in entries if not isinstance(entry, str)]
    return {key.removeprefix("optional "): value for key, value in pairs if not key.startswith("override ")}


def options_of(group: str) -> list[str]:
    """Return the options of a group, those in folders below it as "folder/name" after the others."""
    folder = CONFIGS / group
    found = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(found, key=lambda option: ("/" in option, option))


def list_of(group: str) -> str:
    """Return the table of a group's options and what they are."""
    from omegaconf import OmegaConf

    module, function = LISTS[group]
    found = {name: OmegaConf.load(CONFIGS / group / f"{name}.yaml") for name in options_of(group)}
    firsts = {name: config.pop("defaults", [name])[0] for name, config in found.items()}
    bases = {name: found[first] if isinstance(first, str) else {} for name, first in firsts.items()}
    values = {name: {**bases[name], **config} for name, config in found.items() if config}
    return getattr(importlib.import_module(f"diffusion.{module}"), function)(values)
