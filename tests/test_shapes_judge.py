"""The judge of shapes: right on what is drawn, at any size; wrong captions, blobs and bad input do not get past it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import config, facts, random_net, save_tiny

from diffusion.checkpoint import Part, build, save_model
from diffusion.data.shapes import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, ShapeImages, draw
from diffusion.evaluation.shapes import (
    ATTRIBUTES,
    SETTINGS,
    Judgement,
    agreement,
    draw_samples,
    evaluation_captions,
    judge,
    judgements,
    main,
    rates,
    read_caption,
    read_settings,
    render,
    report,
)


def drawn(count: int, image_size: int, *, seed: int = 123) -> tuple[torch.Tensor, list[str]]:
    """Images in [-1, 1] that no recipe trains on, a third of them of held-out pairs, and their captions."""
    sets = [ShapeImages(count, image_size, split=split, seed=seed) for split in ("train", "validation", "held_out")]
    batches = [images.__getitems__([(0, i) for i in range(count // 3)]) for images in sets]
    return torch.cat([batch["image"] for batch in batches]), [text for batch in batches for text in batch["caption"]]


@pytest.mark.parametrize(("image_size", "count"), [(16, 90), (24, 45), (32, 30)])
def test_it_agrees_with_the_truth_of_drawn_images(image_size, count):
    images, captions = drawn(count, image_size)
    for row in agreement(images, captions).values():
        assert row["agrees"] == row["size"] == 1
        assert row["error"] < 0.01


@pytest.mark.parametrize("deviation", [5, 20])
def test_noise_and_faded_colours_do_not_mislead_it(deviation):
    images, captions = drawn(36, 16)
    noise = deviation / 127.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert agreement((0.9 * images + noise).clamp(-1, 1), captions)["all"]["agrees"] >= 0.97


def test_each_word_of_a_wrong_caption_is_noticed():
    images, captions = drawn(30, 16)
    verdicts = [judge(image) for image in images]

    def rated(wanted):
        return rates([Judgement(*pair) for pair in zip(wanted, verdicts, strict=True)])["all"]

    wanted = [read_caption(text) for text in captions]
    assert rated(wanted)["agrees"] == 1
    assert rated(wanted[1:] + wanted[:1])["agrees"] < 0.1
    swaps = {
        "shape": lambda w: w._replace(shape=next(s for s in SHAPES if s != w.shape)),
        "colour": lambda w: w._replace(colour=next(c for c in COLOURS if c not in (w.colour, w.background))),
        "background": lambda w: w._replace(
            background=next(b for b in BACKGROUNDS if b not in (w.colour, w.background))
        ),
        "size": lambda w: w._replace(size="large" if w.size == "small" else "small"),
    }
    for name, swap in swaps.items():
        row = rated([swap(one) for one in wanted])
        assert row[name] == 0 and all(row[other] == 1 for other in ATTRIBUTES if other != name)
        assert row["agrees"] == (name == "size")  # which the score does not ask for


def test_colours_outside_the_caption_are_noticed():
    scene = Scene("star", "red", "large", "black", 0.5, 0.5, 0.37, 0.1)
    swapped = draw(scene._replace(colour="cyan", background="red"), 16).transpose(1, 2, 0)
    assert judge(swapped)[:3] == ("star", "cyan", "red")
    white = draw(scene, 16).transpose(1, 2, 0)
    white = np.where((white == white[0, 0]).all(-1, keepdims=True), white, np.uint8(245))
    assert judge(white).colour == "white"


def test_blobs_and_empty_images_have_large_errors():
    at = np.linspace(-1, 1, 16)
    hill = np.exp(-3 * (at[:, None] ** 2 + at**2))[..., None]
    blob = (40 + hill * np.array([180, 20, 10])).astype(np.uint8)
    assert judge(blob).error > 0.08
    verdict = judge(np.full((16, 16, 3), 28, np.uint8))
    assert verdict.background == verdict.colour == "black" and verdict.error < 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_templates_are_the_drawings(shape):
    scenes = [
        Scene(shape, "red", "small", "black", 0.4, 0.6, 0.22, 0.1),
        Scene(shape, "red", "large", "black", 0.5, 0.45, 0.38, -0.2),
    ]
    places = np.array([scene[4:] for scene in scenes])
    for coverage, scene in zip(render(shape, places, 24), scenes, strict=True):
        ground, paint = np.array(BACKGROUNDS["black"]), np.array(COLOURS["red"])
        expected = ground + coverage[..., None] * (paint - ground)
        assert np.abs(expected - draw(scene, 24).transpose(1, 2, 0)).max() <= 0.5 + 1e-9


def test_arrays_and_tensors_are_the_same_image():
    images, _ = drawn(3, 16)
    for image in images:
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert judge(image) == judge(pixels)


def test_the_captions_are_different_and_a_part_is_held_out():
    captions = evaluation_captions()
    wanted = [read_caption(text) for text in captions]
    assert len(set(captions)) == 200
    assert sum(one.held_out for one in wanted) == 40 == sum((w.shape, w.colour) in HELD_OUT for w in wanted)
    assert not all(one.held_out for one in wanted[-40:])  # mixed
    assert {one.shape for one in wanted} == set(SHAPES) and {one.background for one in wanted} == set(BACKGROUNDS)
    assert evaluation_captions(0) == captions != evaluation_captions(1)
    assert [one.caption for one in wanted] == captions


def test_rates_are_of_their_groups_and_failures_are_listed():
    scene = Scene("circle", "red", "large", "black", 0.5, 0.5, 0.37, 0.0)
    held_out = scene._replace(colour="purple")
    images = [draw(one, 16).transpose(1, 2, 0) for one in (scene, scene, held_out)]
    captions = [scene.caption, scene._replace(shape="ring").caption, held_out.caption]
    table = agreement(images, captions)
    assert [table[name]["count"] for name in ("all", "seen", "held-out")] == [3, 2, 1]
    assert [table[name]["agrees"] for name in ("all", "seen", "held-out")] == [pytest.approx(2 / 3), 0.5, 1]
    assert table["seen"]["shape"] == 0.5 and table["seen"]["colour"] == 1
    text = report(judgements(images, captions))
    assert "1 do not agree" in text and f"   1 {captions[1]}: shows {scene.caption}" in text
    assert set(agreement(images[:1], captions[:1])) == {"all", "seen"}


def test_the_command_judges_a_file_of_samples(tmp_path, capsys):
    images, captions = drawn(6, 16)
    np.savez(tmp_path / "s.npz", arr_0=((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    (tmp_path / "c.txt").write_text("\n".join(captions) + "\n")
    main([f"samples={tmp_path / 's.npz'}", f"captions={tmp_path / 'c.txt'}", f"grid={tmp_path / 'g.png'}"])
    assert "0 do not agree" in capsys.readouterr().out
    assert (tmp_path / "g.png").stat().st_size > 0


def text_model(path: Path) -> Path:
    """A checkpoint of an untrained model of captions, for 16x16 images."""
    encoder = {"_target_": "diffusion.models.text.TextTransformer", "vocab_size": 64, "channels": 16}
    encoder |= {"num_layers": 1, "num_heads": 2, "max_length": 12}
    text = {"_target_": "diffusion.conditioning.TextConditioner", "encoder": encoder, "pooled": True}
    settings = config(in_channels=3, out_channels=3, num_classes=None, context_channels=16, vector_channels=16)
    parts = {"conditioner": Part(module=build(text), config=text)}
    net = random_net(settings)
    for parameter in net.parameters():  # branches that start at zero would listen to nothing
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    about = facts(shape=[3, 16, 16], num_classes=None, class_names=None)
    save_model(path, net, settings, weights="raw", step=1, facts=about, parts=parts)
    return path


def test_the_command_samples_a_checkpoint_whatever_the_size_of_its_batches(tmp_path):
    model = text_model(tmp_path / "m.safetensors")
    captions = evaluation_captions(3, 5, 1)
    settings = {**SETTINGS, "checkpoint": str(model), "num_steps": 2, "seed": 3}
    images = draw_samples({**settings, "batch_size": 5}, captions)
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert np.array_equal(images, draw_samples({**settings, "batch_size": 2}, captions))
    others = draw_samples(settings, captions[1:] + captions[:1])
    assert not np.array_equal(images, others)  # the captions are told to the network


def test_a_model_without_captions_is_refused(tmp_path):
    path = save_tiny(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="was not trained on captions"):
        main([f"checkpoint={path}"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((16, 16, 3)), r"uint8 \(H, W, 3\)"),
        (np.zeros((16, 16), np.uint8), r"got \(16, 16\)"),
        (np.zeros((16, 20, 3), np.uint8), "square"),
        (torch.zeros(1, 16, 16), r"tensor \(3, H, W\)"),
        (np.zeros((8, 8, 3), np.uint8), "8 pixels are too few"),
    ],
)
def test_other_images_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        judge(image)


@pytest.mark.parametrize("caption", ["", "a red circle", "a tiny red circle on a black background", "a big red dog"])
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="captions read 'a SIZE COLOUR SHAPE on a BACKGROUND background'"):
        read_caption(caption)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either checkpoint=FILE"),
        (["checkpoint=a", "samples=b"], "either checkpoint=FILE"),
        (["checkpoint=a", "captions=b"], "belongs to samples"),
        (["checkpoints=a"], "'checkpoints=a' is no setting; the settings are checkpoint=, samples="),
        (["checkpoint=a", "count=many"], "count=many does not fit; it must be of type int"),
    ],
)
def test_wrong_settings_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        read_settings(words)


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="85 of 84 captions"):
        evaluation_captions(0, 200, 85)
    with pytest.raises(ValueError, match="1 images, but 2 captions"):
        agreement([np.zeros((16, 16, 3), np.uint8)], list(itertools.islice(evaluation_captions(), 2)))
