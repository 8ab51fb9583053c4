"""How does the command line talk to people: its help, and the one line that says what to type instead?

Wraps Hydra for the entry scripts. Nothing here imports torch, so `--help` and `--cfg job` answer at once.
"""

import contextlib
import difflib
import importlib
import os
import re
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MISTAKE = 2  # the exit status of a command that was typed wrong
TRACEBACK_VARIABLES = ("DIFFUSION_TRACEBACK", "HYDRA_FULL_ERROR")
HYDRA_FLAGS = (
    *("--cfg", "--config-dir", "--config-name", "--config-path", "--experimental-rerun", "--help", "--hydra-help"),
    *("--info", "--multirun", "--package", "--resolve", "--run", "--shell-completion", "--version"),
)
LISTS = {"sampler": ("sampler_list", "listing")}  # groups whose options a function makes a table of, for `group=` alone
FLAGS_HELP = """\
  -m, --multirun    sweep: run once for each combination of comma-separated values
  --cfg job         print the composed config and run nothing (--resolve fills in the references)
  --info defaults-tree   print which files the config is made of
  --config-dir DIR  look for your own configs in DIR, too
  DIFFUSION_TRACEBACK=1  (environment) full traceback instead of one line"""


def command(
    config_name: str,
    description: str,
    *,
    folder: str,
    texts: tuple[str, ...] = (),
    expand: Callable[[list[str]], list[str]] = list,
) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make a function of the composed config into a command: `@command("train", __doc__, folder="run_dir")`.

    `--help` prints `description` and every group with its options. A mistake on the command line, or a ValueError or
    OSError of the run, ends it with one line on stderr and exit status 2. In a sweep (`-m`) each job gets its own
    folder, named after its overrides, inside the one that the key `folder` names. Keys in `texts` take the rest of
    their word as it is: prompt="a dog, running" needs no quotes inside the shell's. `expand` may put words in front of
    those that were typed.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @wraps(main)
        def run() -> None:
            arguments = sys.argv[1:]
            if "--help" in arguments or "-h" in arguments:
                print(help_text(config_name, description))
                return
            _refuse_unknown_flags(arguments)
            if group := next((name for name in LISTS if f"{name}=" in arguments), None):
                with contextlib.suppress(BrokenPipeError):
                    print(list_of(group), flush=True)
                return
            try:
                words = expand(arguments)
            except (ValueError, OSError) as error:
                stop_together(str(error))
            ahead = words[: len(words) - len(arguments)]
            typed = [quoted(argument, texts) for argument in arguments]
            first = next((i for i, word in enumerate(typed) if "=" in word and not word.startswith("-")), 0)
            sys.argv[1:] = [*typed[:first], *ahead, *typed[first:]]  # flags may not part Hydra's words
            _run_hydra(main, config_name, folder, ahead)

        return run

    return decorate


def quoted(argument: str, texts: tuple[str, ...] = ()) -> str:
    """Quote a value for Hydra's grammar where it must mean itself: a text, and anything with "=" in it, such as a path.

    What is quoted, a list, a choice for a sweep, null or a reference already stays as it is.
    """
    key, equals, value = argument.partition("=")
    if not equals or value in ("", "null") or value.startswith(("[", "{", '"', "'", "${")) or argument.startswith("-"):
        return argument
    if key not in texts and ("=" not in value or "," in value or "(" in value):
        return argument
    # Hydra reads a backslash as itself, except in front of a quote.
    escaped = re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', value))
    return f'{key}="{escaped}"'


def _run_hydra(main: Callable[[Any], None], config_name: str, folder: str, ahead: Sequence[str]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    verbose = any(os.environ.get(name, "0") not in ("", "0") for name in TRACEBACK_VARIABLES)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the printing is ours
    warnings.formatwarning = format_warning

    @wraps(main)
    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
        if sweeping:
            added = {word.partition("=")[0] for word in ahead}
            typed = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] not in added]
            cfg[folder] = str(Path(cfg[folder]) / sweep_folder(typed, folder))
        typed_wrong = True
        try:
            check_complete(cfg)
            check_types(cfg, HydraConfig.get().overrides.task, config_name)
            typed_wrong = False
            main(cfg)
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            if verbose or sweeping:  # a sweep runs its other jobs first; Hydra then names the job that failed
                raise
            if typed_wrong:
                stop_together(explain(error))
            stop(explain(error), traceback_hint=True)

    try:
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(job)()
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if verbose:
            raise
        diagnosis = diagnose(sys.argv[1:], config_name)
        stop_together(diagnosis or explain(error), traceback_hint=diagnosis is None)


def read_words(arguments: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Read `name=value` words into a copy of small settings; ValueError for what is not one of them.

    For commands whose settings are a handful of numbers and paths, without a config; None stands for a path.
    """
    read = dict(settings)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in settings:
            known = ", ".join(f"{key}=" for key in settings)
            raise ValueError(f"{argument!r} is no setting; the settings are {known}")
        kind = str if settings[name] is None else type(settings[name])
        try:
            read[name] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(f"{argument} does not fit; it must be of type {kind.__name__}") from None
    return read


def run_words(main: Callable[[list[str]], None], description: str) -> None:
    """Run the `main` of such a command: --help prints the description, and the user's mistakes are one clear error."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(description)
        return
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        stop(str(error))


def stop(message: str, *, traceback_hint: bool = False) -> NoReturn:
    """End the program with one clear error on stderr."""
    hint = " [DIFFUSION_TRACEBACK=1 shows where]" if traceback_hint else ""
    print(f"error: {message}{hint}", file=sys.stderr)
    raise SystemExit(MISTAKE)


def stop_together(message: str, *, traceback_hint: bool = False) -> NoReturn:
    """End with an error that every process of a job finds in its command, and let the first one alone say it."""
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) > 0:
        time.sleep(2)  # torchrun ends all processes when one has ended; the first is to finish its sentence
        raise SystemExit(MISTAKE)
    stop(message, traceback_hint=traceback_hint)


def format_warning(message: Any, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Print our own warnings as one line; those of libraries keep their place."""
    ours = Path(filename).is_relative_to(Path(__file__).parent)
    return f"warning: {message}\n" if ours else f"{filename}:{lineno}: {category.__name__}: {message}\n"


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


def typed_words() -> list[str]:
    """Return the `name=value` words that the running job was given, those of `expand` included."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


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


def sweep_folder(overrides: list[str], folder: str) -> str:
    """Return the folder name of one job of a sweep: its overrides, so that a folder says what is in it."""
    kept = [text.replace("/", "_").replace(" ", "") for text in overrides if not text.startswith(f"{folder}=")]
    return ",".join(kept)[:200] or "default"


def composed(config_name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what the overrides make of a primary config, as plain data, for code that is no command of Hydra's.

    References are filled in; a value that only a user can give stays "???".
    """
    return plain(_compose(config_name, list(overrides)))


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


def _compose(config_name: str, overrides: list[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config_name, overrides=overrides)


# ---------------------------------------------------------------------------------------------------------------------
# help


def help_text(config_name: str, description: str) -> str:
    """Return the help: what the script says about itself, then each group with its options, defaults starred."""
    chosen = _defaults(config_name)
    width = max(map(len, chosen), default=0)
    lines = [description.strip(), "", "Groups (group=option; * is the default; group.key=value changes a value in it):"]
    for group, default in chosen.items():
        options = [f"{name}*" if name == default else name for name in _options(group)]
        lines.append(f"  {group:<{width}}  {' '.join(options)}")
    return "\n".join([*lines, "", "Flags:", FLAGS_HELP])


def _defaults(config_name: str) -> dict[str, str | None]:
    """Return {group: chosen option} of a primary config, read from its defaults list."""
    from omegaconf import OmegaConf

    entries = OmegaConf.load(CONFIGS / f"{config_name}.yaml").defaults
    pairs = [next(iter(entry.items())) for entry in entries if not isinstance(entry, str)]
    return {key.removeprefix("optional "): value for key, value in pairs if not key.startswith("override ")}


def _options(group: str) -> list[str]:
    """Return the options of a group, those in folders below it as "folder/name" after the others."""
    folder = CONFIGS / group
    found = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(found, key=lambda option: ("/" in option, option))


def list_of(group: str) -> str:
    """Return the table of a group's options and what they are."""
    from omegaconf import OmegaConf

    module, function = LISTS[group]
    found = {name: OmegaConf.load(CONFIGS / group / f"{name}.yaml") for name in _options(group)}
    bases = {name: config.pop("defaults", [name])[0] for name, config in found.items()}
    values = {name: {**found[bases[name]], **config} for name, config in found.items() if config}
    return getattr(importlib.import_module(f"diffusion.{module}"), function)(values)


# ---------------------------------------------------------------------------------------------------------------------
# did you mean


def _refuse_unknown_flags(arguments: list[str]) -> None:
    for flag in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
        if not any(known.startswith(flag) for known in HYDRA_FLAGS):
            near = difflib.get_close_matches(flag, HYDRA_FLAGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"settings are written without dashes: {flag.strip('-')}=..."
            stop(f"there is no flag {flag}; {hint} (--help lists both)")


def diagnose(arguments: list[str], config_name: str) -> str | None:
    """Return the one line for the first argument that Hydra could not use; None where no argument is to blame."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    chosen = _defaults(config_name)
    parser = OverridesParser.create()
    groups, values = [], []
    for argument in (a for a in arguments if _is_override(a, arguments)):
        try:
            override = parser.parse_override(argument)
        except HydraException:
            return _unreadable(argument, chosen)
        if override.key_or_group.startswith("hydra"):
            continue
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
        places = [f"{group}={argument}" for group in chosen if argument in _options(group)]
        places += [f"{argument}=..."] if argument in chosen else []
        hint = f"did you mean {' or '.join(places)}?" if places else "settings are written key=value"
        return f"cannot read {argument!r}; {hint}"
    key = argument.partition("=")[0]
    return (
        f"cannot read {argument!r}; lists are written '{key}=[1,2]', and a value with spaces, commas, brackets or '=' "
        f"needs quotes inside the shell's: '{key}=\"a, b\"'"
    )


def _unknown_option(override: Any) -> str | None:
    options = _options(override.key_or_group)
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
        return dict(_flatten(_compose(config_name, group_overrides)))
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
