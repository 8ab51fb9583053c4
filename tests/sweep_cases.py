"""A command of seconds that does what its config's `name` says, and sweeps over it, as if typed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOY = """
import os, signal, sys, time
from pathlib import Path
from diffusion.cli import command

def save(number, frame):
    print("saved", signal.Signals(number).name)
    sys.exit(128 + number)

@command("train", "A toy.", folder="run_dir")
def main(cfg):
    folder = Path(cfg.run_dir)
    with open(folder / "starts", "a") as file:  # the folder is there, and so is what says which jobs there are
        file.write("known " if (folder.parent / "sweep.yaml").exists() else "unknown ")
    if cfg.name == "bad" and not Path("mended").exists():
        raise ValueError(f"seed {cfg.seed} is not finite")
    if cfg.name == "crash":
        raise RuntimeError("boom")
    if cfg.name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    if cfg.name == "long" and not Path("mended").exists():
        print("waiting", flush=True)
        time.sleep(60)
    (folder / "metrics.csv").write_text(f"step,val/loss\\n1,{cfg.seed}.5\\n2,\\n")

if __name__ == "__main__":
    main()
"""


def save_toy(folder: Path) -> Path:
    path = folder / "toy.py"
    path.write_text(TOY)
    return path


def sweep(folder: Path, arguments: str | list[str], monkeypatch, capsys) -> tuple[int, str]:
    """Run the toy in `folder` with these arguments, in this process; return the exit status and what it printed."""
    path = save_toy(folder)
    words = arguments.split() if isinstance(arguments, str) else arguments
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # a command sets it for the rest of its process
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.setattr("warnings.formatwarning", None, raising=False)
    spec = importlib.util.spec_from_file_location("toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    status = 0
    capsys.readouterr()
    try:
        module.main()
    except SystemExit as end:
        status = end.code or 0
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def started(folder: Path, arguments: str) -> subprocess.Popen:
    """Start the toy in a process group of its own, as a terminal does; what it prints is in folder/printed.txt."""
    path = save_toy(folder)
    with open(folder / "printed.txt", "wb") as output:
        return subprocess.Popen(
            [sys.executable, str(path), *arguments.split()],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HYDRA_FULL_ERROR": "0"},
        )


def states(sweep_dir: Path) -> dict[str, Any]:
    """Return {folder's name: state} of a sweep's jobs; None for those that have none."""
    from diffusion.sweep import jobs_of

    return {job.folder.name: job.status and job.status.state for job in jobs_of(sweep_dir)}


def starts(sweep_dir: Path) -> dict[str, int]:
    """Return how often each job was started."""
    return {path.parent.name: path.read_text().count("known") for path in sorted(sweep_dir.glob("*/starts"))}


def only_sweep(folder: Path) -> Path:
    """Return the folder of the one sweep that was made."""
    (found,) = (folder / "outputs" / "sweeps").iterdir()
    return found
