"""Do jobs run, and come back, on a real Slurm? munged, slurmctld and two slurmd of Debian's on loopback."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_cases import (
    CUBE,
    ROOT,
    SMALL,
    begin,
    check_cube,
    end,
    environment,
    record,
    state,
    steps,
    train,
    wait_for,
    weights,
)
from slurm.cluster import ask, free_ports, hurry, missing_programs, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason="needs Slurm: apt-get install slurm-wlm munge"),
]
SLOWLY = ("trainer.max_steps=60", "+callbacks.slow._target_=training_cases.Slow", "+callbacks.slow.seconds=0.05")


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands talk to a cluster of our own."""
    with running() as slurm:
        yield environment(SLURM_CONF=slurm["SLURM_CONF"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The weights of the slow run where nothing disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train("trainer.max_steps=60", "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return weights(folder / "run")


@pytest.fixture
def submitit() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="uv sync --extra slurm")


def sbatch(cluster: dict[str, str], tmp_path: Path, *words: str, options: tuple[str, ...] = ()) -> str:
    """Submit configs/slurm/train.sbatch from a folder that has train.py, and return the job's number."""
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    given = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=10", f"--output={tmp_path}/job.log", *options]
    command = ["sbatch", "--parsable", *given, str(ROOT / "configs/slurm/train.sbatch"), *SMALL, *words]
    env = {**cluster, "PYTHON": sys.executable}
    return subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout.strip()


def await_end(cluster: dict[str, str], job: str) -> str:
    """Wait until a job is out of the queue, without the two minutes in front of each return, and say how it ended."""
    looks = 0  # in a row that have not found it: it has no state for a moment when it is put back

    def over() -> bool:
        nonlocal looks
        hurry(cluster)
        looks = 0 if job in numbers(cluster) else looks + 1
        return looks > 10

    wait_for(over, f"the end of job {job}")
    return show(cluster, job)


def numbers(cluster: dict[str, str]) -> list[str]:
    """The jobs in the queue: 12, or of an array 12_0, 12_1."""
    return ask(["squeue", "--noheader", "--array", "--format=%i"], cluster).splitlines()


def show(cluster: dict[str, str], job: str) -> str:
    return ask(["scontrol", "show", "job", "--oneliner", job], cluster)


def test_a_sweep_through_submitit_ends_with_its_failed_job_named_and_runs_that_alone_again(cluster, submitit, tmp_path):
    def launch() -> subprocess.CompletedProcess:
        words = ("hydra/launcher=slurm", "hydra.launcher.partition=main", "hydra.launcher.cpus_per_task=1")
        return train(*CUBE, *words, "sweep_dir=sweep", cwd=tmp_path, env=cluster, flags=("-m",))

    check_cube(tmp_path / "sweep", launch)
    assert "SLURM" not in (tmp_path / "sweep" / "sweep.yaml").read_text()


@pytest.mark.parametrize("how", ["USR1", "TERM", "requeue"])
def test_a_preempted_job_of_a_sweep_is_queued_again_and_ends_as_if_nothing_had_been(
    how, cluster, submitit, undisturbed, tmp_path
):
    """USR1 is what Slurm sends before the time limit, TERM where a job shall make room; requeue is an administrator."""
    run = tmp_path / "sweep" / "seed=0"
    words = ("seed=0,1", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "sweep_dir=sweep")
    sweep = begin(*SLOWLY, *words, cwd=tmp_path, env=cluster, flags=("-m",))
    try:
        wait_for(lambda: steps(run) >= 5, "steps", process=sweep)
        (job,) = (name for name in numbers(cluster) if name.endswith("_0"))
        command = ["scontrol", "requeue", job] if how == "requeue" else ["scancel", f"--signal={how}", job]
        subprocess.run(command, env=cluster, check=True)
        wait_for(lambda: state(run) == "preempted", "the end of the first attempt", process=sweep)
        saved = steps(run)
        assert 5 <= saved < 60
        await_end(cluster, job)
        sweep.wait(120)
    finally:
        end(sweep)
    assert sweep.returncode == 0, (tmp_path / "said.txt").read_text()
    assert "Restarts=1" in show(cluster, job)
    assert (state(run), state(run.with_name("seed=1"))) == ("finished", "finished")
    first, second = record(run)["starts"]
    assert (first["resumed_step"], second["resumed_step"]) == (None, saved)
    assert weights(run) == undisturbed


def test_a_cancelled_job_of_a_sweep_saves_and_stays_away(cluster, submitit, tmp_path):
    run = tmp_path / "sweep" / "seed=0"
    words = ("seed=0,1", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "sweep_dir=sweep")
    sweep = begin(*SLOWLY, *words, cwd=tmp_path, env=cluster, flags=("-m",))
    try:
        wait_for(lambda: steps(run) >= 5, "steps", process=sweep)
        (job,) = (name for name in numbers(cluster) if name.endswith("_0"))
        subprocess.run(["scancel", job], env=cluster, check=True)
        sweep.wait(120)
    finally:
        end(sweep)
    assert "JobState=CANCELLED" in await_end(cluster, job)
    assert state(run) == "preempted"
    assert (run / "checkpoints" / "last.ckpt").exists()
    said = (tmp_path / "said.txt").read_text()
    assert sweep.returncode == 1 and "1 of 2 jobs are done" in said


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_the_batch_file_queues_a_preempted_run_again_in_the_folder_of_its_job(signal, cluster, undisturbed, tmp_path):
    job = sbatch(cluster, tmp_path, *SLOWLY)
    run = Path()

    def is_under_way() -> bool:
        nonlocal run
        run = next(tmp_path.glob(f"outputs/digits/slurm-{job}-*"), Path())
        return steps(run) >= 5

    wait_for(is_under_way, "steps")
    subprocess.run(["scancel", f"--signal={signal}", job], env=cluster, check=True)
    said = await_end(cluster, job)
    assert "JobState=COMPLETED" in said and "Restarts=1" in said, (said, (tmp_path / "job.log").read_text()[-3000:])
    assert [path for path in tmp_path.glob("outputs/*/*") if path != run] == []
    assert state(run) == "finished" and len(record(run)["starts"]) == 2
    assert weights(run) == undisturbed


def test_the_batch_file_trains_on_two_nodes(cluster, tmp_path):
    """One run folder, one voice, and the steps of both."""
    (port,) = free_ports(1)
    env = {**cluster, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    words = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true")
    job = sbatch(env, tmp_path, *words, options=("--nodes=2", "--ntasks-per-node=1"))
    said = await_end(cluster, job)
    log = (tmp_path / "job.log").read_text()
    assert "JobState=COMPLETED" in said and "NumNodes=2" in said, log
    (run,) = tmp_path.glob("outputs/*/*")
    assert run.name.startswith(f"slurm-{job}-")
    assert record(run)["starts"][0]["world_size"] == 2
    assert log.count("holds the model of step 4") == 1
