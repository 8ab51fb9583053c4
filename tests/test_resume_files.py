"""Which checkpoints are there, which of them can be read, and what does a full disk or a kill leave?"""

import errno
import multiprocessing
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

import diffusion.training.checkpoint_files
from diffusion.training.checkpoint_files import (
    NEW,
    AtomicCheckpointIO,
    Damaged,
    candidates,
    keep,
    last_checkpoint,
    promote,
    read_checkpoint,
    tensor_bytes,
)


def content(step=1, size=50):
    draws = torch.Generator().manual_seed(step)
    return {
        "global_step": step,
        "state_dict": {"weight": torch.randn(size, generator=draws), "count": torch.tensor(step)},
        "words": ["one", {"two": 2.5, "three": None}],
    }


def saved(path, step=1, size=50):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content(step, size), path)
    return path


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_a_checkpoint_is_read_without_its_numbers(tmp_path):
    held = read_checkpoint(saved(tmp_path / "a.ckpt", step=7))
    assert held["global_step"] == 7
    assert held["state_dict"]["weight"].shape == (50,)
    assert held["state_dict"]["weight"].is_meta


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:100],
        lambda data: bytes(len(data)),
        lambda data: b"\x80\x02not a checkpoint",
        lambda data: data[: len(data) // 2] + bytes(512) + data[len(data) // 2 + 512 :],
        lambda data: data[512:],
        lambda data: b"<html>404</html>",
    ],
    ids=["empty", "one_byte_less", "half", "head", "zeros", "pickle", "zeros_within", "no_head", "page"],
)
def test_a_file_that_is_not_what_was_written_is_damaged(tmp_path, damage):
    path = saved(tmp_path / "a.ckpt", size=500)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Damaged, match=r"\S"):
        read_checkpoint(path)


def test_a_file_with_no_step_or_of_other_objects_is_damaged(tmp_path):
    for value in ({"weight": torch.zeros(2)}, [1, 2], {"global_step": "many"}, {"global_step": 1, "net": Path("x")}):
        torch.save(value, tmp_path / "a.ckpt")
        with pytest.raises(Damaged):
            read_checkpoint(tmp_path / "a.ckpt")


def test_a_single_wrong_bit_is_found_or_changes_nothing(tmp_path):
    """torch.load itself looks at no checksum: without ours a wrong bit in a weight would go unseen."""
    path = saved(tmp_path / "a.ckpt")
    data, draws, found = path.read_bytes(), random.Random(0), 0
    for _ in range(400):
        flipped = bytearray(data)
        flipped[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        try:
            read_checkpoint(path)
        except Damaged:
            found += 1
            continue
        assert same(torch.load(path, weights_only=True), content())
    assert found > 100


def test_a_folder_of_shards_needs_its_parts(tmp_path):
    shards = tmp_path / "last.ckpt"
    saved(shards / "meta.pt", step=3)
    with pytest.raises(Damaged, match="metadata"):
        read_checkpoint(shards)
    (shards / ".metadata").write_bytes(b"...")
    assert read_checkpoint(shards)["global_step"] == 3
    (shards / "meta.pt").unlink()
    with pytest.raises(Damaged):
        read_checkpoint(shards)


# ---------------------------------------------------------------------------------------------------------------------
# which there are


def names(run_dir):
    return [path.name for path in candidates(run_dir)]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
@pytest.mark.parametrize("shards", [False, True], ids=["file", "folder"])
def test_the_last_few_stay_in_their_order(tmp_path, keep_last, shards):
    folder = last_checkpoint(tmp_path).parent
    for step in range(1, 6):
        saved(folder / NEW / "meta.pt" if shards else folder / NEW, step)
        assert promote(folder / NEW, keep_last) == last_checkpoint(tmp_path)
    files = [path / "meta.pt" if shards else path for path in candidates(tmp_path)]
    assert [torch.load(path, weights_only=True)["global_step"] for path in files] == [5, 4, 3][:keep_last]
    assert len(list(folder.iterdir())) == keep_last


def test_fewer_are_kept_when_fewer_are_asked_for(tmp_path):
    folder = last_checkpoint(tmp_path).parent
    for keep_last, left in ((4, 1), (4, 2), (4, 3), (4, 4), (2, 2), (1, 1)):
        promote(saved(folder / NEW), keep_last)
        assert len(names(tmp_path)) == left


def test_the_newest_come_first(tmp_path):
    folder = last_checkpoint(tmp_path).parent
    for name in ("best.ckpt", "step=0000900.ckpt", "best_step=0001000.ckpt", "last-1.ckpt", "last.ckpt", ".new.ckpt"):
        saved(folder / name)
    (folder / "notes.txt").write_text("")
    assert names(tmp_path) == [
        "last.ckpt", "last-1.ckpt", "best_step=0001000.ckpt", "step=0000900.ckpt", "best.ckpt"
    ]  # fmt: skip
    assert candidates(tmp_path / "nowhere") == []


def test_what_is_kept_outlives_its_first_name(tmp_path, monkeypatch):
    for number, link in enumerate((os.link, failing_link)):  # a file system without hard links gets a copy
        monkeypatch.setattr(os, "link", link)
        one, other = tmp_path / f"{number}.ckpt", tmp_path / f"kept{number}.ckpt"
        keep(saved(one, step=1), other)
        keep(saved(tmp_path / "second", step=2), other)
        one.unlink()
        assert read_checkpoint(other)["global_step"] == 2
        shards = tmp_path / f"shards{number}"
        saved(shards / "meta.pt", step=3)
        keep(shards, tmp_path / f"kept_shards{number}")
        (shards / "meta.pt").unlink()
        assert torch.load(tmp_path / f"kept_shards{number}" / "meta.pt", weights_only=True)["global_step"] == 3


def failing_link(*args):
    raise OSError(errno.EPERM, "no links here")


def promote_for_ever(folder):
    os.fsync = lambda file: None  # against a power cut, and slow
    for step in range(1, 1_000_000):
        AtomicCheckpointIO().save_checkpoint({"global_step": step, "w": torch.full((20_000,), step)}, folder / NEW)
        promote(folder / NEW, 2)


def test_a_process_killed_while_it_writes_leaves_a_last_checkpoint_that_can_be_read(tmp_path):
    """Writing is all that this process does: most kills hit it half way."""
    draws, steps = random.Random(1), []
    folder = last_checkpoint(tmp_path).parent
    process = multiprocessing.get_context("fork").Process(target=promote_for_ever, args=(folder,), daemon=True)
    process.start()
    for _ in range(60):  # stopped, it is what a kill would leave
        signal.sigtimedwait([], draws.uniform(0.001, 0.02))
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        if candidates(tmp_path):
            held = read_checkpoint(last_checkpoint(tmp_path))
            loaded = torch.load(last_checkpoint(tmp_path), weights_only=True)
            assert (loaded["w"] == held["global_step"]).all()
            steps.append(held["global_step"])
            assert len(list(folder.iterdir())) <= 5
        os.kill(process.pid, signal.SIGCONT)
    process.kill()
    process.join()
    assert len(steps) > 40 and steps == sorted(steps)


# ---------------------------------------------------------------------------------------------------------------------
# a full disk


def test_shared_memory_is_counted_once():
    weight = torch.zeros(100)
    value = {"a": weight, "b": [weight.view(10, 10), torch.zeros(5, dtype=torch.int64)], "c": 3}
    assert sum(tensor_bytes(value).values()) == 440


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    last = saved(last_checkpoint(tmp_path), step=3)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(diffusion.training.checkpoint_files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"step 4 into .*: No space left.*needs 0.04 MB and 0.00 MB are free.*is whole"):
        AtomicCheckpointIO().save_checkpoint(content(4, size=10_000), last.with_name(NEW))
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("limit", [1_000, 30_000, 39_000])
def test_a_disk_that_fills_up_half_way_leaves_the_old_checkpoint_whole(tmp_path, limit):
    """The operating system itself refuses more bytes, as it does at the end of a disk or a quota."""
    last = saved(last_checkpoint(tmp_path), step=3)
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            AtomicCheckpointIO().save_checkpoint(content(4, size=10_000), last.with_name(NEW))
        except OSError as error:
            words = ("step 4", "it needs 0.04 MB", "last.ckpt is whole", "the same command goes on")
            os._exit(0 if all(word in str(error) for word in words) else 2)
        os._exit(1)
    assert os.waitpid(process, 0)[1] == 0
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    assert same(torch.load(last, weights_only=True), content(3))


def test_other_errors_of_writing_say_what_they_are(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "checkpoints" / NEW)
