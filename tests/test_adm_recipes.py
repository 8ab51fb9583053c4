"""The recipes of ADM and iDDPM: the papers' hyperparameters, scores with their place, and commands that compose."""

import re
import shlex

import pytest
import torch
from tiny import ROOT

from diffusion.checkpoint import build
from diffusion.cli import composed
from diffusion.losses import DenoisingLoss
from diffusion.timestep_samplers import ImportanceTimesteps

EXPERIMENTS = ROOT / "configs" / "experiment"
# Tables 11 and 13 of arXiv 2105.05233: schedule, millions of parameters, channels, depth, channel multiples, heads,
# channels a head, image size, attention resolutions, dropout, batch size, iterations, learning rate.
M = 1_000_000
TABLES = {
    "adm_imagenet64": ("cosine", 296, 192, 3, "1,2,3,4", None, 64, 64, "32,16,8", 0.1, 2048, 540_000, 3e-4),
    "adm_imagenet128": ("linear", 422, 256, 2, "1,1,2,3,4", 4, None, 128, "32,16,8", 0.0, 256, 4_360_000, 1e-4),
    "adm_imagenet256": ("linear", 554, 256, 2, "1,1,2,2,4,4", None, 64, 256, "32,16,8", 0.0, 256, 1_980_000, 1e-4),
    "adm_imagenet512": ("linear", 559, 256, 2, "0.5,1,1,2,2,4,4", None, 64, 512, "32,16,8", 0.0, 256, 1_940_000, 1e-4),
    "adm_imagenet256_unconditional": (
        *("linear", 553, 256, 2, "1,1,2,2,4,4", None, 64, 256, "32,16,8", 0.0, 256, 2 * M, 1e-4),
    ),
    "adm_lsun256": ("linear", 552.8, 256, 2, "1,1,2,2,4,4", None, 64, 256, "32,16,8", 0.1, 256, M // 2, 1e-4),
    "adm_upsample_64_256": ("linear", 312, 192, 2, "1,1,2,2,4,4", 4, None, 256, "32,16,8", 0.0, 256, M // 2, 1e-4),
    "adm_upsample_128_512": ("linear", 309, 192, 2, "1,1,2,2,4,4", None, 64, 512, "32,16", 0.0, 256, 1_050_000, 1e-4),
}
SCORES = {  # what each header must tell, and the table it stands in
    "adm_imagenet64": ("FID 2.07", "table 5"),
    "adm_imagenet128": ("FID 5.91", "FID 2.97", "table 5"),
    "adm_imagenet256": ("FID 10.94", "FID 4.59", "table 5"),
    "adm_imagenet512": ("FID 23.24", "FID 7.72", "table 5"),
    "adm_imagenet256_unconditional": ("FID 26.21", "FID 12.00", "table 4"),
    "adm_lsun256": ("FID 1.90", "table 5"),
    "adm_upsample_64_256": ("FID 7.49", "FID 3.94", "table 6"),
    "adm_upsample_128_512": ("FID 9.96", "FID 3.85", "table 6"),
    "iddpm_cifar10": ("3.17 bits/dim", "FID 3.19", "2.94 bits/dim", "FID 11.47", "table 2"),
}


def header(recipe: str) -> str:
    """The recipe's opening comment as one line."""
    lines = (EXPERIMENTS / f"{recipe}.yaml").read_text().split("defaults:")[0].splitlines()[1:]
    return " ".join(line.removeprefix("#").rstrip("\\").strip() for line in lines)


@pytest.mark.parametrize("recipe", TABLES)
def test_the_hyperparameters_are_the_papers(recipe):
    config = composed("train", [f"experiment={recipe}"])
    schedule, millions, channels, depth, mults, heads, width, size, attention, dropout, batch, steps, rate = TABLES[
        recipe
    ]
    net, data, trainer = config["net"], config["data"], config["trainer"]
    assert config["schedule"]["_target_"].endswith(f".{schedule}") and config["num_train_timesteps"] == 1000
    with torch.device("meta"):
        count = sum(p.numel() for p in build(net).parameters())
    assert count == pytest.approx(millions * 1e6, rel=2e-3)
    assert (net["channels"], net.get("num_heads"), net.get("head_channels")) == (channels, heads, width)
    assert [stage["depth"] for stage in net["stages"]] == [depth] * len(net["stages"])
    assert [stage["channel_mult"] for stage in net["stages"]] == [float(mult) for mult in mults.split(",")]
    attended = [size >> i for i, stage in enumerate(net["stages"]) if stage.get("attention") == "self"]
    assert attended == [int(resolution) for resolution in attention.split(",")]
    assert (net["resample"], net["modulation"], net["dropout"]) == ("residual", "scale_shift", dropout)
    assert data["image_size"] == size
    assert data["batch_size"] * 8 * trainer["accumulate_grad_batches"] == batch
    assert trainer["max_steps"] == steps and trainer["gradient_clip_val"] is None
    optimizer = config["optimizer"]
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"]) == (rate, [0.9, 0.999], 0.0)
    assert config["ema"]["decays"] == [0.9999] and config["ema"]["rule"]["_target_"].endswith("ConstantDecay")
    unconditional = recipe.endswith("unconditional") or "lsun" in recipe
    assert net["num_classes"] == data["num_classes"] == (None if unconditional else 1000)
    assert config["sampler"]["num_steps"] == "250" and config["sampler"]["eta"] == 1.0


@pytest.mark.parametrize("recipe", SCORES)
def test_every_recipe_says_the_papers_score_and_where_it_stands(recipe):
    text = header(recipe)
    assert "arXiv" in text and "not measured by us" in text
    for fact in SCORES[recipe]:
        assert fact in text, f"{recipe} does not say {fact}"


@pytest.mark.parametrize("recipe", SCORES)
def test_the_commands_in_the_headers_compose(recipe):
    commands = re.findall(r"uv run (train|sample)\.py ((?:[^\s;]+=[^\s;]+ )+)", header(recipe) + " ")
    assert {script for script, _ in commands} == {"train", "sample"}
    for script, words in commands:
        config = composed(script, shlex.split(words))
        if script == "train":
            assert config["name"] == recipe


@pytest.mark.parametrize(
    "words", ["guidance=none sampler=ddpm sampler.num_steps='\"250\"'", "sampler.num_steps=ddim25"]
)
def test_the_papers_strides_are_guided_diffusions(words):
    config = composed("sample", shlex.split(words))
    sampler = build(config["sampler"], {"diffusion.sampling.Sampler"})
    schedule = build({"_target_": "diffusion.schedule.linear"})
    grid = sampler.timesteps(schedule)
    assert len(grid) - 1 == int(re.sub(r"\D", "", config["sampler"]["num_steps"]))
    assert grid == schedule.timesteps(config["sampler"]["num_steps"])


def test_iddpm_on_cifar10_has_both_objectives():
    hybrid = composed("train", ["experiment=iddpm_cifar10"])
    assert (hybrid["num_train_timesteps"], hybrid["diffusion"]["time_scale"]) == (4000, 0.25)
    assert (hybrid["diffusion"]["variance"], hybrid["out_channels"]) == ("learned", 6)
    assert hybrid["loss"]["vlb_weight"] == 0.001 and hybrid["net"]["dropout"] == 0.3
    assert (hybrid["optimizer"]["lr"], hybrid["data"]["batch_size"], hybrid["trainer"]["max_steps"]) == (
        1e-4,
        128,
        500_000,
    )
    bound = composed("train", ["experiment=iddpm_cifar10", "loss=vlb", "timestep_sampler=importance"])
    loss = build(bound["loss"], {"diffusion.losses.DenoisingLoss"})
    assert isinstance(loss, DenoisingLoss) and (loss.kind, loss.vlb_weight) == ("vlb", 1.0)
    loss.check(build(bound["diffusion"]))
    sampler = build(bound["timestep_sampler"], {"diffusion.timestep_samplers.ImportanceTimesteps"})
    assert isinstance(sampler, ImportanceTimesteps) and sampler.num_train_timesteps == 4000
    assert sampler.history.shape == (4000, 10) and sampler.uniform_fraction == 0.001


@pytest.mark.parametrize("objective", [["loss=hybrid"], ["loss=vlb", "timestep_sampler=importance"]])
def test_either_objective_trains_the_variance(objective):
    """One step on a small network: the half of the answer that is the variance gets a gradient."""
    config = composed("train", ["experiment=iddpm_cifar10", "num_train_timesteps=40", *objective])
    loss, diffusion = build(config["loss"], {"diffusion.losses.DenoisingLoss"}), build(config["diffusion"])
    net = torch.nn.Conv2d(3, 6, 3, padding=1)
    t = torch.tensor([1, 7, 30, 0])
    x0 = torch.rand(4, 3, 8, 8) * 2 - 1
    loss(diffusion, lambda x, t: net(x), x0, t, torch.randn_like(x0), {}).loss.mean().backward()
    assert net.weight.grad[3:].abs().sum() > 0
