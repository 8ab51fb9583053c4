"""How is a sweep run? Compose its configs, write sweep.yaml, launch what is not done, and tell what became of it.

The same command again comes to the same folder and runs only what is missing there.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from diffusion.cli.composing import CONFIGS, in_quotes
from diffusion.cli.mistakes import check_complete, check_types
from diffusion.code_state import git_commit
from diffusion.run_folder import locked, read_status
from diffusion.sweep.folder import (
    SWEEP_FILE,
    as_mapping,
    digest,
    folder_names,
    jobs_of,
    read_sweep,
    words_of,
    write_sweep,
)
from diffusion.sweep.job import DONE, STOP_FILE, JobFailed, JobProcess, final_value, handled, write_stop
from diffusion.sweep.plugins import check_plugins
from diffusion.sweep.progress import Watch, table
from diffusion.sweep.queue import await_rest
from diffusion.sweep.search import OPTUNA, Search
from diffusion.sweep.share import with_share
from diffusion.sweep.words import GROUP, NEW_FOLDER, Plan, check_named, is_hydras, named_sweep, plan

FAILED = 1  # the exit status of a sweep that ran to its end, but not all of its jobs did
GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True)
class Command:
    """The command that is swept, and what was typed behind it."""

    config_name: str  # also the command's name
    folder_key: str  # what each job gets a folder of its own by
    start: tuple[str, ...]  # how a job is started: the script, or -m and the module
    line: str  # as it was typed
    texts: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()  # words that the command puts in front of those that were typed


def is_sweep(arguments: Sequence[str]) -> bool:
    """Say whether a command line asks for a sweep, not for one run or for what a config is."""
    from hydra._internal.utils import get_args_parser

    args = get_args_parser().parse_args(list(arguments))
    asked = args.cfg or args.info or args.hydra_help or args.shell_completion or args.run or args.experimental_rerun
    modes = [word for word in args.overrides if word.lower() == "hydra.mode=multirun"]
    return not asked and bool(args.multirun or modes or named_sweep(args.overrides))


def run_sweep(command: Command, arguments: Sequence[str]) -> int:
    """Run the sweep that these arguments describe and return its exit status.

    Raises ValueError, or one of Hydra's exceptions, for what is wrong before the first job has begun.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.utils import get_args_parser
    from hydra.types import HydraContext

    check_alone()
    args = get_args_parser().parse_args(list(arguments))
    config_name = args.config_name or command.config_name
    with hydra_of(command.config_name, config_dir=args.config_dir) as hydra:
        if (name := named_sweep(args.overrides)) is not None:
            check_named(name, command.config_name, hydra.config_loader.get_group_options(GROUP))
        cfg, todo = _composed(hydra, command, config_name, args.overrides)
        search = cfg.hydra.sweeper._target_ != GRID
        _put_sweep_dir(cfg, todo.sweep_dir)
        check_jobs(hydra.config_loader, cfg, todo, config_name, command.ahead)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(cfg))
        job = JobProcess(
            start=(*command.start, *_flags(args)),
            directory=os.getcwd(),
            sweep_dir=todo.sweep_dir,
            folder_key=command.folder_key,
            keys=todo.keys,
            objective=cfg.get("objective"),
            owner=os.getpid(),
        )
        with locked(todo.sweep_dir), stopping(Path(todo.sweep_dir)) as signals:
            record = begin(todo, command)
            context.callbacks.on_multirun_start(config=cfg, config_name=config_name)
            if search:
                trouble = _search(cfg, context, job, todo, signals)
            else:
                trouble = _grid(cfg, context, job, todo, record, signals)
            status = conclude(todo, record, trouble, signals, search=search)
            print_best(cfg, todo.sweep_dir)
            if not signals:
                context.callbacks.on_multirun_end(config=cfg, config_name=config_name)
    return status


def _composed(hydra: Any, command: Command, config_name: str, words: Sequence[str]) -> tuple[Any, Plan]:
    """Return Hydra's config of the sweep, and what the words, and those of the sweep that they name, stand for."""
    from hydra.types import RunMode

    ours = [word for word in words if is_hydras(word)]
    beside = [] if named_sweep(words) else [*command.ahead, *(word for word in words if not is_hydras(word))]
    cfg = hydra.compose_config(config_name, [*beside, *ours], run_mode=RunMode.MULTIRUN)
    check_plugins(cfg)
    search = cfg.hydra.sweeper._target_ != GRID
    check_objective(cfg, search=search)
    todo = plan(cfg, words, command.config_name, command.folder_key, texts=command.texts, search=search)
    if named_sweep(words):  # typed words may be about what only the sweep's bring
        cfg = hydra.compose_config(config_name, [*command.ahead, *ours, *todo.words], run_mode=RunMode.MULTIRUN)
        check_objective(cfg, search=search)
    return cfg, todo


def check_alone() -> None:
    """Raise ValueError where torchrun or srun has started several processes: each would run the whole sweep."""
    count = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if count > 1 and ("RANK" in os.environ or "SLURM_STEP_ID" in os.environ):
        raise ValueError(
            f"a sweep cannot share {count} processes; start it alone: each job starts its own, by trainer.devices= of "
            "train.py and devices= of sample.py"
        )


def _flags(args: Any) -> tuple[str, ...]:
    """Return the flags that each job needs, too."""
    given = {"--config-dir": args.config_dir and os.path.abspath(args.config_dir), "--config-name": args.config_name}
    return tuple(word for flag, value in given.items() if value for word in (flag, value))


def check_objective(cfg: Any, *, search: bool) -> None:
    """Raise ValueError where a search does not know what to look for, or which values are good."""
    if search and cfg.get("objective") is None:
        raise ValueError("a search needs to know what to look for; add objective=METRIC, such as val/loss_ema")
    if (direction := cfg.get("direction", "minimize")) not in ("minimize", "maximize"):
        raise ValueError(f"direction must be minimize or maximize, got {direction!r}")


@contextmanager
def hydra_of(config_name: str, *, config_dir: str | None = None) -> Iterator[Any]:
    """Yield Hydra with our configs, and those of `config_dir` before them, as hydra.main makes it."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_automatic_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    version.setbase("1.3")
    path = create_automatic_config_search_path(None, None, str(CONFIGS))
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ValueError(f"--config-dir {config_dir} is no folder")
        path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", anchor=SearchPathQuery("schema", None))
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name=config_name, config_search_path=path)
    finally:
        GlobalHydra.instance().clear()


def _put_sweep_dir(cfg: Any, sweep_dir: str) -> None:
    """Tell Hydra, and the configs that launchers compose for each job, where the sweep is."""
    from omegaconf import open_dict

    place = os.path.abspath(sweep_dir)
    with open_dict(cfg):
        cfg.sweep_dir = sweep_dir
        cfg.hydra.sweep.dir = place
        cfg.hydra.overrides.hydra.append(f"hydra.sweep.dir={in_quotes(place)}")


def check_jobs(loader: Any, cfg: Any, todo: Plan, config_name: str, ahead: Sequence[str]) -> None:
    """Compose the first job, and it with each other value in turn, so that no mistake waits for its turn."""
    from omegaconf import open_dict

    for words in _samples(todo.jobs):
        job = loader.load_sweep_config(cfg, [*ahead, *words])
        with open_dict(job):
            del job["hydra"]
        check_complete(job)
        check_types(job, [*ahead, *words], config_name)


def _samples(jobs: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Return the first job and, for each word that it has not, the first job that differs from it in that alone."""
    found: dict[str, Sequence[str]] = {}
    for words in jobs:
        different = [word for word, other in zip(words, jobs[0], strict=True) if word != other]
        if len(different) == 1:
            found.setdefault(different[0], words)
    return [*jobs[:1], *found.values()]


# ---------------------------------------------------------------------------------------------------------------------
# the folder


def begin(todo: Plan, command: Command) -> dict[str, Any]:
    """Write sweep.yaml, or add to the one that is there, and return it.

    Raises ValueError where the folder holds another sweep: jobs of the same names with other settings.
    """
    folder = Path(todo.sweep_dir)
    (folder / STOP_FILE).unlink(missing_ok=True)
    old = read_sweep(folder) if (folder / SWEEP_FILE).exists() else {}
    known = {digest(entry["overrides"]): entry["folder"] for entry in old.get("jobs", [])}
    taken = {entry["folder"]: entry["overrides"] for entry in old.get("jobs", [])}
    jobs = []
    for name, words in zip(folder_names(todo.jobs, todo.shown), todo.jobs, strict=True):
        name = known.get(digest(words), name)
        if digest(words) not in known and name in taken:
            raise ValueError(_other_settings(folder / name, words, taken[name]))
        jobs.append({"folder": name, "overrides": list(words)})
        taken.pop(name, None)
    jobs += [{"folder": name, "overrides": words} for name, words in taken.items()]
    record = {
        "name": todo.name,
        "command": command.line,
        "directory": os.getcwd(),
        "time": old.get("time") or datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": old.get("commit") or git_commit(),
        "words": list(todo.words),
        "keys": [key.lstrip("+") for key in dict.fromkeys([*todo.keys, *old.get("keys", [])])],
        "jobs": jobs,
    }
    if record["commit"].removesuffix("+dirty") != git_commit().removesuffix("+dirty"):
        print(
            f"the code has changed since this sweep began: {record['commit']} then, {git_commit()} now; {NEW_FOLDER}",
            file=sys.stderr,
        )
    write_sweep(folder, record)
    return record


def _other_settings(folder: Path, words: Sequence[str], before: Sequence[str]) -> str:
    new, old = as_mapping(words), as_mapping(before)
    changed = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
    return f"{folder} is of a sweep with other settings ({', '.join(changed)}); {NEW_FOLDER}"


# ---------------------------------------------------------------------------------------------------------------------
# launching


def _grid(
    cfg: Any, context: Any, job: JobProcess, todo: Plan, record: dict[str, Any], signals: list[int]
) -> Exception | None:
    """Launch the jobs that are not done; return what the launcher itself failed with, if it did."""
    from hydra.core.plugins import Plugins

    names = [entry["folder"] for entry in record["jobs"][: len(todo.jobs)]]
    labels = {Path(todo.sweep_dir, name): f"[{i}/{len(names)}] {name}" for i, name in enumerate(names, 1)}
    print(f"{len(names)} jobs in {todo.sweep_dir}", file=sys.stderr)
    wanted = [words for words, (folder, label) in zip(todo.jobs, labels.items(), strict=True) if is_due(folder, label)]
    if not wanted:
        print(f"nothing is left to run; {NEW_FOLDER}", file=sys.stderr)
        return None
    job = with_share(job, cfg, len(wanted))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=cfg)
    size = cfg.hydra.sweeper.get("max_batch_size") or len(wanted)
    with Watch(labels):
        for first in range(0, len(wanted), size):
            if signals:
                break
            try:
                launcher.launch([list(words) for words in wanted[first : first + size]], initial_job_idx=first)
            except KeyboardInterrupt:  # for the second time
                break
            except Exception as error:  # of a pool or a cluster; the jobs' own are in their folders
                if type(launcher).__name__ == "SlurmLauncher":
                    await_rest(todo.sweep_dir, signals)
                return error
    return None


def _search(cfg: Any, context: Any, job: JobProcess, todo: Plan, signals: list[int]) -> Exception | None:
    """Let a sweeper of Hydra's choose and launch jobs; return what it failed with, if it did."""
    from hydra.core.plugins import Plugins

    print(f"a search in {todo.sweep_dir}", file=sys.stderr)
    job = with_share(job, cfg, cfg.hydra.sweeper.get("n_jobs") or 1)
    sweeper = Plugins.instance().instantiate_sweeper(config=cfg, hydra_context=context, task_function=job)
    folder = Path(todo.sweep_dir)
    labels = {job.folder: f"[{i}] {job.folder.name}" for i, job in enumerate(jobs_of(folder), 1)}
    with Watch(labels, search=folder, total=cfg.hydra.sweeper.get("n_trials")):
        try:
            if cfg.hydra.sweeper._target_.startswith(OPTUNA):
                Search(sweeper.sweeper, job, cfg, signals=signals).run(todo.words)
            else:
                sweeper.sweep(arguments=list(todo.words))
        except KeyboardInterrupt:  # for the second time
            return None
        except Exception as error:
            return error
    return None


def is_due(folder: Path, label: str) -> bool:
    """Say whether a job is to be run, and in a line why not, or what is there already."""
    status = read_status(folder)
    if status is None:
        return True
    at = "" if status.step is None else f" at step {status.step}"
    if status.state in DONE:
        print(f"{label} is {status.state} already", file=sys.stderr)
        return False
    if status.state == "running":
        print(f"{label} is running already, as process {status.pid} on {status.host}: left alone", file=sys.stderr)
        return False
    why = f" ({status.error})" if status.error else ""
    print(f"{label} was {status.state}{at}{why}; it goes on", file=sys.stderr)
    return True


@contextmanager
def stopping(sweep_dir: Path) -> Iterator[list[int]]:
    """Ask all jobs to save and end where this process is asked to; asked twice, do not wait for them.

    Yields the numbers of the signals that came.
    """
    received: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        write_stop(sweep_dir, number)
        print("stopping: the running jobs save and end (once more: at once)", file=sys.stderr)

    with handled(("SIGINT", "SIGTERM", "SIGUSR1"), ask):
        yield received


def conclude(
    todo: Plan, record: dict[str, Any], trouble: Exception | None, signals: Sequence[int], *, search: bool
) -> int:
    """Print the table of the jobs and return the sweep's exit status."""
    jobs = jobs_of(todo.sweep_dir)
    if search:
        entries = [{"folder": job.folder.name, "overrides": words_of(job.folder)} for job in jobs]
        write_sweep(todo.sweep_dir, {**record, "jobs": entries})
    else:
        jobs = jobs[: len(todo.jobs)]
    print(table({f"[{i}/{len(jobs)}] {job.folder.name}": job for i, job in enumerate(jobs, 1)}), file=sys.stderr)
    if trouble is not None and not signals:  # a pool that is told to stop complains
        text = " ".join(str(trouble).split())
        print(f"error: the launcher failed: {type(trouble).__name__}: {text[:500]}", file=sys.stderr)
    done = sum(job.status is not None and job.status.state in DONE for job in jobs)
    print(f"{done} of {len(jobs)} jobs are done in {todo.sweep_dir}", file=sys.stderr)
    if done < len(jobs) or trouble is not None:
        print(f"the same command runs what is left: {record['command']}", file=sys.stderr)
    if signals:
        return 128 + signals[0]
    return 0 if done == len(jobs) and trouble is None else FAILED


def print_best(cfg: Any, sweep_dir: str) -> None:
    """Print which job has the best value of the objective, where there is one."""
    if (objective := cfg.get("objective")) is None:
        return
    found = {}
    for job in jobs_of(sweep_dir):
        if job.status is not None and job.status.state in DONE:
            with suppress(JobFailed):
                found[job.folder.name] = final_value(job.folder, objective)
    if found:
        best = (max if cfg.direction == "maximize" else min)(found, key=found.__getitem__)
        print(f"best {objective}: {found[best]:.6g} of {best}", file=sys.stderr)
