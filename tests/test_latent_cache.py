"""The latent cache: the same training data as encoding in each step, kept on disk, never stale and never half full."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_cases import NODE, Mirrored, assert_same_batches, autoencoder
from PIL import Image
from torch import nn
from training_cases import tiny

from diffusion.checkpoint import save_model
from diffusion.data.base import ImageData
from diffusion.data.batches import EpochBatches
from diffusion.data.image_folder import ImageFolder
from diffusion.data.images import TensorImages
from diffusion.data.latent_cache import LatentSet, cached
from diffusion.data.shapes import Shapes
from diffusion.data.table import TEXT, Column, Table, TableWriter
from diffusion.latents import NO_NOISE, encode_moments
from diffusion.models.conv_vae import ConvVAE
from diffusion.models.vq import VQAutoencoder
from diffusion.training.metrics import read_rows
from diffusion.training.run import train

# -- the same training data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "settings"),
    [(Mirrored, {}), (Mirrored, {"num_workers": 2}), (Shapes, {"image_size": 8, "num_train": 20, "num_val": 5})],
)
def test_a_cache_gives_the_batches_of_the_images_over_two_epochs(tmp_path, make, settings):
    settings = {"batch_size": 4, "seed": 3, **settings}
    model = autoencoder()
    plain, data = make(**settings), cached(make(**settings), model, tmp_path, batch_size=7)
    assert (data.shape, data.num_classes, data.class_names) == (plain.shape, plain.num_classes, plain.class_names)
    ours, theirs = data.train_dataloader(), plain.train_dataloader()
    for _ in range(2):
        assert_same_batches(ours, theirs, model)
    assert_same_batches(data.val_dataloader(), plain.val_dataloader(), model)


def test_some_samples_are_mirrored_and_some_are_not(tmp_path):
    """What the test above would not see if the mirrors of an image looked like it."""
    model = autoencoder()
    data = cached(Mirrored(), model, tmp_path)
    plain = encode_moments(model, data.train_set.samples(list(range(30)))["image"])
    epochs = [next(iter(_epoch(data, epoch))) for epoch in range(2)]
    same = torch.cat([(batch["moments"] - plain[batch["index"]]).abs().amax((1, 2, 3)) < 1e-6 for batch in epochs])
    assert 0 < same.sum() < len(same)


def _epoch(data: ImageData, epoch: int):
    loader = data.train_dataloader()
    loader.start(epoch)
    return loader


def test_one_cache_serves_every_seed_of_the_same_images(tmp_path):
    model = autoencoder()
    cached(Mirrored(seed=1), model, tmp_path)
    data = cached(Mirrored(seed=2), model, tmp_path)
    assert_same_batches(data.train_dataloader(), Mirrored(seed=2).train_dataloader(), model)


def test_captions_of_any_length_and_script_come_back(tmp_path):
    captions = ["", "ein blauer Kreis", "圆", "", "lone \ud800 surrogate", "x" * 1000]
    for i, _ in enumerate(captions):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "caption": text}) for i, text in enumerate(captions)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    make = {"image_size": 8, "val_fraction": 0.2, "batch_size": 1}
    model, cache = autoencoder(), tmp_path / "cache"
    data = cached(ImageFolder(tmp_path, **make), model, cache, batch_size=2)
    assert_same_batches(data.train_dataloader(), ImageFolder(tmp_path, **make).train_dataloader(), model)
    assert_same_batches(data.val_dataloader(), ImageFolder(tmp_path, **make).val_dataloader(), model)


def test_images_are_not_read_again(tmp_path, monkeypatch):
    model = autoencoder()
    cached(Mirrored(), model, tmp_path)

    def refuse(*args):
        raise AssertionError("an image was read")

    data = cached(Mirrored(), model, tmp_path)
    monkeypatch.setattr(TensorImages, "load", refuse)
    monkeypatch.setattr(model, "moments", refuse)
    assert sum(len(batch["index"]) for batch in data.train_dataloader()) == 28


def test_training_goes_on_in_mid_epoch_with_or_without_the_cache(tmp_path):
    model = autoencoder()
    broken = Mirrored()
    batches = iter(broken.train_dataloader())
    seen = [next(batches)["index"].tolist() for _ in range(3)]
    data = cached(Mirrored(), model, tmp_path)
    data.load_state_dict(broken.state_dict())
    rest = list(data.train_dataloader())
    whole = EpochBatches(30, 4)
    assert seen + [batch["index"].tolist() for batch in rest] == [whole.batch(0, number) for number in range(7)]
    assert data.state_dict()["num_samples"] == 30


def test_a_rank_takes_its_share(tmp_path):
    data = cached(Mirrored(), autoencoder(), tmp_path)
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, overfit_batches=0.0)
    assert next(iter(data.train_dataloader()))["index"].tolist() == EpochBatches(30, 8).batch(0, 0)[4:]


def test_samples_that_are_fewer_than_the_images_cannot_stand_for_them(tmp_path):
    data = Mirrored()
    data.setup()
    with pytest.raises(ValueError, match="7 samples cannot stand for the 30 images of the train set"):
        data.serve(train=data.val_set, val=data.val_set)


def saved(path: Path, model: nn.Module, **settings) -> Path:
    about = {"shape": [1, 8, 8], "num_classes": None, "class_names": None, "condition_drop": 0.0}
    save_model(path, model, {"autoencoder": {**NODE, **settings}}, weights="raw", step=1, facts=about)
    return path


def losses(run_dir: Path) -> list[float]:
    rows, columns = read_rows(run_dir / "metrics.csv"), ("train/loss", "val/loss", "val/loss_ema")
    return [float(row[name]) for row in rows for name in columns if row.get(name)]


def test_a_run_with_a_cache_has_the_losses_of_one_without_and_may_change_over_in_mid_epoch(tmp_path):
    model = autoencoder(in_channels=1, latent_channels=1)
    file = saved(tmp_path / "model.safetensors", model, latent_channels=1, scale_factor=2.0)

    def run(name: str, **changes) -> list[float]:
        config = tiny(tmp_path / name, callbacks__samples=None, **changes)
        config["autoencoder"] = {"_target_": "diffusion.checkpoint.load_autoencoder", "checkpoint": str(file)}
        train(config)
        return losses(tmp_path / name)

    plain = run("plain")
    assert len(plain) > 10
    assert run("cached", latent_cache=str(tmp_path / "cache")) == pytest.approx(plain, rel=1e-5)
    run("mixed", trainer__max_steps=8)
    assert run("mixed", latent_cache=str(tmp_path / "cache")) == pytest.approx(plain, rel=1e-5)


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_the_files_can_be_mapped_by_anybody(tmp_path):
    model = autoencoder()
    data = cached(Mirrored(), model, tmp_path)
    stored = np.load(tmp_path / "train-00000.moments.npy", mmap_mode="r")
    assert stored.shape == (30, 2, 4, 4, 4) and stored.dtype == np.float32  # images, sides, 2C, h, w
    images = data.train_set.samples(list(range(30)))["image"]
    for side, view in enumerate((images, images.flip(-1))):
        torch.testing.assert_close(torch.from_numpy(stored[:, side].copy()), encode_moments(model, view))
    assert np.load(tmp_path / "train-00000.label.npy").tolist() == data.train_set.labels.tolist()
    assert np.load(tmp_path / "val-00000.moments.npy").shape == (7, 1, 4, 4, 4)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 30, "val": 7} and manifest["dtype"] == "float32"
    assert not (tmp_path / "progress.json").exists()


def test_float16_halves_the_size_and_rounds(tmp_path):
    model = autoencoder()
    cached(Mirrored(), model, tmp_path / "wide")
    data = cached(Mirrored(), model, tmp_path / "narrow", dtype="float16")
    wide, narrow = (np.load(tmp_path / name / "train-00000.moments.npy", mmap_mode="r") for name in ("wide", "narrow"))
    assert narrow.nbytes == wide.nbytes / 2
    assert_same_batches(data.train_dataloader(), Mirrored().train_dataloader(), model, atol=2e-3)
    cached(Mirrored(), model, tmp_path / "narrow", dtype="float32")  # what is there serves, however it was stored


def test_latents_that_cannot_be_stored_are_refused(tmp_path):
    model = autoencoder()
    moments = model.moments
    model.moments = lambda x: moments(x)._replace(mean=torch.full((len(x), 2, 4, 4), 1e5))
    with pytest.raises(ValueError, match="too large for float16; build the cache in float32"):
        cached(Mirrored(), model, tmp_path / "one", dtype="float16")
    model.moments = lambda x: moments(x * torch.nan)
    with pytest.raises(ValueError, match="not finite; it cannot be used for training"):
        cached(Mirrored(), model, tmp_path / "two")
    with pytest.raises(ValueError, match="float32 or float16, not as 'int8'"):
        cached(Mirrored(), model, tmp_path / "three", dtype="int8")
    assert not list(tmp_path.glob("*/manifest.json"))


@pytest.mark.parametrize("scale_factor", [None, 0.2])
def test_a_vq_autoencoder_gives_its_latents_before_quantising_and_no_noise(tmp_path, scale_factor):
    model = autoencoder(VQAutoencoder, num_codes=16, scale_factor=scale_factor)
    data = cached(Mirrored(flip=False), model, tmp_path)
    assert np.load(tmp_path / "train-00000.moments.npy").shape == (30, 1, 2, 4, 4)  # no log-variances on the disk
    batch, plain = (next(iter(each.train_dataloader())) for each in (data, Mirrored(flip=False)))
    mean, logvar = batch["moments"].chunk(2, dim=1)
    torch.testing.assert_close(model.normalise(mean), model.encode(plain["image"]))
    assert (logvar == NO_NOISE).all()


def test_vector_latents_are_kept_too(tmp_path):
    model = autoencoder(ConvVAE, image_size=8, latent_channels=5, channels=4)
    data = cached(Mirrored(), model, tmp_path)
    assert_same_batches(data.train_dataloader(), Mirrored().train_dataloader(), model)


def test_the_scale_factor_is_not_part_of_a_cache(tmp_path):
    cached(Mirrored(), autoencoder(), tmp_path)
    model = autoencoder(scale_factor=[0.5, 2.0], shift=0.3)
    assert_same_batches(
        cached(Mirrored(), model, tmp_path).val_dataloader(), Mirrored().val_dataloader(), autoencoder()
    )


# -- encoding ----------------------------------------------------------------------------------------------------------


def test_encoding_is_in_eval_mode_and_leaves_the_mode_alone():
    model = autoencoder(dropout=0.5)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    expected = encode_moments(model, images)
    model.train().requires_grad_(True)
    moments = encode_moments(model, images)
    assert torch.equal(moments, expected) and model.training and not moments.requires_grad
    mean, logvar = model.eval().moments(images)
    assert torch.equal(moments, torch.cat([mean, logvar], 1))


def test_half_precision_is_close_and_an_overflow_is_encoded_in_float32():
    model = autoencoder()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    exact = encode_moments(model, images)
    half = encode_moments(model, images, torch.bfloat16)
    assert not torch.equal(half, exact) and half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)
    moments, asked = model.moments, []

    def overflowing(x):
        asked.append(torch.is_autocast_enabled("cpu"))
        found = moments(x)
        return found._replace(mean=found.mean / 0) if asked[-1] else found

    model.moments = overflowing
    assert torch.equal(encode_moments(model, images, torch.bfloat16), exact)
    assert asked == [True, False]


def test_a_trainer_in_half_precision_does_not_reach_into_encoding():
    model = autoencoder()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    exact = encode_moments(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode_moments(model, images), exact)


@pytest.mark.gpu
def test_a_gpu_encodes_in_half_precision_what_a_cpu_encodes(tmp_path):
    model = autoencoder()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    exact = encode_moments(model, images)
    half = encode_moments(model.cuda(), images.cuda())
    assert half.dtype == torch.float32 and not torch.equal(half.cpu(), exact)
    torch.testing.assert_close(half.cpu(), exact, atol=1e-2, rtol=1e-2)
    data = cached(Mirrored(), model.cpu(), tmp_path, device="cuda")
    assert next(model.parameters()).device.type == "cpu"
    assert_same_batches(data.train_dataloader(), Mirrored().train_dataloader(), model, atol=1e-2)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_table_is_the_same_whenever_its_writer_was_stopped(tmp_path):
    columns = {"point": Column("float32", (2,)), "name": Column(TEXT), "flag": Column("bool")}
    points, names = np.arange(20, dtype=np.float32).reshape(10, 2), [chr(945 + i) * i for i in range(10)]
    flags = np.arange(10) % 3 == 0
    for cut in range(11):
        writer = TableWriter(tmp_path, "t", 10, columns)
        if cut:
            writer.append({"point": points[:cut], "name": names[:cut], "flag": flags[:cut]})
        writer.sync()
        writer.close()
        keep = max(0, cut - 1)  # one row more was written than is taken for safe
        writer = TableWriter(tmp_path, "t", 10, columns, done=keep)
        writer.append({"point": points[keep:], "name": names[keep:], "flag": flags[keep:]})
        writer.close()
        table = pickle.loads(pickle.dumps(Table(tmp_path, "t", 10, columns)))
        table.check()
        rows = [9, 0, 4, 4]
        assert np.array_equal(table.array("point")[rows], points[rows])
        assert table.texts("name", rows) == [names[row] for row in rows]
        assert np.array_equal(table.array("flag"), flags)


def test_rows_that_do_not_fit_a_table_are_refused(tmp_path):
    writer = TableWriter(tmp_path, "t", 4, {"a": Column("int64", (2,))})
    with pytest.raises(ValueError, match=r"rows of \['b'\] do not fit a table of \['a'\]"):
        writer.append({"b": np.zeros((1, 2))})
    with pytest.raises(ValueError, match=r"rows of \(3,\), 1 of them, do not fit"):
        writer.append({"a": np.zeros((1, 3))})
    writer.close()
    with pytest.raises(ValueError, match=r"t\.a\.npy has lost rows"):
        TableWriter(tmp_path, "t", 4, {"a": Column("int64", (2,))}, done=1)


def test_a_worker_maps_the_files_itself(tmp_path):
    data = cached(Mirrored(), autoencoder(), tmp_path)
    served = data.train_dataloader().dataset
    assert isinstance(served, LatentSet) and len(pickle.dumps(served)) < 2000
    other = pickle.loads(pickle.dumps(served))
    assert torch.equal(other[3]["moments"], served[3]["moments"])
