"""How are the cores of a machine divided among the jobs of a sweep that run on it at a time? Nothing imports torch."""

import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple


class Share(NamedTuple):
    """How many jobs run at a time, and on how many of the machine's cores each."""

    jobs: int
    threads: int
    cores: int


def divide(launcher: Mapping[str, Any], num_jobs: int) -> Share | None:
    """Return what a job gets of this machine; None where its launcher takes care of that, or runs one at a time."""
    kind = str(launcher.get("_target_", "")).rpartition(".")[2]
    if kind == "JoblibLauncher":
        import joblib

        at_a_time, cores = joblib.effective_n_jobs(launcher.get("n_jobs") or 1), joblib.cpu_count()
    elif kind == "LocalLauncher":  # submitit's own processes: all at once
        at_a_time, cores = num_jobs, available_cores()
    else:
        return None
    jobs = max(1, min(at_a_time, num_jobs))
    return Share(jobs, max(1, cores // jobs), cores)


def available_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment_of_jobs(launcher: Mapping[str, Any], num_jobs: int) -> dict[str, str]:
    """Return what the environment of each job says about threads, and tell it in a line.

    What the user has set stays; `threads=` of a job beats both.
    """
    share = divide(launcher, num_jobs)
    if share is None:
        return {}
    each = f"{share.threads} of {share.cores} core{'s' if share.cores > 1 else ''} each"
    if "OMP_NUM_THREADS" in os.environ:
        each = f"{os.environ['OMP_NUM_THREADS']} thread(s) each (OMP_NUM_THREADS)"
    print(f"{share.jobs} job{'s' if share.jobs > 1 else ''} at a time, {each}", file=sys.stderr)
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share.threads)}


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
        environment.setdefault("OMP_NUM_THREADS", environment["SLURM_CPUS_PER_TASK"])
    return environment
