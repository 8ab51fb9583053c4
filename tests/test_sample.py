"""sample.py writes what it says, and an image depends on its own seed and label alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import facts, names_in, run, save_tiny

from diffusion.checkpoint import load_model
from diffusion.generate import batches, choose_labels, guidance_for, padded
from diffusion.guidance import ClassifierFreeGuidance, NoGuidance
from diffusion.images import grid, label_layout, read_text, save_npz, save_png, to_uint8
from diffusion.sampling import Sampler


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "model.safetensors")


def sample(checkpoint, out_dir, monkeypatch, capsys, *arguments):
    line = [f"checkpoint={checkpoint}", f"out_dir={out_dir}", "sampler.num_steps=3", *arguments]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 0, err
    return np.load(out_dir / "samples.npz"), err


def test_the_folder_holds_what_the_design_says(checkpoint, tmp_path, monkeypatch, capsys):
    saved, _ = sample(checkpoint, tmp_path / "out", monkeypatch, capsys, "num_samples=12", "seed=5")
    assert saved["arr_0"].shape == (12, 8, 8, 1) and saved["arr_0"].dtype == np.uint8
    assert saved["arr_1"].tolist() == [*range(10), 0, 1] and saved["arr_1"].dtype == np.int64
    names = names_in(tmp_path / "out")
    assert names == ["config.yaml", "grid.png", "images", "record.yaml", "samples.npz"]
    pictures = sorted((tmp_path / "out" / "images").iterdir())
    assert [path.name for path in pictures] == [f"{i:06d}.png" for i in range(12)]
    assert np.array_equal(np.asarray(Image.open(pictures[11])), saved["arr_0"][11, :, :, 0])
    assert Image.open(tmp_path / "out" / "grid.png").width >= 4 * 64


def test_a_picture_says_everything_that_made_it(checkpoint, tmp_path, monkeypatch, capsys):
    sample(checkpoint, tmp_path / "out", monkeypatch, capsys, "num_samples=3", "seed=5", "labels=[3,7]")
    text = read_text(tmp_path / "out" / "images" / "000002.png")
    assert (text["seed"], text["label"], text["weights"], text["step"]) == (7, 3, "ema", 7)
    assert text["sampler"]["num_steps"] == 3 and text["guidance"]["guidance_scale"] == 2.0
    assert len(text["checkpoint_sha256"]) == 64 and text["torch_version"] == torch.__version__
    assert {"package_version", "git_commit", "dtype", "device"} <= set(text)
    json.dumps(text)


def test_the_picture_can_be_made_again_from_what_it_says(checkpoint, tmp_path, monkeypatch, capsys):
    saved, _ = sample(checkpoint, tmp_path / "a", monkeypatch, capsys, "num_samples=20")
    text = read_text(tmp_path / "a" / "images" / "000013.png")
    arguments = ["num_samples=1", f"seed={text['seed']}", f"labels={text['label']}"]
    again, _ = sample(checkpoint, tmp_path / "b", monkeypatch, capsys, *arguments)
    assert np.array_equal(again["arr_0"][0], saved["arr_0"][13])


@pytest.mark.parametrize("sampler", [Sampler(num_steps=8), Sampler(num_steps=8, eta=1.0)], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance(2.0), NoGuidance()], ids=["guided", "plain"])
def test_images_are_the_same_bit_for_bit_whatever_the_batch_size(checkpoint, sampler, guidance):
    model = load_model(checkpoint)
    settings = {"num_samples": 64, "labels": choose_labels(None, 64, 10), "shape": (1, 8, 8), "pad_to": 16}

    def images(batch_size):
        made = batches(model.net, model.diffusion, sampler, guidance, batch_size=batch_size, **settings)
        return torch.cat([batch.images for batch in made])

    reference = images(64)
    assert reference.std() > 0.1
    for batch_size in (1, 7, 64):
        assert torch.equal(images(batch_size), reference), batch_size


def test_sampling_leaves_the_global_random_state_alone(checkpoint):
    model = load_model(checkpoint)
    before = torch.get_rng_state()
    list(batches(model.net, model.diffusion, Sampler(2, eta=1.0), NoGuidance(), num_samples=2, batch_size=2,
                 labels=[1, 2], shape=(1, 8, 8)))  # fmt: skip
    assert torch.equal(before, torch.get_rng_state())


def test_float64_and_bfloat16_sample_close_to_float32(checkpoint, tmp_path, monkeypatch, capsys):
    pixels = {}
    for dtype in ("float32", "float64", "bfloat16"):
        saved, _ = sample(checkpoint, tmp_path / dtype, monkeypatch, capsys, "num_samples=4", f"dtype={dtype}")
        pixels[dtype] = saved["arr_0"].astype(int)
    assert abs(pixels["float64"] - pixels["float32"]).max() <= 1
    assert abs(pixels["bfloat16"] - pixels["float32"]).mean() < 4


def test_a_model_without_classes_samples_without_labels_and_says_so(tmp_path, monkeypatch, capsys):
    about = facts(num_classes=None, class_names=None)
    checkpoint = save_tiny(tmp_path / "model.safetensors", about=about, num_classes=None)
    with pytest.warns(UserWarning, match="no condition to guide towards"):
        saved, _ = sample(checkpoint, tmp_path / "out", monkeypatch, capsys, "num_samples=2")
    assert "arr_1" not in saved


def test_guidance_without_condition_drop_is_warned_about(tmp_path, monkeypatch, capsys):
    checkpoint = save_tiny(tmp_path / "model.safetensors", about=facts(condition_drop=0.0))
    with pytest.warns(UserWarning, match="trained without condition drop"):
        sample(checkpoint, tmp_path / "out", monkeypatch, capsys, "num_samples=2")


def test_plain_sampling_is_never_warned_about(recwarn):
    for guidance in (NoGuidance(), ClassifierFreeGuidance(1.0)):
        assert guidance_for(guidance, conditional=True, condition_drop=0.0) is guidance
    assert not recwarn.list


def test_labels_repeat_and_without_any_all_classes_take_turns():
    assert choose_labels([3, 7], 5, 10) == [3, 7, 3, 7, 3]
    assert choose_labels(None, 4, 3) == [0, 1, 2, 0]
    assert choose_labels(2, 2, 3) == [2, 2]
    assert choose_labels(None, 4, None) is None


def test_padding_reaches_the_next_multiple():
    assert [len(padded([1] * n, 16)) for n in (1, 15, 16, 17)] == [16, 16, 16, 32]


def test_bytes_become_floats_and_bytes_again():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert np.array_equal(to_uint8(levels / 127.5 - 1)[0, :, :, 0], levels[0, 0].numpy())
    assert to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_a_grid_shows_every_pixel_enlarged_and_in_its_place():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(4, 1).repeat(4, 2) * 40
    sheet = np.asarray(grid(images, columns=3, scale=5))
    assert sheet.shape == (2 * 22 + 2, 3 * 22 + 2, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        cell = sheet[2 + row * 22 : 22 + row * 22, 2 + column * 22 : 22 + column * 22]
        assert (cell == i * 40).all()


@pytest.mark.parametrize(
    ("labels", "columns", "captions"),
    [
        (None, None, None),
        ([0, 1, 2, 0, 1, 2], 3, ["a", "b", "c", "", "", ""]),
        ([1, 1, 1], None, ["b", "b", "b"]),
        ([0, 2, 1], None, ["a", "c", "b"]),
    ],
)
def test_labels_that_take_turns_become_columns(labels, columns, captions):
    assert label_layout(labels, ["a", "b", "c"]) == (columns, captions)


def test_captions_are_drawn_and_cut_to_their_cell():
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    plain, named = grid(images, 2), grid(images, 2, captions=["abcdefghijklmnopqrs", "b", "", ""])
    assert named.height > plain.height and named.width == plain.width
    assert np.asarray(named)[:16].min() < 128
    gap = np.asarray(named)[:16, 66:68]  # between the first cell and the second
    assert gap.min() == 255


def test_sentences_are_broken_into_lines_over_larger_cells():
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    text = "a large yellow triangle on a purple background"
    one, three = grid(images, 2, captions=[text, "", "", ""]), grid(images, 2, captions=[text, text, "", ""])
    assert one.width == three.width == 2 * 130 + 2  # cells of 128 pixels
    assert one.height < three.height  # an empty neighbour leaves its space


def test_pictures_and_arrays_read_back_as_written(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    save_png(image, tmp_path / "x.png", {"seed": 1, "name": "Ä"})
    assert read_text(tmp_path / "x.png") == {"seed": 1, "name": "Ä"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), image)
    save_npz(tmp_path / "x.npz", image[None])
    assert list(np.load(tmp_path / "x.npz")) == ["arr_0"]
    Image.fromarray(image).save(tmp_path / "y.png")
    with pytest.raises(ValueError, match="does not say how it was made"):
        read_text(tmp_path / "y.png")
