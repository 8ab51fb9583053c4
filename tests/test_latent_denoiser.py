"""Denoisers on latents and with conditioners: what is trained, what is kept, and what one file gives back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_cases import NODE
from safetensors import safe_open
from tiny import DIFFUSION, facts, run
from training_cases import assert_same_outcome, tiny

from diffusion.checkpoint import BUILDABLE, Part, build, load_autoencoder, load_model, save_model, weights_hash
from diffusion.generate import decoded, generate
from diffusion.guidance import ClassifierFreeGuidance, NoGuidance
from diffusion.images import read_text
from diffusion.run_folder import read_status
from diffusion.sampling import Sampler
from diffusion.training.run import train

AUTOENCODER = {**NODE, "scale_factor": 0.7, "shift": 0.1}
NET = {
    "_target_": "diffusion.models.unet.UNet",
    "in_channels": 2,
    "out_channels": 2,
    "channels": 8,
    "norm_groups": 4,
    "num_heads": 2,
    "stages": [{"depth": 1, "attention": "cross"}],
}
TEXT = {
    "_target_": "diffusion.conditioning.TextConditioner",
    "encoder": {
        "_target_": "diffusion.models.text.TextTransformer",
        "vocab_size": 1024,
        "channels": 16,
        "num_layers": 1,
        "num_heads": 2,
        "max_length": 12,
        "activation": "gelu",
    },
}
SHAPES = {
    "_target_": "diffusion.data.shapes.Shapes",
    "image_size": 16,
    "num_train": 32,
    "num_val": 8,
    "batch_size": 8,
}
CLASS_TOKEN = {"_target_": "diffusion.conditioning.ClassConditioner", "num_classes": 10, "channels": 16}
PLAIN_SAMPLER = {"_target_": "diffusion.sampling.Sampler", "num_steps": 2}


def random_autoencoder(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build({**AUTOENCODER, **changes})


def autoencoder_file(path: Path, **changes) -> Path:
    config = {"net": None, "diffusion": None, "autoencoder": {**AUTOENCODER, **changes}}
    about = facts(shape=[changes.get("in_channels", 1), 8, 8], condition_drop=0.0)
    save_model(path, random_autoencoder(**changes), config, weights="raw", step=1, facts=about)
    return path


def latent_run(run_dir, autoencoder: Path, **changes):
    """A run of a few steps on the digits' latents."""
    trained = {"_target_": "diffusion.checkpoint.load_autoencoder", "checkpoint": str(autoencoder)}
    net = {**NET, "num_classes": 10}
    return tiny(run_dir, autoencoder=trained, net=net, callbacks__samples__sampler=PLAIN_SAMPLER, **changes)


def text_run(run_dir, **changes):
    """A run of a few steps on captioned shapes, in pixels."""
    net = {**NET, "in_channels": 3, "out_channels": 3, "context_channels": 16}
    parts = {"data": SHAPES, "net": net, "conditioner": TEXT}
    return tiny(run_dir, **{**parts, "callbacks__samples__sampler": PLAIN_SAMPLER, **changes})


def losses(run_dir):
    lines = (Path(run_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [line.split(",")[column] for line in lines[1:]]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return autoencoder_file(tmp_path_factory.mktemp("autoencoder") / "model.safetensors")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    train(text_run(folder, trainer__max_steps=4))
    return folder / "model.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# autoencoders as files


def test_an_autoencoder_comes_back_from_its_file_frozen_with_its_scale(autoencoder):
    loaded = load_autoencoder(autoencoder)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    assert torch.equal(loaded.encode(x), random_autoencoder().eval().encode(x))
    assert weights_hash(loaded) == weights_hash(random_autoencoder())


def test_the_weights_hash_sees_every_value_every_name_and_nothing_else():
    one, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    assert weights_hash(one) == weights_hash(other)
    with torch.no_grad():
        other.bias[1] = torch.nextafter(other.bias[1], torch.tensor(torch.inf))
    assert weights_hash(one) != weights_hash(other)
    assert weights_hash(one) != weights_hash(torch.nn.Sequential(one))
    assert weights_hash(one) != weights_hash(one.double())


def test_an_autoencoder_is_refused_where_a_denoiser_is_wanted_and_the_reverse(autoencoder, text_model):
    with pytest.raises(ValueError, match="holds an autoencoder, but a denoiser is needed"):
        load_model(autoencoder)
    with pytest.raises(ValueError, match="holds a denoiser, but an autoencoder is needed"):
        load_autoencoder(text_model)


# ---------------------------------------------------------------------------------------------------------------------
# latents


def test_a_latent_denoiser_is_one_file_that_decodes_what_it_draws(autoencoder, tmp_path, monkeypatch, capsys):
    train(latent_run(tmp_path / "run", autoencoder))
    model = load_model(tmp_path / "run" / "model.safetensors")
    assert weights_hash(model.autoencoder) == weights_hash(load_autoencoder(autoencoder))
    assert (model.autoencoder.scale_factor, model.autoencoder.shift) == (0.7, 0.1)
    assert weights_hash(load_autoencoder(tmp_path / "run" / "model.safetensors")) == weights_hash(model.autoencoder)
    arguments = [f"checkpoint={model.path}", "num_samples=3", "sampler.num_steps=2", f"out_dir={tmp_path / 'out'}"]
    status, _, err = run("sample", arguments, monkeypatch, capsys)
    assert status == 0, err
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (3, 8, 8, 1)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 8


def test_sampled_latents_are_decoded_once_by_the_autoencoders_own_scale(autoencoder):
    """Against the loop written out: sample 2x4x4 latents, divide by the scale, decode."""
    net, diffusion = build({**NET, "num_classes": 10}), build(DIFFUSION)
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    loaded = load_autoencoder(autoencoder)
    settings = {"seeds": [4, 5], "labels": [1, 2]}
    sampler = Sampler(num_steps=3, clip=None)
    latents = generate(net, diffusion, sampler, NoGuidance(), shape=(2, 4, 4), **settings)
    settings |= {"shape": (1, 8, 8), "autoencoder": loaded}
    images = generate(net, diffusion, Sampler(num_steps=3), NoGuidance(), **settings)
    unscaled = random_autoencoder(scale_factor=1.0, shift=0.0).eval()
    by_hand = torch.cat([unscaled.decode(z / 0.7 + 0.1) for z in latents.split(1)])
    assert torch.allclose(images, by_hand, atol=1e-6)


def test_latents_may_be_decoded_in_tiles(autoencoder):
    loaded, z = load_autoencoder(autoencoder), torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, tiled = decoded(loaded, z), decoded(loaded, z, tile=8)
    assert torch.allclose(whole, loaded.decode(z), atol=1e-6)
    by_hand = torch.cat([loaded.decode(one, tile=8, overlap=2) for one in z.split(1)])
    assert torch.allclose(tiled, by_hand, atol=1e-6) and not torch.allclose(tiled, whole, atol=1e-6)


def test_latents_that_overflow_half_precision_are_decoded_in_full(autoencoder):
    loaded, z = load_autoencoder(autoencoder), torch.ones(1, 2, 4, 4)
    with torch.no_grad():
        loaded.decoder.conv_in.weight.mul_(1e6)  # beyond float16, and undone by the norm that follows
    with pytest.warns(UserWarning, match="overflowed float16"):
        images = decoded(loaded, z, dtype=torch.float16)
    assert torch.allclose(images, decoded(loaded, z), atol=1e-5)


def test_latents_are_never_clipped(autoencoder):
    loaded, net = load_autoencoder(autoencoder), build({**NET, "num_classes": 10})
    settings = {"shape": (1, 8, 8), "seeds": [0], "labels": [1], "autoencoder": loaded}
    with pytest.raises(ValueError, match=r"sampler\.clip=clip would cut latents off"):
        generate(net, build(DIFFUSION), Sampler(num_steps=2, clip="clip"), NoGuidance(), **settings)


def test_the_autoencoder_is_neither_trained_nor_kept_in_the_checkpoint(autoencoder, tmp_path):
    train(latent_run(tmp_path, autoencoder, trainer__max_steps=3))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(name.startswith(("net.", "timestep_sampler.", "sums")) for name in checkpoint["state_dict"])
    assert weights_hash(load_model(tmp_path / "model.safetensors").autoencoder) == weights_hash(random_autoencoder())


@pytest.mark.slow
def test_a_cached_run_has_the_losses_of_encoding_in_each_step(autoencoder, tmp_path):
    train(latent_run(tmp_path / "fly", autoencoder))
    train(latent_run(tmp_path / "cached", autoencoder, latent_cache=str(tmp_path / "cache")))
    fly, cached = ([float(x) for x in losses(tmp_path / name) if x] for name in ("fly", "cached"))
    assert len(fly) == 7 and cached == pytest.approx(fly, rel=1e-5)


@pytest.mark.slow
def test_a_latent_run_that_is_stopped_and_resumed_ends_with_the_same_bits(autoencoder, tmp_path):
    train(latent_run(tmp_path / "whole", autoencoder))
    train(latent_run(tmp_path / "parts", autoencoder, trainer__max_steps=4))
    train(latent_run(tmp_path / "parts", autoencoder))
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_a_file_that_bundles_nothing_names_its_autoencoder_by_hash(autoencoder, tmp_path):
    train(latent_run(tmp_path / "run", autoencoder, task__bundle=False, trainer__max_steps=1))
    path = tmp_path / "run" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert not any(name.startswith("autoencoder.") for name in file.keys())  # noqa: SIM118
        part = json.loads(file.metadata()["parts"])["autoencoder"]
    assert part["sha256"] == weights_hash(load_autoencoder(autoencoder)) and part["source"] == str(autoencoder)
    assert weights_hash(load_model(path).autoencoder) == part["sha256"]  # its source is still there
    moved = autoencoder_file(tmp_path / "moved.safetensors")
    assert weights_hash(load_model(path, autoencoder=moved).autoencoder) == part["sha256"]


def test_another_autoencoder_than_the_one_trained_with_is_refused(autoencoder, tmp_path):
    train(latent_run(tmp_path / "run", autoencoder, task__bundle=False, trainer__max_steps=1))
    other = random_autoencoder()
    torch.nn.init.zeros_(next(other.parameters()))
    config = {"autoencoder": AUTOENCODER}
    save_model(tmp_path / "other.safetensors", other, config, weights="raw", step=1, facts=facts())
    with pytest.raises(ValueError, match="was trained with the autoencoder of weights"):
        load_model(tmp_path / "run" / "model.safetensors", autoencoder=tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"needs the autoencoder .* autoencoder=FILE"):
        load_model(tmp_path / "run" / "model.safetensors", autoencoder=tmp_path / "lost.safetensors")


def test_an_autoencoder_whose_scale_was_measured_anew_is_refused(autoencoder, tmp_path):
    train(latent_run(tmp_path / "run", autoencoder, task__bundle=False, trainer__max_steps=1))
    anew = autoencoder_file(tmp_path / "anew.safetensors", scale_factor=0.8)
    with pytest.raises(ValueError, match=r"trained with an autoencoder of scale_factor=0\.7"):
        load_model(tmp_path / "run" / "model.safetensors", autoencoder=anew)


def test_settings_of_another_task_are_refused(tmp_path):
    task = {"_target_": "diffusion.training.autoencoder.AutoencoderTask", "condition_drop": 0.1}
    with pytest.raises(ValueError, match=r"AutoencoderTask takes no task\.condition_drop.*experiment="):
        train({**tiny(tmp_path), "task": task})


def test_latents_that_do_not_fit_the_network_are_refused(autoencoder, tmp_path):
    wide = autoencoder_file(tmp_path / "wide.safetensors", latent_channels=3)
    with pytest.raises(ValueError, match=r"latents have 3 channels, so the network needs in_channels=3"):
        train(latent_run(tmp_path / "a", wide))
    deep = {**NET, "num_classes": 10, "stages": [{"depth": 1}] * 4}
    with pytest.raises(ValueError, match=r"latents are 4x4, but the network halves its input to 1/8"):
        train({**latent_run(tmp_path / "b", autoencoder), "net": deep})
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert read_status(folder).state == "failed" and not (folder / "metrics.csv").exists()


def test_an_autoencoder_whose_scale_is_unknown_is_refused_with_the_command_that_measures_it(tmp_path):
    unmeasured = autoencoder_file(tmp_path / "model.safetensors", scale_factor=None)
    with pytest.raises(ValueError, match=r"latent_scale checkpoint="):
        train(latent_run(tmp_path / "run", unmeasured))


def test_a_latent_cache_needs_latents(tmp_path):
    with pytest.raises(ValueError, match="this run learns no latents"):
        train(tiny(tmp_path / "run", latent_cache=str(tmp_path / "cache")))


def test_a_latent_cache_holds_no_images_for_a_conditioner(autoencoder, tmp_path):
    upscale = {"_target_": "diffusion.conditioning.LowResolutionConditioner", "image_size": 8, "factor": 2}
    upscale |= {"channels": 1, "size": 4}
    config = latent_run(tmp_path / "run", autoencoder, conditioner=upscale, latent_cache=str(tmp_path / "cache"))
    config["net"] = {**NET, "num_classes": 10, "in_channels": 3}
    with pytest.raises(ValueError, match="the conditioner reads images, which latent_cache="):
        train(config)


# ---------------------------------------------------------------------------------------------------------------------
# conditioners


def test_a_text_encoder_is_trained_averaged_and_bundled_with_its_network(tmp_path):
    train(text_run(tmp_path, trainer__max_steps=4))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("trained_conditioner.")}
    averages = next(v for k, v in checkpoint["callbacks"].items() if k.startswith("EMA"))["averages"]["0.9"]
    model = load_model(tmp_path / "model.safetensors")
    for name, p in model.conditioner.named_parameters():
        assert torch.equal(p, averages[f"conditioner.{name}"])
        assert not torch.equal(p, trained[f"trained_conditioner.{name}"])  # an average lags behind
    train(text_run(tmp_path / "one", trainer__max_steps=1))
    start = torch.load(tmp_path / "one" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    moved = [name for name in trained if not torch.equal(trained[name], start[name])]
    assert len(moved) == len(trained)


@pytest.mark.slow
def test_a_text_run_that_is_stopped_and_resumed_ends_with_the_same_bits(tmp_path):
    train(text_run(tmp_path / "whole", trainer__max_steps=8))
    train(text_run(tmp_path / "parts", trainer__max_steps=4))
    train(text_run(tmp_path / "parts", trainer__max_steps=8))
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_a_frozen_encoder_stays_as_it_was_and_out_of_the_checkpoint(tmp_path):
    train(text_run(tmp_path, conditioner={**TEXT, "frozen": True}, trainer__max_steps=2))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert not any("conditioner" in name for name in checkpoint["state_dict"])
    assert load_model(tmp_path / "model.safetensors").conditioner.frozen


def sample(model, out, monkeypatch, capsys, *arguments):
    settings = [f"checkpoint={model}", f"out_dir={out}", "num_samples=2", "sampler.num_steps=2", *arguments]
    return run("sample", settings, monkeypatch, capsys)


def test_a_prompt_is_all_that_a_text_model_needs(text_model, tmp_path, monkeypatch, capsys):
    prompt = "a small red star, on a (blue) background"
    status, _, err = sample(text_model, tmp_path / "a", monkeypatch, capsys, f"prompt={prompt}")
    assert status == 0, err
    said = read_text(tmp_path / "a" / "images" / "000001.png")
    assert said["prompt"] == prompt and said["seed"] == 1 and len(said["conditioner_sha256"]) == 64
    other = sample(text_model, tmp_path / "b", monkeypatch, capsys, "prompt=a large blue ring")
    steered = sample(text_model, tmp_path / "c", monkeypatch, capsys, f"prompt={prompt}", "negative_prompt=a ring")
    assert other[0] == steered[0] == 0
    one, two, three = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "abc")
    assert not np.array_equal(one, two) and not np.array_equal(one, three)


def test_prompts_repeat_over_the_samples(text_model, tmp_path, monkeypatch, capsys):
    prompts = 'prompt=["a red star","a blue ring"]'
    status, _, err = sample(text_model, tmp_path / "a", monkeypatch, capsys, prompts, "num_samples=3")
    assert status == 0, err
    told = [read_text(tmp_path / "a" / "images" / f"{i:06d}.png")["prompt"] for i in range(3)]
    assert told == ["a red star", "a blue ring", "a red star"]


def test_an_image_of_a_prompt_does_not_depend_on_its_batch(text_model, tmp_path, monkeypatch, capsys):
    prompts = 'prompt=["a red star","a blue ring"]'
    for name, size in (("a", 16), ("b", 3)):
        sample(text_model, tmp_path / name, monkeypatch, capsys, prompts, "num_samples=7", f"batch_size={size}")
    one, other = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in "ab")
    assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["labels=[3]"], r"labels=\[3\], but this model was not trained with classes; it takes prompt="),
        ([], "this model draws what texts ask for; add prompt="),
        (["prompt=[7]"], "7 is none, quote it"),
        (["prompt=[]"], "the list is empty"),
        (["prompt=a star", "condition_image=x.png"], "not trained with images"),
        (["prompt=a star", "sampler.clip=clap"], "clip must be one of"),
    ],
)
def test_what_a_text_model_cannot_use_is_refused(text_model, tmp_path, monkeypatch, capsys, arguments, message):
    status, _, err = sample(text_model, tmp_path / "out", monkeypatch, capsys, *arguments)
    assert status == 2 and len(err.splitlines()) == 1, err
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


def test_a_prompt_for_a_model_of_classes_is_refused(autoencoder, tmp_path, monkeypatch, capsys):
    train(latent_run(tmp_path / "run", autoencoder, trainer__max_steps=1))
    path = tmp_path / "run" / "model.safetensors"
    status, _, err = sample(path, tmp_path / "out", monkeypatch, capsys, "prompt=a star")
    assert status == 2 and "prompt=a star, but this model was not trained with texts; it takes labels=[3,7]" in err


def test_data_without_captions_cannot_train_a_text_model(tmp_path):
    digits = {"_target_": "diffusion.data.digits.Digits", "batch_size": 200}
    net = {**NET, "in_channels": 1, "out_channels": 1, "context_channels": 16}
    with pytest.raises(ValueError, match="conditioned on `caption`, but the data give only"):
        train(text_run(tmp_path, callbacks__samples=None) | {"data": digits, "net": net})


def test_a_context_of_another_width_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"context of 16 channels, but the network has context_channels=32"):
        train(text_run(tmp_path / "run") | {"net": {**NET, "context_channels": 32}})


def test_labels_may_enter_as_a_context_token(tmp_path, monkeypatch, capsys):
    net = {**NET, "in_channels": 1, "out_channels": 1, "context_channels": 16}
    train(tiny(tmp_path / "run", net=net, conditioner=CLASS_TOKEN, trainer__max_steps=4))
    path = tmp_path / "run" / "model.safetensors"
    status, _, err = sample(path, tmp_path / "out", monkeypatch, capsys, "labels=[3,7]")
    assert status == 0, err
    assert np.load(tmp_path / "out" / "samples.npz")["arr_1"].tolist() == [3, 7]


def test_a_smaller_image_may_enter_as_channels(tmp_path, monkeypatch, capsys):
    upscale = {"_target_": "diffusion.conditioning.LowResolutionConditioner", "image_size": 16, "factor": 4}
    net = {**NET, "in_channels": 6, "out_channels": 3}
    train(text_run(tmp_path / "run", trainer__max_steps=4) | {"conditioner": upscale, "net": net})
    path = tmp_path / "run" / "model.safetensors"
    picture = next((tmp_path / "run" / "samples").glob("*.png"))
    status, _, err = sample(path, tmp_path / "out", monkeypatch, capsys, f"condition_image={picture}")
    assert status == 0, err
    status, _, err = sample(path, tmp_path / "none", monkeypatch, capsys)
    assert status == 2 and "add condition_image=FILE" in err
    status, _, err = sample(path, tmp_path / "lost", monkeypatch, capsys, "condition_image=lost.png")
    assert status == 2 and "lost.png" in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# guidance between texts


def test_guidance_of_one_is_the_text_alone_and_a_negative_text_replaces_the_empty_one(text_model):
    model = load_model(text_model)
    settings = {
        "shape": (3, 16, 16),
        "seeds": [0, 1],
        "inputs": {"caption": ["a red star", "a blue ring"]},
        "conditioner": model.conditioner,
    }
    draw = lambda guidance, **more: generate(  # noqa: E731
        model.net, model.diffusion, Sampler(num_steps=2), guidance, **settings, **more
    )
    plain = draw(NoGuidance())
    assert torch.allclose(draw(ClassifierFreeGuidance(1.0)), plain, atol=1e-5)
    empty = {"caption": ["", ""]}
    assert torch.equal(draw(ClassifierFreeGuidance(3.0), negative=empty), draw(ClassifierFreeGuidance(3.0)))
    same = draw(ClassifierFreeGuidance(3.0), negative=settings["inputs"])  # nothing to move away from
    assert torch.allclose(same, plain, atol=1e-5)


def test_parts_are_named_in_the_header_with_their_hash(tmp_path):
    net, conditioner = build({**NET, "context_channels": 16}), build(TEXT)
    config = {"net": {**NET, "context_channels": 16}, "diffusion": DIFFUSION}
    part = Part(module=conditioner, config=TEXT)
    about = facts(num_classes=None, class_names=None)
    save_model(tmp_path / "m.safetensors", net, config, weights="raw", step=0, facts=about, parts={"conditioner": part})
    model = load_model(tmp_path / "m.safetensors")
    assert model.parts["conditioner"]["sha256"] == weights_hash(conditioner) == weights_hash(model.conditioner)
    assert TEXT["_target_"] in BUILDABLE
