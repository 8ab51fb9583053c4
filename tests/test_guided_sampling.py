"""Guidance by a classifier's file: sample.py and the pictures of a run, with what they say and what they refuse."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from latent_cases import NODE as AUTOENCODER
from latent_cases import autoencoder
from tiny import DIFFUSION, facts, random_net, run, save_tiny
from tiny import config as tiny_config
from training_cases import NET, tiny

from diffusion.checkpoint import Part, build, load_classifier, load_model, save_model
from diffusion.generate import batches, choose_labels, with_classifier
from diffusion.guidance import ClassifierGuidance, NoGuidance
from diffusion.images import read_text
from diffusion.sampling import Sampler
from diffusion.training.run import train

JUDGE = {
    "_target_": "diffusion.models.classifier.Classifier",
    "in_channels": 1,
    "num_classes": 10,
    "image_size": 8,
    "channels": 16,
    "norm_groups": 8,
    "num_heads": 2,
    "stages": [{"depth": 1}, {"depth": 1}],
    "pool": "adaptive",
}
UNLABELLED = facts(num_classes=None, class_names=None, condition_drop=0.0)


def save_judge(path: Path, *, diffusion=DIFFUSION, parts=None, about=None, **changes) -> Path:
    """A classifier of random weights, as the file that training one leaves."""
    config = {"classifier": {**JUDGE, **changes}, "diffusion": diffusion}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build(config["classifier"])
        torch.nn.init.normal_(net.head.out.weight, std=0.5)
    about = facts(condition_drop=0.0, **(about or {}))
    save_model(path, net, config, weights="ema", step=7, ema_decay=0.99, facts=about, parts=parts)
    return path


def save_conditional(path: Path) -> Path:
    """A denoiser that listens to its labels, as one does after training."""
    config = tiny_config()
    net, draws = random_net(config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=draws))
    save_model(path, net, config, weights="ema", step=7, facts=facts())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A denoiser that knows no classes, one that does, and a classifier."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": save_tiny(folder / "plain.safetensors", about=UNLABELLED, num_classes=None),
        "conditional": save_conditional(folder / "conditional.safetensors"),
        "judge": save_judge(folder / "judge.safetensors"),
    }


@pytest.fixture
def sample(files, tmp_path, monkeypatch, capsys):
    """sample.py with this denoiser and these words: its images, labels, stderr and folder; or its error."""

    def call(name, *arguments, checkpoint="plain", judge=None, fails=False):
        line = [f"checkpoint={files.get(checkpoint, checkpoint)}", f"out_dir={tmp_path / name}", "num_samples=6"]
        if judge is not None:
            line += ["guidance=classifier", f"guidance.classifier_checkpoint={files.get(judge, judge)}"]
        status, _, err = run("sample", [*line, "sampler.num_steps=4", *arguments], monkeypatch, capsys)
        assert (status == 2 and not (tmp_path / name).exists()) if fails else status == 0, err
        if fails:
            return err
        saved = np.load(tmp_path / name / "samples.npz")
        return saved["arr_0"], saved["arr_1"].tolist() if "arr_1" in saved else None, err, tmp_path / name

    return call


FORMS = {"ddim": "bends the score (DDIM, ODE solvers)", "ddpm": "shifts the mean (DDPM)"}


@pytest.mark.parametrize("sampler", FORMS)
def test_labels_reach_the_classifier_of_a_denoiser_that_knows_none(sample, files, sampler):
    words = (f"sampler={sampler}", "labels=[3,7]", "guidance.classifier_scale=20")
    images, labels, err, folder = sample("guided", *words, judge="judge")
    assert labels == [3, 7, 3, 7, 3, 7]
    assert err.count(" guides: ") == 1 and f"it {FORMS[sampler]}, classifier_scale=20" in err
    assert "warning" not in err
    text = read_text(folder / "images" / "000003.png")
    assert text["classifier_sha256"] == hashlib.sha256(files["judge"].read_bytes()).hexdigest()
    assert (text["guidance"]["classifier_scale"], text["label"]) == (20.0, 7)
    assert text["guidance"]["classifier_checkpoint"] == str(files["judge"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["guidance"]["classifier_scale"] == 20.0 and config["classifier_sha256"] == text["classifier_sha256"]
    others = sample("others", f"sampler={sampler}", "labels=[4]", "guidance.classifier_scale=20", judge="judge")[0]
    assert not np.array_equal(images, others)


@pytest.mark.parametrize("sampler", FORMS)
@pytest.mark.parametrize("checkpoint", ["plain", "conditional"])
def test_scale_zero_draws_what_no_guidance_draws(sample, sampler, checkpoint):
    words = (f"sampler={sampler}",)
    guided = sample("zero", *words, "guidance.classifier_scale=0", judge="judge", checkpoint=checkpoint)
    plain = sample("plain", *words, "guidance=none", checkpoint=checkpoint)
    assert np.array_equal(guided[0], plain[0])
    assert guided[1] == [0, 1, 2, 3, 4, 5]  # all classes take turns


def test_a_conditional_denoiser_is_guided_by_both(sample):
    words = ("labels=[2]", "guidance.classifier_scale=5")
    drawn = [
        sample("adm", *words, judge="judge", checkpoint="conditional"),
        sample("both", *words, "guidance.guidance_scale=2", judge="judge", checkpoint="conditional"),
        sample("free", "labels=[2]", "guidance.guidance_scale=2", checkpoint="conditional"),
        sample("interval", *words, "guidance.interval=[0,60]", judge="judge", checkpoint="conditional"),
    ]
    assert len({images.tobytes() for images, *_ in drawn}) == 4
    with pytest.warns(UserWarning, match="the classifier's guidance alone"):
        sample("alone", *words, "guidance.guidance_scale=2", judge="judge")


def test_every_precision_draws_nearly_the_same(sample):
    words = ("labels=[3,7]", "guidance.classifier_scale=5")
    pixels = {
        name: sample(name, *words, *more, judge="judge")[0].astype(int)
        for name, more in {
            "float32": (),
            "float64": ("dtype=float64",),
            "bfloat16": ("dtype=bfloat16",),
            "half": ("guidance.classifier_dtype=bfloat16",),
        }.items()
    }
    assert abs(pixels["float64"] - pixels["float32"]).max() <= 1
    for name in ("bfloat16", "half"):
        assert 0 < abs(pixels[name] - pixels["float32"]).mean() < 4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_images_are_the_same_bit_for_bit_whatever_the_batch_size(files, eta):
    model = load_model(files["plain"])
    guidance = ClassifierGuidance(classifier_checkpoint=str(files["judge"]), classifier_scale=5.0)
    guidance = with_classifier(guidance, model.diffusion, shape=(1, 8, 8), num_classes=None, autoencoder=None)
    settings = {"num_samples": 64, "labels": choose_labels(None, 64, 10), "shape": (1, 8, 8), "pad_to": 16}

    def images(batch_size):
        sampler = Sampler(4, eta=eta)
        made = batches(model.net, model.diffusion, sampler, guidance, batch_size=batch_size, **settings)
        return torch.cat([batch.images for batch in made])

    reference = images(64)
    assert reference.std() > 0.1
    for batch_size in (1, 7, 64):
        assert torch.equal(images(batch_size), reference), batch_size


OTHERS = {
    "size": ({"image_size": 16}, r"was made for 16x16, but the denoiser draws 8x8"),
    "channels": ({"in_channels": 3}, r"reads images of 3 channels, but the denoiser's have 1"),
    "classes": ({"num_classes": 4}, r"knows 4 classes, but the denoiser 10"),
    "schedule": (
        {"diffusion": {**DIFFUSION, "schedule": {"_target_": "diffusion.schedule.linear", "num_train_timesteps": 100}}},
        "another noise schedule than the denoiser",
    ),
    "timesteps": (
        {"diffusion": {**DIFFUSION, "schedule": {"_target_": "diffusion.schedule.cosine", "num_train_timesteps": 50}}},
        "trained with num_train_timesteps=50, but the denoiser with 100",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_classifier_of_something_else_is_refused_before_anything_is_written(sample, tmp_path, kind):
    changes, message = OTHERS[kind]
    other = save_judge(tmp_path / "other.safetensors", **changes)
    err = sample("out", judge=other, checkpoint="conditional", fails=True)
    assert err.count("\n") == 1 and message in err and "other.safetensors" in err


def test_files_of_another_kind_are_refused(sample, files):
    assert "holds a denoiser, but a classifier is needed" in sample("out", judge="conditional", fails=True)
    assert "holds a classifier, but a denoiser is needed" in sample("out", checkpoint="judge", fails=True)
    assert "there is no file" in sample("out", judge=files["judge"].with_name("none.safetensors"), fails=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("guidance=classifier",), "guidance.classifier_checkpoint has no value; add guidance.classifier_checkpoint="),
        (("labels=[3,10]",), "labels=[3, 10] must be whole numbers from 0 to 9"),
        (("labels=[-1]",), "labels=[-1] must be whole numbers from 0 to 9"),
        (("guidance.classifier_scale=-2",), "classifier_scale must be a finite number >= 0, got -2"),
        (("guidance.classifier_scale=big",), "guidance.classifier_scale=big does not fit; it must be of type float"),
        (("guidance.classifier_dtype=int8",), "classifier_dtype must be null, bfloat16 or float16"),
        (("guidance.interval=[9,1]",), "interval must be (low, high) timesteps"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(sample, words, message):
    err = sample("out", *words, judge=None if words == ("guidance=classifier",) else "judge", fails=True)
    assert message in err and err.count("\n") == 1


def latent_files(folder: Path, *, seed: int = 0, scale_factor: float = 0.7) -> dict[str, Path]:
    """A denoiser and a classifier of 4x4 latents with 2 channels, each with its autoencoder."""
    files = {}
    for name, of in (("denoiser", 0), ("judge", seed)):
        module = autoencoder(seed=of, in_channels=1, scale_factor=0.7 if name == "denoiser" else scale_factor)
        node = {**AUTOENCODER, "scale_factor": module.scale_factor}
        files[name] = folder / f"{name}.safetensors"
        if name == "judge":
            part = Part(module=module, config=node, bundled=False, source="elsewhere")
            save_judge(files[name], parts={"autoencoder": part}, in_channels=2, image_size=4)
        else:
            config = tiny_config(in_channels=2, out_channels=2, num_classes=None)
            parts = {"autoencoder": Part(module=module, config=node)}
            save_model(files[name], random_net(config), config, weights="ema", step=1, facts=UNLABELLED, parts=parts)
    return files


def test_latents_are_guided_by_a_classifier_of_the_same_latents(sample, tmp_path):
    files = latent_files(tmp_path)
    words = ("labels=[3,7]", "guidance.classifier_scale=20")
    guided, labels, *_ = sample("guided", *words, checkpoint=files["denoiser"], judge=files["judge"])
    plain = sample("plain", "guidance=none", checkpoint=files["denoiser"])[0]
    assert guided.shape == plain.shape == (6, 8, 8, 1) and not np.array_equal(guided, plain)
    assert labels == [3, 7, 3, 7, 3, 7]
    double = sample("double", *words, "dtype=float64", checkpoint=files["denoiser"], judge=files["judge"])[0]
    assert abs(double.astype(int) - guided).max() <= 1


def test_pixels_and_latents_of_another_autoencoder_are_refused(sample, files, tmp_path):
    for name, settings in (("weights", {"seed": 5}), ("scale", {"scale_factor": 0.9})):
        (tmp_path / name).mkdir()
        latent = latent_files(tmp_path / name, **settings)
        err = sample("out", checkpoint=latent["denoiser"], judge=latent["judge"], fails=True)
        assert "judges latents of another autoencoder" in err
    assert "judges pixels, but the denoiser draws the latents" in sample(
        "out", checkpoint=latent["denoiser"], judge="judge", fails=True
    )
    assert "judges the latents of an autoencoder, but the denoiser draws pixels" in sample(
        "out", judge=latent["judge"], fails=True
    )


def test_a_loaded_classifier_can_be_given_in_python(files):
    model, judge = load_model(files["plain"]), load_classifier(files["judge"])
    settings = {"shape": (1, 8, 8), "num_classes": None, "autoencoder": None}
    given = with_classifier(ClassifierGuidance(classifier=judge), model.diffusion, **settings)
    assert given.net is judge.net and not any(weight.requires_grad for weight in given.net.parameters())
    by_file = ClassifierGuidance(classifier_checkpoint=str(files["judge"]))
    for dtype, own in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        loaded = with_classifier(by_file, model.diffusion, **settings, dtype=dtype)
        assert {weight.dtype for weight in loaded.net.parameters()} == {own}
    plain = NoGuidance()
    assert with_classifier(plain, model.diffusion, **settings) is plain
    with pytest.raises(ValueError, match="judges pixels, but the denoiser draws the latents"):
        with_classifier(given, model.diffusion, **{**settings, "autoencoder": autoencoder(in_channels=1)})


# ---------------------------------------------------------------------------------------------------------------------
# pictures during training


def guided_run(folder: Path, **changes):
    """A run of a few steps of a denoiser without classes, whose pictures a classifier guides."""
    judge = save_judge(folder / "judge.safetensors", diffusion=tiny(folder)["diffusion"], **changes.pop("judge", {}))
    guidance = {
        "_target_": "diffusion.guidance.ClassifierGuidance",
        "classifier_checkpoint": str(judge),
        "classifier_scale": 5.0,
    }
    settings = {
        "net": {**NET, "num_classes": None},
        "task__condition_drop": 0.0,
        "trainer__max_steps": 4,
        "callbacks__samples__guidance": guidance,
        **changes,
    }
    return tiny(folder / "run", **settings)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pictures_during_training_are_guided(tmp_path, capsys, eta):
    train(guided_run(tmp_path, callbacks__samples__sampler__eta=eta))
    err = capsys.readouterr().err
    assert err.count(" guides: ") == 1 and FORMS["ddpm" if eta else "ddim"] in err
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "run" / "samples").glob("*.png")}
    assert set(pictures) == {"step=0000004_raw.png", "step=0000004_ema.png"}
    other = guided_run(tmp_path, callbacks__samples__sampler__eta=eta, callbacks__samples__classes=[8, 9])
    train({**other, "run_dir": str(tmp_path / "other")})
    assert (tmp_path / "other" / "samples" / "step=0000004_raw.png").read_bytes() != pictures["step=0000004_raw.png"]


def test_a_classifier_that_does_not_fit_ends_the_run_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match="was made for 16x16, but the denoiser draws 8x8"):
        train(guided_run(tmp_path, judge={"image_size": 16}))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_gradient_that_is_not_finite_costs_a_picture_and_not_the_run(tmp_path):
    config = guided_run(tmp_path)
    config["callbacks"]["samples"]["guidance"]["classifier_scale"] = 1e38
    with pytest.warns(UserWarning, match="at step 4: the classifier's gradient is not finite"):
        train(config)
    assert (tmp_path / "run" / "model.safetensors").exists()
