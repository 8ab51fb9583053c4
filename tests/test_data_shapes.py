"""Shapes: images are what their captions say, wherever and in whatever order they are drawn."""

import numpy as np
import pytest
import torch

from diffusion.data.shapes import BACKGROUNDS, COLOURS, HELD_OUT, LABELS, SHAPES, ShapeImages, Shapes, draw


def nearest_colour(pixel: np.ndarray) -> str:
    return min(BACKGROUNDS, key=lambda name: np.abs(pixel - np.array(BACKGROUNDS[name])).sum())


def colours_seen(image: torch.Tensor) -> tuple[str, str]:
    """Return the ground's colour, from the corners, and the most frequent other one."""
    pixels = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
    ground = nearest_colour(np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0))
    away = np.abs(pixels - np.array(BACKGROUNDS[ground])).sum(-1)
    shape = pixels[away > 0.9 * away.max()]
    return ground, nearest_colour(np.median(shape, axis=0))


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_colours_and_sizes_are_those_of_the_caption(split):
    dataset = ShapeImages(100, 32, split=split)
    for index in range(len(dataset)):
        sample, scene = dataset[index], dataset.scene(index)
        assert sample["caption"] == f"a {scene.size} {scene.colour} {scene.shape} on a {scene.background} background"
        assert colours_seen(sample["image"]) == (scene.background, scene.colour)
        assert scene.background != scene.colour


def test_an_image_is_a_function_of_seed_split_and_index():
    keys = [(0, index) for index in range(20)]
    whole = ShapeImages(20, 16, seed=1).__getitems__(keys)
    longer = ShapeImages(1000, 16, seed=1).__getitems__([(7, 19), (7, 3)])
    assert torch.equal(longer["image"], whole["image"][[19, 3]])
    assert longer["caption"] == [whole["caption"][19], whole["caption"][3]]
    assert longer["index"].tolist() == [19, 3]
    for other in (ShapeImages(20, 16, seed=2), ShapeImages(20, 16, seed=1, split="validation")):
        assert not torch.equal(other.__getitems__(keys)["image"], whole["image"])


def test_a_batch_may_be_changed_though_its_images_are_kept():
    dataset = ShapeImages(4, 16)
    first = dataset.load([2, 2])["image"]
    before = first.clone()
    first.zero_()
    assert torch.equal(dataset.load([2, 2])["image"], before)


def test_images_that_do_not_fit_in_memory_are_drawn_again(monkeypatch):
    keys = [(0, index) for index in range(8)]
    kept = ShapeImages(8, 16).__getitems__(keys)
    monkeypatch.setattr("diffusion.data.shapes.KEPT_BYTES", 2 * 3 * 16 * 16)
    dataset = ShapeImages(8, 16)
    for _ in range(2):
        assert torch.equal(dataset.__getitems__(keys)["image"], kept["image"])
    assert len(dataset._drawn) == 2


def test_resolution_changes_the_grid_and_not_the_picture():
    scenes = [ShapeImages(8, 32).scene(index) for index in range(8)]
    for scene in scenes:
        coarse, fine = draw(scene, 32).astype(float), draw(scene, 128).astype(float)
        assert np.abs(fine.reshape(3, 32, 4, 32, 4).mean((2, 4)) - coarse).mean() < 2


def test_held_out_pairs_occur_nowhere_else_and_their_words_do():
    def pairs(split):
        dataset = ShapeImages(1500, 8, split=split)
        return {(scene.shape, scene.colour) for scene in map(dataset.scene, range(len(dataset)))}

    assert pairs("held_out") == set(HELD_OUT) == set(Shapes.held_out)
    assert pairs("train") == pairs("validation") == {(s, c) for s in SHAPES for c in COLOURS} - set(HELD_OUT)


@pytest.mark.parametrize("name", SHAPES)
def test_signed_distances_have_slope_one_or_less_and_shapes_differ(name):
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 301), np.linspace(-1.5, 1.5, 301))
    distance = SHAPES[name](x, y)
    assert np.abs(np.diff(distance, axis=0)).max() <= 0.01 + 1e-9
    assert distance[150, 150] < 0 or name == "ring"
    corners = distance[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners > 0.3).all()
    for other in SHAPES.keys() - {name}:
        assert ((distance < 0) != (SHAPES[other](x, y) < 0)).mean() > 0.03


@pytest.mark.parametrize("label", LABELS)
def test_labels_name_what_is_drawn(label):
    data = Shapes(label=label, num_train=200, num_val=10, image_size=8, batch_size=200)
    assert data.num_classes == len(data.class_names) == len(LABELS[label])
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].dtype == torch.int64
    for number, caption in zip(batch["label"].tolist(), batch["caption"], strict=True):
        assert data.class_names[number] in caption


def test_the_datamodule_gives_batches_of_any_size():
    data = Shapes(image_size=24, num_train=10, num_val=3, batch_size=4)
    assert data.shape == (3, 24, 24)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, *data.shape) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    assert [len(batch["caption"]) for batch in data.val_dataloader()] == [3]
    assert len(data.dataset("held_out", 17)) == 17


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": "size"}, r"data\.label is 'size'; choose one of shape, colour, shape_colour"),
        ({"num_classes": 10}, r"data\.num_classes is 10, but data\.label=shape has 6"),
        ({"channels": 1}, r"set data\.channels=3"),
        ({"num_train": 0}, r"data\.num_train is 0"),
        ({"image_size": 0}, r"data\.image_size is 0"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Shapes(**wrong)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split 'test' is not one of train, validation, held_out"):
        Shapes().dataset("test", 3)
