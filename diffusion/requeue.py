"""What does a launcher hear when a job that had to go has saved? What makes it queue the job again, where it can.

submitit does so on a signal of its own, which Slurm sends before the time limit; a job of Slurm's that has to make room
for another gets SIGTERM instead, as does one that somebody cancels. Nothing here imports torch.
"""

import os
import re
import signal
import subprocess
from collections.abc import Sequence

from diffusion.run_name import job_number


def signal_for_launcher(received: Sequence[int]) -> int:
    """Return which signal to raise in the process of a job that has saved, after these have come, the last one last.

    Under submitit that is its own where the job shall come back. Ends the process where Slurm is about to run the job
    again by itself.
    """
    executor = os.environ.get("SUBMITIT_EXECUTOR")
    if executor is None:
        return received[-1]
    from submitit import JobEnvironment

    if executor == "slurm":
        state, restarts = slurm_says()
        if restarts > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
            os._exit(128 + signal.SIGTERM)  # without a result, which would mean that the job is done
        wanted = state == "RUNNING"  # else it was cancelled
    else:
        wanted = any(number != signal.SIGTERM for number in received)  # SIGTERM makes room for nobody here
    return JobEnvironment._usr_sig() if wanted else signal.SIGTERM


def slurm_says() -> tuple[str, int]:
    """Return the state of this job, such as RUNNING or COMPLETING, and how often it has been queued again."""
    command = ["scontrol", "show", "job", "--oneliner", job_number()]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    state, restarts = (re.search(rf"\b{name}=(\S+)", said) for name in ("JobState", "Restarts"))
    return state[1] if state else "UNKNOWN", int(restarts[1]) if restarts else 0
