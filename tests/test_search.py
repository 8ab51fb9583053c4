"""A search finds what is good, ends what is bad, and goes on where it was stopped; a study remembers."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from sweep_cases import states, sweep
from training_cases import tiny

from diffusion.run_folder import read_status, write_status
from diffusion.sweep.job import JobFailed, JobProcess
from diffusion.sweep.search import RESULTS_FILE, Search
from diffusion.sweep.trial import TRIAL_FILE, OpenTrial, check_pruner, storage_of, write_trial

optuna = pytest.importorskip("optuna", reason="uv sync --extra optuna")
plugin = pytest.importorskip("hydra_plugins.hydra_optuna_sweeper._impl", reason="uv sync --extra optuna")
BEST = -2.3  # log10 of the learning rate that is best
STEPS = (10, 20, 30)
SPACE = ("lr=tag(log,interval(1e-5,1e-1))", "kind=choice(good,bad)", "experiment=toy")


class Raising:
    """What Hydra returns of a job that failed: asking for its value raises what it failed with."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def return_value(self) -> float:
        raise self._error


class Launcher:
    """Run jobs in this process: a loss that falls with the steps to a parabola of log lr; kind=bad adds one."""

    def __init__(self, root: Path, *, pruner: str = "none", broken: Any = lambda lr: False) -> None:
        self.root, self.pruner, self.broken = root, pruner, broken
        self.begun: list[str] = []
        self.after: int | None = None  # jobs, before the search is asked to stop in the middle of one
        self.signals: list[int] = []

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[SimpleNamespace]:
        return [self._returned(words) for words in jobs]

    def _returned(self, words: list[str]) -> Any:
        answer = self._job(words)
        return Raising(answer) if isinstance(answer, Exception) else SimpleNamespace(return_value=answer)

    def _job(self, words: list[str]) -> float | Exception:
        folder = self.root / job_of(self.root).folder_of(words)
        status = read_status(folder)
        said = dict(word.split("=") for word in words)
        loss = (math.log10(float(said["lr"])) - BEST) ** 2 + (said["kind"] == "bad")
        if status is not None and status.state in ("finished", "pruned"):
            return loss
        self.begun.append(folder.name)
        if self.broken(float(said["lr"])):
            write_status(folder, "failed", error="boom")
            return JobFailed("boom")
        if self.after is not None and len(self.begun) > self.after:
            self.signals.append(15)
            write_status(folder, "preempted", step=10)
            return JobFailed("stopped after step 10")
        trial = OpenTrial(folder, pruner=self.pruner, max_steps=STEPS[-1], startup_trials=3)
        for step in STEPS:
            if not trial.goes_on(loss + 1 / step, step) and step < STEPS[-1]:
                write_status(folder, "pruned", step=step)
                return loss + 1 / step
        write_status(folder, "finished", step=STEPS[-1])
        return loss + 1 / STEPS[-1]


def job_of(root: Path) -> JobProcess:
    return JobProcess(("toy.py",), str(root.parent), root.name, "run_dir", keys=("lr", "kind"), objective="val/loss")


def search(launcher: Launcher, *, n_trials: int = 12, n_jobs: int = 1, seed: int = 0, space: Any = SPACE) -> dict:
    """Run a search and return its results."""
    sampler = {"_target_": "optuna.samplers.TPESampler", "seed": seed, "n_startup_trials": 5}
    settings = {"sampler": sampler, "n_trials": n_trials}
    cfg = OmegaConf.create({"hydra": {"sweeper": settings, "overrides": {"hydra": ["hydra.sweeper.n_trials=3"]}}})
    impl = plugin.OptunaSweeperImpl(None, "minimize", None, None, n_trials, n_jobs, 0.0, None, None, None)
    impl.config, impl.launcher = cfg, launcher
    launcher.root.mkdir(exist_ok=True)
    Search(impl, job_of(launcher.root), cfg, signals=launcher.signals).run(space)
    assert cfg.hydra.overrides.hydra == []
    return yaml.safe_load((launcher.root / RESULTS_FILE).read_text(encoding="utf-8"))


def trials_of(root: Path) -> list[Any]:
    return optuna.load_study("search", storage_of(f"sqlite:///{root / 'search.db'}")).trials


@pytest.mark.slow
def test_a_search_finds_the_best_region(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "search")
    found = search(launcher, n_trials=25)
    assert found["trials"] == {"finished": 25, "pruned": 0, "failed": 0}
    assert abs(math.log10(found["best_params"]["lr"]) - BEST) < 0.3 and found["best_params"]["kind"] == "good"
    assert found["best_value"] == pytest.approx(
        (math.log10(found["best_params"]["lr"]) - BEST) ** 2 + 1 / STEPS[-1], abs=1e-3
    )
    late = [trial.params for trial in trials_of(launcher.root)[15:]]
    assert sum(params["kind"] == "good" for params in late) >= 8  # what it has learnt
    assert all(len(name) < 30 for name in launcher.begun)  # lr=0.005012,kind=good


def test_bad_trials_are_pruned_and_good_ones_are_not(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "search", pruner="median")
    found = search(launcher, n_trials=16)
    trials = trials_of(launcher.root)
    pruned = [trial for trial in trials if trial.state == optuna.trial.TrialState.PRUNED]
    assert found["trials"]["pruned"] == len(pruned) > 2 and found["trials"]["finished"] + len(pruned) == 16
    finished = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    for trial in pruned:  # by the definition of the median rule, at the step where it ended
        step = trial.last_step
        others = sorted(o.intermediate_values[step] for o in finished if o.number < trial.number)
        middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
        assert trial.intermediate_values[step] > middle and step < STEPS[-1] and len(others) >= 3
        folder = launcher.root / next(name for name in launcher.begun if f"lr={trial.params['lr']:.4g}," in name)
        assert read_status(folder).state == "pruned" and read_status(folder).step == step
    assert found["best_value"] == min(trial.value for trial in finished)


def test_hyperband_ends_runs_early_too(tmp_path: Path) -> None:
    found = search(Launcher(tmp_path / "search", pruner="hyperband"), n_trials=12)
    assert found["trials"]["pruned"] > 0 and found["trials"]["finished"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", [0, 3])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path, stopped_after: int) -> None:
    whole, parts = Launcher(tmp_path / "whole"), Launcher(tmp_path / "parts")
    expected = search(whole, n_trials=7)
    parts.after = stopped_after
    search(parts, n_trials=7)
    assert len(parts.begun) == stopped_after + 1
    parts.after, parts.signals[:] = None, []
    found = search(parts, n_trials=7)
    assert found["best_params"] == expected["best_params"] and found["trials"] == expected["trials"] | {"failed": 1}
    assert parts.begun[stopped_after] == parts.begun[stopped_after + 1]  # it goes on, in its folder
    assert [*parts.begun[:stopped_after], *parts.begun[stopped_after + 1 :]] == whole.begun
    search(parts, n_trials=7)
    assert len(parts.begun) == 8  # nothing is left
    search(parts, n_trials=9)
    assert len(parts.begun) == 10  # two more


class Killed(Launcher):
    """A launcher whose process is killed when its third job has ended."""

    def launch(self, jobs: list[list[str]], initial_job_idx: int) -> list[Any]:
        answers = super().launch(jobs, initial_job_idx)
        if len(self.begun) == 3:
            raise RuntimeError("killed")
        return answers


def test_what_was_killed_before_it_could_tell_is_not_lost(tmp_path: Path) -> None:
    killed = Killed(tmp_path / "search")
    with pytest.raises(RuntimeError, match="killed"):
        search(killed, n_trials=5)
    assert trials_of(killed.root)[-1].state == optuna.trial.TrialState.RUNNING
    again = Launcher(killed.root)
    found = search(again, n_trials=5)
    assert found["trials"]["finished"] == 5 and len(again.begun) == 2  # the third job had ended well


@pytest.mark.slow
def test_a_failed_trial_does_not_end_a_search_and_is_tried_again_with_the_next(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "search", broken=lambda lr: lr > 1e-2)
    found = search(launcher, n_trials=14)
    failed = found["trials"]["failed"]
    assert failed > 0 and found["trials"]["finished"] == 14 - failed
    mended = Launcher(launcher.root)
    found = search(mended, n_trials=14)
    assert found["trials"] == {"finished": 14, "pruned": 0, "failed": failed}
    assert sorted(mended.begun) == sorted(name for name in launcher.begun if read_lr(name) > 1e-2)


def read_lr(name: str) -> float:
    return float(name.split(",")[0].removeprefix("lr="))


def test_a_search_whose_jobs_all_fail_stops_and_says_why(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "search", broken=lambda lr: True)
    with pytest.raises(ValueError, match="the first 3 jobs all failed; the last one said: boom"):
        search(launcher, n_trials=20)
    assert len(launcher.begun) == 3


def test_several_trials_at_a_time(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path / "search")
    assert search(launcher, n_trials=10, n_jobs=4)["trials"]["finished"] == 10
    assert len(set(launcher.begun)) == 10


def test_a_search_of_nothing_says_how_to_give_an_interval(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to search; give a key an interval: 'optimizer.lr=tag\(log"):
        search(Launcher(tmp_path / "search"), space=("lr=0.1", "experiment=toy"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruner": "best"}, "one of median, hyperband, none, got 'best'"),
        ({"pruner": "none", "warmup_steps": -1}, "-1"),
    ],
)
def test_pruners_that_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pruner(**settings)


# -- in a training run -------------------------------------------------------------------------------------------------

PRUNING = {"_target_": "diffusion.training.pruning.Pruning", "_partial_": True, "startup_trials": 1}


def prepared(root: Path, name: str, study: Any, **settings: Any) -> dict[str, Any]:
    """The config of a tiny run that is the study's next trial."""
    trial = study.ask()
    write_trial(root / name, storage=f"sqlite:///{root / 'search.db'}", study="search", trial=trial.number)
    config = tiny(root / name, objective="val/loss", trainer__max_steps=15, **settings)
    config["callbacks"] = {"pruning": PRUNING, **config["callbacks"]}
    return config


def test_a_run_is_ended_as_pruned_with_its_last_value_and_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from diffusion.sweep import final_value
    from diffusion.training.run import train

    study = optuna.create_study(study_name="search", storage=storage_of(f"sqlite:///{tmp_path / 'search.db'}"))
    good = prepared(tmp_path, "good", study)
    train(good)
    assert read_status(tmp_path / "good").state == "finished"
    first = trials_of(tmp_path)[0].intermediate_values
    assert sorted(first) == [5, 10, 15] and first[15] == pytest.approx(final_value(tmp_path / "good", "val/loss"))
    study.tell(0, first[15])

    bad = prepared(tmp_path, "bad", study, seed=3)
    bad["optimizer"]["lr"] = 0.0
    with pytest.raises(SystemExit) as end:
        train(bad)
    status = read_status(tmp_path / "bad")
    assert end.value.code == 0 and (status.state, status.step, status.max_steps) == ("pruned", 5, 15)
    assert status.error == f"val/loss is {first_of(tmp_path, 1, 5):.6g} at step 5: the median pruner ends the run"
    assert final_value(tmp_path / "bad", "val/loss") == pytest.approx(first_of(tmp_path, 1, 5))
    assert f"pruned: {status.error}" in capsys.readouterr().err


def first_of(root: Path, number: int, step: int) -> float:
    return trials_of(root)[number].intermediate_values[step]


def test_without_a_trial_the_callback_does_nothing(tmp_path: Path) -> None:
    from diffusion.training.run import train

    config = tiny(tmp_path / "run", objective="val/loss", trainer__max_steps=6)
    config["callbacks"] = {"pruning": PRUNING, **config["callbacks"]}
    train(config)
    assert not (tmp_path / "run" / TRIAL_FILE).exists() and read_status(tmp_path / "run").state == "finished"


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_searches_with_jobs_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("diffusion.report.build", lambda folders, **kwargs: folders[0] / "report.html")
    words = ["-m", "hydra/sweeper=optuna", "objective=val/loss", "seed=range(0,9)", "sweep_dir=found", "name=ok"]
    more = ["hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=1"]
    status, said = sweep(tmp_path, [*words, *more], monkeypatch, capsys)
    assert status == 0, said
    found = yaml.safe_load((tmp_path / "found" / RESULTS_FILE).read_text(encoding="utf-8"))
    assert found["best_value"] == found["best_params"]["seed"] + 0.5  # what the toy writes
    assert set(states(tmp_path / "found").values()) == {"finished"}
    status, said = sweep(tmp_path, [*words, *more], monkeypatch, capsys)
    assert status == 0 and "begins" not in said


@pytest.mark.slow
def test_the_named_search_trains_and_prunes(tmp_path: Path) -> None:
    import subprocess

    root = Path(__file__).resolve().parent.parent
    quick = "trainer.max_steps=12 trainer.val_check_interval=4 callbacks=quiet data.batch_size=16 net.channels=16"
    search_words = "sweep=search hydra.sweeper.n_trials=4 callbacks.pruning.startup_trials=1"
    command = [sys.executable, "train.py", *search_words.split(), *quick.split(), f"sweep_dir={tmp_path}/found"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(states(tmp_path / "found").values()) <= {"finished", "pruned"} and "best val/loss_ema" in done.stderr
