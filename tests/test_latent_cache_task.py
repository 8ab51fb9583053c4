"""`task=cache_latents` and `data=latents`: what is written, proved to be right, trained from, and refused."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from latent_cases import Mirrored, assert_same_batches, autoencoder
from shard_cases import data_of, shards_of
from test_latent_cache import losses, saved
from training_cases import TinyNet, tiny

from diffusion import latent_facts
from diffusion.cli import composed
from diffusion.conditioning import ClassConditioner, TextConditioner
from diffusion.data import latent_build
from diffusion.data.digits import Digits
from diffusion.data.latent_cache import cached
from diffusion.data.latents import Latents
from diffusion.data.shapes import Shapes
from diffusion.draws import SampleDraws
from diffusion.models.text import TextTransformer
from diffusion.stored_condition import PREFIX, condition_on, stored_entries, why_not_stored
from diffusion.training import cached_latents
from diffusion.training.cached_latents import cache_latents, check, with_cache
from diffusion.training.metrics import read_rows
from diffusion.training.run import build_seeded, build_task, train

SHAPES = {"_target_": "diffusion.data.shapes.Shapes", "image_size": 8, "num_train": 60, "num_val": 12, "batch_size": 8}
TEXT = {
    "_target_": "diffusion.conditioning.TextConditioner",
    "encoder": {
        "_target_": "diffusion.models.text.TextTransformer",
        "vocab_size": 512,
        "channels": 8,
        "num_layers": 2,
        "num_heads": 2,
        "max_length": 10,
    },
    "pooled": True,
    "masked": True,
    "frozen": True,
}


class Told(TinyNet):
    """A network that hears the context's mean and the vector."""

    def __init__(self) -> None:
        super().__init__(num_classes=None)
        self.first = torch.nn.Conv2d(2, 8, 3, padding=1)
        self.last = torch.nn.Conv2d(8, 2, 3, padding=1)
        self.told = torch.nn.Linear(16, 8)
        self.context_channels = self.vector_channels = 8

    def forward(self, x, t, *, context, vector, context_mask):
        seen = (context * context_mask[..., None]).mean(1)
        bias = self.time(t[:, None] / 50) + self.told(torch.cat([seen, vector], 1))
        return self.last(self.dropout(torch.tanh(self.first(x) + bias[:, :, None, None])))


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Speeds are told, not measured, here."""
    monkeypatch.setattr(cached_latents, "SECONDS_TIMED", 0.02)


@pytest.fixture
def file(tmp_path):
    """A saved autoencoder of grey images with a scale."""
    return saved(
        tmp_path / "model.safetensors",
        autoencoder(in_channels=1, latent_channels=1),
        latent_channels=1,
        scale_factor=2.0,
    )


def config_of(run_dir, file, **changes):
    config = tiny(run_dir, callbacks__samples=None, **changes)
    config["autoencoder"] = {"_target_": "diffusion.checkpoint.load_autoencoder", "checkpoint": str(file)}
    return config


def text_config(run_dir, file, **changes):
    """A run that is told captions of shapes by a frozen text encoder."""
    config = config_of(run_dir, file, data=dict(SHAPES), net={"_target_": "test_latent_cache_task.Told"}, **changes)
    return config | {"conditioner": dict(TEXT)}


def filled(config, folder):
    """Run `task=cache_latents` for the run of a config."""
    config = {**config, "task": {"_target_": cached_latents.CACHE_LATENTS}, "latents_dir": str(folder)}
    return cache_latents(config, lambda name: build_seeded(config[name], config["seed"], name))


def text_file(tmp_path):
    about = {"in_channels": 3, "out_channels": 3}
    model = autoencoder(in_channels=3)
    return saved(tmp_path / "rgb.safetensors", model, **about, scale_factor=1.5)


# -- the same training -------------------------------------------------------------------------------------------------


def test_training_from_latents_alone_has_the_losses_of_encoding_on_the_fly(tmp_path, file, capsys):
    train(config_of(tmp_path / "plain", file))
    config = config_of(tmp_path / "run", file)
    train(config | {"task": {"_target_": cached_latents.CACHE_LATENTS}, "latents_dir": str(tmp_path / "cache")})
    said = capsys.readouterr().out
    assert f"{tmp_path}/cache holds the latents of 1200 + 597 images, 0.2" in said
    difference = re.search(r"encoded again: .*largest difference (\S+)\n", said)
    assert float(difference[1]) < 1e-5
    told = re.search(r"on the fly (\S+) images/s from the cache (\S+) images/s: (\S+) times", said.replace(",", ""))
    slow, fast, times = map(float, told.groups())
    assert times == pytest.approx(fast / slow, abs=0.1) and times > 1
    assert not (tmp_path / "run").exists()  # nothing was trained
    config["data"] = {"_target_": "diffusion.data.latents.Latents", "root": str(tmp_path / "cache"), "batch_size": 200}
    train(config)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert "index" not in read_rows(tmp_path / "run" / "metrics.csv")[0]


def test_text_embeddings_are_cached_and_give_the_same_losses(tmp_path, capsys):
    file = text_file(tmp_path)
    train(text_config(tmp_path / "plain", file))
    filled(text_config(tmp_path / "x", file), tmp_path / "cache")
    assert "holds the latents and text embeddings of 60 + 12 images" in capsys.readouterr().out
    config = text_config(tmp_path / "run", file)
    config["data"] = {"_target_": "diffusion.data.latents.Latents", "root": str(tmp_path / "cache"), "batch_size": 8}
    train(config)
    automatic = text_config(tmp_path / "auto", file, latent_cache=str(tmp_path / "cache"))
    train(automatic)
    plain = losses(tmp_path / "plain")
    assert len(plain) > 10
    for name in ("run", "auto"):
        assert losses(tmp_path / name) == pytest.approx(plain, rel=1e-4)


def test_stored_conditions_are_those_that_are_encoded_now_dropped_rows_included():
    text = build_seeded(TEXT, 0, "conditioner")
    batch = {"caption": ["a red circle", "", "two words"]}
    stored = stored_entries(text, batch)
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        f"{PREFIX}context": (3, 10, 8),
        f"{PREFIX}vector": (3, 8),
        f"{PREFIX}context_mask": (3, 10),
    }
    draws = SampleDraws(0, range(3))
    for drop in (None, torch.tensor([True, False, True])):
        now, then = (condition_on(text, each, draws, drop) for each in (batch, batch | stored))
        assert now.keys() == then.keys()
        for name, value in now.items():
            torch.testing.assert_close(then[name], value)
    text.encoder.forward = None
    condition_on(text, batch | stored, draws, torch.tensor([True, False, True]))  # the encoder is not asked again


def test_latents_are_served_with_mirrors_in_the_order_of_the_images(tmp_path):
    model = autoencoder()
    cached(Mirrored(seed=3), model, tmp_path)
    data = Latents(tmp_path, seed=3, batch_size=4)
    assert (data.shape, data.num_classes) == ((3, 8, 8), 10)
    ours, theirs = data.train_dataloader(), Mirrored(seed=3).train_dataloader()
    for _ in range(2):
        assert_same_batches(ours, theirs, model)
    assert_same_batches(data.val_dataloader(), Mirrored(seed=3).val_dataloader(), model)
    assert data.fingerprint() == Latents(tmp_path, seed=4).fingerprint()


@pytest.mark.parametrize("rows", [1, 7, 10, 30, 31])
def test_shards_of_any_size_hold_the_same(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(latent_build, "SHARD_BYTES", rows * 2 * 4 * 4 * 4 * 4)
    model = autoencoder()
    data = cached(Mirrored(), model, tmp_path, batch_size=4)
    assert len(list(tmp_path.glob("train-*.moments.npy"))) == -(-30 // rows)
    assert_same_batches(data.train_dataloader(), Mirrored().train_dataloader(), model)
    shapes = cached(Shapes(image_size=8, num_train=9, num_val=2, batch_size=2), model, tmp_path / "captions")
    assert_same_batches(
        shapes.train_dataloader(),
        Shapes(image_size=8, num_train=9, num_val=2, batch_size=2).train_dataloader(),
        model,
    )


def test_packed_shards_can_be_encoded_too(tmp_path):
    shards_of(tmp_path / "shards", 30)
    model = autoencoder()
    how = {"image_size": 8, "num_classes": 3}
    data = cached(data_of(tmp_path / "shards", **how), model, tmp_path / "cache")
    assert_same_batches(data.train_dataloader(), data_of(tmp_path / "shards", **how).train_dataloader(), model)
    stream = data_of(tmp_path / "shards", **how, reading="stream", samples_per_epoch=10)
    with pytest.raises(ValueError, match=r"shards that are read as a stream cannot be cached"):
        cached(stream, model, tmp_path / "other")


# -- the proof ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["moments", "condition.context", "condition.vector"])
def test_a_cache_that_is_not_what_is_encoded_now_is_an_error(tmp_path, entry):
    model, text = autoencoder(), build_seeded(TEXT, 0, "conditioner")
    settings = {name: value for name, value in SHAPES.items() if name != "_target_"}
    data = cached(Shapes(**settings), model, tmp_path, conditioner=text)
    assert check(data, model, text) < 1e-5
    path = tmp_path / f"train-00000.{entry}.npy"
    raw = bytearray(path.read_bytes())
    row = (len(raw) - 128) // 60
    raw[128 + 7 * row : 128 + 7 * row + 4] = b"\0\0\x80\x3f"  # 1.0
    path.write_bytes(raw)
    data = cached(Shapes(**settings), model, tmp_path, conditioner=text)
    with pytest.raises(
        ValueError, match=rf"{re.escape(entry)} of sample 7 of the train set differs by .*allowed: 0.001"
    ):
        check(data, model, text)


def test_float16_is_within_its_tolerance(tmp_path):
    model = autoencoder()
    assert 1e-6 < check(cached(Mirrored(), model, tmp_path, dtype="float16"), model, None) < 5e-3


# -- what is refused ---------------------------------------------------------------------------------------------------


def latents_config(run_dir, file, cache):
    return config_of(run_dir, file) | {
        "data": {"_target_": "diffusion.data.latents.Latents", "root": str(cache), "batch_size": 8}
    }


def test_latents_of_another_autoencoder_are_refused(tmp_path, file):
    filled(config_of(tmp_path / "x", file), tmp_path / "cache")
    other = saved(
        tmp_path / "other.safetensors",
        autoencoder(in_channels=1, latent_channels=1, seed=1),
        latent_channels=1,
        scale_factor=2.0,
    )
    config = latents_config(tmp_path / "run", other, tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"autoencoder\.weights was [0-9a-f]{12} and is [0-9a-f]{12}\. Write others: tas"
    ):
        with_cache(build_seeded(config["data"], 0, "data"), build_task(config), config)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"layer": "penultimate"}, "settings"), ({"seed": 1}, "weights"), ({"clip_skip": 2}, "settings")],
)
def test_embeddings_of_another_text_encoder_are_refused(tmp_path, change, named):
    file = text_file(tmp_path)
    filled(text_config(tmp_path / "x", file), tmp_path / "cache")
    seed = change.pop("seed", 0)
    latents = {"_target_": "diffusion.data.latents.Latents", "root": str(tmp_path / "cache")}
    for key, value in (("data", latents), ("latent_cache", str(tmp_path / "cache"))):
        config = text_config(tmp_path / "run", file) | {"seed": seed}
        config["conditioner"] |= change
        config[key] = value
        with pytest.raises(ValueError, match=rf"conditioner\.{named} was [0-9a-f]{{12}} and is"):
            with_cache(build_seeded(config["data"], 0, "data"), build_task(config), config)


def test_the_scale_of_latents_is_the_runs_and_no_part_of_a_cache(tmp_path, file):
    filled(config_of(tmp_path / "x", file), tmp_path / "cache")
    other = saved(
        tmp_path / "other.safetensors",
        autoencoder(in_channels=1, latent_channels=1),
        latent_channels=1,
        scale_factor=0.5,
    )
    config = latents_config(tmp_path / "run", other, tmp_path / "cache")
    task = build_task(config)
    data = with_cache(build_seeded(config["data"], 0, "data"), task, config)
    batch = next(iter(data.val_dataloader()))
    images = Digits(batch_size=8)
    mean = autoencoder(in_channels=1, latent_channels=1).moments(next(iter(images.val_dataloader()))["image"]).mean
    torch.testing.assert_close(task.autoencoder.normalise(batch["moments"].chunk(2, 1)[0]), mean * 0.5)


def test_a_run_without_use_for_them_does_not_read_embeddings_or_labels(tmp_path):
    settings = {name: value for name, value in SHAPES.items() if name != "_target_"}
    model = autoencoder()
    cached(Shapes(**settings), model, tmp_path, conditioner=build_seeded(TEXT, 0, "conditioner"))
    data = Latents(tmp_path, batch_size=4)
    data.check(model, None)
    assert set(next(iter(data.train_dataloader()))) == {"moments", "label", "caption", "index"}
    data = Latents(tmp_path, batch_size=4, num_classes=None)
    data.check(model, None)
    assert "label" not in next(iter(data.train_dataloader())) and data.num_classes is None


def test_conditioners_that_cannot_be_stored_are_named():
    def text(**settings):
        return TextConditioner(
            TextTransformer(vocab_size=64, channels=8, num_layers=1, num_heads=1, max_length=8), **settings
        )

    assert why_not_stored(text(frozen=True)) is None
    assert why_not_stored(text()) == "it is trained along"
    assert "several lengths" in why_not_stored(text(frozen=True, long_prompt="chunk"))
    assert "it reads label" in why_not_stored(ClassConditioner(3).requires_grad_(False))


def test_trained_text_is_kept_as_captions(tmp_path, capsys):
    config = text_config(tmp_path / "x", text_file(tmp_path))
    config["conditioner"] |= {"frozen": False}
    filled(config, tmp_path / "cache")
    assert "captions are kept as texts, not encoded: of the conditioner, it is trained along" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert "train-00000.caption.txt" in names and not any("condition" in name for name in names)


def test_folders_without_latents_are_refused(tmp_path, file):
    with pytest.raises(ValueError, match=r"holds no latents; write some: uv run train\.py task=cache_latents .*none"):
        Latents(tmp_path / "none")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no complete latents; run task=cache_latents again"):
        Latents(tmp_path / "begun")
    filled(config_of(tmp_path / "x", file), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"data\.image_size was 8 and is 16; leave them out, or write others"):
        Latents(tmp_path / "cache", image_size=16)
    Latents(tmp_path / "cache", image_size=8, num_train=7, horizontal_flip=True)  # nothing that the cache knows of
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    with pytest.raises(ValueError, match=r"has format 1, this package reads 2"):
        Latents(tmp_path / "cache")


def test_runs_without_latents_are_refused(tmp_path, file):
    filled(config_of(tmp_path / "x", file), tmp_path / "cache")
    pixels = latents_config(tmp_path / "run", file, tmp_path / "cache") | {"autoencoder": None}
    with pytest.raises(ValueError, match=r"data=latents, but this run learns no latents; choose data with images, or"):
        with_cache(build_seeded(pixels["data"], 0, "data"), build_task(pixels), pixels)
    with pytest.raises(ValueError, match=r"this run has no autoencoder; choose one"):
        filled(tiny(tmp_path / "run", autoencoder=None), tmp_path / "other")
    with pytest.raises(ValueError, match=r"data=latents are latents already"):
        filled(latents_config(tmp_path / "run", file, tmp_path / "cache"), tmp_path / "other")
    both = latents_config(tmp_path / "run", file, tmp_path / "cache") | {"latent_cache": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"data=latents reads latents from data\.root; leave latent_cache out"):
        with_cache(build_seeded(both["data"], 0, "data"), build_task(both), both)


# -- the commands ------------------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run train.py in this process; return exit status, stdout, stderr."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import train as script

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.setattr("warnings.formatwarning", None, raising=False)
    status = 0
    try:
        script.main()
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_fills_the_folder_that_training_reads(tmp_path, monkeypatch, capsys):
    file = saved(tmp_path / "model.safetensors", autoencoder(in_channels=1))
    chosen = ["task=cache_latents", "experiment=digits_latent", f"autoencoder.checkpoint={file}"]
    status, out, err = command(monkeypatch, capsys, *chosen, f"latents_dir={tmp_path}/cache")
    assert status == 0 and f"{tmp_path}/cache holds the latents of 1200 + 597 images, 0.48 MB" in out, err
    assert "encoded 1797/1797 images  " in err and "images/s" in err
    status, out, err = command(monkeypatch, capsys, *chosen, f"latents_dir={tmp_path}/cache")
    assert "encoded again: " in out and "encoded 1797" not in err  # complete: only checked
    _, out, _ = command(monkeypatch, capsys, *chosen, f"latents_dir={tmp_path}/half", "latent_dtype=float16")
    assert "0.25 MB" in out
    status, _, err = command(
        monkeypatch,
        capsys,
        "task=cache_latents",
        "autoencoder=trained",
        f"autoencoder.checkpoint={file}",
        f"latents_dir={tmp_path}/cache",
        "data=shapes",
        "data.num_train=9",
        "data.num_val=2",
    )
    assert status == 2 and "data.shape was [1, 8, 8] and is [3, 32, 32]" in err and len(err.splitlines()) == 1


def test_configs_take_shape_and_classes_from_the_folder(tmp_path, file):
    filled(config_of(tmp_path / "x", file), tmp_path / "cache")
    words = ["experiment=digits_latent", "autoencoder.checkpoint=x", "data=latents"]
    config = composed("train", [*words, f"data.root={tmp_path}/cache"])
    assert (config["data"]["channels"], config["data"]["image_size"], config["net"]["num_classes"]) == (1, 8, 10)
    assert composed("train", [*words, f"data.root={tmp_path}/none"])["net"]["num_classes"] is None
    assert composed("train", words)["data"]["root"] == "???"
    assert latent_facts.facts(tmp_path) == {}
