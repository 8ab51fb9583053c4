"""How are the cores and GPUs of a machine divided among the jobs of a sweep that run on it at a time?

Nothing here imports torch.
"""

import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion.sweep.gpus import visible_gpus, wanted_gpus

if TYPE_CHECKING:
    from diffusion.sweep.job import JobProcess


# What tells PyTorch and what it computes with how many threads to use; joblib sets all of them in its workers.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Share(NamedTuple):
    """How many jobs run at a time, on how many of the machine's cores each, and the GPUs that they share."""

    jobs: int
    threads: int
    cores: int
    gpus: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What the environment of a job says about threads: what the user has said, or its share."""
        return {name: os.environ.get(name, str(self.threads)) for name in THREADS}

    def __str__(self) -> str:
        gpus = f", {len(self.gpus)} GPUs shared" if self.gpus else ""
        cores = f"{self.environment[THREADS[0]]} of {self.cores} cores"
        return f"{self.jobs} job{'s' if self.jobs > 1 else ''} at a time, each with {cores}{gpus}"


def with_share(job: "JobProcess", cfg: Any, num_jobs: int) -> "JobProcess":
    """Return the job with what it gets of this machine where up to `num_jobs` run, and say in a line what that is."""
    # `uv run` would otherwise have Ray pack the folder and build an environment for each worker; and nobody is counted.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    share = divide(cfg, num_jobs)
    if share is None:
        return job
    print(share, file=sys.stderr)
    return replace(job, environment=tuple(share.environment.items()), gpus=share.gpus)


def divide(cfg: Any, num_jobs: int) -> Share | None:
    """Return what a job gets of this machine; None where its launcher takes care of that, or runs one at a time.

    `cfg` is the config of the sweep, Hydra's part included.
    """
    launcher = cfg.hydra.launcher
    kind = str(launcher.get("_target_", "")).rpartition(".")[2]
    if kind == "JoblibLauncher":
        import joblib

        at_a_time, cores = joblib.effective_n_jobs(launcher.get("n_jobs") or 1), joblib.cpu_count()
    elif kind == "LocalLauncher":  # submitit's own processes: all at once
        at_a_time, cores = num_jobs, available_cores()
    else:
        return None
    gpus = visible_gpus()
    if wanted := wanted_gpus(cfg, len(gpus)):
        at_a_time = min(at_a_time, len(gpus) // wanted)
    jobs = max(1, min(at_a_time, num_jobs))
    return Share(jobs, max(1, cores // jobs), cores, gpus if wanted else ())


def available_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def job_environment() -> dict[str, str]:
    """Return the environment that a job gets from the process that starts it.

    Slurm's one task is not the whole of a job that trains on several devices: Lightning starts the other ranks, unless
    it finds the number of Slurm's.
    """
    environment = dict(os.environ)
    if environment.get("SLURM_NTASKS") == "1":
        for name in [name for name in environment if name.startswith("SLURM_NTASKS")]:
            del environment[name]
    if "SLURM_CPUS_PER_TASK" in environment:
        environment.setdefault(THREADS[0], environment["SLURM_CPUS_PER_TASK"])
    return environment
