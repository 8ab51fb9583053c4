"""Which jobs do the words of a sweep stand for? Reading `seed=0,1,2` and named sweeps as Hydra does.

Nothing here imports torch.
"""

import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffusion.cli.composing import CONFIGS, flat, in_grammar
from diffusion.sweep.folder import as_mapping, digest

GROUP = "sweep"
FOLDERS = "outputs/sweeps"
NEW_FOLDER = "sweep_dir=... begins anew elsewhere"


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do. `jobs` are the words of each; a search, which finds its jobs as it goes, has none."""

    name: str
    words: tuple[str, ...]  # what was typed, and what the named sweep says, each key once
    keys: tuple[str, ...]  # what is varied
    shown: tuple[str, ...]  # what the jobs' folders are named by: the same, or where that is nothing what was typed
    jobs: tuple[tuple[str, ...], ...]
    sweep_dir: str


def named_sweep(words: Sequence[str]) -> str | None:
    """Return the name that `sweep=` gives among these words, the last one; None where there is none."""
    names = [word.partition("=")[2] for word in words if word.partition("=")[0] == GROUP]
    return names[-1] if names and names[-1] not in ("", "null") else None


def is_hydras(word: str) -> bool:
    """Say whether a word is about the sweep, not about its jobs."""
    return word.lstrip("+~").startswith((f"{GROUP}=", "hydra.", "hydra/"))


def plan(
    cfg: Any, words: Sequence[str], command: str, folder_key: str, *, texts: Sequence[str] = (), search: bool = False
) -> Plan:
    """Return what the words of a command line and the sweep that they name stand for; `cfg` is Hydra's of the sweep.

    Raises ValueError for what cannot be swept over: nothing, or the folder of the jobs.
    """
    params = [f"{key}={value}" for key, value in (cfg.hydra.sweeper.get("params") or {}).items()]
    if (chosen := named_sweep(words)) is not None:
        params = [*_settings(chosen), *params]
    typed = [word for word in words if not is_hydras(word)]
    read = _by_key([*params, *typed])
    _check(read, folder_key, texts)
    given = read.pop("sweep_dir", None)
    values = {key: _values(override, search=search) for key, override in read.items()}
    keys = tuple(key for key, found in values.items() if len(found) != 1)
    jobs = [] if search else list(itertools.product(*values.values()))
    name = chosen or _recipe(cfg, read) or command
    meant = [override.input_line for override in read.values()]
    identity = [*meant, *(word for word in words if word.startswith("hydra/sweeper="))]
    place = f"{FOLDERS}/{name}-{digest(identity)}" if given is None else as_mapping([given.input_line])["sweep_dir"]
    shown = keys or tuple(word.partition("=")[0] for word in typed)
    return Plan(name, tuple(meant), keys, shown, tuple(jobs), place)


def words_of_named(words: Sequence[str]) -> list[str]:
    """Return what the named sweep among these words says of its jobs, if it is one of ours: to look up mistakes."""
    name = named_sweep(words)
    if name is None or not (path := CONFIGS / GROUP / f"{name}.yaml").exists():
        return []
    params = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["sweeper"].get("params") or {}
    return [f"{key}={value}" for key, value in params.items()]


def _settings(name: str) -> list[str]:
    """Return as words what a named sweep sets beside Hydra's own part, so that each job has it, too."""
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    loaded = GlobalHydra.instance().hydra.config_loader.repository.load_config(f"{GROUP}/{name}")
    config = OmegaConf.to_container(loaded.config, resolve=False)
    own = flat({key: value for key, value in config.items() if key not in ("hydra", "defaults")})
    return [f"{key}={in_grammar(value)}" for key, value in own.items() if key]


def _by_key(words: Sequence[str]) -> dict[str, Any]:
    """Parse words; of several about one key the last one counts, at the place of the first."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create(config_loader=GlobalHydra.instance().hydra.config_loader)
    return {override.get_key_element(): override for override in parser.parse_overrides(list(words))}


def _check(read: Mapping[str, Any], folder_key: str, texts: Sequence[str]) -> None:
    for key, override in read.items():
        plain, value = key.lstrip("+"), override.input_line.partition("=")[2]
        if plain == folder_key:
            raise ValueError(
                f"{override.input_line}: in a sweep each job has a folder of its own; name the folder of all: "
                f"sweep_dir={value.partition(',')[0]}"
            )
        if plain == "sweep_dir" and override.is_sweep_override():
            raise ValueError(f"{override.input_line}: a sweep has one folder")
        if value == "" and plain not in texts and not override.is_delete():
            raise ValueError(f"{override.input_line} has no value to sweep over; write {plain}=A,B or leave it out")


def _values(override: Any, *, search: bool) -> list[str]:
    """Return the words that an override stands for, each once. Raises ValueError where there is none."""
    if not override.is_sweep_override():
        return [override.input_line]
    if search:
        return []
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        raise ValueError(f"{override.input_line}: only a search chooses from an interval; add hydra/sweeper=optuna")
    found = [f"{key}={value}" for value in override.sweep_string_iterator()]
    if not found:
        raise ValueError(f"{override.input_line} is a sweep of no jobs: it has no values")
    once = list(dict.fromkeys(found))
    for word in once:
        if (count := found.count(word)) > 1:
            print(f"{word} is there {count} times in {override.input_line}; it is run once", file=sys.stderr)
    return once


def _recipe(cfg: Any, read: Mapping[str, Any]) -> str | None:
    """Return the name that the recipe gives to its runs; None where there is no recipe, or several."""
    experiment = read.get("experiment")
    return None if experiment is not None and experiment.is_sweep_override() else cfg.get("name")


# ---------------------------------------------------------------------------------------------------------------------
# named sweeps


def about(path: Path) -> tuple[str, str]:
    """Return the command that a named sweep is for and what it is, from the first line of its file that tells."""
    lines = (line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines())
    line = next((line for line in lines if line and not line.startswith("@package")), "")
    command, _, what = line.partition(": ")
    return command.removesuffix(".py"), what


def listing(configs: Mapping[str, Any] | None = None) -> str:
    """Return the named sweeps with a line each, for `sweep=`."""
    found = {path.stem: about(path) for path in sorted((CONFIGS / GROUP).glob("*.yaml"))}
    width = max(map(len, found), default=0)
    lines = [f"  {name:<{width}}  {command}.py  {what}" for name, (command, what) in found.items()]
    return "\n".join(["uv run COMMAND sweep=NAME, and more words beside it:", *lines])


def check_named(name: str, command: str, options: Sequence[str]) -> None:
    """Raise ValueError for a name that is no sweep's, `options` being those of Hydra's group, or another command's."""
    if name not in options:
        near = difflib.get_close_matches(name, options, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no sweep {name!r}{hint}\n{listing()}")
    path = CONFIGS / GROUP / f"{name}.yaml"
    if path.exists() and (wanted := about(path)[0]) != command:
        raise ValueError(f"sweep={name} is one for {wanted}.py\n{listing()}")
