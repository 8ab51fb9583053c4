"""Commands in several processes, started as torchrun and Slurm start them, and what they leave behind."""

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import ROOT

from diffusion.images import read_text

STARTERS = {"RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NAME", "MASTER_ADDR", "MASTER_PORT"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each of its processes."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def slurm(rank: int, size: int, port: int) -> dict[str, str]:
    """What srun tells each of its tasks; the port comes from the number of the job."""
    numbers = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": size, "SLURM_JOB_ID": port}
    return {"SLURM_NODELIST": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


class Job:
    """`size` processes that do `work()`, forked from this one so that they start at once."""

    def __init__(
        self, folder: Path, size: int, work: Callable[[], Any], *, starter: Callable[..., dict[str, str]] = torchrun
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.outputs = [folder / f"output-{rank}.txt" for rank in range(size)]
        context = multiprocessing.get_context("fork")
        port = free_port()
        self.processes = [
            context.Process(
                target=_rank, args=(work, starter(rank, size, port) if size > 1 else {}, self.outputs[rank])
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 60) -> tuple[list[int], str]:
        """Return the exit statuses and all that was printed; a process that hangs is killed, its status is -9."""
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes], "".join(path.read_text() for path in self.outputs)


def _rank(work: Callable[[], Any], variables: Mapping[str, str], output: Path) -> None:
    for name in STARTERS & os.environ.keys():  # of what runs the tests
        del os.environ[name]
    os.environ.update(variables)
    status = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        warnings.simplefilter("default")
        warnings.showwarning = lambda *said, **how: print(warnings.formatwarning(*said[:4]), file=file)  # not pytest's
        try:
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        file.flush()
    os._exit(status)


def command(arguments: Sequence[str]) -> Callable[[], None]:
    """Return what runs sample.py as if typed."""

    def run() -> None:
        os.environ["HYDRA_FULL_ERROR"] = "0"
        sys.argv = ["sample.py", *arguments]
        spec = importlib.util.spec_from_file_location("entry_sample", ROOT / "sample.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()

    return run


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves: samples.npz byte for byte, pictures with what they say, but for the commit of the code.

    Not record.yaml, nor the uncommitted changes: they say when and by whom.
    """
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    left: dict[str, Any] = {name: None for name in names if not name.startswith(("record.yaml", "changes_"))}
    for path in folder.rglob("*.png"):
        text = {key: value for key, value in read_text(path).items() if key != "git_commit"}
        left[str(path.relative_to(folder))] = (np.asarray(Image.open(path)).tobytes(), text)
    left["samples.npz"] = (folder / "samples.npz").read_bytes()
    return left


def words(checkpoint, out_dir, *more):
    return [f"checkpoint={checkpoint}", f"out_dir={out_dir}", "device=cpu", "sampler.num_steps=3", *more]


def last_words(*arguments):
    """Each setting as it is given last."""
    return list({word.partition("=")[0]: word for word in arguments}.values())


def sampled(folder, arguments, *, size=1, starter=torchrun):
    """Run sample.py in `size` processes, and return what it leaves."""
    statuses, printed = Job(folder, size, command(arguments), starter=starter).wait()
    assert statuses == [0] * size, printed
    return outcome(next(folder.parent / word[8:] for word in arguments if word.startswith("out_dir=")))
