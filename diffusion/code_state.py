"""Which code is running? The commit of its repository, and what was changed since, as a patch.

Nothing here imports torch. Code that is installed inside somebody else's repository has no commit of its own.
"""

import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNTRACKED = ("*.py", "*.yaml", "*.yml")  # new files that can change what a run does
SECONDS = 10.0  # for one question to git


def git(*arguments: str, root: Path = ROOT, fine: tuple[int, ...] = (0,)) -> str:
    """Ask git about a repository. Raises OSError or subprocess.SubprocessError where there is no answer."""
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    answer = subprocess.run(command, capture_output=True, timeout=SECONDS)
    if answer.returncode not in fine:
        raise subprocess.CalledProcessError(answer.returncode, command, answer.stdout, answer.stderr)
    return answer.stdout.decode("utf-8", errors="replace")


def is_repository(root: Path = ROOT) -> bool:
    """Say whether `root` is itself a repository, not a folder in one."""
    try:
        return Path(git("rev-parse", "--show-toplevel", root=root).strip()).resolve() == root.resolve()
    except (OSError, subprocess.SubprocessError):
        return False


@functools.cache
def git_commit(root: Path = ROOT) -> str:
    """Return the commit of this code, "+dirty" where tracked files were edited, or "unknown" outside its repository."""
    if not is_repository(root):
        return "unknown"
    try:
        dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no", root=root).strip() else ""
        return git("rev-parse", "HEAD", root=root).strip() + dirty
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def uncommitted(root: Path = ROOT, *, most: int = 1_000_000) -> str:
    """Return what differs from the last commit as a patch for `git apply`, new Python and YAML files included.

    "" where nothing does or there is no repository. Files whose patch would make it longer than `most` bytes are left
    out, whole, and named in lines in front of the rest, which git skips.
    """
    if not is_repository(root):
        return ""
    try:
        plain = ("--no-ext-diff", "--no-color", "--no-textconv")
        tracked = git("diff", *plain, "HEAD", "--", ".", root=root)
        new = git("ls-files", "-z", "--others", "--exclude-standard", "--", *UNTRACKED, root=root).split("\0")
        patches = ["diff --git " + part for part in ("\n" + tracked).split("\ndiff --git ")[1:]]
        patches += [
            git("diff", *plain, "--no-index", "--", "/dev/null", name, root=root, fine=(0, 1))
            for name in new
            if name and (root / name).is_file() and (root / name).stat().st_size <= most
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return _bounded([patch.rstrip("\n") + "\n" for patch in patches if patch.strip()], most)


def _bounded(patches: list[str], most: int) -> str:
    kept, left_out, size = [], [], 0
    for patch in patches:
        length = len(patch.encode())
        if size + length <= most:
            kept.append(patch)
            size += length
        else:
            left_out.append(f"# left out, {length} bytes: {patch.partition(chr(10))[0]}\n")
    return "".join([*left_out, *kept])
