"""Do the launchers share a machine fairly, and do all processes of a run agree on what it is called?"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from launch_cases import CUBE, ROOT, check_cube, record, state, train
from omegaconf import DictConfig, OmegaConf
from torch.distributed import TCPStore

from diffusion.cli import composed
from diffusion.requeue import signal_for_launcher
from diffusion.run_name import VARIABLE, run_name, run_named
from diffusion.sweep.gpus import held_gpus, visible_gpus, wanted_gpus
from diffusion.sweep.job import JobProcess
from diffusion.sweep.plugins import let_ours_stand_first
from diffusion.sweep.queue import await_rest
from diffusion.sweep.share import THREADS, divide, job_environment

EXTRAS = {
    "joblib": "hydra_joblib_launcher",
    "slurm": "hydra_submitit_launcher",
    "slurm_local": "hydra_submitit_launcher",
    "ray": "hydra_ray_launcher",
}


def need(launcher: str) -> None:
    extra = launcher.partition("_")[0]
    pytest.importorskip(f"hydra_plugins.{EXTRAS[launcher]}", reason=f"uv sync --extra {extra}")


def hydra_of(launcher: str, *words: str) -> DictConfig:
    """The composed config of a sweep with this launcher."""
    let_ours_stand_first()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", [f"hydra/launcher={launcher}", *words], return_hydra_config=True)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No scheduler around the tests, and nothing said about threads and GPUs."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name in (VARIABLE, "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", *THREADS):
        monkeypatch.delenv(name, raising=False)


def script(folder: Path, name: str, text: str) -> None:
    """A program that stands in for one of the cluster's."""
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


# ---------------------------------------------------------------------------------------------------------------------
# what a run is called


def test_a_run_is_called_by_the_time_and_its_children_by_the_same_name(monkeypatch):
    with run_named(["seed=0"]) as name:
        assert len(name) == len("2026-11-21_15-22-16-886499")
        assert os.environ[VARIABLE] == name
        monkeypatch.setenv("LOCAL_RANK", "1")  # as in a process that Lightning starts
        assert run_name(["seed=0"]) == name
    assert VARIABLE not in os.environ
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv(VARIABLE, name)  # a shell inside of a run begins a run of its own
    assert run_name(["seed=0"]) != name


def test_a_batch_job_of_slurm_finds_its_run_again_and_keeps_its_runs_apart(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    first = run_name(["seed=0"])
    assert first.startswith("slurm-1234-") and run_name(["seed=0"]) == first
    assert run_name(["seed=1"]) != first
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1200")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert run_name(["seed=0"]).startswith("slurm-1200_7-")


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_in_an_allocation_is_no_batch_job(name, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    assert not run_name([]).startswith("slurm")


def test_the_processes_of_torchrun_agree_on_the_first_name_also_after_a_restart(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("LOCAL_RANK", "0")
    first = run_name([])
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert {run_name([]), run_name([])} == {first}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert run_name([]) != first


@pytest.mark.parametrize(("config", "key"), [("train", "run_dir"), ("sample", "out_dir")])
def test_the_name_is_where_both_commands_write_by_default(config, key, monkeypatch):
    monkeypatch.setenv(VARIABLE, "slurm-7-abcdef")
    assert composed(config)[key].endswith("/slurm-7-abcdef")


# ---------------------------------------------------------------------------------------------------------------------
# cores and GPUs


@pytest.mark.parametrize(
    ("words", "num_jobs", "jobs", "threads"),
    [
        ((), 8, 8, 1),  # one job a core
        ((), 3, 3, 2),  # fewer jobs than cores
        (("hydra.launcher.n_jobs=2",), 8, 2, 4),
        (("hydra.launcher.n_jobs=3",), 8, 3, 2),
        (("hydra.launcher.n_jobs=16",), 32, 16, 1),  # more jobs than cores
        (("hydra.launcher.n_jobs=2",), 1, 1, 8),
    ],
)
def test_joblib_divides_the_cores_among_the_jobs_that_run_at_a_time(words, num_jobs, jobs, threads, monkeypatch):
    need("joblib")
    import joblib

    monkeypatch.setattr(joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda n: 8 if n == -1 else n)
    share = divide(hydra_of("joblib", *words), num_jobs)
    assert (share.jobs, share.threads) == (jobs, threads)
    assert str(share) == f"{jobs} job{'s' if jobs > 1 else ''} at a time, each with {threads} of 8 cores"
    assert share.environment == dict.fromkeys(THREADS, str(threads))


def test_threads_that_the_user_has_set_stay(monkeypatch):
    need("joblib")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    share = divide(hydra_of("joblib"), 2)
    assert share.environment["OMP_NUM_THREADS"] == "3"
    assert "each with 3 of" in str(share)


@pytest.mark.parametrize("launcher", ["basic", "slurm", "ray"])
def test_other_launchers_divide_nothing(launcher):
    if launcher != "basic":
        need(launcher)
    assert divide(hydra_of(launcher), 8) is None


def test_jobs_that_train_on_gpus_are_as_many_as_find_some(monkeypatch):
    need("joblib")
    import joblib

    monkeypatch.setattr(joblib, "cpu_count", lambda: 16)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda n: 16 if n == -1 else n)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    share = divide(hydra_of("joblib", "experiment=cifar10", "trainer=gpu"), 12)
    assert (share.jobs, share.threads, share.gpus) == (4, 4, ("4", "5", "6", "7"))
    two = divide(hydra_of("joblib", "experiment=cifar10", "trainer=ddp", "trainer.devices=2"), 12)
    assert (two.jobs, two.threads) == (2, 8)
    on_cpu = divide(hydra_of("joblib", "experiment=cifar10", "trainer=cpu"), 12)
    assert (on_cpu.jobs, on_cpu.gpus) == (12, ())


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        ({"trainer": {"accelerator": "auto", "devices": 1}}, 1),
        ({"trainer": {"accelerator": "cuda", "devices": "auto"}}, 4),
        ({"trainer": {"accelerator": "gpu", "devices": -1}}, 4),
        ({"trainer": {"accelerator": "gpu", "devices": 8}}, 4),
        ({"trainer": {"accelerator": "gpu", "devices": [1, 2]}}, 0),  # chosen by hand
        ({"trainer": {"accelerator": "cpu", "devices": 2}}, 0),
        ({"device": "auto", "devices": 1}, 1),
        ({"device": "cuda:1", "devices": 1}, 0),
    ],
)
def test_a_config_says_how_many_gpus_a_job_takes(cfg, wanted):
    assert wanted_gpus(OmegaConf.create(cfg), 4) == wanted


@pytest.mark.parametrize(
    ("said", "gpus"), [("0,1", ("0", "1")), ("", ()), ("-1", ()), ("GPU-ab, GPU-cd", ("GPU-ab", "GPU-cd"))]
)
def test_gpus_are_those_that_this_process_may_use(said, gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_gpus() == gpus


def test_without_the_variable_the_driver_lists_the_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == ()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)\nGPU 1: H100 (UUID: b)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus() == ("0", "1")


def test_no_two_jobs_hold_a_gpu_at_a_time_and_none_waits_for_another_forever(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("diffusion.sweep.gpus.PULSE", 0.01)
    held: list[str] = []
    seen: list[str] = []
    lock = threading.Lock()

    def job(count: int) -> None:
        with held_gpus(("0", "1", "2"), count) as environment:
            mine = environment["CUDA_VISIBLE_DEVICES"].split(",")
            with lock:
                assert len(mine) == count and not set(mine) & set(held)
                held.extend(mine)
            threading.Event().wait(0.02)
            with lock:
                seen.extend(mine)
                for name in mine:
                    held.remove(name)

    jobs = [threading.Thread(target=job, args=(1 + i % 2,)) for i in range(8)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join(60)
    assert len(seen) == 12 and not held


def test_a_job_sees_its_share(monkeypatch, tmp_path):
    """What with_share gives to a job arrives in its process, whatever the launcher has set there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # as joblib does in its workers
    told = tmp_path / "told.py"
    told.write_text("import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])\n")
    job = JobProcess(
        start=(str(told),),
        directory=str(tmp_path),
        sweep_dir="sweep",
        folder_key="run_dir",
        keys=("seed",),
        environment=(("OMP_NUM_THREADS", "2"), ("CUDA_VISIBLE_DEVICES", "1")),
    )
    job.run(["seed=0"])
    assert (tmp_path / "sweep" / "seed=0" / "log.txt").read_text().splitlines()[-1] == "2 1"


# ---------------------------------------------------------------------------------------------------------------------
# Slurm


def test_one_task_of_slurm_is_not_the_whole_of_a_job_that_starts_its_own_ranks(monkeypatch):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    found = job_environment()
    assert "SLURM_NTASKS" not in found and "SLURM_NTASKS_PER_NODE" not in found
    assert (found["SLURM_JOB_ID"], found["OMP_NUM_THREADS"]) == ("7", "5")
    monkeypatch.setenv("SLURM_NTASKS", "4")  # where Slurm starts the ranks, they are what Slurm says
    assert job_environment()["SLURM_NTASKS"] == "4"


def test_the_batch_file_of_a_sweep_asks_for_the_signal_and_to_be_queued_again(tmp_path):
    need("slurm")
    from submitit.slurm.slurm import _make_sbatch_string

    words = ("hydra.launcher.partition=gpu", "hydra.launcher.signal_delay_s=300", "hydra.launcher.gpus_per_node=2")
    asked = hydra_of("slurm", *words).hydra.launcher
    given = OmegaConf.to_container(OmegaConf.create({"hydra": {"launcher": asked}}), resolve=False)["hydra"]["launcher"]
    more = {**given["additional_parameters"], "signal": "USR1@300"}
    assert given["additional_parameters"]["signal"] == "USR1@${hydra.launcher.signal_delay_s}"
    names = ("partition", "gpus_per_node", "signal_delay_s", "setup")
    text = _make_sbatch_string("train", tmp_path, **{k: given[k] for k in names}, additional_parameters=more)
    lines = text.splitlines()
    for line in ("--signal=USR1@300", "--requeue", "--partition=gpu", "--gpus-per-node=2"):
        assert f"#SBATCH {line}" in lines
    assert sum("--signal" in line for line in lines) == 1
    assert "export SUBMITIT_PREEMPT_SIGNAL=USR1" in lines
    assert given["max_num_timeout"] > 100 and given["tasks_per_node"] == given["nodes"] == 1


@pytest.mark.parametrize(
    ("says", "received", "raised"),
    [
        ("JobState=RUNNING Restarts=0", ["SIGUSR1"], "SIGUSR2"),  # time is nearly over
        ("JobState=RUNNING Restarts=0", ["SIGTERM"], "SIGUSR2"),  # room for another
        ("JobState=RUNNING Restarts=0", ["SIGUSR1", "SIGTERM"], "SIGUSR2"),
        ("JobState=COMPLETING Restarts=0", ["SIGTERM"], "SIGTERM"),  # cancelled
        ("", ["SIGTERM"], "SIGTERM"),  # Slurm does not answer
    ],
)
def test_a_job_of_slurm_that_has_saved_comes_back_unless_it_was_cancelled(
    says, received, raised, monkeypatch, tmp_path
):
    need("slurm")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    script(tmp_path, "scontrol", f'[ "$*" = "show job --oneliner 12" ] && echo "JobId=12 {says} Requeue=1"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert signal_for_launcher([getattr(signal, name) for name in received]) == getattr(signal, raised)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "3")  # one of an array is asked for by name; here nobody knows it
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "9")
    assert signal_for_launcher([signal.SIGTERM]) == signal.SIGTERM


def test_a_job_that_slurm_itself_runs_again_ends_without_a_result(monkeypatch, tmp_path):
    need("slurm")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    script(tmp_path, "scontrol", 'echo "JobState=COMPLETING Restarts=3"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    ended: list[int] = []
    monkeypatch.setattr("diffusion.requeue.os._exit", ended.append)
    signal_for_launcher([signal.SIGTERM])
    assert ended == [143]


def test_a_sweep_that_lost_one_job_waits_for_those_that_slurm_still_has(monkeypatch, tmp_path):
    (tmp_path / ".submitit" / "12_0").mkdir(parents=True)
    (tmp_path / ".submitit" / "7").mkdir()
    says = f'echo "$*" >> {tmp_path}/calls; [ $(wc -l < {tmp_path}/calls) -lt 3 ] && echo 12_1 || exit 1'
    script(tmp_path, "squeue", says)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("diffusion.sweep.queue.PULSE", 0.01)
    await_rest(tmp_path, [])
    assert (tmp_path / "calls").read_text().splitlines() == ["--noheader --jobs=12,7 --format=%i"] * 3
    (tmp_path / "calls").unlink()
    await_rest(tmp_path, [signal.SIGINT])  # whoever stops the sweep waits for nothing
    assert not (tmp_path / "calls").exists()


def test_other_launchers_hear_what_has_come(monkeypatch):
    assert signal_for_launcher([signal.SIGUSR1, signal.SIGTERM]) == signal.SIGTERM
    need("slurm_local")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert signal_for_launcher([signal.SIGUSR2]) == signal.SIGUSR2
    assert signal_for_launcher([signal.SIGTERM]) == signal.SIGTERM


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[Path]:
    """A folder of programs that say what they were called with: srun, squeue, scontrol."""
    for name in ("srun", "squeue", "scontrol"):
        script(tmp_path, name, f'echo "{name} $*" >> {tmp_path}/calls; eval "${{DOES_{name}:-true}}"')
    script(tmp_path, "sleep", "true")
    yield tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("status", "state_", "again"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),  # failed
        (2, "RUNNING", False),  # typed wrong
        (137, "RUNNING", False),  # killed
        (138, "RUNNING", True),
        (140, "RUNNING", True),
        (143, "RUNNING", True),
        (143, "COMPLETING", False),  # cancelled, or queued again by Slurm
    ],
)
def test_the_batch_file_queues_the_job_again_only_where_it_was_preempted(status, state_, again, stand_ins):
    env = {
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(stand_ins),
        "SLURM_JOB_ID": "12",
        "SLURM_NNODES": "4",
        "SLURM_NTASKS_PER_NODE": "8",
        "DOES_srun": f"exit {status}",
        "DOES_squeue": f"echo {state_}",
    }
    command = ["bash", str(ROOT / "configs/slurm/train.sbatch"), "experiment=digits", "prompt=a dog"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == status and not done.stderr
    calls = (stand_ins / "calls").read_text().splitlines()
    assert calls[0] == (
        "srun --wait=300 uv run --no-sync python train.py experiment=digits prompt=a dog "
        "trainer.num_nodes=4 trainer.devices=8"
    )
    assert ("scontrol requeue 12" in calls) == again


# ---------------------------------------------------------------------------------------------------------------------
# for real


@pytest.mark.slow
def test_a_sweep_with_joblib_ends_with_its_failed_job_named_and_runs_that_alone_again(tmp_path):
    need("joblib")
    words = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep_dir=sweep")
    check_cube(tmp_path / "sweep", lambda: train(*CUBE, *words, cwd=tmp_path, flags=("-m",)))


@pytest.mark.slow
def test_a_sweep_on_a_cluster_of_ray_ends_with_its_failed_job_named_and_runs_that_alone_again(tmp_path):
    need("ray")
    here = "+hydra.launcher.ray.init._node_ip_address=127.0.0.1"
    words = ("hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2", here, "sweep_dir=sweep")
    check_cube(tmp_path / "sweep", lambda: train(*CUBE, *words, cwd=tmp_path, flags=("-m",)))


@pytest.mark.slow
@pytest.mark.parametrize("starter", ["lightning", "torchrun"])
def test_two_ranks_write_one_run_folder_and_speak_with_one_voice(starter, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2")
    done = train(*words, cwd=tmp_path, before=(sys.executable,) if starter == "lightning" else torchrun)
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("outputs/*/*")
    assert state(run) == "finished"
    assert record(run)["starts"][0]["world_size"] == 2
    for text in ("training in", "config\n", "holds the model of step 4"):
        assert (done.stdout + done.stderr).count(text) == 1
