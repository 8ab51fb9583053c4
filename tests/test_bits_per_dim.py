"""Bits per dimension on a validation set: against the entropy of data whose exact denoiser is known, and by hand."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import config, facts, random_net, save_tiny
from torch import nn

from diffusion.checkpoint import LoadedModel, Part, build, load_model, save_model
from diffusion.conditioning import LowResolutionConditioner
from diffusion.data.digits import Digits
from diffusion.data.images import ImageSet
from diffusion.denoiser import denoiser
from diffusion.evaluation.bits_per_dim import bits_per_dim, evenly_spaced, main
from diffusion.guidance import clip_x0
from diffusion.likelihood import bits_per_dim as bound
from diffusion.process import GaussianDiffusion, variances
from diffusion.randomness import fold
from diffusion.sampling import SampleNoise
from diffusion.schedule import CLEAN, cosine

STD = 0.2  # of the Gaussian pixels: hardly any reaches the edges


class Pixels(ImageSet):
    """8-bit images of independent Gaussian pixels, and a label each."""

    def __init__(self, count: int = 40, size: int = 16) -> None:
        super().__init__()
        values = np.random.default_rng(0).normal(0, STD, size=(count, 1, size, size))
        self.values = torch.from_numpy(((values.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))

    def __len__(self) -> int:
        return len(self.values)

    def load(self, indices):
        return {"image": self.values[list(indices)], "label": torch.as_tensor(indices) % 10}


class Exact(nn.Module):
    """E[eps | x_t] for Gaussian pixels, and the exact variance of x_{t-1} given x_t: nothing is left to learn."""

    num_classes = None

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule, self.learned = schedule, True

    def forward(self, x, t):
        here, there = self.schedule.level(t), self.schedule.level(t - 1)
        alpha, sigma = here.to(x)
        total = alpha**2 * STD**2 + sigma**2
        eps = sigma * x / total
        if not self.learned:
            return eps
        jump, posterior = (v.to(x) for v in variances(here, there))
        coefficient = there.alpha.to(x) * jump / sigma**2
        exact = posterior + coefficient**2 * STD**2 * sigma**2 / total
        low, high = posterior.clamp(min=1e-20).log(), jump.log()
        frac = torch.where((t == 0).view(-1, 1, 1, 1), torch.ones_like(low), (exact.log() - low) / (high - low))
        return torch.cat([eps, (2 * frac - 1).expand_as(x)], dim=1)


def loaded(net: nn.Module, diffusion: GaussianDiffusion, **about) -> LoadedModel:
    known = {"path": "model", "config": {}, "weights": "ema", "step": 7, "ema_decay": None, "shapes": {}}
    versions = {"package_version": "", "git_commit": "", "torch_version": ""}
    return LoadedModel(net=net, diffusion=diffusion, facts={"shape": [1, 16, 16]} | about, **known, **versions)


def entropy() -> float:
    """Of a Gaussian pixel in 256 levels, in bits."""
    levels = (torch.arange(256, dtype=torch.float64) / 127.5 - 1) / STD
    edges = torch.special.ndtr(torch.cat([levels - 1 / 255 / STD, levels[-1:] + 1 / 255 / STD]))
    p = edges.diff().clamp(min=1e-300)
    return -(p * p.log2()).sum().item()


def test_the_bound_of_an_exact_denoiser_is_the_entropy_of_the_data():
    schedule = cosine(1000)
    net = Exact(schedule)
    result = bits_per_dim(loaded(net, GaussianDiffusion(schedule, "eps", "learned")), Pixels(), batch_size=20)
    assert result["bits_per_dim"] == pytest.approx(entropy(), abs=4 * result["standard_error"] + 0.01)
    # log p of a Gaussian pixel varies by 1/2 nat^2, an image has 256 pixels; the noise of the bound comes on top.
    assert 1 < result["standard_error"] / (0.5**0.5 / math.log(2) / 16 / 40**0.5) < 2
    assert result["prior"] < 1e-4
    assert result["bits_per_dim"] == pytest.approx(result["prior"] + result["vb"], rel=1e-6)
    net.learned = False
    for variance in ("posterior", "jump"):  # a fixed variance cannot be exact at every step
        fixed = bits_per_dim(loaded(net, GaussianDiffusion(schedule, "eps", variance)), Pixels(), num_images=10)
        assert fixed["bits_per_dim"] > result["bits_per_dim"] + 4 * result["standard_error"]
        assert fixed["mse"] == pytest.approx(result["mse"], rel=0.05)  # the mean is the same


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(save_tiny(tmp_path_factory.mktemp("model") / "model.safetensors"))


@pytest.fixture(scope="module")
def digits():
    data = Digits()
    data.setup()
    return data.val_set


def test_it_is_the_bound_of_each_image_under_its_own_label_and_noise(model, digits, tmp_path):
    result = bits_per_dim(model, digits, 3, num_images=5, num_steps="4", batch_size=2, out=tmp_path / "terms.npz")
    numbers = [i * 597 // 5 for i in range(5)]
    batch = digits.samples(numbers)
    denoise = clip_x0(denoiser(model.diffusion, model.net, label=batch["label"]), model.diffusion.schedule.level)
    grid = model.diffusion.schedule.timesteps("4")
    noise = SampleNoise([fold(3, "bits", number) for number in numbers])
    expected = bound(model.diffusion, denoise, batch["image"], noise=noise, timesteps=grid)
    stored = np.load(tmp_path / "terms.npz")
    assert stored["timesteps"].tolist() == list(grid[:-1]) and grid[-1] == CLEAN
    for name, theirs in (("bits_per_dim", expected.total), ("vb", expected.vlb.mean(0))):
        np.testing.assert_allclose(stored[name], theirs, rtol=1e-5)
    np.testing.assert_allclose(stored["mse"], expected.eps_mse.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stored["x0_mse"], expected.x0_mse.mean(0), rtol=1e-5)
    assert result["bits_per_dim"] == pytest.approx(expected.total.mean().item(), rel=1e-5)
    error = stored["bits_per_dim"].std(ddof=1) / math.sqrt(5)
    assert result["standard_error"] == pytest.approx(error, rel=1e-6)
    assert (result["num_images"], result["of_images"], result["num_steps"]) == (5, 597, 4)
    json.dumps(result)


def test_it_depends_on_the_seed_and_neither_on_the_batches_nor_on_the_other_images(model, digits, tmp_path):
    settings = {"num_images": 6, "num_steps": 3}
    one = bits_per_dim(model, digits, 0, **settings, batch_size=6)
    other = bits_per_dim(model, digits, 0, **settings, batch_size=4)
    assert one["bits_per_dim"] == pytest.approx(other["bits_per_dim"], rel=1e-5)
    assert bits_per_dim(model, digits, 1, **settings)["bits_per_dim"] != one["bits_per_dim"]
    assert bits_per_dim(model, digits, 0, **settings, clip=False)["bits_per_dim"] != one["bits_per_dim"]
    for count in (3, 6):
        bits_per_dim(model, digits, 0, num_images=count, num_steps=3, out=tmp_path / f"{count}.npz")
    few, more = (np.load(tmp_path / f"{count}.npz")["bits_per_dim"] for count in (3, 6))
    np.testing.assert_allclose(few, more[::2], rtol=1e-5)


def test_the_images_are_evenly_spaced():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7] and evenly_spaced(3, 10) == [0, 1, 2]
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        evenly_spaced(3, 0)


def test_one_image_has_no_standard_error(model, digits):
    assert bits_per_dim(model, digits, num_images=1, num_steps=2)["standard_error"] is None


def test_an_upsampler_is_told_each_images_small_version(tmp_path, digits):
    node = {"_target_": "diffusion.conditioning.LowResolutionConditioner", "image_size": 8, "factor": 2, "channels": 1}
    settings = config(in_channels=2)
    part = Part(module=build(node), config=node)
    path = tmp_path / "up.safetensors"
    save_model(path, random_net(settings), settings, weights="ema", step=1, facts=facts(), parts={"conditioner": part})
    model = load_model(path)
    assert isinstance(model.conditioner, LowResolutionConditioner)
    result = bits_per_dim(model, digits, num_images=4, num_steps=2)
    assert math.isfinite(result["bits_per_dim"])
    plain = model.conditioner.prepare
    model.conditioner.prepare = lambda images: plain(images.flip(0))
    assert bits_per_dim(model, digits, num_images=4, num_steps=2)["bits_per_dim"] != result["bits_per_dim"]


def test_the_command_prints_one_line_of_json(tmp_path, capsys):
    path = save_tiny(tmp_path / "model.safetensors")
    main([f"checkpoint={path}", "data=digits", "num_images=6", "num_steps=3", f"out={tmp_path / 'terms.npz'}"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert len(printed.out.splitlines()) == 1 and "evaluated 6/6 images" in printed.err
    assert (result["data"], result["split"], result["clip"]) == ("digits", "val", True)
    assert result["bits_per_dim"] == pytest.approx(np.load(tmp_path / "terms.npz")["bits_per_dim"].mean())
    main([f"checkpoint={path}", "data=digits", "split=train", "num_images=2", "num_steps=3", "clip=false"])
    assert json.loads(capsys.readouterr().out)["of_images"] == 1200


def test_what_cannot_be_evaluated_is_one_error(tmp_path, digits):
    path = save_tiny(tmp_path / "model.safetensors")
    large = save_tiny(tmp_path / "large.safetensors", about=facts(shape=[1, 16, 16]))
    for words, message in (
        (["data=digits"], "give the denoiser and the data: checkpoint="),
        ([f"checkpoint={path}"], "give the denoiser and the data: data="),
        ([f"checkpoint={path}", "data=digit"], "there is no data set 'digit'"),
        ([f"checkpoint={path}", "data=digits", "split=test"], "split=test must be train or val"),
        ([f"checkpoint={path}", "data=digits", "data.rot=3"], "the data set digits has no setting rot"),
        ([f"checkpoint={path}", "data=digits", "clip=maybe"], "clip=maybe does not fit; it must be of type bool"),
        ([f"checkpoint={path}", "data=digits", "num_steps=200"], "num_steps '200'"),
        ([f"checkpoint={large}", "data=digits"], "data.image_size is 16, but the digits have 8"),
        ([f"checkpoint={path}", "data=shapes", "data.num_train=9", "data.num_val=9", "data.channels=3"], "num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            main(words)
    with pytest.raises(ValueError, match=r"the images are \[1, 8, 8\] .* a model of \[1, 16, 16\]; set data.channels"):
        bits_per_dim(load_model(large), digits)
    model = load_model(path)
    object.__setattr__(model, "autoencoder", nn.Identity())
    with pytest.raises(ValueError, match="draws latents, whose bound is none of pixels"):
        bits_per_dim(model, digits)


def test_labels_that_the_data_lack_are_named(model):
    class Unlabelled(Pixels):
        def load(self, indices):
            return {"image": self.values[list(indices)]}

    with pytest.raises(ValueError, match="is told label of an image, which these data do not give"):
        bits_per_dim(model, Unlabelled(size=8))
