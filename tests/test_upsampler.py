"""Models that enlarge: what they are trained on, what a small file or earlier samples give, noise on the way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close, load, names
from PIL import Image
from tiny import run
from torch import nn
from training_cases import Stopped, assert_same_outcome, tiny

from diffusion.condition_images import choose_images
from diffusion.conditioning import JointConditioner, LowResolutionConditioner
from diffusion.data.digits import Digits
from diffusion.draws import SampleDraws
from diffusion.generate import choose_asked, generate
from diffusion.guidance import NoGuidance
from diffusion.images import read_text, save_npz, save_png, to_uint8
from diffusion.pretrained import guided_diffusion
from diffusion.process import GaussianDiffusion
from diffusion.sample_folder import files_hash
from diffusion.sampling import Sampler
from diffusion.schedule import cosine
from diffusion.training.denoiser import DenoiserTask
from diffusion.training.run import build_task, train

SHAPE = (3, 16, 16)


class Echo(nn.Module):
    """Answers x0 with the enlarged small image: what is sampled in one step is what the network was told."""

    num_classes = None

    def forward(self, x, t, *, concat):
        return F.interpolate(concat[:, :3], x.shape[-2:], mode="bilinear", align_corners=False)


def conditioner(**settings) -> LowResolutionConditioner:
    return LowResolutionConditioner(16, 4, **{"size": 4, "kernel": "area"} | settings)


def bytes_image(*size, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)


def as_floats(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def echo(images: list[torch.Tensor], seeds=None, **settings) -> torch.Tensor:
    """What one step of the echo draws, given small images."""
    diffusion = GaussianDiffusion(cosine(20), "x0")
    seeds = range(len(images)) if seeds is None else seeds
    told = {"shape": SHAPE, "seeds": list(seeds), "inputs": {"image": images}}
    return generate(Echo(), diffusion, Sampler(num_steps=1, clip=None), NoGuidance(), **told, **settings)


class Model:
    """What `choose_asked` looks at of a loaded model."""

    def __init__(self, part: nn.Module | None, num_classes: int | None = None) -> None:
        self.net, self.conditioner, self.facts = Echo(), part, {"shape": SHAPE}
        self.net.num_classes = num_classes


def asked(model: Model, **settings):
    return choose_asked(model, {"num_samples": 4, "labels": None} | settings)


# --- as guided-diffusion does it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("adm/superres*"))
def test_the_conditioner_gives_adms_upsampler_what_its_own_code_does(name):
    case = load(name)
    net = guided_diffusion.load_unet(case.config, case.group("weights"), super_resolution=True).eval()
    x, t, low = case["in.x"], case["in.timesteps"], case["in.low_res"]
    condition = {"label": case["in.y"]} if "in.y" in case.tensors else {}
    size, small = x.shape[-1], low.shape[-1]
    for inside in (True, False):  # the network enlarges, or the conditioner does
        part = LowResolutionConditioner(size, size // small, size=small if inside else size, kernel="area")
        with torch.no_grad():
            assert_close(net(x, t, **condition, **part.encode(low)), case["out.y"], 5e-5, f"inside={inside}")


def test_training_reduces_as_super_res_train_does():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(conditioner().prepare(x), F.interpolate(x, 4, mode="area"))


# --- noise conditioning augmentation ---------------------------------------------------------------------------------


def draws(count: int) -> SampleDraws:
    return SampleDraws(0, range(count))


def test_without_noise_nothing_changes_and_nothing_is_drawn():
    part = conditioner()
    prepared = part.prepare(torch.rand(2, *SHAPE))
    assert part.augmented(prepared, None) is prepared
    assert part.corrupted(prepared, torch.randn_like) is prepared


def test_the_noise_is_that_of_the_process_at_a_uniform_level():
    """z_s = alpha z + sigma eps: constant images tell sigma by their spread and alpha by their mean."""
    part = conditioner(train_noise=[0.2, 0.8], noise=0.5, tell_noise=True)
    prepared = part.prepare(torch.full((4000, 3, 4, 4), 0.5))
    assert prepared.shape == (4000, 4, 4, 4) and not prepared[:, 3].any()
    noisy = part.augmented(prepared, draws(4000))
    level = noisy[:, 3, 0, 0]
    assert torch.equal(noisy[:, 3], level[:, None, None].expand(-1, 4, 4))
    assert 0.2 <= level.min() < 0.21 and 0.79 < level.max() <= 0.8
    assert level.mean().item() == pytest.approx(0.5, abs=4 * 0.6 / 12**0.5 / 4000**0.5)
    eps = (noisy[:, :3] - (1 - level**2).sqrt()[:, None, None, None] * 0.5) / level[:, None, None, None]
    count = eps.numel()
    assert eps.mean().item() == pytest.approx(0, abs=4 / count**0.5)
    assert eps.square().mean().item() == pytest.approx(1, abs=4 * (2 / count) ** 0.5)
    fixed = part.corrupted(prepared, torch.zeros_like)
    torch.testing.assert_close(fixed[:, :3], torch.full_like(fixed[:, :3], 0.75**0.5 * 0.5))
    assert torch.equal(fixed[:, 3], torch.full_like(fixed[:, 3], 0.5))


def test_a_level_in_training_is_that_of_sampling_unless_said_otherwise():
    assert conditioner(noise=0.3).train_noise == (0.3, 0.3)
    assert conditioner(noise=0.1, train_noise=[0, 0.5]).train_noise == (0, 0.5)
    assert conditioner(tell_noise=True).provides == {"concat": 4}


def test_sampled_noise_depends_on_the_seed_alone_and_leaves_the_sample_its_own():
    images = [torch.full((3, 4, 4), value) for value in (-0.5, 0.0, 0.5)]
    noisy = {"conditioner": conditioner(noise=0.4)}
    together = echo(images, **noisy)
    for i, image in enumerate(images):
        assert torch.equal(echo([image], [i], pad_to=4, **noisy)[0], together[i])
    assert torch.equal(echo(images, conditioner=conditioner()), torch.stack(images)[:, :, :1, :1].expand(-1, *SHAPE))
    assert not torch.allclose(together, echo(images, [5, 6, 7], **noisy))
    stronger = echo(images, condition_noise=0.8, conditioner=conditioner(noise=0.4, train_noise=[0.0, 1.0]))
    eps = [
        (got - (1 - s * s) ** 0.5 * torch.stack(images)[:, :, :1, :1]) / s
        for got, s in ((together, 0.4), (stronger, 0.8))
    ]
    torch.testing.assert_close(*eps, atol=1e-5, rtol=0)


def test_noise_falls_on_the_image_only_and_on_null_conditions_alike():
    joint = JointConditioner([conditioner(noise=0.3, droppable=False), conditioner(entry="other")])
    assert joint.low_size == (4, 4) and joint.train_noise == (0.3, 0.3)
    prepared = joint.prepare([torch.zeros(2, *SHAPE), torch.zeros(2, *SHAPE)])
    for noisy in (joint.augmented(prepared, draws(2)), joint.corrupted(prepared, torch.randn_like)):
        assert noisy.parts[0].std() > 0.1 and not noisy.parts[1].any()
        told, away = joint(noisy), joint(noisy, torch.ones(2, dtype=torch.bool))
        assert torch.equal(told["concat"], away["concat"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_noise": [0.5, 0.2]}, r"train_noise=\[0.5, 0.2\] must be .* in rising order"),
        ({"train_noise": 1.5}, "train_noise=1.5 must be a standard deviation"),
        ({"noise": -0.1}, "train_noise=-0.1"),
        ({"noise": 0.9, "train_noise": [0, 0.5]}, "noise=0.9 is outside of the levels 0 to 0.5"),
        ({"noise": 0.1, "train_noise": 0}, "noise=0.1, but this model is trained without noise"),
    ],
)
def test_impossible_noise_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        conditioner(**settings)


# --- training --------------------------------------------------------------------------------------------------------

UNET = {
    "_target_": "diffusion.models.unet.SuperResolutionUNet",
    "in_channels": 3,
    "out_channels": 1,
    "channels": 8,
    "norm_groups": 4,
    "num_classes": 10,
    "stages": [{"depth": 1}, {"depth": 1, "attention": "self"}],
}
UPSCALE = {
    "_target_": "diffusion.conditioning.LowResolutionConditioner",
    "image_size": 8,
    "factor": 4,
    "channels": 1,
    "size": 2,
    "kernel": "area",
    "train_noise": [0.0, 0.5],
    "noise": 0.1,
    "tell_noise": True,
}


def upscaling(run_dir, **changes):
    parts = {"net": UNET, "conditioner": UPSCALE, "data__batch_size": 100, "callbacks__samples__every_n_steps": 3}
    sampler = {"_target_": "diffusion.sampling.Sampler", "num_steps": 1}
    return tiny(run_dir, **parts, **{"trainer__max_steps": 4, "callbacks__samples__sampler": sampler, **changes})


def test_noise_in_training_is_a_function_of_seed_and_sample(tmp_path):
    batch = {"image": torch.rand(6, 1, 8, 8), "label": torch.arange(6)}
    task: DenoiserTask = build_task(upscaling(tmp_path))

    def concat(first: int, seed: int = 0) -> torch.Tensor:
        return task.condition(batch, SampleDraws(seed, range(first, first + 6)))["concat"]

    assert torch.equal(concat(18), concat(18))
    assert not any(torch.equal(concat(18), other) for other in (concat(24), concat(18, seed=1)))
    half = {name: values[3:] for name, values in batch.items()}
    assert torch.equal(task.condition(half, SampleDraws(0, range(21, 24)))["concat"], concat(18)[3:])


def test_a_run_with_noise_goes_on_bit_for_bit(tmp_path):
    train(upscaling(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(upscaling(tmp_path / "parts", callbacks__stop={"_target_": "training_cases.StopAt", "step": 2}))
    train(upscaling(tmp_path / "parts"))
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def classes(root, count: int = 6, size: int = 20):
    for number in range(2 * count):
        folder = root / ("ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        save_png(bytes_image(size, size, 3, seed=number), folder / f"{number}.png")
    return root


RECIPE = [
    *("experiment=adm_upsample_64_256", "data.image_size=16", "data.num_classes=2", "data.batch_size=4"),
    *("data.num_workers=0", "conditioner.size=4", "net.channels=8", "+net.norm_groups=4"),
    *("net.stages=[{depth:1},{depth:1,attention:self}]", "trainer.max_steps=2", "trainer.accelerator=cpu"),
    *("num_train_timesteps=50", "sampler.num_steps=2", "callbacks=quiet", "optimizer.lr=1e-3"),
]


def test_the_recipe_trains_on_a_folder_and_samples_in_two_stages(tmp_path, monkeypatch, capsys):
    line = [*RECIPE, f"data.root={classes(tmp_path / 'images')}", f"run_dir={tmp_path / 'run'}"]
    status, _, err = run("train", line, monkeypatch, capsys)
    assert status == 0, err
    small, labels = bytes_image(5, 4, 4, 3), [1, 0, 0, 1, 1]
    save_npz(tmp_path / "small.npz", small, labels)
    save_png(small[2], tmp_path / "small.png")
    common = [f"checkpoint={tmp_path / 'run' / 'model.safetensors'}", "sampler.num_steps=2", "guidance=none"]

    def sampled(name: str, *words: str):
        status, _, err = run("sample", [*common, f"out_dir={tmp_path / name}", *words], monkeypatch, capsys)
        assert status == 0, err
        return np.load(tmp_path / name / "samples.npz")

    found = sampled("all", f"condition_image={tmp_path / 'small.npz'}", "num_samples=5")
    assert found["arr_0"].shape == (5, 16, 16, 3) and found["arr_1"].tolist() == labels
    made = run("sample", [f"from={tmp_path / 'all' / 'images' / '000003.png'}", f"out_dir={tmp_path / 'again'}",
                          "verify=true"], monkeypatch, capsys)  # fmt: skip
    assert made[0] == 0 and "identical" in made[1], made
    assert read_text(tmp_path / "again" / "images" / "000000.png")["condition_image"].endswith("small.npz#3")
    one = sampled("one", f"condition_image={tmp_path / 'small.png'}", "labels=0", "num_samples=1", "seed=2")
    assert np.array_equal(one["arr_0"][0], found["arr_0"][2])
    text = read_text(tmp_path / "one" / "images" / "000000.png")
    assert text["condition_image"].endswith("small.png")
    assert text["condition_image_sha256"] == files_hash([str(tmp_path / "small.png")])
    words = [*common, f"out_dir={tmp_path / 'no'}", f"condition_image={tmp_path / 'small.png'}", "num_samples=1"]
    for more, message in (([], "add labels=[3,7]"), (["labels=0", "condition_noise=0.1"], "trained without noise")):
        status, _, err = run("sample", [*words, *more], monkeypatch, capsys)
        assert status == 2 and message in err


@pytest.mark.slow
def test_a_trained_upsampler_draws_what_the_small_digits_show(tmp_path, monkeypatch, capsys):
    """Digits from a quarter of their pixels: reduced again, they are the small ones, and the small ones are noisy."""
    words = ["conditioner=lowres_concat", "conditioner.factor=2", "conditioner.kernel=area"]
    words += ["conditioner.train_noise=[0,0.3]", "conditioner.tell_noise=true", "net.in_channels=3"]
    words += ["task.condition_drop=0", "trainer.max_steps=150", "callbacks=quiet", f"run_dir={tmp_path / 'run'}"]
    status, _, err = run("train", words, monkeypatch, capsys)
    assert status == 0, err
    data = Digits()
    data.setup()
    real = data.val_set.samples(range(100))
    small = F.interpolate(real["image"], 4, mode="area")
    save_npz(tmp_path / "small.npz", to_uint8(small), real["label"].tolist())
    errors = {}
    for level in (0.0, 0.3):
        words = [f"checkpoint={tmp_path / 'run' / 'model.safetensors'}", f"condition_image={tmp_path / 'small.npz'}"]
        words += [f"condition_noise={level}", f"out_dir={tmp_path / str(level)}", "num_samples=100", "guidance=none"]
        status, _, err = run("sample", [*words, "sampler.num_steps=20", "save_images=false"], monkeypatch, capsys)
        assert status == 0, err
        drawn = as_floats(np.load(tmp_path / str(level) / "samples.npz")["arr_0"])
        reduced = F.interpolate(drawn, 4, mode="area")
        errors[level] = (reduced - small).abs().mean().item()
        assert errors[level] < 0.5 * (reduced.flip(0) - small).abs().mean().item()
    assert errors[0.0] < errors[0.3] and errors[0.0] < 0.15


# --- what a user gives -----------------------------------------------------------------------------------------------


def test_a_small_file_is_taken_bit_for_bit_and_a_large_one_reduced_as_in_training(tmp_path):
    small, large, between = bytes_image(4, 4, 3), bytes_image(16, 16, 3), bytes_image(9, 7, 3)
    for name, pixels in (("small", small), ("large", large), ("between", between)):
        save_png(pixels, tmp_path / f"{name}.png")
    paths = [tmp_path / f"{name}.png" for name in ("small", "large", "between")]
    images, labels = choose_images([str(path) for path in paths], 4, SHAPE, (4, 4))
    assert labels is None and [tuple(image.shape[1:]) for image in images] == [(4, 4), (16, 16), (4, 4), (4, 4)]
    assert np.array_equal(images[0].permute(1, 2, 0), small) and torch.equal(images[3], images[0])
    assert np.array_equal(images[1].permute(1, 2, 0), large)
    drawn = echo(images[:1], conditioner=conditioner())
    expected = F.interpolate(as_floats(small[None]), 16, mode="bilinear", align_corners=False)
    torch.testing.assert_close(drawn, expected)
    reduced = echo(images[1:2], conditioner=conditioner())
    low = F.interpolate(as_floats(large[None]), 4, mode="area")
    torch.testing.assert_close(reduced, F.interpolate(low, 16, mode="bilinear", align_corners=False))
    # A model that does not enlarge sees pictures at the training images' size.
    assert [tuple(image.shape[1:]) for image in choose_images(str(paths[0]), 1, SHAPE)[0]] == [(16, 16)]


def test_samples_of_an_earlier_model_come_with_their_labels_and_repeat(tmp_path):
    small, labels = bytes_image(3, 4, 4, 3), [7, 1, 4]
    save_npz(tmp_path / "samples.npz", small, labels)
    for given in (tmp_path / "samples.npz", tmp_path):
        images, told = choose_images(str(given), 5, SHAPE, (4, 4))
        assert told == [7, 1, 4, 7, 1]
        assert np.array_equal(torch.stack(images).permute(0, 2, 3, 1), small[[0, 1, 2, 0, 1]])
    images, told = choose_images([str(tmp_path / "samples.npz")], 2, SHAPE, (4, 4))
    assert told == [7, 1] and len(images) == 2
    model = Model(conditioner(), num_classes=10)
    found = asked(model, condition_image=str(tmp_path / "samples.npz"))
    assert found.labels == [7, 1, 4, 7] and len(found.inputs["image"]) == 4
    assert asked(model, condition_image=str(tmp_path / "samples.npz"), labels=[2, 3]).labels == [2, 3, 2, 3]
    assert asked(Model(conditioner()), condition_image=str(tmp_path / "samples.npz")).labels is None


def test_grey_samples_serve_a_model_of_colours(tmp_path):
    save_npz(tmp_path / "grey.npz", bytes_image(2, 4, 4, 1))
    images, told = choose_images(str(tmp_path / "grey.npz"), 2, SHAPE, (4, 4))
    assert told is None and images[0].shape == (3, 4, 4) and torch.equal(images[0][0], images[0][2])


def test_files_that_cannot_be_used_are_named(tmp_path):
    save_npz(tmp_path / "plain.npz", bytes_image(2, 4, 4, 3))
    np.savez(tmp_path / "odd.npz", bytes_image(2, 4, 4, 3), np.array([0.5, 1.0]))
    (tmp_path / "text.png").write_text("no picture")
    model = Model(conditioner(), num_classes=10)
    for path, settings, message in (
        ("plain.npz", {}, "the files tell none; add labels="),
        ("odd.npz", {}, "arr_1 of .*odd.npz must hold a label, a whole number, for each of its 2 images"),
        ("text.png", {"labels": 1}, "condition_image=.*text.png cannot be read as an image"),
        ("none.png", {"labels": 1}, "condition_image=.*none.png cannot be read as an image"),
        ("none.npz", {"labels": 1}, "there is no file or folder .*none.npz"),
        ("plain.npz", {"labels": 11}, "must be whole numbers from 0 to 9"),
        ("plain.npz", {"labels": 1, "condition_noise": 0.2}, "condition_noise=0.2, but this model is trained without"),
    ):
        with pytest.raises(ValueError, match=message):
            asked(model, condition_image=str(tmp_path / path), **settings)
    with pytest.raises(ValueError, match="condition_image is an empty list"):
        choose_images([], 1, SHAPE)
    noisy = Model(conditioner(noise=0.1, train_noise=[0, 0.3]))
    given = {"condition_image": str(tmp_path / "plain.npz")}
    assert asked(noisy, **given, condition_noise=0.25).condition_noise == 0.25
    with pytest.raises(ValueError, match=r"condition_noise=0.4 is outside of the levels 0 to 0.3"):
        asked(noisy, **given, condition_noise=0.4)


def test_what_samples_are_conditioned_on_is_known_by_its_content(tmp_path):
    folder = tmp_path / "folder"
    save_png(bytes_image(4, 4, 3), folder / "a.png")
    before = files_hash([str(folder)])
    assert before == files_hash([str(folder)]) != files_hash([str(folder), str(folder)])
    save_png(bytes_image(4, 4, 3, seed=1), folder / "a.png")
    assert files_hash([str(folder)]) != before


def test_pictures_are_turned_upright_before_they_are_measured(tmp_path):
    picture = Image.fromarray(bytes_image(4, 8, 3))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    images, _ = choose_images(str(tmp_path / "turned.png"), 1, SHAPE, (4, 4))
    assert images[0].shape == (3, 4, 4)
