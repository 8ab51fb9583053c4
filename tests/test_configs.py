"""Every config composes and builds, every sampler samples, and the layers of the package are as drawn in its design."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import ROOT

from diffusion.autoencoder_losses import AutoencoderLoss
from diffusion.cli.composing import register_latents
from diffusion.draws import SampleDraws
from diffusion.models.classifier import Classifier
from diffusion.pretrained.guided_diffusion_classifier import classifier_config, classifier_flags
from diffusion.process import GaussianDiffusion
from diffusion.sampling import SampleNoise
from diffusion.training.classifier import ClassifierTask
from diffusion.training.denoiser import DenoiserTask
from diffusion.training.run import build

CONFIGS = ROOT / "configs"
GROUPS = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
SIZE, CHANNELS = 8, 3
# Which autoencoder a recipe's `autoencoder.checkpoint` is meant to be.
LATENTS_OF = {
    "digits_latent": "digits",
    "shapes_latent_text": "shapes",
    "ldm_f4_class": "vq_f4",
    "ldm_f8_text": "kl_f8",
}


def composed(*overrides: str, name: str = "train") -> dict:
    """Return the resolved config; what a user must give is given."""
    register_latents()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(name, overrides=list(overrides))
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, str(ROOT))
    return OmegaConf.to_container(cfg, resolve=True)


def built(node: dict):
    return instantiate(node, _convert_="all")


def options(group: str) -> list[str]:
    return [option for name, option in OPTIONS if name == group and option != "none"]


def trains(experiment: str, what: str) -> bool:
    """Say whether a recipe trains a "denoiser", a "classifier" or an "autoencoder"."""
    return composed(f"experiment={experiment}")["task"]["_target_"].startswith(f"diffusion.training.{what}.")


DENOISERS = [experiment for experiment in options("experiment") if trains(experiment, "denoiser")]
AUTOENCODERS = [experiment for experiment in options("experiment") if trains(experiment, "autoencoder")]
CLASSIFIERS = [experiment for experiment in options("experiment") if trains(experiment, "classifier")]
# Which denoisers a recipe's classifier is meant to guide.
GUIDES = {
    "digits_classifier": ["digits_unconditional", "digits"],
    "shapes_classifier": ["shapes"],
    "classifier": ["image_folder"],
    "imagenet64_classifier": ["adm_imagenet64"],
    "imagenet128_classifier": ["adm_imagenet128"],
    "imagenet256_classifier": ["adm_imagenet256", "adm_imagenet256_unconditional"],
    "imagenet512_classifier": ["adm_imagenet512"],
}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_and_resolves(group, option):
    config = composed(f"{group}={option}")
    trained = config.get("net") or config.get("autoencoder") or config.get("classifier")
    assert config["run_dir"] and (option == "none" or trained)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_recipe_opens_with_its_command_hardware_time_and_score(experiment):
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    comments = [line for line in text.split("defaults:")[0].splitlines() if line.startswith("#")]
    for fact in ("command:", "hardware:", "wall time:", "score:"):
        assert any(fact in line for line in comments), f"{experiment} does not say its {fact}"
    assert composed(f"experiment={experiment}")["name"] == experiment


@pytest.mark.parametrize("experiment", DENOISERS)
def test_every_recipe_builds_a_network_that_fits_its_process_its_latents_and_its_condition(experiment):
    config = composed(f"experiment={experiment}")
    data = config["data"]
    shape = (data["channels"], data["image_size"], data["image_size"])
    latents_of = LATENTS_OF.get(experiment)
    node = composed(f"experiment={AUTOENCODERS[0]}", f"autoencoder={latents_of}")["autoencoder"] if latents_of else None
    with torch.device("meta"):
        net, conditioner = built(config["net"]), build(config["conditioner"])
        channels = {"in_channels": shape[0], "out_channels": shape[0], "scale_factor": 1.0}
        autoencoder = built({**node, **channels}) if node else None
    assert bool(config["autoencoder"]) == (autoencoder is not None)
    diffusion = built(config["diffusion"])
    task = DenoiserTask(
        net,
        diffusion,
        loss=built(config["loss"]),
        optimizer=built(config["optimizer"]),
        timestep_sampler=built(config["timestep_sampler"]),
        autoencoder=autoencoder,
        conditioner=conditioner,
    )
    task.check_shape(shape)
    if autoencoder is None:
        assert net.out_channels == diffusion.out_channels(shape[0])
    assert built(config["sampler"]).timesteps(diffusion.schedule)[-1] == -1
    check_optimizer(config)


@pytest.mark.parametrize("experiment", AUTOENCODERS)
def test_every_autoencoder_recipe_builds_what_fits_its_images(experiment):
    config = composed(f"experiment={experiment}")
    data = config["data"]
    shape = (data["channels"], data["image_size"], data["image_size"])
    with torch.device("meta"):
        autoencoder, discriminator = built(config["autoencoder"]), build(config["discriminator"])
        assert autoencoder.latent_shape(shape)[0] == autoencoder.latent_channels
        if discriminator is not None:
            assert discriminator(torch.empty(2, *shape)).ndim == 4
    loss = {**config["loss"], "perceptual": None}  # LPIPS looks for its weights when it is built
    assert (built(loss).adversarial is None) == (discriminator is None)
    check_optimizer(config)


@pytest.mark.parametrize("experiment", CLASSIFIERS)
def test_every_classifier_recipe_builds_what_fits_its_images_and_the_denoisers_that_it_guides(experiment):
    classes = ["data.num_classes=10"] if experiment == "classifier" else []  # the user's
    config = composed(f"experiment={experiment}", *classes)
    data = config["data"]
    shape = (data["channels"], data["image_size"], data["image_size"])
    with torch.device("meta"):
        classifier = built(config["classifier"])
        assert classifier(torch.empty(2, *shape), torch.empty(2)).shape == (2, data["num_classes"])
    task = ClassifierTask(
        classifier,
        built(config["diffusion"]),
        optimizer=built(config["optimizer"]),
        timestep_sampler=built(config["timestep_sampler"]),
        **{key: value for key, value in config["task"].items() if key != "_target_"},
    )
    task.check_shape(shape)
    assert not config["net"] and not config["sampler"] and "samples" not in config["callbacks"]
    check_optimizer(config)
    for denoiser in GUIDES[experiment]:
        guided = composed(f"experiment={denoiser}")
        assert guided["schedule"] == config["schedule"]
        assert guided["diffusion"]["time_scale"] == config["diffusion"]["time_scale"]
        assert (guided["data"]["channels"], guided["data"]["image_size"]) == shape[:2]


# Table 12 of arXiv 2105.05233, and the sizes of what was published, to the parameter.
@pytest.mark.parametrize(
    ("size", "depth", "parameters", "weight_decay", "batch_size", "steps", "rate"),
    [
        (64, 4, 65_438_568, 0.2, 1024, 300_000, 6e-4),
        (128, 2, 42_568_040, 0.05, 256, 300_000, 3e-4),
        (256, 2, 54_096_360, 0.05, 256, 500_000, 3e-4),
        (512, 2, 54_448_360, 0.05, 256, 500_000, 3e-4),
    ],
)
def test_the_imagenet_classifiers_are_the_papers(size, depth, parameters, weight_decay, batch_size, steps, rate):
    config = composed(f"experiment=imagenet{size}_classifier")
    with torch.device("meta"):
        classifier = built(config["classifier"])
        theirs = Classifier(**classifier_config(classifier_flags({"image_size": size, "classifier_depth": depth})))
    assert sum(p.numel() for p in classifier.parameters()) == parameters
    assert {k: v.shape for k, v in classifier.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    for name, module in classifier.named_modules():  # what has no weights: heads, resampling, groups
        assert repr(module) == repr(theirs.get_submodule(name))
        assert getattr(module, "num_heads", None) == getattr(theirs.get_submodule(name), "num_heads", None)
    assert (config["optimizer"]["lr"], config["optimizer"]["weight_decay"]) == (rate, weight_decay)
    accumulated = config["trainer"]["accumulate_grad_batches"]
    assert config["data"]["batch_size"] * 8 * accumulated == batch_size and config["trainer"]["max_steps"] == steps
    assert config["data"]["random_crop"] and config["data"]["num_classes"] == 1000 and not config["ema"]
    optimizer = built(config["optimizer"])([torch.nn.Parameter(torch.zeros(1))])
    scheduler = build(config["lr_scheduler"])(optimizer)
    for step in (0, 1000, steps // 2):
        assert scheduler.lr_lambdas[0](step) == pytest.approx(1 - step / steps)


def flattened(node: dict, prefix: str = "") -> dict:
    """Return {dotted key: value} of nested mappings."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {key: value for name, child in node.items() for key, value in flattened(child, f"{prefix}.{name}").items()}


def test_the_unconditional_digits_are_the_digits_without_labels():
    one, other = (flattened(composed(f"experiment={name}")) for name in ("digits", "digits_unconditional"))
    changed = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert changed - {".run_dir"} == {
        ".name",
        ".latents_dir",
        ".net.num_classes",
        ".task.condition_drop",
        *(
            f"{place}guidance.{key}"
            for place in (".", ".callbacks.samples.")
            for key in ("_target_", "guidance_scale", "rescale")
        ),
    }
    assert other[".net.num_classes"] is None and other[".data.num_classes"] == 10


def check_optimizer(config):
    scheduler = build(config["lr_scheduler"])
    optimizer = built(config["optimizer"])([torch.nn.Parameter(torch.zeros(1))])
    assert scheduler is None or scheduler(optimizer).get_last_lr()


@pytest.mark.parametrize(("experiment", "millions"), [("ldm_f4_class", 400.9), ("ldm_f8_text", 859.5)])
def test_the_full_size_recipes_have_their_papers_networks(experiment, millions):
    with torch.device("meta"):
        net = built(composed(f"experiment={experiment}")["net"])
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)


def test_the_cifar10_recipe_is_iddpms():
    config = composed("experiment=cifar10")
    with torch.device("meta"):
        net = built(config["net"])
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(52.5e6, rel=0.01)
    assert config["diffusion"]["variance"] == "learned" and config["loss"]["vlb_weight"] == 0.001
    assert config["num_train_timesteps"] * config["diffusion"]["time_scale"] == 1000
    assert config["net"]["num_classes"] is None and config["net"]["dropout"] == 0.3


@pytest.mark.parametrize("option", options("schedule"))
def test_every_schedule_falls_from_almost_clean_to_almost_noise(option):
    schedule = built(
        composed(f"schedule={option}", "num_train_timesteps=50", "data.image_size=64", "data=shapes")["schedule"]
    )
    assert schedule.num_train_timesteps == 50
    assert (schedule.alphas_cumprod.diff() <= 0).all() and schedule.alphas_cumprod[0] > 0.9


@pytest.mark.parametrize("guidance", options("guidance"))
@pytest.mark.parametrize("sampler", options("sampler"))
def test_every_sampler_samples_with_every_guidance(sampler, guidance):
    config = composed(f"sampler={sampler}", f"guidance={guidance}", "num_train_timesteps=60")
    diffusion = GaussianDiffusion(built(config["schedule"]), "eps")
    label = torch.tensor([0, 1])

    def net(x, t, *, label):
        return 0.5 * x + 0.1 * label.view(-1, 1, 1, 1)

    denoise = built(config["guidance"])(diffusion, net, {"label": label}, {"label": torch.full_like(label, -1)})
    noise = SampleNoise([0, 1])
    x = built(config["sampler"]).sample(diffusion, denoise, noise.initial((CHANNELS, SIZE, SIZE)), noise=noise)
    assert x.shape == (2, CHANNELS, SIZE, SIZE) and x.isfinite().all()


@pytest.mark.parametrize("option", options("loss"))
def test_every_loss_gives_a_gradient(option):
    config = composed(f"loss={option}")
    loss = built({**config["loss"], **({"perceptual": None} if "perceptual" in config["loss"] else {})})
    if isinstance(loss, AutoencoderLoss):
        x, y = torch.rand(2, 4, CHANNELS, SIZE, SIZE).requires_grad_()
        moments = {"mean": x[:, :1], "logvar": x[:, :1]} if "codebook" not in option else {"codebook": x.mean()}
        assert loss(x, y, **moments, step=10).loss.requires_grad
        return
    learned = loss.vlb_weight > 0
    diffusion = GaussianDiffusion(built(config["schedule"]), "v", variance="learned" if learned else "posterior")
    loss.check(diffusion)
    net = torch.nn.Conv2d(CHANNELS, diffusion.out_channels(CHANNELS), 3, padding=1)
    x0 = torch.rand(4, CHANNELS, SIZE, SIZE) * 2 - 1
    t = torch.tensor([0, 1, 500, 999])
    terms = loss(diffusion, lambda x, t: net(x), x0, t, loss.noise(x0, SampleDraws(0, range(4))), {})
    terms.loss.mean().backward()
    assert net.weight.grad.isfinite().all() and net.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("option", options("timestep_sampler"))
def test_every_timestep_sampler_stays_on_the_chain(option):
    sampler = built(composed(f"timestep_sampler={option}", "num_train_timesteps=7")["timestep_sampler"])
    t, weight = sampler(SampleDraws(0, range(64)))
    assert set(t.tolist()) <= set(range(7)) and weight.shape == (64,)


def test_the_ablation_line_reaches_the_process():
    config = composed("schedule=linear", "task.parameterization=eps", "task.variance=jump")
    assert config["diffusion"]["schedule"]["_target_"].endswith("linear")
    assert (config["diffusion"]["parameterization"], config["diffusion"]["variance"]) == ("eps", "jump")


@pytest.mark.parametrize(("override", "node"), [("ema=none", "ema"), ("lr_scheduler=constant", "lr_scheduler")])
def test_a_part_can_be_switched_off_though_the_recipe_sets_values_in_it(override, node):
    config = composed(override)
    assert config[node]  # the recipe's values are still there
    assert build(config[node]) is None


def test_sampling_needs_nothing_from_the_training_config():
    config = composed(name="sample")
    assert config["sampler"]["num_steps"] == 50 and config["guidance"]["guidance_scale"] == 2.0


# ---------------------------------------------------------------------------------------------------------------------
# layers

MATHS = {
    *("randomness", "schedule", "process", "denoiser", "guidance", "solvers", "sampling", "losses"),
    *("grids", "brownian", "timestep_samplers", "likelihood", "autoencoder_losses"),
}
FRAMEWORKS = {"lightning", "hydra", "omegaconf", "wandb", "tensorboard"}
MAY_USE_FRAMEWORKS = ("training", "data", "cli", "checkpoint", "processes", "sweep")
MODULES = sorted((ROOT / "diffusion").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return what a file imports anywhere in it, our own modules as `diffusion.NAME`."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "diffusion" else {module}
    return found


def layer(path: Path) -> str:
    return path.relative_to(ROOT / "diffusion").with_suffix("").parts[0]


def third_party(names: set[str]) -> set[str]:
    tops = {name.partition(".")[0] for name in names}
    return tops - set(sys.stdlib_module_names) - {"diffusion"}


def own_layers(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("diffusion.")}


@pytest.mark.parametrize("path", [p for p in MODULES if layer(p) in MATHS], ids=lambda path: path.stem)
def test_the_mathematics_needs_nothing_but_torch(path):
    assert third_party(imports(path)) <= {"torch"}
    assert own_layers(imports(path)) <= MATHS


@pytest.mark.parametrize("path", [p for p in MODULES if layer(p) == "models"], ids=lambda path: path.stem)
def test_the_networks_know_neither_the_mathematics_nor_a_framework(path):
    assert own_layers(imports(path)) <= {"models"}
    assert third_party(imports(path)) <= {"torch", "einops"}


FOREIGN = [p for p in MODULES if layer(p) == "pretrained" and p.stem != "__main__"]  # but the command itself


@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: path.stem)
def test_foreign_names_act_on_networks_only(path):
    assert own_layers(imports(path)) <= {"models", "pretrained"}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if layer(p) not in MAY_USE_FRAMEWORKS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_lightning_and_hydra_stay_at_the_edge(path):
    assert not third_party(imports(path)) & FRAMEWORKS


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_test_oracles_are_never_imported_by_the_package(path):
    assert not third_party(imports(path)) & {"diffusers", "transformers", "pytest"}
