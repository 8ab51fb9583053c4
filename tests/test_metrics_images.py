"""Where the images of a comparison come from: files, folders and data sets read alike, and resizing is stated."""

import zipfile

import numpy as np
import pytest
from metric_cases import random_images, score
from tiny import run, save_tiny

from diffusion.evaluation.features import pixels
from diffusion.evaluation.metrics import Evaluation
from diffusion.evaluation.reference import Reference, of_array, open_images, open_reference
from diffusion.images import save_npz, save_png


def saved(folder, array):
    """The same images as an .npz of guided-diffusion, and as a folder of pictures."""
    save_npz(folder / "samples_elsewhere.npz", array)
    for number, image in enumerate(array):
        save_png(image, folder / "pictures" / f"{number:03d}.png")
    return folder / "samples_elsewhere.npz", folder / "pictures"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_and_a_folder_of_the_same_images_read_alike(channels, tmp_path):
    array = random_images(11, size=6, channels=channels)
    for path in saved(tmp_path, array):
        found = open_images(path)
        assert (found.count, found.shape) == (11, (6, 6, channels))
        for batch_size in (1, 4, 64):
            assert np.array_equal(np.concatenate(list(found.read(batch_size))), array)


def test_guided_diffusions_evaluator_could_read_our_samples(tmp_path, monkeypatch, capsys):
    """It streams arr_0.npy from the zip by the header of .npy version 1 or 2, in C's order."""
    checkpoint = save_tiny(tmp_path / "model.safetensors")
    line = [f"checkpoint={checkpoint}", f"out_dir={tmp_path / 'out'}", "sampler.num_steps=2", "num_samples=5"]
    assert run("sample", line, monkeypatch, capsys)[0] == 0
    with zipfile.ZipFile(tmp_path / "out" / "samples.npz") as file:
        assert file.namelist()[0] == "arr_0.npy"
        with file.open("arr_0.npy") as array:
            assert np.lib.format.read_magic(array) == (1, 0)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(array)
            assert (shape, fortran, dtype) == ((5, 8, 8, 1), False, np.uint8)
            assert len(array.read()) == np.prod(shape)


def test_a_folder_of_sample_py_is_its_samples_and_not_its_grid(tmp_path):
    save_npz(tmp_path / "samples.npz", random_images(3))
    save_png(random_images(1, size=32)[0], tmp_path / "grid.png")
    assert open_images(tmp_path).count == 3


def test_a_data_set_is_read_in_the_levels_of_samples_and_without_mirrors():
    train, val = (open_reference("digits", split=split).images for split in ("train", "val"))
    assert (train.count, val.count, train.shape) == (1200, 597, (8, 8, 1))
    levels = np.unique(next(train.read(100)))
    assert set(levels) <= {round(level * 255 / 16) for level in range(17)} and len(levels) == 17


def test_a_data_set_takes_settings(tmp_path):
    shapes = open_reference("shapes", settings={"image_size": 12, "num_train": 5}).images
    assert (shapes.count, shapes.shape) == (5, (12, 12, 3))
    save_png(random_images(1, size=9, channels=3)[0], tmp_path / "a.png")
    save_png(random_images(1, size=9, channels=3)[0], tmp_path / "b.png")
    folder = open_reference(
        "image_folder", settings={"root": str(tmp_path), "image_size": 8, "val_root": str(tmp_path)}
    )
    assert (folder.images.count, folder.images.shape) == (2, (8, 8, 3))


def test_resizing_makes_every_image_the_same_square_and_is_stated(tmp_path):
    for name, size in (("a", (10, 20)), ("b", (30, 30)), ("c", (8, 8)), ("d", (9, 12))):
        save_png(np.full((*size, 3), 90, np.uint8), tmp_path / f"{name}.png")
    folder = open_images(tmp_path, resize=8)
    assert folder.shape == (8, 8, 3) and (np.concatenate(list(folder.read(3))) == 90).all()
    array = random_images(4, size=16, channels=3)
    large = of_array(array, "large", resize=8)
    assert large.shape == (8, 8, 3) and next(large.read(4)).shape == (4, 8, 8, 3)
    assert np.array_equal(next(of_array(array, "same", resize=16).read(4)), array)
    result = Evaluation(["kid"], pixels(), Reference(source="real", images=large), resize=8)(folder)
    assert "shorter side to 8 by Lanczos" in result["resize"]


def test_grey_images_are_compared_with_colour_ones_as_rgb_and_the_result_says_so():
    grey = random_images(30)
    colour = Reference(source="real", images=of_array(np.repeat(grey, 3, -1), "real"))
    result = Evaluation(["fid"], pixels(), colour)(of_array(grey, "samples"))
    assert abs(score(result, "fid")) < 1e-6 and "grey repeated to RGB: samples" in result["resize"]
