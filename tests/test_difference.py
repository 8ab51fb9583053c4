"""Is all that differs between two runs told, and the step at which they part, and nothing where they are the same?"""

import math
import re
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from tiny import ROOT
from training_cases import TIMINGS as TINY_TIMINGS
from training_cases import tiny

from diffusion.report import difference as module
from diffusion.report.difference import (
    ABSENT,
    NEVER,
    NOT_COMPARED,
    changed_files,
    difference,
    parting_matrix,
    parting_step,
    run_difference,
)
from diffusion.report.runs import read_run

DIFF = """diff --git a/train.py b/train.py
index 1..2 100644
--- a/train.py
+++ b/train.py
@@ -1,2 +1,2 @@ def main
 same
-old
+{new}
diff --git a/a file.py b/a file.py
--- a/a file.py
+++ b/a file.py
@@ -1 +1 @@
--- removed
++ added
"""
START = {"commit": "abc", "python": "3.11", "host": "one", "device": "cpu", "world_size": 1, "threads": 1}
DATA = {"name": "Digits", "hash": "d1", "num_samples": 1200}


def a_run(folder, losses, *, diff=None, config=None, data=DATA, starts=None, state="finished", more=None):
    """A run's folder with metrics every ten steps."""
    folder.mkdir(parents=True)
    starts = [{**START, "packages": {"torch": "2.15"}}] if starts is None else starts
    if diff is not None:
        (folder / "changes_1.diff").write_text(diff)
        starts[-1]["changes"] = "changes_1.diff"
    (folder / "record.yaml").write_text(yaml.safe_dump({"starts": starts, "data": data}))
    config = {"run_dir": str(folder), "seed": 0, "optimizer": {"lr": 1e-3}} | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    status = {"state": state, "step": 10 * len(losses), "max_steps": 50, "time": "2026-11-21T12:00:00+00:00"}
    (folder / "STATUS").write_text(yaml.safe_dump(status | {"error": None, "host": "one", "pid": 1}))
    more = {"train/images_per_second": [f"{900 + hash(folder) % 90}"] * len(losses), **(more or {})}
    lines = [["step", "train/loss", *more]]
    lines += [[str(10 * i + 10), text, *(values[i] for values in more.values())] for i, text in enumerate(losses)]
    (folder / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    return folder


def between(one, other, **how):
    return difference(read_run(one), read_run(other), **how)


def test_two_runs_of_one_command_differ_in_nothing(tmp_path):
    one, other = (a_run(tmp_path / name, ["0.5", "0.25", "nan"]) for name in "ab")
    found = between(one, other)
    assert found.same and found.parts_at == {"train/loss": None} and found.drifts_at == {"train/loss": None}
    assert (found.config, found.code, found.data, found.environment, found.progress) == ({},) * 5


def test_the_first_step_at_which_a_metric_is_written_otherwise_is_told_and_timings_are_not(tmp_path):
    one = a_run(tmp_path / "a", ["0.5", "0.25000000", "0.125", "0.1"])
    other = a_run(tmp_path / "b", ["0.5", "0.25", "0.12500001", "0.11"])
    found = between(one, other)
    assert found.parts_at == {"train/loss": 30} and found.drifts_at == {"train/loss": 40}
    assert found.first_parting == 30 and not found.same
    assert between(one, other, tolerance=0.2).drifts_at == {"train/loss": None}


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "step"),
    [
        ([1.0, math.nan], [1.0, math.nan], 0.0, None),
        ([1.0, math.nan], [1.0, 2.0], 0.5, 2),
        ([1.0, math.inf], [1.0, math.inf], 0.1, None),
        ([1.0, math.inf], [1.0, 3.0], 0.1, 2),
        ([100.0, 0.0], [101.0, 0.0], 0.01, None),
        ([100.0, 0.0], [101.1, 0.0], 0.01, 1),
        ([0.0, -1.0], [-0.0, 1.0], 0.0, 2),
    ],
)
def test_numbers_that_are_none_part_as_others_do(a, b, tolerance, step):
    assert parting_step(pd.Series(a, [1, 2]), pd.Series(b, [1, 2]), tolerance) == step


def test_only_common_steps_are_compared():
    one, other = pd.Series([1.0, 2.0, 3.0], [1, 2, 3]), pd.Series([9.0, 3.0, 5.0], [0, 3, 4])
    assert parting_step(one, other) is None


def test_config_data_and_environment_are_compared_key_by_key(tmp_path):
    one = a_run(tmp_path / "a", ["0.5"], config={"optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}})
    start = {**START, "host": "two", "packages": {"torch": "2.11", "numpy": "2.0"}}
    other = a_run(
        tmp_path / "b",
        ["0.5", "0.4"],
        config={"seed": 1, "resume": False},
        data={**DATA, "hash": "d2"},
        starts=[start, {**start, "host": "three"}],
        state="failed",
    )
    found = between(one, other)
    assert found.config == {"seed": (0, 1), "optimizer.betas": ([0.9, 0.99], ABSENT)}
    assert found.data == {"hash": ("d1", "d2")}
    assert found.environment == {
        "host": ("one", "two, then three"),
        "packages.torch": ("2.15", "2.11"),
        "packages.numpy": (ABSENT, "2.0"),
    }
    assert found.progress == {"state": ("finished", "failed"), "step": (10, 20)}


def test_uncommitted_changes_are_told_by_file_with_the_first_lines_that_differ(tmp_path):
    one = a_run(tmp_path / "a", ["0.5"], diff=DIFF.format(new="new"))
    other = a_run(tmp_path / "b", ["0.5"], diff=DIFF.format(new="newer"), starts=[{**START, "commit": "def"}])
    clean = a_run(tmp_path / "c", ["0.5"])
    assert between(one, other).code == {"commit": ("abc", "def"), "train.py": ("+new", "+newer")}
    assert between(one, clean).code == {"a file.py": ("--- removed", ABSENT), "train.py": ("-old", ABSENT)}


def test_the_lines_of_a_diff_are_found_by_file():
    assert changed_files(DIFF.format(new="x")) == {
        "train.py": ["-old", "+x"],
        "a file.py": ["--- removed", "++ added"],
    }


def test_true_is_not_one_and_nan_is_nan():
    nan = float("nan")
    assert module.differing({"a": True, "b": nan}, {"a": 1, "b": nan}) == {"a": (True, 1)}


def test_what_a_folder_does_not_tell_is_unknown_and_neither_the_same_nor_different(tmp_path, capsys):
    one, other = (a_run(tmp_path / name, ["0.5"]) for name in "ab")
    (other / "record.yaml").unlink()
    (other / "config.yaml").unlink()
    found = between(one, other)
    assert [line.partition(" has ")[2] for line in found.unknown] == [
        "no config.yaml",
        "no record of its code and environment",
        "no record of its data",
    ]
    assert (found.config, found.code, found.data, found.environment) == ({},) * 4
    assert run_difference([str(one), str(other)]) == 0
    said = capsys.readouterr().out
    assert "nothing that is known differs" in said and "the same: progress" in said and said.count("unknown") == 3


def test_the_matrix_agrees_with_each_pair(tmp_path):
    losses = [["1", "2", "3"], ["1", "2", "4"], ["1.001", "2"], ["1", "2", "3"]]
    runs = [read_run(a_run(tmp_path / str(i), text)) for i, text in enumerate(losses)]
    runs.append(read_run(a_run(tmp_path / "none", [])))
    for tolerance in (0.0, 0.01):
        matrix = parting_matrix(runs, "train/loss", tolerance=tolerance)
        for i, one in enumerate(runs):
            for j, other in enumerate(runs):
                a, b = one.series("train/loss"), other.series("train/loss")
                step = parting_step(a, b, tolerance) if len(a) and len(b) else NOT_COMPARED
                assert matrix[i][j] == (NEVER if step is None else step)
    assert parting_matrix(runs, "val/nothing") == [[NOT_COMPARED] * 5] * 5


# ---------------------------------------------------------------------------------------------------------------------
# real runs, and the terminal


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from diffusion.training.run import train

    folder = tmp_path_factory.mktemp("runs")
    short = {"trainer__max_steps": 4, "callbacks__samples": None, "callbacks__progress": None}
    for name, changes in {"a": {}, "b": {}, "seed": {"seed": 1}}.items():
        train(tiny(folder / name, **short, **changes))
    return folder


def test_training_twice_gives_the_same_run_and_another_seed_another(trained, capsys):
    assert run_difference([str(trained / "a"), str(trained / "b")]) == 0
    said = capsys.readouterr().out
    assert "nothing differs" in said and "the same: config, code, data, environment, progress" in said
    assert run_difference([str(trained / "a"), str(trained / "seed")]) == 1
    said = capsys.readouterr().out
    assert re.search(r"seed +│ 0 +│ 1", said) and "the metrics part at step 2" in said
    assert module.TIMINGS == TINY_TIMINGS and not any(name in said for name in module.TIMINGS)


def test_the_command_answers_by_its_status(trained):
    def command(*words):
        return subprocess.run(
            [sys.executable, "-m", "diffusion.report", "diff", *words], cwd=ROOT, capture_output=True, text=True
        )

    same = command(str(trained / "a"), str(trained / "b"))
    assert same.returncode == 0 and "nothing differs" in same.stdout, same.stderr
    wrong = command(str(trained / "a"), str(trained / "nowhere"))
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: there is no folder")


def test_folders_without_runs_and_runs_without_a_common_metric_are_refused(tmp_path):
    one = a_run(tmp_path / "a", ["0.5"])
    other = a_run(tmp_path / "b", [], more={"val/loss": []})
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.yaml").write_text("jobs: []")
    for words, message in [
        ([one], "takes the folders of two runs, got 1"),
        ([one, other, one], "got 3"),
        ([one, tmp_path / "missing"], "there is no folder"),
        ([one, tmp_path / "empty"], "holds no run"),
        ([one, tmp_path / "sweep"], "is a sweep's folder; give two runs inside it"),
        ([one, other], "have no metric that both measured at one step"),
        ([one, one, "tolerance=much"], "tolerance=much is no number"),
        ([one, one, "tolerance=-1"], "at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            run_difference([str(word) for word in words])


def test_square_brackets_in_values_are_shown_as_they_are(tmp_path, capsys):
    one = a_run(tmp_path / "a[red]", ["0.5"], config={"ema": {"decays": [0.9]}})
    other = a_run(tmp_path / "b", ["0.5"], config={"ema": {"decays": "[bold]x"}})
    run_difference([str(one), str(other)])
    said = capsys.readouterr().out.replace("\n", "")
    assert "[bold]x" in said and "a[red]" in said
