"""How does the command line talk to people: its help, and the one line that says what to type instead?

Wraps Hydra for the entry scripts. Nothing here imports torch, so `--help` and `--cfg job` answer at once.
"""

import contextlib
import inspect
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from diffusion.cli.composing import (
    CONFIGS,
    LISTS,
    composed,
    defaults_of,
    flat,
    in_quotes,
    list_of,
    options_of,
    plain,
    register_latents,
)
from diffusion.cli.mistakes import check_complete, check_types, diagnose, explain, nearest_keys, refuse_unknown_flags
from diffusion.run_name import run_named

# fmt: off
__all__ = [
    "CONFIGS", "command", "composed", "diagnose", "explain", "flat", "format_warning", "help_text",
    "list_of", "nearest_keys", "plain", "quoted", "read_words", "run_words", "stop", "typed_words",
]
# fmt: on
MISTAKE = 2  # the exit status of a command that was typed wrong
INTERRUPTED = 130  # the exit status of what Ctrl-C has ended, as in shells
TRACEBACK_VARIABLES = ("DIFFUSION_TRACEBACK", "HYDRA_FULL_ERROR")
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
    OSError of the run, ends it with one line on stderr and exit status 2. In a sweep (`-m` or `sweep=NAME`) each job
    is this command again, with a folder of its own as the key `folder`. Keys in `texts` take the rest of their word as
    it is: prompt="a dog, running" needs no quotes inside the shell's. `expand` may put words in front of those that
    were typed.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @wraps(main)
        def run() -> None:
            arguments = sys.argv[1:]
            if "--help" in arguments or "-h" in arguments:
                print(help_text(config_name, description))
                return
            if group := next((name for name in LISTS if f"{name}=" in arguments), None):
                with contextlib.suppress(BrokenPipeError):
                    print(list_of(group), flush=True)
                return
            try:
                refuse_unknown_flags(arguments)
                words = expand(arguments)
            except (ValueError, OSError) as error:
                stop_together(str(error))
            ahead = words[: len(words) - len(arguments)]
            typed = sweep_first([quoted(argument, texts) for argument in arguments])
            if _asks_for_sweep(typed):
                _run_sweep(main, config_name, folder, typed, ahead=tuple(ahead), texts=texts)
                return
            first = next((i for i, word in enumerate(typed) if "=" in word and not word.startswith("-")), 0)
            sys.argv[1:] = [*typed[:first], *ahead, *typed[first:]]  # flags may not part Hydra's words
            _run_hydra(main, config_name)

        return run

    return decorate


def sweep_first(words: list[str]) -> list[str]:
    """Put -m in front, wherever it was typed: Hydra does not find the words behind a flag among them."""
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))


def quoted(argument: str, texts: tuple[str, ...] = ()) -> str:
    """Quote a value for Hydra's grammar where it must mean itself: a text, and anything with "=" in it, such as a path.

    What is quoted, a list, a choice for a sweep, null or a reference already stays as it is. With "=" and "," it is a
    path where there is one, such as a sweep's job, else a choice.
    """
    key, equals, value = argument.partition("=")
    if not equals or value in ("", "null") or value.startswith(("[", "{", '"', "'", "${")) or argument.startswith("-"):
        return argument
    if key in texts or ("=" in value and "(" not in value and ("," not in value or os.path.exists(value))):
        return f"{key}={in_quotes(value)}"
    if "=" in value and "(" not in value and not {'"', "'", "["} & set(value):
        return f"{key}={','.join(in_quotes(choice) if '=' in choice else choice for choice in value.split(','))}"
    return argument


def _asks_for_sweep(arguments: Sequence[str]) -> bool:
    from diffusion.sweep.run import is_sweep

    return is_sweep(arguments)


def _run_sweep(
    main: Callable[[Any], None],
    config_name: str,
    folder: str,
    typed: list[str],
    *,
    ahead: tuple[str, ...],
    texts: tuple[str, ...],
) -> None:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from diffusion.sweep.plugins import explain_missing
    from diffusion.sweep.run import Command, run_sweep
    from diffusion.sweep.words import words_of_named

    _word_warnings()
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    command = Command(config_name, folder, _start_of(main), line, texts=texts, ahead=ahead)
    try:
        status = run_sweep(command, typed)
    except (HydraException, OmegaConfBaseException) as error:
        if _wants_traceback():
            raise
        words = [*words_of_named(typed), *typed]
        stop_together(explain_missing(error) or diagnose(words, config_name, sweep=True) or explain(error))
    except (ValueError, OSError) as error:
        if _wants_traceback():
            raise
        stop_together(explain(error))
    except KeyboardInterrupt:
        print("stopped before the first job began", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    if status:
        raise SystemExit(status)


def _start_of(main: Callable[[Any], None]) -> tuple[str, ...]:
    """Return what follows the interpreter in a command line that runs this command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if main.__module__ == "__main__" and spec is not None:
        return "-m", spec.name
    return (os.path.abspath(inspect.getfile(main)),)


def _wants_traceback() -> bool:
    return any(os.environ.get(name, "0") not in ("", "0") for name in TRACEBACK_VARIABLES)


def _run_hydra(main: Callable[[Any], None], config_name: str) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register_latents()
    verbose = _wants_traceback()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the printing is ours
    _word_warnings()

    @wraps(main)
    def job(cfg: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        typed_wrong = True
        try:
            check_complete(cfg)
            check_types(cfg, HydraConfig.get().overrides.task, config_name)
            typed_wrong = False
            main(cfg)
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            if verbose:
                raise
            if typed_wrong:
                stop_together(explain(error))
            stop(explain(error), traceback_hint=True)

    try:
        with run_named(sys.argv[1:]):
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


def _word_warnings() -> None:
    from diffusion.sweep.plugins import let_ours_stand_first

    warnings.formatwarning = format_warning
    let_ours_stand_first()


def format_warning(message: Any, category: type, filename: str, lineno: int, line: str | None = None) -> str:
    """Print our own warnings as one line; those of libraries keep their place."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    return f"warning: {message}\n" if ours else f"{filename}:{lineno}: {category.__name__}: {message}\n"


def typed_words() -> list[str]:
    """Return the `name=value` words that the running job was given, those of `expand` included."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def help_text(config_name: str, description: str) -> str:
    """Return the help: what the script says about itself, then each group with its options, defaults starred."""
    chosen = defaults_of(config_name)
    width = max(map(len, chosen), default=0)
    lines = [description.strip(), "", "Groups (group=option; * is the default; group.key=value changes a value in it):"]
    for group, default in chosen.items():
        options = [f"{name}*" if name == default else name for name in options_of(group)]
        lines.append(f"  {group:<{width}}  {' '.join(options)}")
    return "\n".join([*lines, "", "Flags:", FLAGS_HELP])
