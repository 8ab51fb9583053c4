"""Measuring samples during training: the right weights and seeds, said before, logged after, and nothing disturbed."""

import json

import numpy as np
import pytest
from lightning.pytorch import LightningModule
from metric_cases import random_images
from tiny import ROOT
from training_cases import NET, as_bytes, outcome, tiny

from diffusion.checkpoint import load_model
from diffusion.cli import composed
from diffusion.evaluation.features import pixels
from diffusion.evaluation.metrics import Evaluation
from diffusion.evaluation.reference import of_array, open_reference
from diffusion.generate import batches, choose_labels
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.images import to_uint8
from diffusion.sampling import Sampler
from diffusion.training.evaluation import SampleMetrics
from diffusion.training.metrics import read_rows
from diffusion.training.run import train

CALLBACK = {
    "_target_": "diffusion.training.evaluation.SampleMetrics",
    "_partial_": True,
    "sampler": {"_target_": "diffusion.sampling.Sampler", "num_steps": 2, "eta": 1.0},
    "guidance": {"_target_": "diffusion.guidance.ClassifierFreeGuidance", "guidance_scale": 2.0},
    "metrics": ["kid", "recall"],
    "features": "pixels",
    "num_samples": 30,
    "every_n_steps": 4,
    "batch_size": 16,
    "seed": 3,
}
SHORT = {"trainer__max_steps": 6, "callbacks__samples": None}


def measured(run_dir, *, callback=None, **changes):
    config = tiny(run_dir, **SHORT, **changes)
    config["callbacks"]["evaluation"] = {**CALLBACK, **(callback or {})}
    train(config)
    return run_dir


def results(run_dir):
    return {path.name: json.loads(path.read_text()) for path in sorted((run_dir / "evaluation").iterdir())}


def test_scores_go_to_the_loggers_and_results_to_the_run_folder(tmp_path, capsys):
    found = results(measured(tmp_path / "run"))
    assert list(found) == ["step=0000004.json", "step=0000006.json"]
    last = found["step=0000006.json"]
    assert (last["step"], last["weights"], last["num_samples"], last["num_reference"]) == (6, "ema", 30, 1200)
    assert last["reference"] == "1200 grey images of 8x8 from data set Digits (train)"
    rows = {row["step"]: row for row in read_rows(tmp_path / "run" / "metrics.csv")}
    for name in ("kid_30_pixels", "kid_std_30_pixels", "recall_30_pixels"):
        assert float(rows["6"][f"eval/{name}"]) == pytest.approx(last["scores"][name], rel=1e-6)
    assert float(rows["6"]["eval/seconds"]) > 0
    err = capsys.readouterr().err
    assert "evaluation: kid, recall of 30 samples every 4 steps, 120 network calls each" in err
    assert "2 times in 6 steps" in err and "step 6  eval/kid_30_pixels" in err


def test_what_is_measured_are_samples_of_the_averaged_weights_on_the_seeds(tmp_path):
    run_dir = measured(tmp_path / "run")
    model = load_model(run_dir / "model.safetensors", buildable=["training_cases.TinyNet"])
    assert model.weights == "ema"
    drawn = batches(
        model.net,
        model.diffusion,
        Sampler(num_steps=2, eta=1.0),
        ClassifierFreeGuidance(2.0),
        num_samples=30,
        batch_size=30,
        seed=3,
        labels=choose_labels(None, 30, 10),
        shape=(1, 8, 8),
    )
    images = np.concatenate([to_uint8(batch.images) for batch in drawn])
    expected = Evaluation(["kid", "recall"], pixels(), open_reference("digits"))(of_array(images, "samples"))["scores"]
    assert results(run_dir)["step=0000006.json"]["scores"] == pytest.approx(expected, abs=1e-4)


def test_measuring_changes_nothing_of_the_training(tmp_path):
    one = outcome(measured(tmp_path / "with"))
    train(tiny(tmp_path / "without", **SHORT))
    other = outcome(tmp_path / "without")
    rows = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in one.pop("metrics")]
    assert [row for row in rows if row["step"] != "4" or row["train/loss"]] == other.pop("metrics")
    assert as_bytes(one) == as_bytes(other)


def test_without_averages_the_raw_weights_are_measured(tmp_path):
    found = results(measured(tmp_path / "run", ema=None, callback={"reference_split": "val", "metrics": "precision"}))
    assert {one["weights"] for one in found.values()} == {"raw"}
    assert "(val)" in found["step=0000006.json"]["reference"]
    assert list(found["step=0000006.json"]["scores"]) == ["precision_30_pixels"]


def test_another_reference_can_be_named(tmp_path):
    np.savez(tmp_path / "other.npz", arr_0=random_images(40, size=8))
    found = results(measured(tmp_path / "run", callback={"reference": str(tmp_path / "other.npz")}))
    assert "other.npz" in found["step=0000006.json"]["reference"]


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        ({"features": "clip"}, "features=clip is neither"),
        ({"metrics": ["ssim"]}, "there is no ssim"),
        ({"num_samples": 0}, r"callbacks\.evaluation\.num_samples must be at least 1"),
        ({"num_samples": 3}, "3 images are too few"),
        ({"reference": "shapes"}, "32x32"),
        ({"sampler": {"_target_": "diffusion.sampling.Sampler", "num_steps": 999}}, "999"),
    ],
)
def test_what_is_wrong_ends_the_run_before_its_first_step(callback, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        measured(tmp_path / "run", callback=callback)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_samples_that_are_not_finite_cost_a_measurement_and_not_the_run(tmp_path):
    broken = {"sampler": {"_target_": "metric_cases.Broken", "num_steps": 2}}
    with pytest.warns(UserWarning, match="no samples at step 4: .* not finite"):
        measured(tmp_path / "run", callback=broken)
    assert not (tmp_path / "run" / "evaluation").exists()


def test_a_model_without_classes_is_measured(tmp_path):
    settings = {"net": {**NET, "num_classes": None}, "task__condition_drop": 0.0}
    guidance = {"_target_": "diffusion.guidance.NoGuidance"}
    found = results(measured(tmp_path / "run", callback={"guidance": guidance}, **settings))
    assert found["step=0000006.json"]["num_samples"] == 30


def test_it_is_off_by_default_and_one_word_switches_it_on():
    assert "evaluation" not in composed("train")["callbacks"]
    on = composed("train", ["callbacks=evaluation"])["callbacks"]
    assert on["evaluation"]["num_samples"] == 1000 and set(composed("train")["callbacks"]) < set(on)
    assert (ROOT / "configs" / "callbacks" / "evaluation.yaml").is_file()


def test_a_task_that_draws_nothing_is_refused():
    callback = SampleMetrics(Sampler(2), ClassifierFreeGuidance(2.0), data=None)
    with pytest.raises(ValueError, match=r"LightningModule draws no samples.*callbacks\.evaluation=null"):
        callback.on_train_start(None, LightningModule())
