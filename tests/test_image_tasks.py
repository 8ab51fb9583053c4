"""Pictures in sampling: the tail of the grid, what a mask keeps, what inpainting and editing networks read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from latent_cases import autoencoder
from PIL import Image
from tiny import run, save_tiny
from torch import nn

from diffusion.asked import choose_asked, choose_shape
from diffusion.condition_images import choose_pictures, picture_size
from diffusion.generate import batches, generate, with_picture
from diffusion.guidance import ClassifierFreeGuidance, NoGuidance, TwoScaleGuidance
from diffusion.guiding import with_two_scales
from diffusion.image_tasks import (
    EDITING,
    INPAINTING,
    STRENGTH,
    Begin,
    Source,
    choose_strength,
    count_moves,
    picture_task,
    tail,
)
from diffusion.images import to_uint8
from diffusion.process import GaussianDiffusion, q_sample
from diffusion.sampling import SampleNoise, Sampler
from diffusion.schedule import cosine

SHAPE = (3, 16, 16)
DIFFUSION = GaussianDiffusion(cosine(100), "eps")
SAMPLER = Sampler(num_steps=10, clip=None)


class Watched(nn.Module):
    """Answers a part of what it sees, and remembers what that was, call by call."""

    num_classes = None

    def __init__(self, channels: int = 3, extra: int = 0) -> None:
        super().__init__()
        self.in_channels, self.channels, self.seen = channels + extra, channels, []

    def forward(self, x, t, *, concat=None, context=None):
        self.seen.append({"x": x.clone(), "t": t.clone(), "concat": concat, "context": context})
        mixed = 0.4 * x + 0.1 * x.flip(2)
        if concat is not None:
            mixed = mixed + 0.1 * concat[:, -self.channels :]
        return mixed if context is None else mixed + 0.05 * context.mean((1, 2)).view(-1, 1, 1, 1)


class Words(nn.Module):
    """A conditioner of numbers: the context is what it is given, nothing is zero."""

    entries, provides, num_classes, low_size = ("caption",), {"context": 4}, None, None
    train_noise = (0.0, 0.0)

    def prepare_batch(self, batch):
        return torch.tensor([float(len(text)) for text in batch["caption"]])

    def corrupted(self, prepared, noise, level=None):
        return prepared

    def alike(self, one, other):
        return one, other

    def forward(self, prepared, drop=None):
        value = prepared if drop is None else prepared.masked_fill(drop, 0.0)
        return {"context": value.view(-1, 1, 1).expand(-1, 2, 4)}


def picture(seed: int = 0, shape=SHAPE) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_floats(image: torch.Tensor) -> torch.Tensor:
    return image.float() / 127.5 - 1


def half_mask(shape=SHAPE) -> torch.Tensor:
    mask = torch.zeros(1, *shape[1:])
    mask[:, :, : shape[2] // 2] = 1
    return mask


def drawn(net, source=None, *, seeds=(0,), guidance=None, sampler=SAMPLER, diffusion=DIFFUSION, **settings):
    told = {"shape": SHAPE, "seeds": list(seeds), "source": source, **settings}
    return generate(net, diffusion, sampler, guidance or NoGuidance(), **told)


# --- the tail of a grid ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "strength", "expected"),
    [
        ((90, 60, 30, -1), None, (90, 60, 30, -1)),
        ((90, 60, 30, -1), 1.0, (90, 60, 30, -1)),
        ((90, 60, 30, -1), 0.67, (60, 30, -1)),
        ((90, 60, 30, -1), 0.66, (30, -1)),
        ((90, 60, 30, -1), 0.3, ()),
        ((90, 60, 30, -1), 0.0, ()),
        (((90, 60), (60, 90), (90, -1)), 0.67, ((60, 90), (90, -1))),
        (((90, 60), (60, 90), (90, -1)), None, ((90, 60), (60, 90), (90, -1))),
    ],
)
def test_strength_is_the_part_of_the_moves_that_are_made(grid, strength, expected):
    assert tuple(tail(grid, strength)) == expected


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("strength", [0.0, 0.01, 0.3, 0.5, 0.75, 0.99, 1.0])
def test_as_many_moves_are_made_as_diffusers_makes(steps, strength):
    grid = Sampler(num_steps=steps).timesteps(cosine(100))
    theirs = steps - max(steps - min(int(steps * strength), steps), 0)
    assert count_moves(tail(grid, strength)) == theirs


# --- image to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_sampling_starts_at_the_picture_noised_to_the_first_timestep_that_is_left(strength):
    net, image = Watched(), picture()
    drawn(net, Source([image], strength=strength), seeds=(5,))
    grid = SAMPLER.timesteps(DIFFUSION.schedule)[10 - round(10 * strength) :]
    assert [int(call["t"][0]) for call in net.seen] == list(grid[:-1])
    noise = SampleNoise([5]).initial(SHAPE)
    expected = q_sample(as_floats(image)[None], noise, DIFFUSION.schedule.level(grid[0]))
    assert torch.equal(net.seen[0]["x"], expected)


def test_strength_0_is_the_picture_itself_and_asks_nothing():
    net, image = Watched(), picture()
    assert np.array_equal(to_uint8(drawn(net, Source([image], strength=0.0))), image.permute(1, 2, 0)[None])
    assert net.seen == []


def test_latents_of_the_picture_are_the_mode_and_strength_0_is_its_reconstruction():
    coder, image = autoencoder(seed=3), picture()
    net = Watched(channels=2)
    got = drawn(net, Source([image], strength=0.0), autoencoder=coder)
    torch.testing.assert_close(got, coder.decode(coder.encode(as_floats(image)[None])))
    drawn(net, Source([image], strength=0.5), autoencoder=coder)
    noise = SampleNoise([0]).initial(coder.latent_shape(SHAPE))
    start = SAMPLER.timesteps(DIFFUSION.schedule)[5]
    expected = q_sample(coder.encode(as_floats(image)[None]), noise, DIFFUSION.schedule.level(start))
    torch.testing.assert_close(net.seen[0]["x"], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_depends_on_its_own_picture_and_seed_alone(masked):
    images = [picture(seed) for seed in range(3)]
    masks = [half_mask(), 1 - half_mask(), half_mask()] if masked else None
    source = Source(images, masks, strength=0.7)
    settings = {"num_samples": 3, "seed": 4, "shape": SHAPE, "source": source}
    reference = [
        drawn(Watched(), Source([images[i]], masks and [masks[i]], strength=0.7), seeds=[4 + i]) for i in range(3)
    ]
    for size in (1, 2, 3):
        made = batches(Watched(), DIFFUSION, SAMPLER, NoGuidance(), batch_size=size, pad_to=size, **settings)
        torch.testing.assert_close(torch.cat([batch.images for batch in made]), torch.cat(reference))


# --- inpainting with any model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [-1, 0])
@pytest.mark.parametrize("strength", [None, 0.6])
def test_what_the_mask_keeps_is_the_picture_at_every_level_and_without_noise_at_the_end(final, strength):
    net, image, keep = Watched(), picture(), half_mask()[0] == 0
    sampler = Sampler(num_steps=10, clip=None, final=final)
    got = drawn(net, Source([image], [half_mask()], strength, paste=False), sampler=sampler)
    noise, level = SampleNoise([0]).initial(SHAPE), DIFFUSION.schedule.level
    assert torch.equal(net.seen[0]["x"], noise) == (strength is None)
    for call in net.seen[1:]:
        expected = q_sample(as_floats(image)[None], noise, level(int(call["t"][0])))
        assert torch.equal(call["x"][..., keep], expected[..., keep])
        assert not torch.isclose(call["x"][..., ~keep], expected[..., ~keep]).any()
    assert torch.equal(got[..., keep], as_floats(image)[None][..., keep])
    assert not torch.isclose(got[..., ~keep], as_floats(image)[None][..., ~keep]).all()


@pytest.mark.parametrize("paste", [True, False])
def test_kept_pixels_are_pasted_bit_for_bit_unless_they_are_to_come_from_the_autoencoder(paste):
    coder, image, mask = autoencoder(seed=3), picture(), half_mask()
    got = drawn(Watched(channels=2), Source([image], [mask], paste=paste), autoencoder=coder)
    keep = mask[0] == 0
    same = to_uint8(got)[0][keep.numpy()] == image.permute(1, 2, 0)[keep].numpy()
    assert same.all() if paste else same.mean() < 0.1
    other = drawn(Watched(channels=2), Source([image], [mask], paste=False), autoencoder=coder)
    assert torch.equal(got[..., ~keep], other[..., ~keep])


def test_a_mask_at_the_latents_size_is_the_upper_left_pixel_of_each_cell():
    coder, mask = autoencoder(), torch.zeros(1, 16, 16)
    mask[:, 2:5, 4:9] = 1
    net = Watched(channels=2, extra=3)
    drawn(net, Source([picture()], [mask]), autoencoder=coder)
    assert torch.equal(net.seen[0]["concat"][0, 0], mask[0, ::2, ::2])


def test_a_mask_of_which_no_latent_pixel_is_left_is_an_error():
    mask = torch.zeros(1, 16, 16)
    mask[:, 3, 5] = 1
    with pytest.raises(ValueError, match="finer than a latent pixel, 2x2"):
        drawn(Watched(channels=2), Source([picture()], [mask]), autoencoder=autoencoder())


# --- networks that read pictures -------------------------------------------------------------------------------------


def test_input_channels_tell_what_a_network_reads():
    assert picture_task(Watched(4), 4) is None
    assert picture_task(Watched(4, extra=5), 4) == INPAINTING
    assert picture_task(Watched(4, extra=4), 4) == EDITING
    words = Words()
    words.provides = {"concat": 4}
    assert picture_task(Watched(4, extra=4), 4, words) is None
    assert picture_task(lambda x, t: x, 4) is None


@pytest.mark.parametrize("strength", [None, 0.5])
def test_an_inpainting_network_reads_x_then_the_mask_then_the_masked_picture(strength):
    coder, image, mask = autoencoder(seed=2), picture(), half_mask()
    net = Watched(channels=2, extra=3)
    drawn(net, Source([image], [mask], strength), autoencoder=coder)
    masked = as_floats(image)[None] * (mask < 0.5)
    small = F.interpolate(mask[None], scale_factor=0.5, mode="nearest")
    for call in net.seen:
        torch.testing.assert_close(call["concat"], torch.cat([small, coder.encode(masked)], dim=1))
    assert len(net.seen) == (10 if strength is None else 5)
    noise = SampleNoise([0]).initial(coder.latent_shape(SHAPE))
    start = noise
    if strength is not None:
        first = SAMPLER.timesteps(DIFFUSION.schedule)[5]
        start = q_sample(coder.encode(as_floats(image)[None]), noise, DIFFUSION.schedule.level(first))
    torch.testing.assert_close(net.seen[0]["x"], start)


def test_both_halves_of_guidance_see_the_picture_to_be_inpainted():
    net, words = Watched(channels=2, extra=3), Words()
    told = {"inputs": {"caption": ["four"]}, "conditioner": words, "autoencoder": autoencoder()}
    drawn(net, Source([picture()], [half_mask()]), guidance=ClassifierFreeGuidance(3.0), **told)
    concat, context = net.seen[0]["concat"], net.seen[0]["context"]
    assert torch.equal(concat[0], concat[1]) and concat[0].abs().sum() > 0
    assert context[:, 0, 0].tolist() == [4.0, 0.0]


@pytest.mark.parametrize("negative", [None, "to"])
def test_an_editing_network_reads_unscaled_latents_and_answers_three_questions(negative):
    coder = autoencoder(seed=2, scale_factor=0.3, shift=0.1)
    net, words, image = Watched(channels=2, extra=2), Words(), picture()
    told = {"inputs": {"caption": ["four"]}, "conditioner": words, "autoencoder": coder}
    told |= {"negative": {"caption": [negative]}} if negative else {}
    drawn(net, Source([image]), guidance=TwoScaleGuidance(7.5, 1.5), **told)
    concat, context = net.seen[0]["concat"], net.seen[0]["context"]
    mode = coder.moments(as_floats(image)[None]).mean[0]
    torch.testing.assert_close(concat, torch.stack([mode, mode, torch.zeros_like(mode)]), atol=1e-6, rtol=1e-5)
    none = float(len(negative or ""))
    assert context[:, 0, 0].tolist() == [4.0, none, none]
    assert len(net.seen) == 10 and torch.equal(
        net.seen[0]["x"][:1], SampleNoise([0]).initial(coder.latent_shape(SHAPE))
    )


def test_channels_of_a_picture_come_before_those_of_a_conditioner():
    picture, own, nothing = torch.ones(1, 2, 4, 4), torch.full((1, 3, 4, 4), 2.0), torch.zeros(1, 2, 4, 4)
    begin = Begin(picture, (), concat=picture, null_concat=nothing)
    condition, null = with_picture({"concat": own}, {"concat": -own}, begin)
    assert condition["concat"][0, :, 0, 0].tolist() == [1, 1, 2, 2, 2]
    assert null["concat"][0, :, 0, 0].tolist() == [0, 0, -2, -2, -2]
    condition, null = with_picture({"concat": own}, {"concat": -own}, begin._replace(null_concat=None))
    assert null["concat"][0, :, 0, 0].tolist() == [1, 1, -2, -2, -2]
    assert with_picture({}, {}, Begin(picture, ())) == ({}, {})


def test_guidance_of_an_editing_network_gets_its_second_scale():
    free = ClassifierFreeGuidance(4.0, rescale=0.3, interval=(10, 90))
    assert with_two_scales(free, EDITING, None) == TwoScaleGuidance(4.0, 1.5, rescale=0.3, interval=(10, 90))
    assert with_two_scales(free, EDITING, 1.2).image_guidance_scale == 1.2
    assert with_two_scales(TwoScaleGuidance(4.0, 2.0), EDITING, None) == TwoScaleGuidance(4.0, 2.0)
    assert with_two_scales(TwoScaleGuidance(4.0, 2.0), EDITING, 1.2) == TwoScaleGuidance(4.0, 1.2)
    assert with_two_scales(free, None, None) is free
    with pytest.raises(ValueError, match=r"image_guidance_scale=1\.2 is for models that edit pictures"):
        with_two_scales(free, INPAINTING, 1.2)


# --- what is asked for -----------------------------------------------------------------------------------------------


class Model:
    """What `choose_asked` looks at of a loaded model."""

    def __init__(self, net: nn.Module, *, unit: int = 1, coder: nn.Module | None = None, shape=SHAPE) -> None:
        self.net, self.conditioner, self.autoencoder, self.facts = net, None, coder, {"shape": shape}
        net.size_factor = unit


def asked(model: Model, **settings):
    return choose_asked(model, {"num_samples": 2, "labels": None, "prompt": None} | settings)


def saved(path, seed: int = 0, size=(16, 16), mode: str = "RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("given", "task", "masked", "expected"),
    [
        (None, None, False, STRENGTH),
        (None, None, True, None),
        (None, INPAINTING, True, None),
        (None, EDITING, False, None),
        (1, None, False, 1.0),
        (1.0, None, True, None),
        (1, EDITING, False, None),
        (0.4, None, True, 0.4),
        (0, INPAINTING, True, 0.0),
    ],
)
def test_without_a_strength_a_task_takes_its_usual_one(given, task, masked, expected):
    assert choose_strength(given, task, masked=masked) == expected


@pytest.mark.parametrize("strength", [-0.1, 1.01, 75, float("nan"), "much", True])
def test_a_strength_outside_of_0_to_1_is_an_error(strength):
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]"):
        choose_strength(strength, None, masked=False)
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\]"):
        Source([picture()], strength=strength)


def test_pictures_and_masks_repeat_over_the_samples(tmp_path):
    images = [saved(tmp_path / f"{i}.png", i) for i in range(2)]
    white = tmp_path / "mask.png"
    Image.fromarray(np.where(np.arange(16) < 5, 255, 0).astype(np.uint8)[None].repeat(16, 0)).save(white)
    got = asked(Model(Watched()), num_samples=3, image=images, mask=str(white))
    assert got.shape == SHAPE and got.source.strength is None and len(got.source.images) == 3
    assert torch.equal(got.source.images[2], got.source.images[0])
    assert not torch.equal(got.source.images[1], got.source.images[0])
    assert np.array_equal(got.source.images[1].permute(1, 2, 0), np.asarray(Image.open(images[1])))
    assert got.source.masks[0].unique().tolist() == [0, 1] and got.source.masks[0].sum() == 5 * 16


def test_a_picture_says_how_large_the_samples_are_unless_height_and_width_do(tmp_path):
    path = saved(tmp_path / "a.png", size=(30, 21))
    model = Model(Watched(), unit=4)
    assert choose_shape(model, {"image": path}) == (3, 20, 32)
    assert choose_shape(model, {"image": path, "height": 8, "width": 12}) == (3, 8, 12)
    assert choose_shape(model, {"image": path, "height": 8}) == (3, 8, 32)
    assert choose_shape(model, {"height": 24}) == (3, 24, 16)
    got = asked(model, image=path, strength=0.5)
    assert got.shape == (3, 20, 32) and got.source.images[0].shape == (3, 20, 32)


@pytest.mark.parametrize(("side", "near"), [(100, "96 or 104"), (3, "8"), (8.0, "whole number"), (0, "8")])
def test_a_size_that_cannot_be_halved_names_the_nearest(side, near):
    model = Model(Watched(channels=2), unit=4, coder=autoencoder())
    with pytest.raises(ValueError, match=f"height={side} must be a multiple of 8 .*{near}"):
        choose_shape(model, {"height": side})


def test_a_picture_far_larger_than_the_model_was_trained_on_needs_a_size(tmp_path):
    path = saved(tmp_path / "a.png", size=(80, 40))
    with pytest.raises(ValueError, match=r"80x40, and the model was trained on 16x16.*height=12 width=24"):
        picture_size(path, (16, 16), 4)


def test_pictures_of_other_sizes_are_cut_and_not_distorted(tmp_path):
    stripes = np.zeros((10, 40, 3), dtype=np.uint8)
    stripes[:, 15:25] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    (image,), _ = choose_pictures(str(tmp_path / "a.png"), None, 1, (3, 20, 20))
    assert image.shape == (3, 20, 20) and image.float().mean() > 240


def test_a_mask_of_another_size_than_its_picture_is_an_error(tmp_path):
    image, mask = saved(tmp_path / "a.png"), saved(tmp_path / "m.png", size=(8, 16), mode="L")
    with pytest.raises(ValueError, match="mask 0 is 8x16, but its image 16x16"):
        asked(Model(Watched()), image=image, mask=mask)
    with pytest.raises(ValueError, match="the mask is 8x16, but its image 16x16"):
        Source([picture()], [torch.ones(1, 16, 8)])


@pytest.mark.parametrize(
    ("extra", "settings", "message"),
    [
        (0, {"mask": "m.png"}, "mask=m.png says what to do with a picture; add image=FILE"),
        (0, {"strength": 0.5}, "strength=0.5 says what to do with a picture"),
        (4, {}, "made for inpainting pictures and needs one; add image=FILE mask=FILE"),
        (4, {"image": "a.png"}, "needs to know where; add mask=FILE"),
        (3, {}, "made for editing pictures and needs one; add image=FILE"),
        (3, {"image": "a.png", "mask": "a.png"}, "reads no mask"),
        (0, {"image": "gone.png"}, "gone.png"),
        (0, {"image": []}, "empty list"),
    ],
)
def test_what_a_picture_task_lacks_is_said(extra, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.png")
    with pytest.raises((ValueError, OSError), match=message):
        asked(Model(Watched(extra=extra)), **settings)


def test_the_command_repaints_what_is_white_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    checkpoint, image = save_tiny(tmp_path / "model.safetensors"), np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(image).save(tmp_path / "a.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 5:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    line = [f"checkpoint={checkpoint}", f"out_dir={tmp_path / 'out'}", "sampler.num_steps=4", "num_samples=3"]
    line += [f"image={tmp_path / 'a.png'}", f"mask={tmp_path / 'm.png'}"]
    status, _, err = run("sample", line, monkeypatch, capsys)
    assert status == 0, err
    drawn = np.load(tmp_path / "out" / "samples.npz")["arr_0"][..., 0]
    assert (drawn[:, :, :5] == image[:, :5]).all()
    assert not (drawn[:, :, 5:] == image[:, 5:]).all() and not (drawn[0] == drawn[1]).all()
    status, _, err = run("sample", [*line, "overwrite=true", "strength=2"], monkeypatch, capsys)
    assert status == 2 and "strength must be in [0, 1]" in err
