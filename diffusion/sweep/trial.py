"""Should this job of a search go on? It tells the study what it has measured, and a pruner of Optuna's answers.

Nothing here imports torch.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffusion.files import atomic_write

TRIAL_FILE = "trial.yaml"  # in a job's folder: which trial of which study it is
PRUNERS = ("median", "hyperband", "none")
BUSY = 60.0  # seconds to wait for a database that another job writes to
LEAST = 27  # hyperband's shortest runs have this part of all steps; the best third of them goes on three times as long


def write_trial(folder: Path, *, storage: str, study: str, trial: int) -> None:
    """Tell the job that will run in a folder which trial it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / TRIAL_FILE, durable=False) as partial:
        partial.write_text(yaml.safe_dump({"storage": storage, "study": study, "trial": trial}), encoding="utf-8")


def check_pruner(pruner: str, **numbers: int) -> None:
    """Raise ValueError for a pruner that there is not, and for numbers below 0."""
    if pruner not in PRUNERS:
        raise ValueError(f"callbacks.pruning.pruner is one of {', '.join(PRUNERS)}, got {pruner!r}")
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"callbacks.pruning.{name} must not be negative, got {value}")


def storage_of(url: str) -> Any:
    """Open the database of a study, or make it.

    Optuna 2, which Hydra's sweeper asks for, never commits what it says about its own version under SQLAlchemy 2, and
    then refuses the database; so each statement is committed. A search asks and a job reports in single statements.
    """
    from optuna.storages import RDBStorage

    options: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
    if url.startswith("sqlite:"):
        options["connect_args"] = {"timeout": BUSY}
    return RDBStorage(url, engine_kwargs=options)


class OpenTrial:
    """The trial that the job in `folder` is, in the study that it belongs to. `max_steps` are those of a whole job."""

    def __init__(
        self, folder: Path, *, pruner: str, max_steps: int, startup_trials: int = 5, warmup_steps: int = 0
    ) -> None:
        import optuna

        check_pruner(pruner, startup_trials=startup_trials, warmup_steps=warmup_steps)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        facts: Mapping[str, Any] = yaml.safe_load((folder / TRIAL_FILE).read_text(encoding="utf-8"))
        judge: Any = optuna.pruners.NopPruner()
        if pruner == "median":
            judge = optuna.pruners.MedianPruner(startup_trials, warmup_steps)
        elif pruner == "hyperband":
            judge = optuna.pruners.HyperbandPruner(max(1, max_steps // LEAST), max(1, max_steps), 3)
        sampler = optuna.samplers.RandomSampler(seed=0)  # it has nothing to choose here
        self.name = pruner
        self._study = optuna.load_study(facts["study"], storage_of(facts["storage"]), sampler=sampler, pruner=judge)
        trials = self._study.get_trials(deepcopy=False)
        self._id = next(trial._trial_id for trial in trials if trial.number == facts["trial"])

    def goes_on(self, value: float, step: int) -> bool:
        """Report what was measured after `step` steps; say whether the job is worth going on.

        A study that cannot be reached prunes nothing: a warning says so.
        """
        import optuna

        try:
            trial = optuna.trial.Trial(self._study, self._id)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a job that goes on reports a step again
                trial.report(value, step)
                return not trial.should_prune()
        except optuna.exceptions.StorageInternalError as error:
            warnings.warn(f"the study of this search cannot be reached, so nothing is pruned: {error}", stacklevel=2)
            return True
