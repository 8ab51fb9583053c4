"""How does a search go on? Optuna chooses, Hydra's launcher runs, and a study in the sweep's folder remembers.

Hydra's Optuna sweeper reads the search space and makes jobs of trials. The loop around that is ours, because the
plugin's own forgets where it was, ends at the first job that fails, and knows nothing of pruning. Nothing here imports
torch.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from diffusion.files import atomic_write
from diffusion.run_folder import read_status
from diffusion.sweep.job import JobProcess
from diffusion.sweep.trial import storage_of, write_trial

OPTUNA = "hydra_plugins.hydra_optuna_sweeper."
RESULTS_FILE = "optimization_results.yaml"
SWEEPER = ("hydra.sweeper", "hydra/sweeper")
STUDY, DATABASE = "search", "search.db"
HOPELESS = 3  # jobs that fail before any other has ended well: something is wrong with all of them
FIXED = "fixed_params"  # Optuna's name for the parameters of a trial that nobody had to choose


class Search:
    """Carry a study of `n_trials` to its end; `sweeper` is Hydra's, set up with the launcher, and `signals` stop it.

    What a trial tries is a function of the sampler's seed, its number and the results before it, so that a search that
    was interrupted goes on as if it had not been. Trials whose jobs failed or were stopped are tried again, in the same
    folders, when the search is started again.
    """

    def __init__(self, sweeper: Any, job: JobProcess, cfg: Any, *, signals: Sequence[int] = ()) -> None:
        self.sweeper, self.job, self.signals = sweeper, job, signals
        self.settings = cfg.hydra.sweeper
        overrides = cfg.hydra.overrides  # with which launchers compose each job: it knows nothing of the sweeper
        overrides.hydra = [word for word in overrides.hydra if not word.lstrip("+~").startswith(SWEEPER)]
        self.storage = sweeper.storage or f"sqlite:///{job.root.absolute() / DATABASE}"

    def run(self, words: Sequence[str]) -> None:
        """Run the trials that are missing and write optimization_results.yaml.

        Raises ValueError where there is nothing to search for or no job comes to an end.
        """
        import optuna
        from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, fixed = create_params_from_overrides(list(words))
        if not space:
            raise ValueError(
                "there is nothing to search; give a key an interval: 'optimizer.lr=tag(log, interval(1e-4, 1e-2))'"
            )
        study = self._study()
        self._take_up(study)
        left = self.settings.n_trials - done(study)
        while left > 0 and not self.signals:
            trials, jobs = [], []
            for _ in range(min(left, self.sweeper.n_jobs)):
                study.sampler = self._sampler(space, chosen(study))
                trials.append(study.ask())
                jobs += [rounded(said, space) for said in self.sweeper._configure_trials(trials[-1:], space, fixed)]
            self._launch(study, [trial.number for trial in trials], jobs)
            left -= len(trials)
            study = self._study()
        self._write_results(study)

    def _study(self) -> Any:
        """Open the study anew, or make it: Optuna remembers what it asked for, and would not see what jobs report."""
        import optuna

        return optuna.create_study(
            study_name=self.sweeper.study_name or STUDY,
            storage=storage_of(self.storage),
            directions=self.sweeper._get_directions(),
            load_if_exists=True,
        )

    def _take_up(self, study: Any) -> None:
        """Ask again for what was tried without a result: by jobs that failed, or that a stopped search left behind."""
        from optuna.trial import TrialState

        tried = study.get_trials()
        for trial in tried:
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
            if trial.state not in (TrialState.RUNNING, TrialState.FAIL) or not trial.params:
                continue
            later = tried[trial.number + 1 :]
            if not any(trial.params in (other.params, other.system_attrs.get(FIXED)) for other in later):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # asking again is an experimental feature, it says
                    study.enqueue_trial(trial.params)

    def _sampler(self, space: Mapping[str, Any], number: int) -> Any:
        """Return the sampler for a trial, with a seed of its own where the config has one."""
        from hydra.utils import instantiate

        sampler = self.sweeper.sampler
        if isinstance(sampler, functools.partial):  # of a grid
            return sampler({key: self.sweeper._to_grid_sampler_choices(values) for key, values in space.items()})
        seed = self.settings.sampler.get("seed")
        return sampler if seed is None else instantiate(self.settings.sampler, seed=seed + number)

    def _launch(self, study: Any, trials: Sequence[int], words: Sequence[Sequence[str]]) -> None:
        """Run the jobs of the trials of these numbers and tell the study what became of them."""
        from optuna.trial import TrialState

        folders = [self.job.root / self.job.folder_of(list(said)) for said in words]
        for trial, folder in zip(trials, folders, strict=True):
            write_trial(folder, storage=self.storage, study=study.study_name, trial=trial)
        results = self.sweeper.launcher.launch(words, initial_job_idx=trials[0])
        study = self._study()
        for trial, folder, result in zip(trials, folders, results, strict=True):
            status = read_status(folder)
            try:
                value = float(result.return_value)
            except Exception as error:  # whatever ended a job; its folder says what
                if not self.signals:
                    study.tell(trial, state=TrialState.FAIL)
                    self._check_hope(study, error)
                continue
            if status is not None and status.state == "pruned":
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, value)

    def _check_hope(self, study: Any, error: Exception) -> None:
        from optuna.trial import TrialState

        if not done(study) and len(study.get_trials(states=(TrialState.FAIL,))) >= HOPELESS:
            raise ValueError(f"the first {HOPELESS} jobs all failed; the last one said: {error}")

    def _write_results(self, study: Any) -> None:
        from optuna.trial import TrialState

        states = Counter(trial.state for trial in study.trials)
        names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
        found: dict[str, Any] = {"name": "optuna", "trials": {name: states[state] for state, name in names.items()}}
        if states[TrialState.COMPLETE]:
            best = study.best_trial
            params = {key: yaml.safe_load(brief(str(value))) for key, value in best.params.items()}
            found |= {"best_params": params, "best_value": best.value, "best_trial": best.number}
        with atomic_write(self.job.root / RESULTS_FILE, durable=False) as partial:
            partial.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")


def rounded(words: Sequence[str], space: Mapping[str, Any]) -> list[str]:
    """Return the words of a job with four digits of each number that was drawn; more would only make names long."""
    pairs = [word.partition("=") for word in words]
    return [f"{key}={brief(value)}" if key in space else f"{key}={value}" for key, _, value in pairs]


def brief(value: str) -> str:
    """Return a number with four digits, and any other word as it is."""
    try:
        return value if float(value).is_integer() else f"{float(value):.4g}"
    except ValueError:
        return value


def chosen(study: Any) -> int:
    """Return how many trials a sampler has chosen, without those that were asked for again."""
    return sum(FIXED not in trial.system_attrs for trial in study.get_trials(deepcopy=False))


def done(study: Any) -> int:
    """Return how many trials of a study have a result: those that came to their end, and those that were pruned."""
    from optuna.trial import TrialState

    return len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED), deepcopy=False))
