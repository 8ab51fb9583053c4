"""Commands of a few seconds for what launches them: small digits runs, one alone or as a sweep."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml
from safetensors.torch import load_file

from diffusion.run_folder import read_status
from diffusion.sweep import jobs_of

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    *("experiment=digits", "net.channels=8", "data.batch_size=16", "trainer.max_steps=4"),
    *("trainer.log_every_n_steps=1", "trainer.limit_val_batches=1", "callbacks=quiet", "callbacks.forecast=null"),
    "+trainer.enable_progress_bar=false",
)
CUBE = ("schedule=linear,cosine", "task.parameterization=eps,v", "seed=0,1")  # 2 x 2 x 2
BAD = "schedule=linear,task.parameterization=v,seed=1"  # the job that is made to fail


def environment(**more: str) -> dict[str, str]:
    """What a user's shell has, without what the tests around it may be launched by."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_", "RAY_", "TORCHELASTIC_"))}
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), **more}


def train(
    *words: str,
    cwd: Path,
    before: tuple[str, ...] = (sys.executable,),
    flags: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run train.py in a folder and return how it ended; `before` is what stands in front of the script."""
    command = [*before, str(ROOT / "train.py"), *flags, *SMALL, *words]
    return subprocess.run(command, cwd=cwd, env=dict(env or environment()), capture_output=True, text=True)


def begin(
    *words: str, cwd: Path, flags: tuple[str, ...] = (), env: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Start train.py in a folder, in a session of its own."""
    with open(cwd / "said.txt", "w") as said:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags, *SMALL, *words],
            cwd=cwd,
            env=dict(env or environment()),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen) -> None:
    """End what `begin` started, with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(true: Callable[[], object], what: str, *, process: subprocess.Popen | None = None) -> None:
    """Wait until something holds; fail after five minutes, or when the process that shall bring it about has ended."""
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, f"waited five minutes for {what}"
        assert process is None or process.poll() is None, f"the process ended before {what}"
        time.sleep(0.1)


def spoil(sweep: Path) -> None:
    """Make one job of the cube fail: where its checkpoints go there is a file."""
    (sweep / BAD).mkdir(parents=True)
    (sweep / BAD / "checkpoints").touch()


def mend(sweep: Path) -> None:
    (sweep / BAD / "checkpoints").unlink()


def states(sweep: Path) -> dict[str, str | None]:
    return {job.folder.name: job.status and job.status.state for job in jobs_of(sweep)}


def starts(sweep: Path) -> dict[str, int]:
    """How often each job of a sweep has begun, by its log."""
    return {job.folder.name: (job.folder / "log.txt").read_text().count("$ python ") for job in jobs_of(sweep)}


def state(run: Path) -> str | None:
    status = read_status(run)
    return status and status.state


def steps(run: Path) -> int:
    """How many rows the metrics of a run have."""
    try:
        return len((run / "metrics.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


def weights(run: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(run / "model.safetensors").items()}


def record(run: Path) -> dict:
    return yaml.safe_load((run / "record.yaml").read_text())


def check_cube(sweep: Path, launch: Callable[[], subprocess.CompletedProcess]) -> None:
    """Hold a launcher to the whole story: seven finish, one fails; again, mended, and only that one runs."""
    spoil(sweep)
    first = launch()
    told = first.stdout + first.stderr
    assert first.returncode == 1, told
    assert states(sweep) == {name: "failed" if name == BAD else "finished" for name in states(sweep)}
    assert len(states(sweep)) == 8
    assert "7 of 8 jobs are done" in told
    assert "Not a directory" in read_status(sweep / BAD).error
    assert (sweep / "report.html").exists()
    models = {name: weights(sweep / name) for name in states(sweep) if name != BAD}
    assert len({tuple(model.values()) for model in models.values()}) == 7  # they differ in what was varied

    mend(sweep)
    second = launch()
    assert second.returncode == 0, second.stdout + second.stderr
    assert set(states(sweep).values()) == {"finished"}
    assert starts(sweep) == {name: 2 if name == BAD else 1 for name in states(sweep)}
    assert {name: weights(sweep / name) for name in models} == models
