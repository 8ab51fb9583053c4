"""Does a run that was killed at random moments end with the same bits? Real processes, real SIGKILL.

`DIFFUSION_KILLS=20 pytest tests/test_kill_resume.py` for the full measurement.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_cases import assert_same_outcome, tiny

KILLS = int(os.environ.get("DIFFUSION_KILLS", "3"))
STEPS = 60
CHANGES = {
    "trainer__max_steps": STEPS,
    "trainer__accumulate_grad_batches": 2,
    "trainer__val_check_interval": 10,
    "callbacks__checkpoints__every_n_steps": 3,
    "callbacks__slow": {"_target_": "training_cases.Slow", "seconds": 0.05},  # so that there is time to be killed
}
PROGRAM = "import json, sys; from diffusion.training.run import train; train(json.loads(sys.argv[1]))"


def start(run_dir):
    """Start the same command each time, in a process of its own."""
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(tiny(run_dir, **CHANGES))]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def steps_done(run_dir):
    path = run_dir / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def wait_for_training(process, run_dir):
    """Wait until this process has written something of its own, or has ended."""
    before = time.time()
    while process.poll() is None:
        if any(path.stat().st_mtime > before for path in run_dir.rglob("last.ckpt")):
            return
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    process = start(run_dir)
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(tmp_path, whole, number):
    process = start(tmp_path)
    if number % 4:  # every fourth kill may come before training has begun
        wait_for_training(process, tmp_path)
        time.sleep(random.uniform(0, STEPS * 2 * 0.05))
    else:
        time.sleep(random.uniform(0, 12))
    process.kill()
    process.communicate()
    killed_at = steps_done(tmp_path)
    process = start(tmp_path)
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert steps_done(tmp_path) == STEPS
    assert_same_outcome(whole, tmp_path)
    print(f"killed with a checkpoint of step {killed_at} of {STEPS}: equal")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_process_with_its_status_and_the_same_command_goes_on(tmp_path, whole, number, status):
    process = start(tmp_path)
    wait_for_training(process, tmp_path)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == status, messages
    assert "to go on:" in messages
    assert f"run_dir={tmp_path}" in messages
    assert "Traceback" not in messages
    assert 0 < steps_done(tmp_path) < STEPS
    process = start(tmp_path)
    _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert_same_outcome(whole, tmp_path)
