"""The report's numbers against hand computations and another library, and its patience with broken runs."""

import csv
import gzip
import json
import math
import re
import statistics
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import pytest
import yaml
from report_cases import EIGHT, make_run, make_sweep, status, write_metrics, write_yaml
from scipy import stats

from diffusion.report import build
from diffusion.report.figures import Curves, learning_curves
from diffusion.report.pictures import shown_pictures
from diffusion.report.runs import read_run, read_sweeps
from diffusion.report.statistics import Mean, best, direction, mean, paired
from diffusion.report.summary import problems, verdict
from diffusion.report.tables import duration, number, ordered, results
from diffusion.report.varied import find_varied, short_names


def varied_of(*folders):
    return find_varied(read_sweeps(list(folders)))


def tiny_run(folder: Path, finals: dict[str, float], config: dict, state: str = "finished") -> Path:
    write_yaml(folder / "config.yaml", config)
    write_metrics(folder, [{"step": 1, **dict.fromkeys(finals, 9.0)}, {"step": 2, **finals}])
    status(folder, state, 2, 2)
    return folder


def grid_of(folder: Path, values: dict[tuple[str, str, int], float], metric: str = "eval/fid_2k") -> Path:
    """Runs over net x lr x seed whose metric ends at the value given."""
    for (net, lr, seed), value in values.items():
        tiny_run(folder / f"{net}-{lr}-{seed}", {metric: value}, {"net": net, "optimizer": {"lr": lr}, "seed": seed})
    return folder


FACTORIAL = {
    ("a", "1", 0): 10.0, ("a", "1", 1): 12.0, ("a", "1", 2): 17.0,
    ("b", "1", 0): 9.0, ("b", "1", 1): 10.5, ("b", "1", 2): 14.0,
    ("a", "2", 0): 20.0, ("a", "2", 1): 21.0, ("a", "2", 2): 22.0,
    ("b", "2", 0): 18.0, ("b", "2", 1): 17.5,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def test_mean_and_standard_deviation_are_those_of_a_sample():
    values = [3.1, 2.2, 5.9, 4.4]
    assert mean(values) == (pytest.approx(statistics.mean(values)), pytest.approx(statistics.stdev(values)), 4)
    assert mean([2.0])[0] == 2.0 and math.isnan(mean([2.0]).sd) and math.isnan(mean([]).mean)


def test_paired_differences_have_the_interval_of_the_paired_t_test():
    ones, others = {"0": 1.0, "1": 2.5, "2": 2.0, "7": 9.0}, {"2": 1.5, "1": 1.0, "0": 0.7, "8": 3.0}
    found = paired(ones, others)
    test = stats.ttest_rel([1.0, 2.5, 2.0], [0.7, 1.0, 1.5])
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert found.n == 3 and found.certain == (test.pvalue < 0.05)


def test_one_shared_seed_has_a_difference_without_interval_and_none_has_no_difference():
    found = paired({"0": 3.0}, {"0": 1.0})
    assert found.mean == 2 and math.isnan(found.half) and not found.certain
    assert paired({"0": 3.0}, {"1": 1.0}) is None


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("train/loss", "lower"), ("val/loss_ema", "lower"), ("eval/fid_500_pixels", "lower"),
        ("val/accuracy@1", "higher"), ("val/psnr_ema", "higher"), ("train/images_per_second", "higher"),
        ("train/memory_gb", "lower"),
        ("is_10k_inception", "higher"), ("eval/precision_2k_pixels", "higher"), ("bits_per_dim_500", "lower"),
        ("train/lr", None), ("train/grad_norm", None), ("val/latent_std_00", None), ("issues", None),
        ("lossless", None),
    ],
)  # fmt: skip
def test_less_or_more_is_better_by_what_a_metric_means(metric, better):
    assert direction(metric) == better


def test_the_best_mean_needs_a_rival_and_a_direction_and_a_number():
    means = [Mean(2.0, 0.1, 3), Mean(1.0, math.nan, 1), Mean(math.nan, math.nan, 2), Mean(1.0, 0, 2)]
    assert best(means, "lower") == {1, 3} and best(means, "higher") == {0}
    assert best(means, None) == set() and best(means[:1], "lower") == set() and best(means[1::2], "lower") == set()


def test_the_table_has_means_spreads_the_best_and_differences_on_the_same_seeds(tmp_path):
    varied = varied_of(grid_of(tmp_path, FACTORIAL))
    found = results(varied)
    assert varied.keys == ("net", "optimizer.lr") and varied.names == ("net", "lr")
    by_values = {row.row.values: row for row in found.rows}
    cell = by_values["a", "1"].cells[0]
    assert cell.value == 13.0 and cell.text == "13.0" and cell.spread == "± 3.6"  # the root of (9 + 1 + 16) / 2
    assert [row.row.values for row in found.rows if row.cells[0].best] == [("b", "1")]
    assert by_values["b", "2"].ended == 2
    rows = [row.row.values for row in found.rows]
    i, j = rows.index(("a", "1")), rows.index(("b", "1"))
    sign = 1 if i > j else -1
    middle, half, n = found.pairs["eval/fid_2k"][f"{max(i, j)},{min(i, j)}"]
    assert sign * middle == pytest.approx((1 + 1.5 + 3) / 3, rel=1e-5) and n == 3
    assert half == pytest.approx(4.302653 * statistics.stdev([1, 1.5, 3]) / 3**0.5, rel=1e-5)


def test_the_effect_of_a_choice_is_taken_over_runs_that_are_alike_in_all_else(tmp_path):
    found = results(varied_of(grid_of(tmp_path, FACTORIAL)))
    effects = {(effect.key, effect.value): effect for effect in found.effects}
    net, lr = effects["net", "b"], effects["lr", "2"]
    differences = [9 - 10.0, 10.5 - 12, 14 - 17.0, 18 - 20.0, 17.5 - 21]
    assert net.baseline == "a" and net.cells[0][0].value == pytest.approx(statistics.mean(differences))
    assert net.cells[0][0].spread.endswith("(n = 5)") and net.cells[0][1] == "better"
    differences = [20 - 10.0, 21 - 12.0, 22 - 17.0, 18 - 9.0, 17.5 - 10.5]
    assert lr.cells[0][0].value == pytest.approx(statistics.mean(differences)) and lr.cells[0][1] == "worse"


def test_runs_that_did_not_end_are_left_out_of_the_means_and_shown_among_the_runs(tmp_path):
    for seed, (value, state) in enumerate(
        [(1.0, "finished"), (3.0, "finished"), (99.0, "preempted"), (50.0, "pruned")]
    ):
        tiny_run(tmp_path / str(seed), {"val/loss": value}, {"seed": seed}, state)
    found = results(varied_of(tmp_path))
    (row,) = found.rows
    assert row.cells[0].value == 2.0 and (row.ended, row.of) == (2, 4)


def test_a_metric_that_ended_as_nan_is_told_and_never_the_best(tmp_path):
    for name, value in [("a", math.nan), ("b", 2.0), ("c", 3.0)]:
        tiny_run(tmp_path / name, {"val/loss": value}, {"net": name, "seed": 0})
    found = results(varied_of(tmp_path))
    assert [row.cells[0].text for row in found.rows] == ["nan", "2.00", "3.00"]
    assert [row.cells[0].best for row in found.rows] == [False, True, False]
    assert verdict(found).row == "net=b"


def test_metrics_of_different_names_leave_empty_cells_that_are_explained(tmp_path):
    tiny_run(tmp_path / "a", {"val/loss": 1.0}, {"net": "a"})
    tiny_run(tmp_path / "b", {"val/accuracy@1": 0.5, "val/loss": 2.0}, {"net": "b"})
    found = results(varied_of(tmp_path))
    column = [one.metric for one in found.columns].index("val/accuracy@1")
    assert [row.cells[column].text for row in found.rows] == ["", "0.5000"]
    assert "An empty cell" in build([tmp_path]).read_text()


def test_a_loss_that_was_itself_varied_is_no_verdict(tmp_path):
    for target in ("eps", "v"):
        tiny_run(tmp_path / target, {"val/loss": 1.0 + len(target)}, {"task": {"parameterization": target}})
    found = results(varied_of(tmp_path))
    assert found.columns[0].by_definition and verdict(found).by_definition
    assert "no verdict" in build([tmp_path]).read_text()


@pytest.mark.parametrize("winner", ["a", "b"])
def test_the_verdict_tells_the_lead_on_the_same_seeds(tmp_path, winner):
    losses = {(net, "1", seed): 5.0 + seed + 2 * (net != winner) for net in "ab" for seed in (0, 1)}
    found = verdict(results(varied_of(grid_of(tmp_path, losses))))
    assert (found.row, found.doubt) == (f"net={winner}", "") and found.lead == "2.00 ± 0.00 (n = 2)"


def test_what_readers_look_at_first_comes_first():
    names = [
        "train/loss",
        "val/loss",
        "train/lr",
        "val/loss_ema",
        "val/loss_q1",
        "eval/is_2k",
        "eval/fid_2k",
        "eval/seconds",
    ]
    assert ordered(names) == ["eval/fid_2k", "eval/is_2k", "val/loss_ema", "val/loss", "train/loss"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(1234.5, 1, "1,234.5"), (-0.25, 2, "−0.25"), (0.00012, 2, "0.00012"), (0.0, 2, "0.00"), (math.inf, 2, "inf")],
)
def test_numbers_are_written_for_people(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (None, "")])
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# what was varied


def test_a_sweep_is_told_apart_by_its_overrides_but_for_the_seed(tmp_path):
    make_sweep(tmp_path / "sweep", EIGHT)
    varied = varied_of(tmp_path / "sweep")
    assert varied.keys == ("schedule", "task.parameterization") and varied.names == ("schedule", "parameterization")
    assert varied.rows[0].label == "schedule=linear, parameterization=eps"
    assert varied.labels[-1] == "schedule=cosine, parameterization=v, seed=1"
    assert all(len(row.runs) == 2 for row in varied.rows)


def test_runs_without_overrides_are_told_apart_by_as_few_keys_of_their_configs_as_do(tmp_path):
    for number_, (net, lr) in enumerate([("a", 1e-3), ("a", 1e-4), ("b", 1e-3)]):
        config = {
            "net": {"_target_": f"some.{net}", "width": len(net)},
            "optimizer": {"lr": lr},
            "copy": {"lr": {"of": lr}},
        }
        config |= {
            "said": {"by": {"others": min(number_, 1)}},
            "run_dir": f"outputs/{number_}",
            "threads": number_,
            "callbacks": {"log": {"net": f"some.{net}"}},
        }
        tiny_run(tmp_path / str(number_), {"val/loss": 1.0}, config)
    varied = varied_of(tmp_path)
    assert varied.keys == ("net", "optimizer.lr") and varied.values == (("a", "0.001"), ("a", "0.0001"), ("b", "0.001"))
    assert varied.also["optimizer.lr"] == ("copy.lr.of",)


def test_two_sweeps_are_one_report_in_which_a_key_of_one_is_read_from_the_others_configs(tmp_path):
    make_sweep(tmp_path / "one", {"schedule": ["linear", "cosine"]})
    make_sweep(tmp_path / "two", {"optimizer.lr": ["1e-3"]})
    varied = varied_of(tmp_path / "one", tmp_path / "two", tmp_path / "one")
    assert len(varied.runs) == 3 and varied.keys == ("schedule", "optimizer.lr")
    assert varied.values == (("linear", "0.002"), ("cosine", "0.002"), ("cosine", "0.001"))


def test_many_values_of_a_search_are_told_by_their_range(tmp_path):
    for i in range(15):
        tiny_run(tmp_path / str(i), {"val/loss": 1.0 + i}, {"optimizer": {"lr": 10.0**-i}})
    varied = varied_of(tmp_path)
    assert varied.range_of("optimizer.lr") == "15 values from 1e-14 to 1"
    assert len(varied.rows) == 15 and "15 values from" in build([tmp_path]).read_text()


def test_short_names_stay_apart():
    assert short_names(["optimizer.lr", "net.width", "discriminator.width"]) == [
        "lr",
        "net.width",
        "discriminator.width",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# the csv file


def test_the_csv_file_has_the_last_values_of_each_metrics_csv(tmp_path):
    folders = make_sweep(tmp_path / "sweep", EIGHT, job_3={"state": "failed", "error": "no memory", "reached": 0.5})
    build([tmp_path / "sweep"])
    with open(tmp_path / "sweep" / "report.csv", newline="") as file:
        rows = {row["folder"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(map(str, folders))
    for folder in folders:
        row, last = rows[str(folder)], {}
        with open(folder / "metrics.csv", newline="") as file:
            for line in csv.DictReader(file):
                last |= {name: value for name, value in line.items() if value}
        assert row["step"] == last.pop("step")
        assert {name: float(row[name]) for name in last} == {name: float(value) for name, value in last.items()}
    failed = rows[str(folders[3])]
    assert (failed["state"], failed["error"], failed["schedule"], failed["seed"]) == (
        "failed",
        "no memory",
        "linear",
        "1",
    )
    assert failed["parameters"] == "1234567"


# ---------------------------------------------------------------------------------------------------------------------
# folders in any state


def damage_metrics(folder):
    with open(folder / "metrics.csv", "a") as file:
        file.write("2020,0.1,0")


def damage_config(folder):
    (folder / "config.yaml").write_text("net: {unclosed\n  - [", encoding="utf-8")


def damage_binary(folder):
    for name in ("metrics.csv", "config.yaml", "STATUS", "record.yaml", "hints.yaml", "microscope.csv", "log.txt"):
        (folder / name).write_bytes(b"\xff\x00\x8f\n\x13,,\xff\n")


def damage_shape(folder):
    for name in ("config.yaml", "STATUS", "record.yaml", "overrides.yaml", "metrics.json", "forecast.yaml"):
        (folder / name).write_text("- 3\n- [x]\n")
    (folder / "metrics.csv").write_text("loss\n1\n")


def damage_pictures(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])


def damage_all(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


DAMAGES = [damage_metrics, damage_config, damage_binary, damage_shape, damage_pictures, damage_all]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_a_gap_and_no_error(tmp_path, damage):
    folders = make_sweep(tmp_path / "sweep", {"schedule": ["linear", "cosine"], "seed": [0, 1]})
    damage(folders[0])
    page = build([tmp_path / "sweep"]).read_text()
    assert "schedule=linear, seed=0" in page
    assert len(read_sweeps([tmp_path / "sweep"])[0].runs) == 4


def test_a_last_line_that_is_not_whole_is_left_out(tmp_path):
    (folder,) = make_sweep(tmp_path, {"seed": [0]})
    whole = read_run(folder).finals
    damage_metrics(folder)
    assert read_run(folder).finals == whole


def test_a_step_that_was_written_twice_has_its_last_values(tmp_path):
    write_metrics(tmp_path, [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 2.5}])
    assert read_run(tmp_path).series("loss").to_dict() == {1: 2.5, 2: 2.0}


def test_what_cannot_be_read_is_told(tmp_path):
    folders = make_sweep(tmp_path, {"seed": [0, 1]})
    damage_config(folders[0])
    (problem,) = problems(varied_of(tmp_path))
    assert problem.troubles[0].startswith("config.yaml cannot be read")


def test_runs_of_every_state_are_listed_with_their_errors_and_the_end_of_their_logs(tmp_path):
    states = ["finished", "failed", "preempted", "pruned", "running", "waiting"]
    special = {f"job_{i}": {"state": state, "reached": 0.5} for i, state in enumerate(states)}
    special["job_1"] |= {"error": "ValueError: the loss is <nan>"}
    make_sweep(tmp_path, {"optimizer.lr": [1, 2, 3, 4, 5, 6]}, **special)
    varied = varied_of(tmp_path)
    assert [run.state for run in varied.runs] == [*states[:4], "killed", "waiting"]  # no process holds its lock
    found = {problem.label: problem for problem in problems(varied)}
    assert list(found) == ["lr=2", "lr=5", "lr=3", "lr=4"]
    assert found["lr=2"].error == "ValueError: the loss is <nan>"
    assert found["lr=2"].log.splitlines()[:2] == ["training", "step 1000"]  # as a terminal would show it
    assert "ValueError: the loss is &lt;nan&gt;" in build([tmp_path]).read_text()


def test_no_finished_run_is_a_report_too(tmp_path):
    special = {f"job_{i}": {"state": "waiting"} for i in range(3)}
    make_sweep(tmp_path, {"seed": [0, 1, 2]}, **special)
    page = build([tmp_path]).read_text()
    assert "No run has ended yet" in page and "3 waiting" in page


def test_samples_are_runs_too_with_their_scores_and_grids(tmp_path):
    jobs = []
    for steps, fid in [("5", 12.0), ("50", 3.0)]:
        folder = tmp_path / f"sampler.num_steps={steps}"
        make_run(folder, overrides={}, level=0.2, seed=0)
        (folder / "metrics.csv").unlink()
        (folder / "samples" / "step=0002000_ema.png").rename(folder / "grid.png")
        for path in (folder / "samples").glob("*.png"):
            path.unlink()
        (folder / "metrics.json").write_text(json.dumps({"scores": {"fid_500_pixels": fid, "recall_500_pixels": None}}))
        jobs.append({"folder": folder.name, "overrides": [f"sampler.num_steps={steps}"]})
    write_yaml(tmp_path / "sweep.yaml", {"name": "steps", "keys": ["sampler.num_steps"], "jobs": jobs})
    varied = varied_of(tmp_path)
    found = results(varied)
    assert verdict(found)[:3] == ("Lowest", "fid_500_pixels", "num_steps=50")
    (kind,) = shown_pictures(varied.runs)["kinds"]
    assert kind["name"] == "grid" and set(kind["last"]) == {0, 1}
    assert "num_steps" in build([tmp_path]).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# figures and pictures


def test_curves_hold_what_metrics_csv_says(tmp_path):
    folders = make_sweep(tmp_path, {"seed": [0, 1]})
    curves = learning_curves(varied_of(tmp_path))
    place, values = curves["runs"]["of"]["val/loss"]["1"]
    with open(folders[1] / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    assert curves["runs"]["x"][place] == [int(row["step"]) for row in rows]
    assert values == [float(f"{float(row['val/loss']):.5g}") for row in rows]
    place, means, spreads = curves["rows"]["of"]["val/loss"]["0"]
    others = curves["runs"]["of"]["val/loss"]["0"][1]
    assert means == pytest.approx([(a + b) / 2 for a, b in zip(values, others, strict=True)], rel=1e-4)
    assert spreads == pytest.approx([abs(a - b) / 2**0.5 for a, b in zip(values, others, strict=True)], abs=3e-5)


def test_seconds_are_images_over_throughput(tmp_path):
    config = {"data": {"batch_size": 10}, "trainer": {"accumulate_grad_batches": 2}}
    write_yaml(tmp_path / "config.yaml", config)
    write_metrics(
        tmp_path, [{"step": step, "train/images_per_second": rate} for step, rate in [(5, 50.0), (15, 100.0)]]
    )
    assert read_run(tmp_path).seconds.to_dict() == {5: 2.0, 15: 4.0}


def test_long_curves_are_thinned_to_every_nth_point_and_the_last():
    import pandas as pd

    curves = Curves(most=10)
    curves.add("loss", 0, pd.Series(range(35), index=range(100, 135), dtype=float))
    assert curves.plain["x"] == [[103, 107, 111, 115, 119, 123, 127, 131, 134]] and curves.plain["every"] == 4
    assert curves.plain["of"]["loss"]["0"] == [0, [3, 7, 11, 15, 19, 23, 27, 31, 34]]


def test_pictures_are_scaled_into_their_room_and_damaged_ones_left_out(tmp_path):
    folders = make_sweep(tmp_path, {"seed": list(range(6))})
    (folders[0] / "samples" / "step=0002000_ema.png").write_bytes(b"no picture")
    runs = varied_of(tmp_path).runs
    everything, little = shown_pictures(runs), shown_pictures(runs, room=12_000)
    assert [kind["name"] for kind in everything["kinds"]] == ["ema", "raw"] and not everything["scaled"]
    assert set(everything["kinds"][0]["last"]) == set(range(1, 6))
    assert sorted(everything["kinds"][0]["steps"]) == [500, 1000, 1500, 2000]
    assert little["scaled"] and len(json.dumps(little)) < 14_000 and len(little["kinds"][0]["last"]) == 5
    uri = little["kinds"][0]["last"][3][0]
    assert b64decode(uri.partition(",")[2])[8:12] == b"WEBP"


# ---------------------------------------------------------------------------------------------------------------------
# the page as a file, and the command


def test_the_page_needs_no_network_and_escapes_what_runs_say(tmp_path):
    make_sweep(tmp_path, {"prompt": ["<script>alert(1)</script>", "a & b"]})
    page = build([tmp_path]).read_text()
    scripts = re.findall(r"<script[^>]*>", page)
    assert len(scripts) == 4 and "alert(1)</script>" not in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)


def test_the_pages_data_can_be_unpacked(tmp_path):
    make_sweep(tmp_path, {"seed": [0, 1]})
    page = build([tmp_path], out=tmp_path / "here.html").read_text()
    packed = re.search(r'id="data">([^<]*)<', page)[1]
    data = json.loads(gzip.decompress(b64decode(packed)))
    assert data["compare"]["parts"]["train/loss"] == [[-1, 20], [20, -1]]
    seeds = {"texts": ["0", "1"], "of": [0, 1]}
    assert data["compare"]["sections"]["config"] == {"seed": seeds, "data.seed": seeds}
    assert (tmp_path / "here.csv").exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "there is no folder"),
        (lambda folder: folder.mkdir(), "holds no run"),
        (lambda folder: write_yaml(folder / "sweep.yaml", {"name": "x", "jobs": []}), "holds no run"),
        (lambda folder: (folder / "deep" / "empty").mkdir(parents=True), "holds no run"),
    ],
)
def test_a_folder_without_runs_is_one_clear_error(tmp_path, prepare, message):
    prepare(tmp_path / "sweep")
    with pytest.raises(ValueError, match=message):
        build([tmp_path / "sweep"])


def test_the_page_must_be_named_as_one(tmp_path):
    make_sweep(tmp_path, {"seed": [0]})
    with pytest.raises(ValueError, match=r"end in \.html"):
        build([tmp_path], out=tmp_path / "report.csv")


def test_the_command_writes_the_page_and_says_where(tmp_path):
    make_sweep(tmp_path / "sweep", {"seed": [0, 1]})
    command = [sys.executable, "-m", "diffusion.report", str(tmp_path / "sweep")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).stat().st_size < 5_000_000
    failed = subprocess.run([*command[:3], str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: there is no folder")
    nothing = subprocess.run(command[:3], capture_output=True, text=True)
    assert nothing.returncode == 2 and "of which runs?" in nothing.stderr


def test_a_sweeps_record_of_a_run_is_what_sweep_yaml_says(tmp_path):
    make_sweep(tmp_path, EIGHT)
    (sweep,) = read_sweeps([tmp_path])
    said = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert sweep.keys == tuple(said["keys"]) and sweep.command == said["command"]
    assert [run.name for run in sweep.runs] == [job["folder"] for job in said["jobs"]]
