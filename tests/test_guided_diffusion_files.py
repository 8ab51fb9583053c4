"""Files published with guided-diffusion: each fits its recipe to the key, runs no code, and goes back."""

import os
import pickle
from functools import cache

import pytest
import torch
from golden_cases import assert_close, key_configs, key_list, key_lists, load
from safetensors.torch import load_file
from tiny import run
from torch import Tensor, nn

from diffusion.checkpoint import build, load_classifier, load_model, read_header
from diffusion.cli import composed
from diffusion.conversion.published import from_published, to_published
from diffusion.model_file import NODES, kind_of
from diffusion.models.attention import SelfAttention
from diffusion.models.layers import Downsample, ResidualBlock, Upsample
from diffusion.pretrained import guided_diffusion, guided_diffusion_classifier
from diffusion.pretrained.__main__ import main
from diffusion.pretrained.guided_diffusion_files import FILES, Published, table

# The key lists of the reference data, and the published file that each describes.
LISTS = {
    "adm_64": "64x64_diffusion.pt",
    "adm_128": "128x128_diffusion.pt",
    "adm_256": "256x256_diffusion.pt",
    "adm_256_uncond": "256x256_diffusion_uncond.pt",
    "adm_512": "512x512_diffusion.pt",
    **{f"adm_classifier_{size}": f"{size}x{size}_classifier.pt" for size in (64, 128, 256, 512)},
}
# The flags that guided-diffusion's README gives with the files that no list describes.
COMMON = {"learn_sigma": True, "resblock_updown": True, "use_scale_shift_norm": True, "num_res_blocks": 2}
LSUN = {**COMMON, "image_size": 256, "num_channels": 256, "num_head_channels": 64, "attention_resolutions": "32,16,8"}
FLAGS = {
    "64_256_upsampler.pt": {
        **COMMON,
        "image_size": 256,
        "class_cond": True,
        "num_channels": 192,
        "num_heads": 4,
        "attention_resolutions": "32,16,8",
    },
    "128_512_upsampler.pt": {
        **COMMON,
        "image_size": 512,
        "class_cond": True,
        "num_channels": 192,
        "num_head_channels": 64,
        "attention_resolutions": "32,16",
        "channel_mult": "1,1,2,2,4,4",  # sr_create_model's own at this size
    },
    **{f"lsun_{name}.pt": {**LSUN, "dropout": 0.1} for name in ("bedroom", "cat", "horse")},
    "lsun_horse_nodropout.pt": {**LSUN, "dropout": 0.0},
}
MILLIONS = {"64_256_upsampler.pt": 312, "128_512_upsampler.pt": 309, "lsun_cat.pt": 552.8}  # the paper's tables


def settings(file: str) -> dict:
    return config_of(FILES[file])


@cache
def config_of(entry: Published) -> dict:
    return composed("train", [f"experiment={entry.recipe}", *entry.overrides])


def recipe_net(file: str) -> nn.Module:
    config = settings(file)
    with torch.device("meta"):
        return build(config[NODES[kind_of(config)][0]])


def structure(net: nn.Module) -> list:
    """What shapes do not tell, and the order of everything."""
    found = []
    for name, module in net.named_modules():
        if isinstance(module, SelfAttention):
            found.append((name, module.num_heads))
        elif isinstance(module, ResidualBlock):
            resample = module.resample.__class__.__name__
            found.append((name, module.dropout, module.scale_shift, resample, module.residual_scale))
        elif isinstance(module, (Downsample, Upsample)):
            found.append((name, module.conv is None))
    return found


# --- full size, on the meta device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in key_lists() if name.startswith("adm_")])
def test_a_recipes_network_has_exactly_the_published_tensors_both_ways(name):
    file = LISTS[name]
    expected = {key: tuple(spec[:-1]) for key, spec in key_list(name).items()}
    net = recipe_net(file)
    order = FILES[file].new_attention_order
    names = table(net, new_attention_order=order)
    assert names.foreign_shapes == expected
    theirs = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    net.load_state_dict(names.to_ours(theirs), assign=True)
    assert {key: tuple(t.shape) for key, t in names.to_foreign(net.state_dict()).items()} == expected
    assert order == key_configs()[name].get("use_new_attention_order", False)


def from_flags(file: str) -> nn.Module:
    """The network that guided-diffusion's own flags describe."""
    name = next((name for name, described in LISTS.items() if described == file), None)
    flags = FLAGS[file] if name is None else key_configs()[name]
    with torch.device("meta"):
        if "classifier" in file:
            config = guided_diffusion_classifier.classifier_flags(flags)
            return build({"_target_": CLASSIFIER, **guided_diffusion_classifier.classifier_config(config)})
        kwargs = guided_diffusion.kwargs_from_flags(flags)
        enlarges = "upsampler" in file
        target = SUPER if enlarges else UNET
        return build({"_target_": target, **guided_diffusion.unet_config(kwargs, super_resolution=enlarges)})


UNET, SUPER = "diffusion.models.unet.UNet", "diffusion.models.unet.SuperResolutionUNet"
CLASSIFIER = "diffusion.models.classifier.Classifier"


@pytest.mark.parametrize("file", FILES)
def test_a_recipes_network_is_the_one_that_the_published_flags_describe(file):
    ours, theirs = recipe_net(file), from_flags(file)
    assert type(ours) is type(theirs)
    shapes = [{name: tuple(t.shape) for name, t in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert structure(ours) == structure(theirs)
    if file in MILLIONS:
        assert sum(p.numel() for p in ours.parameters()) == pytest.approx(MILLIONS[file] * 1e6, rel=2e-3)


@pytest.mark.parametrize("file", FILES)
def test_a_recipes_process_is_the_published_one(file):
    config = settings(file)
    diffusion = build(config["diffusion"])
    cosine = "64x64" in file
    assert config["schedule"]["_target_"].endswith("cosine" if cosine else "linear")
    assert diffusion.num_train_timesteps == 1000 and diffusion.time_scale == 1.0
    if "classifier" in file:
        return
    assert (diffusion.parameterization, diffusion.variance) == ("eps", "learned")
    assert config["loss"]["vlb_weight"] * 1000 == 1  # guided-diffusion's sum of mse and vb
    assert config["ema"]["decays"] == [0.9999] and config["task"]["condition_drop"] == 0
    small = {"64_256_upsampler.pt": 64, "128_512_upsampler.pt": 128}.get(file)
    if small:
        conditioner = build(config["conditioner"])
        assert conditioner.low_size == conditioner.size == (small, small) and conditioner.kernel == "area"


# --- in small, with weights ------------------------------------------------------------------------------------------

TINY = ("data.image_size=16", "data.num_classes=10", "num_train_timesteps=100", "net.channels=32")
STAGES = "stages=[{depth:1},{depth:1,attention:self}]"
SMALL = (*TINY, "net.head_channels=16", f"net.{STAGES}")
SMALL_UP = (*TINY, f"net.{STAGES}", "conditioner.factor=2", "conditioner.size=8")
JUDGE = ("data.image_size=16", "data.num_classes=10", "classifier.channels=32", "classifier.head_channels=16")
SMALL_CLASSIFIER = (*JUDGE, f"classifier.{STAGES}")


@pytest.fixture
def small(monkeypatch):
    """Published files of a few thousand weights."""
    entries = {
        "plain.pt": Published("adm_imagenet256", SMALL),
        "order.pt": Published("adm_imagenet64", SMALL, new_attention_order=True),
        "up.pt": Published("adm_upsample_64_256", SMALL_UP),
        "judge.pt": Published("imagenet64_classifier", SMALL_CLASSIFIER),
    }
    for name, entry in entries.items():
        monkeypatch.setitem(FILES, name, entry)
    return entries


def random_state(file: str) -> dict[str, Tensor]:
    """Weights under guided-diffusion's names, as that file would hold them."""
    config = settings(file)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(config[NODES[kind_of(config)][0]])
        for tensor in net.parameters():
            nn.init.normal_(tensor, std=0.1)
    return table(net, new_attention_order=FILES[file].new_attention_order).to_foreign(net.state_dict())


@pytest.mark.parametrize("file", ["plain.pt", "order.pt", "up.pt", "judge.pt"])
def test_a_file_becomes_a_model_and_goes_back_bit_for_bit(file, small, tmp_path, capsys):
    state = random_state(file)
    torch.save(state, tmp_path / file)
    ours = from_published(tmp_path / file, tmp_path / "ours.safetensors")
    header = read_header(ours)
    averaged = file != "judge.pt"  # guided-diffusion trains its classifiers without an average
    assert (header.weights, header.ema_decay) == (("ema", 0.9999) if averaged else ("raw", None))
    assert header.step == settings(file)["trainer"]["max_steps"]
    assert header.facts == {"shape": [3, 16, 16], "num_classes": 10, "class_names": None, "condition_drop": 0.0}
    to_published(ours, tmp_path / "back.pt", recipe=small[file].recipe)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert f"use_new_attention_order {file == 'order.pt'}" in capsys.readouterr().err
    if file == "judge.pt":
        assert load_classifier(ours).net.num_classes == 10
        return
    assert load_model(ours).diffusion.variance == "learned"
    assert ("conditioner" in header.parts) == (file == "up.pt")


def test_the_order_of_attention_rows_is_the_files_own(small, tmp_path):
    """The same numbers mean another network in the other order: the recipe decides, by the name in our file."""
    state = random_state("order.pt")
    torch.save(state, tmp_path / "order.pt")
    from_published(tmp_path / "order.pt", tmp_path / "new.safetensors")
    to_published(tmp_path / "new.safetensors", tmp_path / "back.pt")
    assert all(torch.equal(t, state[key]) for key, t in torch.load(tmp_path / "back.pt", weights_only=True).items())
    from_published(tmp_path / "order.pt", tmp_path / "old.safetensors", recipe="adm_imagenet64")
    to_published(tmp_path / "new.safetensors", tmp_path / "other.pt", recipe="adm_imagenet256")
    other = torch.load(tmp_path / "other.pt", weights_only=True)
    changed = {key for key in state if not torch.equal(other[key], state[key])}
    assert changed and all(".qkv." in key for key in changed)


def test_a_golden_upsampler_gives_the_peers_output_through_the_file(small, tmp_path, monkeypatch):
    case = load("adm/superres")
    monkeypatch.setitem(FILES, "golden.pt", small["up.pt"])
    torch.save(case.group("weights"), tmp_path / "golden.pt")
    model = load_model(from_published(tmp_path / "golden.pt", tmp_path / "golden.safetensors"))
    with torch.no_grad():
        y = model.net(case["in.x"], case["in.timesteps"], label=case["in.y"], concat=case["in.low_res"])
    assert_close(y, case["out.y"], 5e-5)


def test_sample_py_draws_from_a_converted_file(small, tmp_path, monkeypatch, capsys):
    torch.save(random_state("plain.pt"), tmp_path / "plain.pt")
    from_published(tmp_path / "plain.pt", tmp_path / "ours.safetensors")
    words = [f"checkpoint={tmp_path / 'ours.safetensors'}", f"out_dir={tmp_path / 'out'}", "num_samples=2"]
    words += ["sampler=ddpm", "sampler.num_steps='4'", "guidance=none", "labels=[1,2]", "pad_to=1"]
    status, _, err = run("sample", words, monkeypatch, capsys)
    assert status == 0, err


def test_half_precision_files_are_taken(small, tmp_path):
    state = {key: t.half() for key, t in random_state("plain.pt").items()}
    torch.save(state, tmp_path / "plain.pt")
    ours = load_file(from_published(tmp_path / "plain.pt", tmp_path / "ours.safetensors"))
    assert all(t.dtype == torch.float32 for t in ours.values())


# --- what is refused -------------------------------------------------------------------------------------------------


def test_every_key_that_does_not_fit_is_reported_at_once(small, tmp_path):
    state = random_state("plain.pt")
    state["intruder"] = torch.zeros(3)
    state["out.2.bias"] = torch.zeros(5)
    del state["time_embed.0.weight"], state["label_emb.weight"]
    torch.save(state, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match="2 missing, 1 unexpected, 1 mis-shaped") as error:
        from_published(tmp_path / "plain.pt", tmp_path / "ours.safetensors")
    for line in (
        "missing     time_embed.0.weight",
        "missing     label_emb",
        "unexpected  intruder",
        "mis-shaped  out.2",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "ours.safetensors").exists()


class Trap:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_objects_are_never_unpickled(small, tmp_path):
    mark = tmp_path / "mark"
    torch.save({"weight": torch.zeros(1), "trap": Trap(str(mark))}, tmp_path / "plain.pt")
    (tmp_path / "order.pt").write_bytes(pickle.dumps(Trap(str(mark))))
    for name in ("plain.pt", "order.pt"):
        with pytest.raises(ValueError, match=r"is no file of tensors alone, or is damaged.*never unpickled"):
            from_published(tmp_path / name, tmp_path / "ours.safetensors")
    assert not mark.exists()


def test_files_that_hold_no_state_dict_are_refused(small, tmp_path):
    contents = {
        "empty.pt": b"",
        "page.pt": b"<html>not found</html>",
        "short.pt": b"PK\x03\x04 and no more",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"model": {"weight": torch.zeros(1)}, "step": 3}, tmp_path / "nested.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    (tmp_path / "folder.pt").mkdir()
    for name, message in (
        ("empty.pt", "cannot be read|damaged"),
        ("page.pt", "damaged"),
        ("short.pt", "cannot be read|damaged"),
        ("nested.pt", "holds a mapping of model, step, ... and not tensors by name"),
        ("tensor.pt", "holds a Tensor and not tensors by name"),
        ("folder.pt", "is a folder; name the .pt file in it"),
        ("none.pt", "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            from_published(tmp_path / name, tmp_path / "ours.safetensors", recipe="adm_imagenet256")


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("mine.pt", None, "mine.pt has none of the published names, 64x64_diffusion.pt, .*recipe="),
        ("a.pt", "adm_imagenet65", "did you mean adm_imagenet64.* recipes: adm_imag"),
    ],
)
def test_names_that_are_unknown_say_which_are_known(name, recipe, message):
    with pytest.raises(ValueError, match=message):
        from_published(name, "a.safetensors", recipe=recipe)


def test_a_network_that_guided_diffusion_cannot_compute_is_not_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"guided-diffusion has no groups of 8 with eps=1e-05 .*which this network has"
    ):
        to_published("checkpoints/digits.safetensors", tmp_path / "digits.pt")


def test_the_command_converts_by_the_files_names(small, tmp_path, capsys):
    torch.save(random_state("plain.pt"), tmp_path / "plain.pt")
    ours = tmp_path / "ours.safetensors"
    assert main(["convert", str(tmp_path / "plain.pt"), str(ours), "--layout", "ours"]) == 0
    assert capsys.readouterr().out.strip() == str(ours)
    assert main(["convert", str(ours), str(tmp_path / "back.pt"), "--layout", "guided-diffusion"]) == 0
    assert torch.load(tmp_path / "back.pt", weights_only=True).keys() == random_state("plain.pt").keys()
