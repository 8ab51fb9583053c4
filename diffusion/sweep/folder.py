"""What lies in a sweep's folder? sweep.yaml, which says what was varied and names a folder for each job, and those.

Nothing here imports torch.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diffusion.files import atomic_write
from diffusion.run_folder import Status, read_status

SWEEP_FILE = "sweep.yaml"
OVERRIDES_FILE = "overrides.yaml"  # the words of one job; its time is when the job was last begun
LOG_FILE = "log.txt"
LONGEST = 150  # characters of a folder's name, of the 255 that file systems allow
ODD = re.compile(r"[^\w.,=+\-@%~()\[\]{}]+")  # what a folder's name does without


class Job(NamedTuple):
    """One job of a sweep: its folder, which need not exist yet, what was set for it, and what became of it."""

    folder: Path
    overrides: dict[str, str]  # {key: value} of all its words, without Hydra's "+" and quotes
    status: Status | None


def read_sweep(sweep_dir: str | Path) -> dict[str, Any]:
    """Return what sweep.yaml says: name, command, words, time, commit, keys, jobs.

    Raises ValueError where there is none, or one that cannot be read.
    """
    path = Path(sweep_dir) / SWEEP_FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{sweep_dir} is no folder of a sweep: it has no {SWEEP_FILE}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); begin anew with sweep_dir=..."
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("jobs"), list):
        raise ValueError(f"{path} is no record of a sweep; begin anew with sweep_dir=...")
    return found


def write_sweep(sweep_dir: str | Path, record: Mapping[str, Any]) -> None:
    """Write sweep.yaml, whole or not at all."""
    with atomic_write(Path(sweep_dir) / SWEEP_FILE) as partial:
        partial.write_text(
            yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True, width=10**6), encoding="utf-8"
        )


def jobs_of(sweep_dir: str | Path) -> list[Job]:
    """Return the jobs of a sweep in its order, and after them those that a search has begun since it was written.

    Raises ValueError for a folder that is no sweep's.
    """
    sweep_dir = Path(sweep_dir)
    words = {entry["folder"]: entry["overrides"] for entry in read_sweep(sweep_dir)["jobs"]}
    for path in sorted(sweep_dir.glob(f"*/{OVERRIDES_FILE}")):
        if path.parent.name not in words:
            words[path.parent.name] = words_of(path.parent)
    return [Job(sweep_dir / name, as_mapping(said), read_status(sweep_dir / name)) for name, said in words.items()]


def words_of(folder: Path) -> list[str]:
    """Return the words that a job was last begun with."""
    return yaml.safe_load((folder / OVERRIDES_FILE).read_text(encoding="utf-8")) or []


def as_mapping(words: Sequence[str]) -> dict[str, str]:
    """Return `key=value` words as {key: value}, without Hydra's "+" in front of keys and quotes around values."""
    pairs = (word.partition("=") for word in words)
    return {key.lstrip("+"): _unquoted(value) for key, _, value in pairs}


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return re.sub(rf"\\(\\|{value[0]})", r"\1", value[1:-1])
    return value


def folder_names(jobs: Sequence[Sequence[str]], keys: Sequence[str]) -> list[str]:
    """Return a folder's name for the words of each job: those whose key is in `keys`, all where there are none.

    A name that is too long, or that two jobs would share, ends in eight hexadecimal digits of the job's words.
    """
    names = [_readable(words, keys) for words in jobs]
    shared = Counter(names)
    return [
        name if shared[name] == 1 and len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{digest(words)}"
        for name, words in zip(names, jobs, strict=True)
    ]


def _readable(words: Sequence[str], keys: Sequence[str]) -> str:
    wanted = {key.lstrip("+") for key in keys}
    shown = [f"{key}={value}" for key, value in as_mapping(words).items() if key in wanted or not wanted]
    return ODD.sub("_", ",".join(shown)).lstrip(".") or "default"


def digest(words: Sequence[str]) -> str:
    """Return eight hexadecimal digits that these words share with no others; their order does not matter."""
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:8]
