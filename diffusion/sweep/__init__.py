"""How do many runs become one sweep? One folder a job, each job a process of its own, and the same command goes on.

`jobs_of` reads a sweep's folder. Hydra composes and launches: any of its launchers calls a `JobProcess` for each job.
"""

from diffusion.sweep.folder import SWEEP_FILE, Job, jobs_of, read_sweep
from diffusion.sweep.job import JobFailed, JobProcess, final_value
from diffusion.sweep.report import Report

__all__ = ["SWEEP_FILE", "Job", "JobFailed", "JobProcess", "Report", "final_value", "jobs_of", "read_sweep"]
