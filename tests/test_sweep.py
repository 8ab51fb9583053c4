"""A sweep is one folder a job, each job a process; nothing ends it early, and the same command runs what is left."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml
from sweep_cases import only_sweep, save_toy, started, starts, states, sweep
from tiny import run

from diffusion.cli.composing import CONFIGS
from diffusion.run_folder import locked, read_status, write_status
from diffusion.sweep import JobFailed, JobProcess, final_value, jobs_of
from diffusion.sweep.folder import folder_names
from diffusion.sweep.job import read_stop, reason, settle, write_stop
from diffusion.sweep.progress import clock, last_line, table


@pytest.fixture
def no_report(monkeypatch):
    """Leave out the page at the end, whose libraries take a second to load."""
    monkeypatch.setattr("diffusion.report.build", lambda folders, **kwargs: folders[0] / "report.html")


# ---------------------------------------------------------------------------------------------------------------------
# jobs


def test_jobs_that_fail_stop_no_others_and_only_they_run_again(no_report, monkeypatch, capsys, tmp_path):
    status, said = sweep(tmp_path, "-m name=ok,bad,kill seed=4", monkeypatch, capsys)
    folder = only_sweep(tmp_path)
    assert status == 1
    assert states(folder) == {"name=ok": "finished", "name=bad": "failed", "name=kill": "failed"}
    assert read_status(folder / "name=bad").error == "seed 4 is not finite"
    assert read_status(folder / "name=kill").error == "killed by SIGKILL (out of memory, or by hand)"
    for line in (
        r"\[1/3\] name=ok begins",
        r"\[1/3\] name=ok finished in \d+:\d\d",
        r"\[2/3\] name=bad failed after .*",
    ):
        assert re.search(f"^{line}$", said, re.M)
    assert re.search(r"^\[2/3\] name=bad +failed\n +seed 4 is not finite\n +log: .*name=bad/log.txt$", said, re.M)
    assert "1 of 3 jobs are done" in said and f"report: {folder}/report.html" in said and "Traceback" not in said

    record = yaml.safe_load((folder / "sweep.yaml").read_text())
    assert record["keys"] == ["name"] and record["words"] == ["name=ok,bad,kill", "seed=4"]
    assert record["command"] == "toy.py -m name=ok,bad,kill seed=4"
    assert record["jobs"][1] == {"folder": "name=bad", "overrides": ["name=bad", "seed=4"]}
    assert {path.name for path in folder.iterdir()} == {".lock", "sweep.yaml", *states(folder)}
    ok = {path.name for path in (folder / "name=ok").iterdir()}
    assert ok == {"STATUS", "log.txt", "metrics.csv", "overrides.yaml", "starts"}  # nothing of Hydra's
    assert "known" in (folder / "name=ok" / "starts").read_text().split()  # sweep.yaml comes first

    (tmp_path / "mended").touch()
    status, said = sweep(tmp_path, "-m seed=4 name=ok,bad,kill", monkeypatch, capsys)  # in another order
    assert status == 1 and only_sweep(tmp_path) == folder
    assert starts(folder) == {"name=ok": 1, "name=bad": 2, "name=kill": 2}
    assert states(folder) == {"name=ok": "finished", "name=bad": "finished", "name=kill": "failed"}
    assert "[1/3] name=ok is finished already" in said
    assert "[2/3] name=bad was failed (seed 4 is not finite); it goes on" in said


def test_a_sweep_that_is_done_runs_nothing(no_report, monkeypatch, capsys, tmp_path):
    assert sweep(tmp_path, "-m seed=0,0,1 sweep_dir=mine", monkeypatch, capsys)[0] == 0
    status, said = sweep(tmp_path, "seed=0,0,1 -m sweep_dir=mine", monkeypatch, capsys)
    assert status == 0 and starts(tmp_path / "mine") == {"seed=0": 1, "seed=1": 1}
    assert "seed=0 is there 2 times in seed=0,0,1; it is run once" in said and "nothing is left to run" in said
    assert "report: " in said


@pytest.mark.slow
def test_other_seeds_join_the_sweep_and_other_settings_do_not(no_report, monkeypatch, capsys, tmp_path):
    sweep(tmp_path, "-m seed=0,1 sweep_dir=mine", monkeypatch, capsys)
    status, said = sweep(tmp_path, "-m seed=1,2 sweep_dir=mine", monkeypatch, capsys)
    assert status == 0 and starts(tmp_path / "mine") == {"seed=0": 1, "seed=1": 1, "seed=2": 1}
    assert set(states(tmp_path / "mine")) == {"seed=0", "seed=1", "seed=2"}
    status, said = sweep(tmp_path, "-m seed=1,2 threads=3 sweep_dir=mine", monkeypatch, capsys)
    assert status == 2 and "other settings (threads: None -> 3); sweep_dir=... begins anew elsewhere" in said


def test_two_sweeps_get_two_folders_and_one_sweep_cannot_run_twice(no_report, monkeypatch, capsys, tmp_path):
    sweep(tmp_path, "-m seed=0", monkeypatch, capsys)
    first = only_sweep(tmp_path)
    with locked(first):
        status, said = sweep(tmp_path, "-m seed=0", monkeypatch, capsys)
        assert status == 2 and f"process {os.getpid()} on {socket.gethostname()}" in said
        assert sweep(tmp_path, "-m seed=1", monkeypatch, capsys)[0] == 0
    assert len(list(first.parent.iterdir())) == 2


def test_code_that_changed_since_the_sweep_began_is_told(no_report, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("diffusion.sweep.run.git_commit", lambda: "abc+dirty")
    assert "the code has changed" not in sweep(tmp_path, "-m seed=0", monkeypatch, capsys)[1]
    monkeypatch.setattr("diffusion.sweep.run.git_commit", lambda: "def")
    said = sweep(tmp_path, "-m seed=0", monkeypatch, capsys)[1]
    assert said.count("the code has changed since this sweep began: abc+dirty then, def now") == 1


def test_a_report_that_fails_hides_nothing(monkeypatch, capsys, tmp_path):
    def fail(folders, **kwargs):
        raise RuntimeError("no ink")

    monkeypatch.setattr("diffusion.report.build", fail)
    status, said = sweep(tmp_path, "-m seed=0 objective=val/loss", monkeypatch, capsys)
    assert status == 0 and "1 of 1 jobs are done" in said
    assert "best val/loss: 0.5 of seed=0" in said
    assert "the report failed: RuntimeError: no ink; to make it again: uv run python -m diffusion.report" in said


@pytest.mark.slow
def test_lists_texts_and_paths_reach_the_job_as_they_were_typed(no_report, monkeypatch, capsys, tmp_path):
    words = ["-m", "threads=1,2", 'name="a, b=c"', "latent_cache=x/y=1,x/y=2", "latent_dtype=[a,b]"]
    status, said = sweep(tmp_path, words, monkeypatch, capsys)
    assert status == 0, said
    jobs = jobs_of(only_sweep(tmp_path))
    assert [job.folder.name for job in jobs][1] == "threads=1,latent_cache=x_y=2"
    assert jobs[0].overrides["name"] == "a, b=c" and jobs[0].overrides["latent_dtype"] == "[a,b]"


def test_jobs_compose_with_the_users_own_configs(no_report, monkeypatch, capsys, tmp_path):
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    (tmp_path / "own" / "experiment").mkdir()
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\n")
    params = {"experiment": "mine", "seed": "3,4", "threads": "1"}
    text = yaml.safe_dump({"hydra": {"mode": "MULTIRUN", "sweeper": {"params": params}}})
    (tmp_path / "own" / "sweep" / "ours.yaml").write_text(f"# @package _global_\n{text}")
    status, said = sweep(tmp_path, "--config-dir own sweep=ours seed=4 threads=1,2", monkeypatch, capsys)
    assert status == 0, said
    assert only_sweep(tmp_path).name.startswith("ours-")
    assert states(only_sweep(tmp_path)) == {"threads=1": "finished", "threads=2": "finished"}  # typed words count


# ---------------------------------------------------------------------------------------------------------------------
# stopping


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_sweep_lets_its_job_save_and_goes_on_later(name, no_report, monkeypatch, capsys, tmp_path):
    words, number = "-m name=long seed=0,1 sweep_dir=mine", getattr(signal, name)
    process = started(tmp_path, words)
    log = tmp_path / "mine" / "seed=0" / "log.txt"
    wait_for(lambda: log.exists() and "waiting" in log.read_text())
    os.killpg(process.pid, number)
    assert process.wait(30) == 128 + number
    said = (tmp_path / "printed.txt").read_text()
    assert log.read_text().count(f"saved {name}") == 1
    assert states(tmp_path / "mine") == {"seed=0": "preempted", "seed=1": None}
    assert "stopping: the running jobs save and end" in said and "report" not in said
    assert f"the same command runs what is left: toy.py {words}" in said

    (tmp_path / "mended").touch()
    status, said = sweep(tmp_path, words, monkeypatch, capsys)
    assert status == 0 and starts(tmp_path / "mine") == {"seed=0": 2, "seed=1": 1}
    assert "[1/2] seed=0 was preempted; it goes on" in said


def process_of(folder: Path, name: str, **changes) -> JobProcess:
    settings = {
        "start": (str(save_toy(folder)),),
        "directory": str(folder),
        "sweep_dir": "mine",
        "folder_key": "run_dir",
        "keys": ("seed",),
    }
    return JobProcess(**{**settings, **changes})


def test_a_job_that_is_asked_to_stop_before_it_begins_does_not(tmp_path):
    (tmp_path / "mine").mkdir()
    write_stop(tmp_path / "mine", signal.SIGTERM)
    assert read_stop(tmp_path / "mine") == signal.SIGTERM
    with pytest.raises(JobFailed, match="the sweep was stopped"):
        process_of(tmp_path, "ok").run(["seed=0"])
    assert starts(tmp_path / "mine") == {}


def test_a_job_that_runs_elsewhere_is_left_alone(tmp_path):
    folder = tmp_path / "mine" / "seed=0"
    with locked(folder):
        write_status(folder, "running", step=3)
        with pytest.raises(JobFailed, match=f"process {os.getpid()} on"):
            process_of(tmp_path, "ok").run(["seed=0"])
    assert starts(tmp_path / "mine") == {}


def test_the_objective_is_what_a_search_gets_and_done_jobs_are_asked_without_running(tmp_path):
    job = process_of(tmp_path, "ok", objective="val/loss")
    assert job.run(["seed=3"]) == 3.5
    assert job.run(["seed=3"]) == 3.5
    assert starts(tmp_path / "mine") == {"seed=3": 1}
    with pytest.raises(JobFailed, match=r"objective=val/lose was not measured; .* has step, val/loss"):
        process_of(tmp_path, "ok", objective="val/lose").run(["seed=3"])


def test_the_objective_may_be_a_score_of_metrics_json_and_must_be_finite(tmp_path):
    (tmp_path / "metrics.json").write_text('{"scores": {"fid_500": 12.5, "kid_500": NaN}}')
    assert final_value(tmp_path, "fid_500") == 12.5
    with pytest.raises(JobFailed, match="kid_500 is nan"):
        final_value(tmp_path, "kid_500")


# ---------------------------------------------------------------------------------------------------------------------
# what is told


@pytest.mark.parametrize(
    ("wrote", "returncode", "state", "error"),
    [
        (None, 0, "finished", None),
        ("finished", 0, "finished", None),
        ("pruned", 0, "pruned", None),
        ("running", 0, "finished", None),
        ("failed", 0, "failed", "it says so"),
        ("preempted", 75, "preempted", "stopped after step 7"),
        (None, 143, "preempted", "stopped before its end"),
        (None, -signal.SIGTERM, "preempted", "stopped before its end"),
        ("running", -signal.SIGKILL, "failed", "killed by SIGKILL (out of memory, or by hand)"),
        ("failed", 2, "failed", "it says so"),
        (None, 2, "failed", "that is wrong"),
    ],
)
def test_status_says_how_a_job_ended_whatever_the_job_wrote(wrote, returncode, state, error, tmp_path):
    if wrote is not None:
        write_status(tmp_path, wrote, step=7, error="it says so" if wrote == "failed" else None)
    said = "warning: x\nerror: that is wrong [DIFFUSION_TRACEBACK=1 shows where]\n"
    assert settle(tmp_path, returncode, said) == error
    assert read_status(tmp_path).state == state
    assert read_status(tmp_path).step == (None if wrote is None else 7)


def test_a_crash_is_told_by_its_last_line():
    assert reason(1, "Traceback\n  File x\nRuntimeError: boom\n\n") == "exit status 1: RuntimeError: boom"
    assert reason(1, "") == "exit status 1"


def test_folders_are_named_by_what_varies_and_no_two_alike():
    jobs = [["net=a/b", "seed=0", "x=1"], ["net=a_b", "seed=0", "x=1"], ["net=c d", "+seed=1", "x=1"]]
    one, other, third = folder_names(jobs, ["net", "seed"])
    assert third == "net=c_d,seed=1"
    assert re.fullmatch(r"net=a_b,seed=0-[0-9a-f]{8}", one) and one[:-8] == other[:-8] and one != other
    (long,) = folder_names([["name=" + "x" * 300]], ["name"])
    assert len(long) == 150 and re.search(r"x-[0-9a-f]{8}$", long)
    assert folder_names([["x=1", "y=2"], []], []) == ["x=1,y=2", "default"]


def test_a_table_tells_of_every_job_and_times_read_as_people_write_them(tmp_path):
    write_status(tmp_path, "failed", step=3, max_steps=10, error="out of ink")
    job = jobs_like(tmp_path)
    assert table({"[1/2] a": job, "[2/2] bb": job._replace(status=None)}).splitlines() == [
        "job       state    step",
        "[1/2] a   failed   3 of 10",
        "    out of ink",
        f"    log: {tmp_path}/log.txt",
        "[2/2] bb  waiting",
    ]
    assert [clock(seconds) for seconds in (3.4, 62, 7205)] == ["0:03", "1:02", "2:00:05"]


def jobs_like(folder: Path):
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"jobs": [{"folder": ".", "overrides": []}]}))
    return jobs_of(folder)[0]._replace(folder=folder)


def test_the_last_line_of_a_log_is_what_tells_how_the_job_goes(tmp_path):
    (tmp_path / "log.txt").write_text("$ python toy.py\nstep 1\rstep 2\r\n\n/x/y.py:3: UserWarning: z\n  z()\n")
    assert last_line(tmp_path / "log.txt") == "step 2"
    (tmp_path / "log.txt").write_text("$ python toy.py\n├── logger\n    └── a: 1\n")
    assert last_line(tmp_path / "log.txt") == ""


@pytest.mark.slow
def test_a_job_that_trains_on_several_devices_is_one_folder_and_one_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = "-m seed=0,1 trainer.accelerator=cpu trainer.devices=2 +trainer.strategy=ddp trainer.max_steps=2"
    small = "data.batch_size=8 net.channels=8 trainer.log_every_n_steps=1 trainer.val_check_interval=2"
    status, _, said = run("train", [*words.split(), *small.split(), "callbacks.samples=null"], monkeypatch, capsys)
    assert status == 0, said
    folder = only_sweep(tmp_path)
    assert states(folder) == {"seed=0": "finished", "seed=1": "finished"}
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}  # no rank began a folder of its own
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"seed=0", "seed=1"}
    for name in ("seed=0", "seed=1"):
        starts = yaml.safe_load((folder / name / "record.yaml").read_text())["starts"]
        assert [start["world_size"] for start in starts] == [2]
        rows = (folder / name / "metrics.csv").read_text().splitlines()
        assert [row.partition(",")[0] for row in rows] == ["step", "1", "2"]
        assert len(list((folder / name).glob("log*.txt"))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("-m seed=0 hydra/launcher=cloud", "hydra/launcher has no option 'cloud'; options: basic"),
        ("-m seed=", "seed= has no value to sweep over; write seed=A,B"),
        ("-m seed=range(0,0)", "seed=range(0,0) is a sweep of no jobs"),
        ("-m seed=interval(0,1)", "only a search chooses from an interval; add hydra/sweeper=optuna"),
        (
            "-m run_dir=a,b",
            "run_dir=a,b: in a sweep each job has a folder of its own; name the folder of all: sweep_dir=a",
        ),
        ("-m seed=0,1 sweep_dir=a,b", "sweep_dir=a,b: a sweep has one folder"),
        ("-m seed=0,x", "seed=x does not fit; it must be of type int"),
        ("-m seed=0,1 schedule=cosine,linaer", "schedule has no option 'linaer'; did you mean linear?"),
        ("-m seed=0,1 schedul=cosine", "did you mean schedule"),
        ("-m seed=0,1 data=image_folder", "data.root has no value; add data.root=..."),
        ("-m seed=0,1 direction=up", "direction must be minimize or maximize"),
        ("sweep=adm_tabel1", "there is no sweep 'adm_tabel1'; did you mean adm_table1?"),
        ("sweep=sampler_x_steps", "sweep=sampler_x_steps is one for sample.py"),
        ("seed=0,1", "seed=0,1 are several values; -m in front sweeps over them"),
        ("-m seed=0 --config-dir nowhere", "--config-dir nowhere is no folder"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_job_begins(arguments, expected, monkeypatch, capsys, tmp_path):
    status, said = sweep(tmp_path, arguments, monkeypatch, capsys)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and expected in errors[0]
    assert "Traceback" not in said and {path.name for path in tmp_path.iterdir()} <= {"toy.py", "__pycache__"}


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("hydra/launcher=joblib", "hydra_joblib_launcher", "joblib"),
        ("hydra/launcher=ray", "hydra_ray_launcher", "ray"),
        ("hydra/launcher=slurm", "hydra_submitit_launcher", "slurm"),
        ("hydra/sweeper=optuna", "hydra_optuna_sweeper", "optuna"),
    ],
)
def test_a_missing_plugin_is_named_with_the_command_that_installs_it(
    words, package, extra, monkeypatch, capsys, tmp_path
):
    from hydra.core.config_store import ConfigStore

    role = words.removeprefix("hydra/").partition("=")[0]
    there = ConfigStore.instance().repo["hydra"][role]
    for name in [name for name in there if not name.startswith("basic")]:
        monkeypatch.delitem(there, name)
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == f"hydra_plugins.{package}" else find(name, *a)
    )
    monkeypatch.setattr("hydra.core.plugins.Plugins._scan_all_plugins", lambda modules: ([], None))
    status, said = sweep(tmp_path, f"-m seed=0 objective=val/loss {words}", monkeypatch, capsys)
    assert status == 2
    assert f"{words} needs a plugin that is not installed; `uv sync --extra {extra}` installs it" in said


def test_a_search_must_know_what_to_look_for(monkeypatch, capsys, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    status, said = sweep(tmp_path, "-m seed=interval(0,9) hydra/sweeper=optuna", monkeypatch, capsys)
    assert status == 2 and "a search needs to know what to look for; add objective=METRIC" in said


def test_a_folder_that_is_no_sweeps_is_not_taken_for_one(tmp_path):
    with pytest.raises(ValueError, match=r"no folder of a sweep: it has no sweep\.yaml"):
        jobs_of(tmp_path)
    (tmp_path / "sweep.yaml").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"sweep\.yaml cannot be read .*begin anew with sweep_dir"):
        jobs_of(tmp_path)
    (tmp_path / "sweep.yaml").write_text("jobs: 3")
    with pytest.raises(ValueError, match="no record of a sweep"):
        jobs_of(tmp_path)


def test_every_named_sweep_says_what_it_is_and_how_long_it_takes(monkeypatch, capsys, tmp_path):
    _, said = sweep(tmp_path, "sweep=", monkeypatch, capsys)
    for path in (CONFIGS / "sweep").glob("*.yaml"):
        text = path.read_text()
        assert re.search(rf"^  {path.stem} +(train|sample)\.py  \S.{{20}}", said, re.M)
        assert "command:" in text and "wall time:" in text and f"sweep={path.stem}" in text


def test_what_a_named_sweep_sets_its_jobs_have_too(monkeypatch, capsys, tmp_path):
    from hydra.types import RunMode

    from diffusion.sweep.run import hydra_of
    from diffusion.sweep.words import plan

    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "own.yaml").write_text(
        "# @package _global_\nname: it's\ntrainer: {max_steps: 3}\nema: {decays: [0.5, 0.9]}\nobjective: val/loss\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"
    )
    words = ["sweep=own", "objective=val/loss_ema"]
    with hydra_of("train", config_dir=str(tmp_path)) as hydra:
        cfg = hydra.compose_config("train", words, run_mode=RunMode.MULTIRUN)
        todo = plan(cfg, words, "train", "run_dir")
        job = hydra.config_loader.load_sweep_config(cfg, list(todo.jobs[1]))
    assert todo.keys == ("seed",) and len(todo.jobs) == 2 and todo.sweep_dir.startswith("outputs/sweeps/own-")
    assert (job.name, job.trainer.max_steps, list(job.ema.decays), job.seed) == ("it's", 3, [0.5, 0.9], 1)
    assert job.objective == "val/loss_ema"  # typed words count


def test_a_sweep_is_not_started_by_several_processes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, said = sweep(tmp_path, "-m seed=0", monkeypatch, capsys)
    assert status == 2 and "a sweep cannot share 2 processes; start it alone" in said


def test_words_beside_a_named_sweep_may_be_about_what_only_the_sweep_brings(monkeypatch, capsys, tmp_path):
    status, said = sweep(tmp_path, "sweep=adm_table1 callbacks.evaluation.num_samplez=7", monkeypatch, capsys)
    assert status == 2 and "did you mean callbacks.evaluation.num_samples?" in said
    assert "has no option" in sweep(tmp_path, "sweep=adm_table1 net=nope", monkeypatch, capsys)[1]


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_named_sweep_composes(path):
    from hydra.types import RunMode

    from diffusion.sweep.run import check_jobs, hydra_of
    from diffusion.sweep.words import about, plan

    command = about(path)[0]
    if "override /hydra/sweeper" in path.read_text():
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = [f"sweep={path.stem}"]
    with hydra_of(command) as hydra:
        cfg = hydra.compose_config(command, words, run_mode=RunMode.MULTIRUN)
        search = "interval(" in path.read_text()
        todo = plan(cfg, words, command, "run_dir" if command == "train" else "out_dir", search=search)
        cfg = hydra.compose_config(command, list(todo.words), run_mode=RunMode.MULTIRUN)
        check_jobs(hydra.config_loader, cfg, todo, command, ())
    assert search or len(todo.jobs) > 10


def test_adms_table_is_the_papers_rows():
    text = (CONFIGS / "sweep" / "adm_table1.yaml").read_text()
    wanted = ("baseline", "depth", "heads", "attention_resolutions", "biggan_updown", "rescale_residual", "adm")
    assert re.findall(r"ablation/(\w+)", text) == list(wanted)
