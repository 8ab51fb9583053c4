"""What is a run called that names no folder of its own? The time of its start; in a Slurm job, the job.

All processes of a run must say the same, and a job that is requeued must say it again. Nothing here imports torch,
except where torchrun started several processes that have to agree.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

VARIABLE = "DIFFUSION_RUN_NAME"  # what configs/train.yaml reads
TIME = "%Y-%m-%d_%H-%M-%S-%f"
INTERACTIVE = ("bash", "interactive", "sh", "zsh")  # names of Slurm jobs in which somebody types
PATIENCE = timedelta(minutes=5)  # until the last node has come up


@contextmanager
def run_named(words: Sequence[str]) -> Iterator[str]:
    """Keep the name of this run in the environment, where the config and the ranks that Lightning starts find it."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name = run_name(words)
    try:
        yield name
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def run_name(words: Sequence[str]) -> str:
    """Return the name that all processes of this run agree on; `words` are those of its command line.

    In a batch job of Slurm: the job's number and six hex digits of the words, so that the same script finds its run
    again when the job is requeued, and two runs of one job stay apart. Under torchrun: the time at which the first
    process asked, kept by torchrun through its restarts. Else: the time.
    """
    if "LOCAL_RANK" in os.environ and VARIABLE in os.environ:
        return os.environ[VARIABLE]  # Lightning started this rank from one that has chosen
    if in_batch_job():
        return f"slurm-{job_number()}-{hashlib.sha256(repr(list(words)).encode()).hexdigest()[:6]}"
    now = datetime.now().strftime(TIME)
    return agreed(now) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else now


def in_batch_job() -> bool:
    """Say whether this is a job that Slurm may run again, not a shell in an allocation."""
    name = os.environ.get("SLURM_JOB_NAME", "")
    return "SLURM_JOB_ID" in os.environ and name not in INTERACTIVE and not sys.stderr.isatty()


def job_number() -> str:
    """Return the number of this job of Slurm's; of one of an array, whose bare number may be that of all, 12_3."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def agreed(proposal: str) -> str:
    """Return what the first process of a torchrun job proposed, by way of the store that torchrun keeps."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=PATIENCE)
    return store.compare_set(f"{VARIABLE}/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", "", proposal).decode()
