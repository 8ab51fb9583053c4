"""Image folders: every layout, every way in which one can be wrong, and files that cannot be read."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from latent_cases import autoencoder
from PIL import Image

from diffusion.data.image_folder import ImageFolder, read_image
from diffusion.data.latent_cache import cached
from diffusion.data.listing import CACHE, METADATA, unreadable


def save(path, value=128, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def noise(path, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)


@pytest.fixture
def classes(tmp_path):
    """Three classes of four images, whose grey value tells class and number."""
    root = tmp_path / "images"
    for label, name in enumerate(["ant", "bee", "cat"]):
        for number in range(4):
            save(root / name / f"{number}.png", 50 * label + 10 * number)
    return root


def everything(data: ImageFolder) -> dict[str, int | None]:
    """Map each image's name to its label, over both splits."""
    data.setup("fit")
    seen = {}
    for dataset in (data.train_set, data.val_set):
        for index in range(len(dataset)):
            sample = dataset[index]
            seen[dataset.entries[index].name] = int(sample["label"]) if "label" in sample else None
    return seen


def test_class_folders_are_labels_and_pixels_are_exact(classes):
    data = ImageFolder(classes, image_size=8, num_classes=3, batch_size=2)
    assert data.class_names == ("ant", "bee", "cat") and data.shape == (3, 8, 8)
    assert everything(data) == {f"{c}/{n}.png": i for i, c in enumerate(data.class_names) for n in range(4)}
    for dataset in (data.train_set, data.val_set):
        for index, entry in enumerate(dataset.entries):
            sample = dataset[index]
            expected = 50 * int(sample["label"]) + 10 * int(entry.name[-5])
            assert torch.equal(((sample["image"] + 1) * 127.5).round(), torch.full((3, 8, 8), float(expected)))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 8, 8) and batch["label"].dtype == torch.int64 and "caption" not in batch


def test_without_num_classes_labels_are_not_used(classes):
    assert set(everything(ImageFolder(classes, image_size=8)).values()) == {None}


def test_a_flat_folder_needs_no_classes(tmp_path):
    for number in range(5):
        save(tmp_path / f"{number}.JPG")
    save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert set(everything(ImageFolder(tmp_path, image_size=4, channels=1))) == {f"{n}.JPG" for n in range(5)}


def describe(root, *lines):
    (root / METADATA).write_text("\n".join(json.dumps(line) if isinstance(line, dict) else line for line in lines))


def test_metadata_gives_captions_and_labels(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "unlisted.png"):
        save(tmp_path / name)
    describe(
        tmp_path,
        {"file_name": "a.png", "caption": "an a", "label": "x"},
        {"file_name": "b.png", "text": "a b", "label": "y"},
        "",
        {"file_name": "sub/c.png", "label": "x"},
    )
    data = ImageFolder(tmp_path, image_size=4, num_classes=2, batch_size=1)
    assert everything(data) == {"a.png": 0, "b.png": 1, "sub/c.png": 0}
    found = {}
    for dataset in (data.train_set, data.val_set):
        batch = dataset.__getitems__([(0, index) for index in range(len(dataset))])
        found |= dict(zip([entry.name for entry in dataset.entries], batch["caption"], strict=True))
    assert found == {"a.png": "an a", "b.png": "a b", "sub/c.png": ""}


def test_numbers_below_num_classes_keep_their_value(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    describe(tmp_path, {"file_name": "a.png", "label": 10}, {"file_name": "b.png", "label": 2})
    assert everything(ImageFolder(tmp_path, image_size=4, num_classes=12)) == {"a.png": 10, "b.png": 2}
    assert everything(ImageFolder(tmp_path, image_size=4, num_classes=2)) == {"a.png": 1, "b.png": 0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"file_name": "a.png"', ""], r"metadata\.jsonl, line 1: expected"),
        ([{"file_name": "a.png"}, {"name": "b.png"}], "line 2: expected"),
        ([{"file_name": "a.png", "caption": ["one", "two"]}], "line 1: expected"),
        (["[1, 2]"], "line 1: expected"),
        (
            [{"file_name": f"{n}.png"} for n in range(9)] + [{"file_name": "a.png"}],
            r"names 9 files that do not exist in .*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png and 4 more",
        ),
        ([""], "no images in"),
    ],
)
def test_wrong_metadata_is_an_error_that_says_where(tmp_path, lines, message):
    save(tmp_path / "a.png")
    describe(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, image_size=4).setup()


def test_a_missing_or_empty_folder_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root is '.*nowhere', but there is no such folder"):
        ImageFolder(tmp_path / "nowhere", image_size=4).setup()
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "readme.txt").write_text("soon")
    with pytest.raises(ValueError, match=r"no images in .*: looked for \.png, \.jpg.* and for a metadata\.jsonl"):
        ImageFolder(tmp_path, image_size=4, num_classes=1)


def test_a_wrong_number_of_classes_names_the_setting(classes):
    with pytest.raises(
        ValueError, match=r"num_classes is 5, but .* has 3 classes \(ant, bee, cat\); set data\.num_c.*=3"
    ):
        ImageFolder(classes, image_size=4, num_classes=5)
    with pytest.raises(ValueError, match=r"no class folders and no labels; set data\.num_classes=null"):
        ImageFolder(classes / "ant", image_size=4, num_classes=3)
    save(classes / "stray.png")
    with pytest.raises(ValueError, match=r"1 images .* none of the 3 classes: stray\.png"):
        ImageFolder(classes, image_size=4, num_classes=3)


def test_impossible_settings_are_refused(classes):
    with pytest.raises(ValueError, match=r"data\.channels is 4"):
        ImageFolder(classes, image_size=4, channels=4)
    with pytest.raises(ValueError, match=r"data\.val_fraction is 1"):
        ImageFolder(classes, image_size=4, val_fraction=1)


def test_unreadable_images_are_counted_named_and_left_out(classes):
    noise(classes / "ant" / "cut.png")
    truncate(classes / "ant" / "cut.png")
    (classes / "bee" / "fake.jpg").write_text("no image at all")
    (classes / "cat" / "empty.webp").touch()
    data = ImageFolder(classes, image_size=4, num_classes=3)
    with pytest.warns(UserWarning, match=r"3 of 15 images in .* left out: ant/cut\.png \(.*\), bee/fake\.jpg"):
        assert len(everything(data)) == 12
    assert set(data.skipped) == {"ant/cut.png", "bee/fake.jpg", "cat/empty.webp"}


def test_a_folder_of_unreadable_images_is_an_error(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 1 images in .* can be read: a\.png"):
        ImageFolder(tmp_path, image_size=4).setup()


def test_images_are_checked_once_and_again_when_they_change(classes, monkeypatch):
    names = [f"ant/{number}.png" for number in range(4)]
    assert unreadable(classes, names) == {}
    checked = []
    monkeypatch.setattr("diffusion.data.listing.failure", lambda path: checked.append(path.name) or "seen")
    assert unreadable(classes, names) == {} and checked == []
    save(classes / "ant" / "2.png", size=(40, 40))
    assert unreadable(classes, names) == {"ant/2.png": "seen"} and checked == ["2.png"]
    (classes / CACHE).write_text('{"cut short')
    assert len(unreadable(classes, names)) == 4


def test_an_image_lost_during_training_is_replaced_and_named(classes):
    data = ImageFolder(classes, image_size=4, num_classes=3)
    data.setup()
    dataset = data.train_set
    following = dataset[1]
    (classes / dataset.entries[0].name).unlink()
    with pytest.warns(UserWarning, match=r"can no longer be read .* \(1 such so far\)"):
        replaced = dataset[0]
    assert torch.equal(replaced["image"], following["image"]) and replaced["label"] == following["label"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset[0]  # named once only
    shutil.rmtree(classes)
    with (
        pytest.warns(UserWarning, match="can no longer be read"),
        pytest.raises(ValueError, match=r"none of the .* can be read any more"),
    ):
        dataset[0]


def test_validation_is_set_aside_by_name(tmp_path):
    for number in range(300):
        save(tmp_path / f"{number:03d}.png", size=(2, 2))

    def names():
        data = ImageFolder(tmp_path, image_size=2, val_fraction=0.1)
        data.setup()
        return [{entry.name for entry in dataset.entries} for dataset in (data.train_set, data.val_set)]

    train, val = names()
    assert len(train) + len(val) == 300 and 15 <= len(val) <= 45
    save(tmp_path / "another.png")
    more_train, more_val = names()
    assert train <= more_train and val <= more_val


def test_a_small_set_keeps_one_image_for_validation_and_one_image_is_too_few(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 images in .* leave none to train on beside data\.val_fraction=0\.02"):
        ImageFolder(tmp_path, image_size=4).setup()
    save(tmp_path / "b.png")
    data = ImageFolder(tmp_path, image_size=4)
    data.setup()
    assert len(data.train_set) == len(data.val_set) == 1


def test_a_validation_folder_of_its_own(classes, tmp_path):
    save(tmp_path / "other" / "bee" / "x.png")
    data = ImageFolder(classes, image_size=4, num_classes=3, val_root=tmp_path / "other")
    data.setup()
    assert len(data.train_set) == 12 and int(data.val_set[0]["label"]) == 1
    save(tmp_path / "other" / "dog" / "x.png")
    data = ImageFolder(classes, image_size=4, num_classes=3, val_root=tmp_path / "other")
    with pytest.raises(ValueError, match=r"1 images in .*other belong to none of the 3 classes: dog/x\.png"):
        data.setup()


def test_images_are_cut_at_the_centre_and_resized_without_aliasing(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:40] = 200  # the left half of the centre square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", channels=3, image_size=8).float()
    assert (image[:, :, :4] - 200).abs().max() < 25 and image[:, :, 4:].max() < 25
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    image = read_image(tmp_path / "stripes.png", channels=1, image_size=8).float()
    assert (image - 127.5).abs().max() < 12
    assert read_image(tmp_path / "stripes.png", channels=1, image_size=96).shape == (1, 96, 96)


def test_odd_files_are_read_as_they_look(tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)  # black under full transparency
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", channels=3, image_size=4) == 255).all()
    deep = np.full((4, 4), 128 << 8, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", channels=1, image_size=4) == 128).all()
    turned = np.zeros((4, 4, 3), np.uint8)
    turned[0] = 250  # the upper row; the camera was held so that it belongs on the right
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", channels=3, image_size=4)
    assert (image[:, :, 3] == 250).all() and (image[:, :, :3] == 0).all()


def test_mirrors_are_drawn_for_training_only(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, :2] = 255
    for number in range(40):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    data = ImageFolder(tmp_path, image_size=4, val_fraction=0.5, horizontal_flip=True)
    data.setup()
    for dataset, expected in ((data.train_set, {-1.0, 1.0}), (data.val_set, {1.0})):
        batch = dataset.__getitems__([(3, index) for index in range(len(dataset))])
        assert set(batch["image"][:, 0, 0, 0].tolist()) == expected


def test_random_crops_are_keyed_squares_of_the_image_for_training_only(tmp_path):
    rows, columns = np.mgrid[0:40, 0:60]
    for number in range(12):  # red tells the row, green the column, blue the image
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.stack([rows * 4, columns * 4, np.full_like(rows, number * 8)], -1).astype(np.uint8)).save(
            path
        )
    make = lambda **settings: ImageFolder(tmp_path, image_size=32, val_fraction=0.2, **settings)  # noqa: E731
    data, plain = make(random_crop=True), make()
    for one in (data, plain):
        one.setup("fit")
    keys = [(epoch, index) for epoch in range(6) for index in range(len(data.train_set))]
    shown = (data.train_set.__getitems__(keys)["image"] + 1) * 127.5
    assert torch.equal(shown, (data.train_set.__getitems__(keys)["image"] + 1) * 127.5)
    corners = set()
    for image, (_, index) in zip(shown, keys, strict=True):
        expected = float(data.train_set.entries[index].name.split(".")[0]) * 8
        torch.testing.assert_close(image[2], torch.full((32, 32), expected), atol=1, rtol=0)
        steps = image[:2, 1:-1, 1:-1].diff(dim=1)[0].mean(), image[:2, 1:-1, 1:-1].diff(dim=2)[1].mean()
        for step in steps:  # 40 rows shown by 32 to 40 pixels
            assert 4 * 1.0 - 0.1 < step < 4 * 1.25 + 0.1
        assert image.min() >= 0 and image[0].max() <= 156 and image[1].max() <= 236
        corners.add(tuple(image[:2, 0, 0].round().tolist()))
    assert len(corners) > 0.8 * len(keys)
    held = range(len(data.val_set))
    assert torch.equal(data.val_set.samples(held)["image"], plain.val_set.samples(held)["image"])
    other = make(random_crop=True, seed=1)
    other.setup("fit")
    assert not torch.equal(
        other.train_set.__getitems__(keys[:4])["image"], data.train_set.__getitems__(keys[:4])["image"]
    )


@pytest.mark.parametrize("size", [(32, 32), (5, 90), (31, 700)])
def test_random_crops_take_images_of_any_size(tmp_path, size):
    noise(tmp_path / "image.png", size)
    for crop in range(20):
        assert read_image(tmp_path / "image.png", channels=3, image_size=32, crop=crop).shape == (3, 32, 32)


def test_random_crops_cannot_be_cached_as_latents(classes, tmp_path):
    data = ImageFolder(classes, image_size=8, num_classes=3, random_crop=True)
    with pytest.raises(ValueError, match=r"data\.random_crop=true shows other pixels in each epoch"):
        cached(data, autoencoder(), tmp_path / "cache")
