"""What does a run folder say of its run, whoever reads it and whenever?"""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import diffusion.run_folder
from diffusion.code_state import git_commit, uncommitted
from diffusion.run_folder import (
    STATES,
    first_process,
    locked,
    read_record,
    read_status,
    record_facts,
    record_start,
    write_status,
)

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from diffusion.run_folder import locked, write_status
with locked(sys.argv[1]):
    write_status(sys.argv[1], "running", step=3)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("state", STATES)
def test_a_status_is_read_as_it_was_written(tmp_path, state):
    with locked(tmp_path):
        write_status(tmp_path, state, step=7, max_steps=10, error="CUDA: out of memory\nat line 3")
        status = read_status(tmp_path)
    assert (tmp_path / "STATUS").read_text().splitlines()[0] == f"state: {state}"
    assert status[:3] == (state, 7, 10)
    assert status.error == "CUDA: out of memory"
    assert status.pid == os.getpid() and status.time[:2] == "20"


def test_a_state_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not 'done'"):
        write_status(tmp_path, "done")


@pytest.mark.parametrize("text", [None, "", "state: [", "state: done", "- running", "\x00\xff", "state: running" * 999])
def test_a_folder_without_a_status_that_can_be_read_has_none(tmp_path, text):
    if text is not None:
        (tmp_path / "STATUS").write_bytes(text.encode("latin-1"))
    assert read_status(tmp_path) is None


def test_a_status_of_later_or_fewer_entries_is_read(tmp_path):
    (tmp_path / "STATUS").write_text("state: finished\nmood: good\n")
    assert read_status(tmp_path)[:2] == ("finished", None)


def test_running_is_true_while_its_process_lives_and_killed_when_it_does_not(tmp_path, holder):
    assert read_status(tmp_path).state == "running"
    assert read_status(tmp_path).pid == holder.pid
    holder.kill()
    holder.wait()
    assert read_status(tmp_path)[:2] == ("killed", 3)


def test_a_folder_is_refused_while_another_process_is_at_work_there(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(diffusion.run_folder, "PATIENCE", 0.1)
    with pytest.raises(ValueError, match=f"process {holder.pid} on "), locked(tmp_path):
        raise AssertionError
    assert read_status(tmp_path).state == "running"
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


def test_a_lock_is_free_after_an_error_and_again_in_the_same_process(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "new" / "folder"):
            raise KeyError
    with locked(tmp_path / "new" / "folder"):
        pass


def test_many_readers_do_not_keep_a_run_from_its_folder(tmp_path):
    write_status(tmp_path, "running")
    with locked(tmp_path):
        pass
    readers = [multiprocessing.get_context("fork").Process(target=read_often, args=(tmp_path,)) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(50):
            with locked(tmp_path):
                pass
    finally:
        for reader in readers:
            reader.kill()
            reader.join()


def read_often(folder):
    while True:
        read_status(folder)


def test_a_forked_worker_that_outlives_a_killed_run_does_not_keep_the_lock(tmp_path):
    """What a loader's workers do for some seconds; without care they would share the lock of their parent."""
    program = (
        "import os, sys, time\nfrom diffusion.run_folder import locked\n"
        "with locked(sys.argv[1]):\n"
        "    if os.fork() == 0:\n        time.sleep(30)\n"
        "    print('forked', flush=True)\n    time.sleep(30)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, process_group=0
    )
    try:
        assert process.stdout.readline() == "forked\n"
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, 9)
        process.stdout.close()


def test_without_locks_a_living_process_is_believed_and_a_dead_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion.run_folder, "_try_lock", lambda *args, **kwargs: None)
    with locked(tmp_path):
        write_status(tmp_path, "running")
    status = yaml.safe_load((tmp_path / "STATUS").read_text())
    (tmp_path / "STATUS").write_text(yaml.safe_dump({**status, "pid": os.getppid()}))
    assert read_status(tmp_path).state == "running"
    with pytest.raises(ValueError, match="at work"), locked(tmp_path):
        raise AssertionError
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "STATUS").write_text(yaml.safe_dump({**status, "pid": gone.pid}))
    assert read_status(tmp_path).state == "killed"
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"NODE_RANK": "1"}, False),
    ],
)
def test_one_process_of_a_job_writes(monkeypatch, variables, first):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert first_process() == first


# ---------------------------------------------------------------------------------------------------------------------
# record.yaml


def test_each_start_is_recorded_and_facts_come_later(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=digits", "name=a b"])
    record_start(tmp_path, threads=1)
    record_start(tmp_path, resumed_step=5)
    record_facts(tmp_path, start={"device": "cpu"}, data={"name": "Digits", "hash": "ab", "num_samples": 3})
    record = read_record(tmp_path)
    first, second = record["starts"]
    assert first["command"] == "train.py experiment=digits 'name=a b'"
    assert (first["threads"], first["device"], first["resumed_step"]) == (1, None, None)
    assert (second["threads"], second["device"], second["resumed_step"]) == (None, "cpu", 5)
    assert record["data"]["hash"] == "ab" and record["parameters"] is None
    assert {"torch", "lightning", "numpy"} <= first["packages"].keys()
    assert {"time", "directory", "commit", "changes", "python", "host", "world_size"} <= first.keys()


@pytest.mark.parametrize("text", [None, "", "starts: 3", "starts: [", "\x00"])
def test_a_record_that_cannot_be_read_is_one_without_starts(tmp_path, text):
    if text is not None:
        (tmp_path / "record.yaml").write_text(text)
    assert read_record(tmp_path) == {"starts": [], "data": None, "parameters": None}
    record_start(tmp_path)
    assert len(read_record(tmp_path)["starts"]) == 1


def test_uncommitted_changes_are_kept_once_while_they_stay_the_same(tmp_path, monkeypatch):
    for text in ("diff one\n", "diff one\n", "diff two\n", "", "diff one\n"):
        monkeypatch.setattr(diffusion.run_folder, "uncommitted", lambda text=text: text)
        record_start(tmp_path)
    names = [start["changes"] for start in read_record(tmp_path)["starts"]]
    assert names == ["changes_1.diff", "changes_1.diff", "changes_3.diff", None, "changes_1.diff"]
    assert sorted(path.name for path in tmp_path.glob("*.diff")) == ["changes_1.diff", "changes_3.diff"]


# ---------------------------------------------------------------------------------------------------------------------
# the code


def git(folder, *arguments, **more):
    identity = ["-c", "user.name=N", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, **more)


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "code"
    (root / "configs").mkdir(parents=True)
    (root / "net.py").write_text("width = 1\n")
    (root / "old.py").write_text("gone\n")
    (root / ".gitignore").write_text("outputs\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_code_as_committed_has_no_changes(repository):
    assert uncommitted(repository) == ""
    assert len(git_commit(repository)) == 40


def test_the_patch_makes_the_code_that_ran_from_the_commit(repository, tmp_path):
    git(repository, "clone", "-q", str(repository), str(tmp_path / "clone"))
    (repository / "net.py").write_text("width = 2\n")
    (repository / "old.py").unlink()
    (repository / "new net.py").write_text("new\n")
    (repository / "configs" / "mine.yaml").write_text("seed: 1")  # no newline at the end
    (repository / "data.bin").write_bytes(b"\x00" * 9)
    (repository / "outputs").mkdir()
    (repository / "outputs" / "run.py").write_text("ignored")
    patch = uncommitted(repository)
    assert "outputs" not in patch and "data.bin" not in patch
    git(tmp_path / "clone", "apply", "-", input=patch.encode())
    assert (tmp_path / "clone" / "net.py").read_text() == "width = 2\n"
    assert not (tmp_path / "clone" / "old.py").exists()
    assert (tmp_path / "clone" / "new net.py").read_text() == "new\n"
    assert (tmp_path / "clone" / "configs" / "mine.yaml").read_text() == "seed: 1"


def test_a_patch_stays_bounded_and_names_what_it_left_out(repository, tmp_path):
    git(repository, "clone", "-q", str(repository), str(tmp_path / "clone"))
    (repository / "net.py").write_text("x = 1\n" * 3000)
    (repository / "old.py").write_text("small\n")
    patch = uncommitted(repository, most=2000)
    assert len(patch) < 2200 and "# left out" in patch.splitlines()[0] and "net.py" in patch.splitlines()[0]
    git(tmp_path / "clone", "apply", "-", input=patch.encode())
    assert (tmp_path / "clone" / "old.py").read_text() == "small\n"


def test_code_outside_a_repository_has_neither_commit_nor_changes(tmp_path, repository, monkeypatch):
    (repository / "lib").mkdir()  # as a package installed inside somebody's repository
    (repository / "net.py").write_text("changed")
    for folder in (tmp_path, repository / "lib"):
        assert (git_commit(folder), uncommitted(folder)) == ("unknown", "")
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert uncommitted(repository) == ""


def test_reading_a_folder_imports_no_torch():
    program = "import sys, diffusion.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
