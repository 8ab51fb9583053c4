"""With whom does this process share its work, and how does the end of one end them all?

Processes come from torchrun, from Slurm's srun, or from `devices=N` here; a process alone is a team of one. What they
say to each other goes through a store and gloo, on the CPU also where they compute elsewhere.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# The last two are what Slurm, or submitit, is told to send before a job is killed.
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
MISTAKE = 2  # the exit status of a process that ends because of an error, its own or another's
MEETING = timedelta(minutes=5)  # how long to wait for all processes of a job to start
SILENCE = timedelta(minutes=30)  # how long to wait for a process that is there, but says nothing
PULSE = 0.25  # seconds between two questions whether all are still there
GRACE = 30.0  # seconds for processes that were asked to stop
PATIENCE = 3.0  # seconds for processes to ask why another one ends

Answer = TypeVar("Answer")
Work = Callable[[Any, "Team"], Answer]


class Lost(ValueError):
    """Another process of the team has ended, or says nothing."""


class Stopped(BaseException):
    """A signal asked to stop. `message` says how to go on, where there is something to go on with."""

    message: str | None = None

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class ChildTraceback(Exception):
    """Where an error was raised, in the process that raised it."""


class Team:
    """The processes that do one job; by default this one alone. Use as a context: inside, all have met.

    `rank` of `size`, and `local_rank` on this machine. `open_store` connects to the store that all share.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        open_store: Callable[[], dist.Store] | None = None,
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"process {rank} of {size} cannot be; processes count from 0")
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._open_store = open_store
        self._store: dist.Store | None = None
        self._pulse: _Pulse | None = None
        self._speaks: bool | None = None

    @property
    def first(self) -> bool:
        """Say whether this is the one process that shows, writes and asks on behalf of all."""
        return self.rank == 0

    def __enter__(self) -> "Team":
        if self.size > 1:
            try:
                self._store = self._open_store()
                dist.init_process_group(
                    "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=SILENCE
                )
            except RuntimeError as error:
                raise ValueError(
                    f"the {self.size} processes of this job did not find each other within "
                    f"{MEETING.seconds // 60} minutes ({str(error).splitlines()[0]}); start all of them, or one alone "
                    "without torchrun's and Slurm's variables (RANK, WORLD_SIZE, SLURM_NTASKS)"
                ) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        told = kind is not None and self.speaks()  # before the others see this one go
        if self._pulse is not None:
            self._pulse.leave(told)
        if self._store is None:
            return
        if kind is None:
            self._part(GRACE)
        with contextlib.suppress(RuntimeError):  # the others see the connection close, whatever this one does
            dist.destroy_process_group()
        if kind is not None:
            self._part(PATIENCE)

    def _part(self, seconds: float) -> None:
        """Let the first process, which may keep the store, leave last."""
        with contextlib.suppress(RuntimeError):
            left = self._store.add("left", 1)
            end = time.monotonic() + seconds
            while self.first and left < self.size and time.monotonic() < end:
                time.sleep(0.01)
                left = self._store.add("left", 0)

    def share(self, make: Callable[[], Answer]) -> Answer:
        """Call `make` in the first process and return its answer in all."""
        answer = [make() if self.first else None]
        if self.size > 1:
            try:
                dist.broadcast_object_list(answer, src=0)
            except RuntimeError as error:
                raise self._lost() from error
        return answer[0]

    def turns(self, count: int) -> Iterator[int]:
        """Yield numbers below `count`, in order, each of them in exactly one process of the team: whoever is free."""
        if self._store is None:
            yield from range(count)
            return
        while (number := self._next_turn()) < count:
            yield number

    def _next_turn(self) -> int:
        try:
            return self._store.add("turn", 1) - 1
        except RuntimeError as error:
            raise self._lost() from error

    @contextlib.contextmanager
    def working(self, show: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
        """Yield what counts the work done, and leave when all processes have left.

        `show` gets what all have counted together, in the first process. Counting raises `Lost` where another process
        has ended, so that none works on for nothing.
        """
        if self.size == 1:
            done = 0

            def count(amount: int) -> None:
                nonlocal done
                done += amount
                show(done)

            yield count
            return
        self._pulse = _Pulse(self.size, show if self.first else None)
        self._pulse.start()

        def count(amount: int) -> None:
            self._pulse.done += amount
            if self._pulse.lost:
                raise self._lost()

        yield count
        self._pulse.finished = True
        while self._pulse.is_alive():
            self._pulse.join(PULSE)
        if self._pulse.lost:
            raise self._lost()
        self._pulse = None

    def _lost(self) -> Lost:
        return Lost(
            f"one of the {self.size} processes of this job ended without a word or was silent for "
            f"{SILENCE.seconds // 60} minutes (a process that runs out of memory is killed); the same command goes on"
        )

    def speaks(self) -> bool:
        """Say, to one process of the team alone, that it is the one to tell the user why the job ends."""
        if self._pulse is not None and self._pulse.told:
            return False
        if self._speaks is None:
            try:
                self._speaks = self.first if self._store is None else self._store.add("word", 1) == 1
            except RuntimeError:  # the store went with the process that kept it, the first
                self._speaks = self.rank == 1
        return self._speaks


class _Pulse(threading.Thread):
    """Ask all processes four times a second whether they are there, what they have done, and whether that was all.

    A process that ends closes its connections, which the others notice here, while their work goes on. One that can
    say so before has `told` the user why.
    """

    def __init__(self, size: int, show: Callable[[int], None] | None) -> None:
        super().__init__(name="pulse", daemon=True)
        self.show = show
        self.done, self.finished, self.lost, self.told = 0, False, False, False
        self._tells = False
        self._leaving = threading.Event()
        self._heard = [torch.zeros(3, dtype=torch.int64) for _ in range(size)]

    def run(self) -> None:
        leaving = False
        while not leaving:
            leaving = self._leaving.wait(PULSE)
            try:
                dist.all_gather(self._heard, torch.tensor([self.done, int(self.finished), int(self._tells)]))
            except RuntimeError:
                self.lost = True
                return
            done, finished, told = torch.stack(self._heard).sum(0).tolist()
            if told:
                self.lost, self.told = True, not self._tells
                return
            if self.show is not None:
                self.show(done)
            if finished == len(self._heard):
                return

    def leave(self, tells: bool) -> None:
        """Ask no more: after this the others find this process gone. `tells`: it says why."""
        self._tells = tells
        self._leaving.set()
        self.join(GRACE)


# ---------------------------------------------------------------------------------------------------------------------
# starting


def together(work: Work, settings: Any, *, devices: int = 1) -> Any:
    """Do `work(settings, team)` in every process of the job; return the first one's answer there, None in the others.

    Under torchrun and srun this process is one of theirs. Otherwise `devices` new ones do the work on this machine;
    then `work` must be importable by its name, `settings` and the answer go through pickle, and the answer is
    returned here. All processes work with the settings of the first. The first failure ends all: one process raises
    it, the others exit in silence. SIGINT, SIGTERM and SIGUSR1 raise `Stopped` in `work` and exit with 128 + number.
    """
    if devices < 1:
        raise ValueError(f"devices is a number of processes, at least 1; got {devices}")
    team = surroundings()
    if team.size > 1 and (problem := _unfit(devices, team.size)):
        if team.first:
            raise ValueError(problem)
        time.sleep(1)
        raise SystemExit(MISTAKE)
    try:
        with stoppable():
            answer = _launch(work, settings, devices) if devices > 1 else _take_part(work, settings, team)
    except Stopped as stop:
        if stop.message:
            print(stop.message, file=sys.stderr, flush=True)
        raise SystemExit(128 + stop.number) from None
    return answer if team.first else None


def _unfit(devices: int, size: int) -> str | None:
    """Say what `size` processes that were started from outside cannot do."""
    if devices != 1:
        return f"devices={devices}, but {size} processes were started already; leave devices out"
    return None


def surroundings() -> Team:
    """Return the team that torchrun's or Slurm's environment variables describe, or a team of one."""
    variables = os.environ
    if "RANK" in variables and "WORLD_SIZE" in variables:
        rank, size = int(variables["RANK"]), int(variables["WORLD_SIZE"])
        return Team(rank, size, local_rank=int(variables.get("LOCAL_RANK", rank)), open_store=_torchrun_store)
    if "SLURM_NTASKS" in variables and "SLURM_PROCID" in variables:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        if SLURMEnvironment.detect():  # not in a shell that salloc or srun --pty opened
            rank, size = int(variables["SLURM_PROCID"]), int(variables["SLURM_NTASKS"])
            local_rank = int(variables.get("SLURM_LOCALID", 0))
            return Team(rank, size, local_rank=local_rank, open_store=lambda: _slurm_store(rank, size))
    return Team()


def _torchrun_store() -> dist.Store:
    return next(dist.rendezvous("env://", timeout=MEETING))[0]


def _slurm_store(rank: int, size: int) -> dist.Store:
    """Meet on the node of the first task, at MASTER_ADDR and MASTER_PORT where they are set, as Lightning does."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
    job = os.environ.get("SLURM_JOB_ID", "0")[-4:]
    port = int(os.environ.get("MASTER_PORT") or 15000 + int(job))
    return dist.TCPStore(host, port, size, is_master=rank == 0, timeout=MEETING)


def _take_part(work: Work, settings: Any, team: Team) -> Any:
    """Work as one of the team, and raise what went wrong in one process only."""
    try:
        with team:
            return work(team.share(lambda: settings), team)
    except BaseException as error:
        if team.speaks():
            raise
        time.sleep(1)  # torchrun ends all when one has ended; the other is to finish its sentence
        raise SystemExit(128 + error.number if isinstance(error, Stopped) else MISTAKE) from None


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first signal that asks to stop into `Stopped`; further ones are heard and change nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = []

    def stop(number: int, frame: object) -> None:
        if not heard:
            heard.append(number)
            raise Stopped(number)

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)


# ---------------------------------------------------------------------------------------------------------------------
# processes of our own


def _launch(work: Work, settings: Any, size: int) -> Any:
    """Start `size` processes, wait for them, and return the first one's answer or raise the first error."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=MEETING)
    context = multiprocessing.get_context("spawn")
    children = [
        context.Process(
            target=_child, args=(work, settings, rank, size, store.port), name=f"process {rank}", daemon=True
        )
        for rank in range(size)
    ]
    try:
        with _unheard(signal.SIGINT):  # Ctrl-C reaches the whole group; one process answers it
            for child in children:
                child.start()
        running = list(children)
        while running and all(child.exitcode in (None, 0) for child in children):
            wait([child.sentinel for child in running], timeout=1)
            running = [child for child in running if child.exitcode is None]
        killed = next((child for child in children if (child.exitcode or 0) < 0), None)
        _end(children, patience=GRACE / 3)
    except Stopped as stop:
        for child in children:
            if child.is_alive():
                child.terminate()
        _end(children, patience=GRACE)
        stop.message = _read(store, "stopped")
        raise
    if all(child.exitcode == 0 for child in children):
        return pickle.loads(store.get("answer"))
    raise _failure(store, killed, size)


def _failure(store: dist.Store, killed: multiprocessing.Process | None, size: int) -> BaseException:
    """Return what the processes' end was about."""
    if (number := _read(store, "signal")) is not None:
        stop = Stopped(int(number))
        stop.message = _read(store, "stopped")
        return stop
    if killed is not None:
        name = signal.Signals(-killed.exitcode).name
        why = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return ValueError(f"{killed.name} of {size} was ended by {name}{why}; the same command goes on")
    error = ValueError(_read(store, "error") or f"one of {size} processes failed; its traceback is above")
    error.__cause__ = ChildTraceback(_read(store, "traceback"))
    return error


def _end(children: list[multiprocessing.Process], *, patience: float) -> None:
    """Wait for processes that are about to end, and kill those that do not."""
    end = time.monotonic() + patience
    for child in children:
        if child.pid is not None:
            child.join(max(0.0, end - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join()


def _read(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


@contextlib.contextmanager
def _unheard(number: int) -> Iterator[None]:
    """Ignore a signal, here and in the processes started meanwhile."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def _child(work: Work, settings: Any, rank: int, size: int, port: int) -> None:
    """Take part as a process of our own, and leave in the store what the parent is to say."""
    from diffusion.cli import explain, format_warning

    warnings.formatwarning = format_warning
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=MEETING)
    team = Team(rank, size, local_rank=rank, open_store=lambda: store)
    try:
        with stoppable():
            answer = _take_part(work, settings, team)
        if team.first:
            store.set("answer", pickle.dumps(answer))
    except Stopped as stop:
        store.set("stopped", stop.message or "")
        store.set("signal", str(stop.number))
        raise SystemExit(128 + stop.number) from None
    except (ValueError, OSError) as error:
        store.set("error", explain(error))
        store.set("traceback", traceback.format_exc())
        raise SystemExit(MISTAKE) from None


def _end_with_parent() -> None:
    """Leave nobody working whom nobody waits for: a parent that was killed could not say so."""
    multiprocessing.parent_process().join()
    os._exit(MISTAKE)
