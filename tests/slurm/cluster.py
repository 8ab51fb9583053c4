"""How are Slurm jobs tried on one machine? munged, slurmctld and two slurmd on loopback, in a folder of their own.

python tests/slurm/cluster.py COMMAND...   runs a command on such a cluster (Debian: slurm-wlm and munge) and stops it
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "squeue", "sinfo", "scontrol")
NODES = ("node1", "node2")
SERVE = "--serve"
SETTLING = timedelta(seconds=6)  # after which nothing of a job's first attempt is left

CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
KillWait=20
ReturnToService=2
PropagateResourceLimits=NONE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName={names[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName={names[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""


def missing_programs() -> list[str]:
    """Return what this machine lacks: empty where a cluster can be started."""
    return [name for name in PROGRAMS if program(name) is None]


def program(name: str) -> str | None:
    """Return the path of a program; daemons lie where a user's PATH does not always lead."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))


@contextmanager
def running() -> Iterator[dict[str, str]]:
    """Run a cluster of two nodes with two CPUs each and give the environment that leads Slurm's commands to it.

    Jobs and daemons are ended and the folder is removed however the block ends, and also where this process is killed:
    another one looks after them. Raises RuntimeError, with the ends of the logs, where the nodes are not idle within 30
    seconds.
    """
    command = [sys.executable, str(Path(__file__).resolve()), SERVE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as keeper:
        try:
            if not (said := keeper.stdout.readline()):
                raise RuntimeError("Slurm did not start; its logs stand above")
            yield {**os.environ, "SLURM_CONF": said.strip()}
        finally:
            keeper.stdin.close()
            keeper.wait()


def serve() -> None:
    """Run a cluster, print the path of its slurm.conf, and stop when standard input ends, as it does with its owner."""
    with daemons_running() as environment:
        print(environment["SLURM_CONF"], flush=True)
        sys.stdin.read()


@contextmanager
def daemons_running() -> Iterator[dict[str, str]]:
    """Start the daemons in a new folder, wait until the nodes are idle, and clean up after the block."""
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        environment = {**os.environ, "SLURM_CONF": str(write_config(folder))}
        daemons: list[subprocess.Popen] = []
        cleanup.callback(stop, daemons, environment)
        for command in commands(folder):
            daemons.append(start(command, environment, folder))
            if command[0].endswith("munged"):
                wait_until(lambda: (folder / "munge" / "socket").exists(), folder)
        wait_until(lambda: idle_nodes(environment) == len(NODES), folder)
        yield environment


def write_config(folder: Path) -> Path:
    """Write the key and the settings into an empty folder and return the path of slurm.conf."""
    folder.chmod(0o755)  # munge trusts no socket and no key below a folder that others may change
    for name, mode in (("munge", 0o711), ("state", 0o755), *((node, 0o755) for node in NODES)):
        (folder / name).mkdir(mode=mode)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    values = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser(), "names": NODES}
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, ports=free_ports(3), **values), encoding="utf-8")
    # Control groups stay as they are. Before 23.02 no plugin may be named that does nothing; the first one does nothing
    # either where neither processes nor tasks are tracked by it.
    plugin = "cgroup/v1" if version() < (23, 2) else "disabled"
    (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n", encoding="utf-8")
    return config


def version() -> tuple[int, ...]:
    """Return the version of Slurm, such as (22, 5, 8)."""
    said = subprocess.run([program("slurmd"), "-V"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in said.split()[-1].split("-")[0].split("."))


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens on."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def commands(folder: Path) -> list[list[str]]:
    """Return what starts each daemon in the foreground, in order."""
    munge = [f"--{name}={folder / 'munge' / name.partition('-')[0]}" for name in ("key-file", "log-file", "pid-file")]
    munge += [f"--seed-file={folder / 'munge' / 'seed'}", f"--socket={folder / 'munge' / 'socket'}"]
    return [
        [program("munged"), "--foreground", "--force", *munge],
        [program("slurmctld"), "-D"],
        *([program("slurmd"), "-D", "-N", node] for node in NODES),
    ]


def start(command: Sequence[str], environment: dict[str, str], folder: Path) -> subprocess.Popen:
    """Start a daemon."""
    with open(folder / "output.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def stop(daemons: Sequence[subprocess.Popen], environment: dict[str, str]) -> None:
    """End all jobs, then the daemons, the last first."""
    if len(daemons) > 1:
        ask(["scancel", "--full", f"--user={getpass.getuser()}"], environment)
        deadline = time.monotonic() + 15
        while ask(["squeue", "--noheader"], environment) and time.monotonic() < deadline:
            time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def ask(command: Sequence[str], environment: dict[str, str]) -> str:
    """Return what one of Slurm's commands prints; nothing where it fails or hangs."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def idle_nodes(environment: dict[str, str]) -> int:
    """Return how many nodes wait for jobs."""
    return ask(["sinfo", "--Node", "--noheader", "--format=%T"], environment).split().count("idle")


def hurry(environment: dict[str, str]) -> None:
    """Start requeued jobs soon: Slurm makes each wait two minutes.

    Not at once: the end of the first attempt's script would be taken for that of the second.
    """
    for line in ask(["squeue", "--noheader", "--states=PENDING", "--format=%i %V %r"], environment).splitlines():
        job, queued, reason = line.split(maxsplit=2)
        if reason == "BeginTime" and datetime.now() - datetime.fromisoformat(queued) > SETTLING:
            ask(["scontrol", "update", f"JobId={job}", "StartTime=now"], environment)


def wait_until(true: Callable[[], bool], folder: Path, seconds: float = 30.0) -> None:
    """Wait for something that the daemons do; RuntimeError with the ends of their logs where they do not."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            logs = [*folder.glob("*.log"), folder / "munge" / "log"]
            tails = [f"== {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs if log.exists()]
            raise RuntimeError("Slurm did not start:\n" + "\n".join(tails))
        time.sleep(0.1)


def main() -> int:
    """Run the command that was typed, and return its exit status."""
    if missing := missing_programs():
        print(f"error: there is no {', '.join(missing)}; apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    if sys.argv[1:] == [SERVE]:
        serve()
        return 0
    with running() as environment:
        return subprocess.run(sys.argv[1:] or ["sinfo"], env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
