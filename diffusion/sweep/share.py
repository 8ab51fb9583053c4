"""How are the cores and GPUs of a machine divided among the jobs of a sweep that run on it at a time?

Nothing here imports torch.
"""

import os
from typing import Any, NamedTuple

from diffusion.sweep.gpus import visible_gpus, wanted_gpus


class Share(NamedTuple):
    """How many jobs run at a time, on how many of the machine's cores each, and the GPUs that they share."""

    jobs: int
    threads: int
    cores: int
    gpus: tuple[str, ...]


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


def in_words(share: Share) -> str:
    """Return one line about a share."""
    threads = os.environ.get("OMP_NUM_THREADS") or share.threads
    gpus = f", {len(share.gpus)} GPUs shared" if share.gpus else ""
    many = "s" if share.jobs > 1 else ""
    return f"{share.jobs} job{many} at a time, each with {threads} of {share.cores} cores{gpus}"


def job_environment(threads: int | None = None) -> dict[str, str]:
    """Return the environment that a job gets from the process that starts it; a number of threads set there stays.

    Slurm's one task is not the whole of a job that trains on several devices: Lightning starts the other ranks, unless
    it finds the number of Slurm's.
    """
    environment = dict(os.environ)
    if environment.get("SLURM_NTASKS") == "1":
        for name in [name for name in environment if name.startswith("SLURM_NTASKS")]:
            del environment[name]
    if threads := threads or environment.get("SLURM_CPUS_PER_TASK"):
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return environment
