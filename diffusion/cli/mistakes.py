"""What was meant by a word that was typed wrong, or by an error? One line that says what to type instead.

Nothing here imports torch, but `check_types`, which asks the constructors.
"""

import difflib
import importlib
import types
import typing
from collections.abc import Iterator
from typing import Any

from diffusion.cli.composing import CONFIGS, LISTS, compose, defaults_of, list_of, options_of

HYDRA_FLAGS = (
    *("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun", "--help", "--hydra-help"),
    *("--info", "--multirun", "--package", "--resolve", "--run", "--shell-completion", "--version"),
)


def explain(error: BaseException) -> str:
    """Return what an exception says to the user, without the frames of Hydra that carried it."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    where = ""
    if isinstance(error, InstantiationException):
        key = next((line[10:].strip() for line in str(error).splitlines() if line.startswith("full_key: ")), "")
        where = f"{key}: " if key else ""
        while isinstance(error, InstantiationException) and error.__cause__ is not None:
            error = error.__cause__
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        text = " ".join(text.partition("full_key:")[0].partition("Config search path:")[0].split())
    return where + text


def check_complete(cfg: Any) -> None:
    """Raise one ValueError that names every value the user still has to give, and check that all references resolve."""
    from omegaconf import OmegaConf

    if missing := sorted(OmegaConf.missing_keys(cfg)):
        needed = " ".join(f"{key}=..." for key in missing)
        raise ValueError(f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value; add {needed}")
    OmegaConf.to_container(cfg, resolve=True)


def check_types(cfg: Any, overrides: list[str], config_name: str) -> None:
    """Raise ValueError for a word, a fraction or a truth value typed where the constructor takes something else."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    defaults = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml"))
    for override in OverridesParser.create().parse_overrides(overrides):
        parent, _, leaf = override.key_or_group.rpartition(".")
        if override.is_delete() or (CONFIGS / override.key_or_group).is_dir():
            continue
        value = OmegaConf.select(cfg, override.key_or_group)
        if parent:
            wanted = _annotation(OmegaConf.select(cfg, parent), leaf)
        else:
            wanted = int if type(defaults.get(leaf)) is int else Any
        if not _fits(value, wanted):
            name = getattr(wanted, "__name__", None) or str(wanted).replace("typing.", "")
            raise ValueError(f"{override.key_or_group}={value} does not fit; it must be of type {name}")


def _annotation(node: Any, argument: str) -> Any:
    """Return the type that the constructor of a config node declares for an argument, Any where it says nothing."""
    target = node.get("_target_") if hasattr(node, "get") else None
    if target is None:
        return Any
    module, _, name = target.rpartition(".")
    call = getattr(importlib.import_module(module), name)
    try:
        return typing.get_type_hints(call.__init__ if isinstance(call, type) else call).get(argument, Any)
    except (NameError, TypeError):  # names that exist for type checkers only
        return Any


def _fits(value: Any, wanted: Any) -> bool:
    """Say whether a number, word or truth value is one of the declared types; what cannot be told fits."""
    if not isinstance(value, (bool, int, float, str)):
        return True
    members = typing.get_args(wanted) if isinstance(wanted, types.UnionType) or _is_union(wanted) else (wanted,)
    if Any in members or object in members or not all(isinstance(member, type) for member in members):
        return True
    if isinstance(value, int) and not isinstance(value, bool) and float in members:
        return True
    return type(value) in members


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Union


def refuse_unknown_flags(arguments: list[str]) -> None:
    """Raise ValueError for a word with dashes in front that is no flag of Hydra's."""
    for flag in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        if not any(known.startswith(flag) for known in HYDRA_FLAGS):
            near = difflib.get_close_matches(flag, HYDRA_FLAGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"settings are written without dashes: {flag.strip('-')}=..."
            raise ValueError(f"there is no flag {flag}; {hint} (--help lists both)")


def diagnose(arguments: list[str], config_name: str, *, sweep: bool = False) -> str | None:
    """Return the one line for the first argument that Hydra could not use; None where no argument is to blame.

    `sweep`: the arguments are those of a sweep, where a key may have several values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    chosen = defaults_of(config_name)
    parser = OverridesParser.create()
    groups, values = [], []
    for argument in (a for a in arguments if _is_override(a, arguments)):
        try:
            override = parser.parse_override(argument)
        except HydraException:
            return _unreadable(argument, chosen)
        if override.key_or_group.startswith("hydra"):
            continue
        if override.is_sweep_override() and not sweep:
            return _several_values(argument)
        if (CONFIGS / override.key_or_group).is_dir():
            if problem := _unknown_option(override):
                return problem
            groups.append(override)
        elif not override.is_force_add():
            values.append(override)
    known = _known_keys(config_name, [_first_choice(override) for override in groups])
    if known is None:
        return None
    for override in values:
        key, text = override.key_or_group, override.input_line
        if override.is_add():
            if key in known and not isinstance(override.value(), (dict, list)):
                return f"{key!r} is there already; change it without the plus: {text[1:]}"
        elif key not in known:
            return _unknown_key(key, text, known, chosen)
    return None


def _is_override(argument: str, arguments: list[str]) -> bool:
    """Tell settings from flags and from the words that belong to flags (`--cfg job`, `-cn train`)."""
    if argument.startswith("-"):
        return False
    before = arguments[arguments.index(argument) - 1] if arguments.index(argument) else ""
    return "=" in argument or not before.startswith("-") or before in ("-m", "--multirun", "--resolve", "-r", "--run")


def _unreadable(argument: str, chosen: dict[str, str | None]) -> str:
    if "=" not in argument:
        places = [f"{group}={argument}" for group in chosen if argument in options_of(group)]
        places += [f"{argument}=..."] if argument in chosen else []
        hint = f"did you mean {' or '.join(places)}?" if places else "settings are written key=value"
        return f"cannot read {argument!r}; {hint}"
    key = argument.partition("=")[0]
    return (
        f"cannot read {argument!r}; lists are written '{key}=[1,2]', and a value with spaces, commas, brackets or '=' "
        f"needs quotes inside the shell's: '{key}=\"a, b\"'"
    )


def _several_values(argument: str) -> str:
    key, _, value = argument.partition("=")
    others = f"'{key}=[{value}]' is a list, '{key}=\"{value}\"' a text"
    return f"{argument} are several values; -m in front sweeps over them ({others})"


def _unknown_option(override: Any) -> str | None:
    options = options_of(override.key_or_group)
    group, _, folder = override.key_or_group.partition("/")
    if folder:
        return f"there is no group {group}/{folder}; did you mean {group}={folder}/{_choices(override)[0]}?"
    for choice in _choices(override):
        if choice not in options and choice not in ("null", "None"):
            near = difflib.get_close_matches(choice, options, n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            table = f"\n{list_of(group)}" if group in LISTS else ""
            return f"{override.key_or_group} has no option {choice!r}; {hint}options: {', '.join(options)}{table}"
    return None


def _choices(override: Any) -> list[str]:
    if override.is_sweep_override():
        return [str(choice) for choice in override.sweep_string_iterator()]
    value = override.value()
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _first_choice(override: Any) -> str:
    prefix = override.input_line.partition("=")[0]
    return f"{prefix}={_choices(override)[0]}" if override.is_sweep_override() else override.input_line


def _known_keys(config_name: str, group_overrides: list[str]) -> dict[str, Any] | None:
    """Return every dotted key of the config that these groups compose, or None where they compose nothing."""
    from hydra.errors import HydraException

    try:
        return dict(_flatten(compose(config_name, group_overrides)))
    except HydraException:
        return None


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    from omegaconf import DictConfig

    for key, child in node.items_ex(resolve=False):
        yield f"{prefix}{key}", child
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _flatten(child, f"{prefix}{key}.")


def _unknown_key(key: str, argument: str, known: dict[str, Any], chosen: dict[str, str | None]) -> str:
    parent, _, leaf = key.rpartition(".")
    near = nearest_keys(key, [*known, *chosen])
    if near:
        return f"there is no key {key!r}; did you mean {' or '.join(near)}?"
    if parent and parent in known:
        here = sorted(name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent)
        here = [name for name in here if not name.startswith("_")]
        return f"there is no {leaf!r} in {parent}; it has {', '.join(here)} (+{argument} would add the key)"
    top = sorted(name for name in known if "." not in name)
    return f"there is no key {key!r}; at the top there are {', '.join(top)}"


def nearest_keys(key: str, known: list[str]) -> list[str]:
    """Return up to two keys that a user who typed `key` may have meant: same place first, then same name elsewhere."""
    parent, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    if close := difflib.get_close_matches(leaf, siblings, n=2, cutoff=0.7):
        return [siblings[name] for name in close]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    if same_leaf:
        return sorted(same_leaf, key=lambda name: (name.count("."), -_likeness(name, key)))[:2]
    return difflib.get_close_matches(key, known, n=2, cutoff=0.75)


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
