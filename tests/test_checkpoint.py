"""A model file rebuilds its model exactly, names no foreign callable, and survives a failed write."""

import errno
import json
import subprocess
import sys

import pytest
import torch
from latent_cases import NODE
from safetensors.torch import load_file, save_file
from tiny import DIFFUSION, NET, ROOT, config, facts, random_net, save_tiny
from torch import nn

from diffusion.checkpoint import (
    BUILDABLE,
    atomic_write,
    build,
    load_autoencoder,
    load_classifier,
    load_model,
    load_weights,
    locate,
    read_header,
    save_model,
)


class TinyNet(nn.Module):
    """A user's own network."""

    num_classes = None

    def __init__(self, width: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 1)


def test_a_loaded_model_answers_bit_for_bit_as_the_saved_one(tmp_path):
    model = load_model(save_tiny(tmp_path / "model.safetensors"))
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 70]), torch.tensor([1, -1])
    with torch.no_grad():
        assert torch.equal(model.net(x, t, label=label), random_net(config())(x, t, label=label))
    assert not model.net.training
    assert model.diffusion.num_train_timesteps == 100
    assert (model.weights, model.step, model.ema_decay, model.facts) == ("ema", 7, 0.99, facts())


def test_a_fresh_process_rebuilds_the_model_without_hydra_or_lightning(tmp_path):
    path = save_tiny(tmp_path / "model.safetensors")
    code = (
        "import sys; from diffusion.checkpoint import load_model; load_model(sys.argv[1]);"
        "sys.exit(bool({'hydra', 'lightning', 'omegaconf'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)


def test_the_header_says_what_the_file_is(tmp_path):
    header = read_header(save_tiny(tmp_path / "model.safetensors"))
    assert header.config == config()
    assert header.torch_version == torch.__version__
    assert header.package_version and header.git_commit
    assert header.shapes["conv_in.weight"] == (16, 1, 3, 3)


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    path = save_tiny(tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    load_model(path)
    assert torch.equal(before, torch.get_rng_state())


def test_every_buildable_name_exists():
    for name in BUILDABLE:
        assert callable(locate(name))


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "diffusion.checkpoint.build", "subprocess.Popen"]
)
@pytest.mark.parametrize("place", ["net", "schedule", "argument"])
def test_a_foreign_callable_is_refused_by_name_before_anything_is_imported(tmp_path, name, place):
    settings = json.loads(json.dumps({"net": NET, "diffusion": DIFFUSION}))
    bad = {"_target_": name, "command": f"touch {tmp_path}/pwned"}
    if place == "net":
        settings["net"] = bad
    elif place == "schedule":
        settings["diffusion"]["schedule"] = bad
    else:
        settings["net"]["stages"] = [{"depth": bad}]
    path = tmp_path / "model.safetensors"
    save_model(path, nn.Linear(1, 1), settings, weights="raw", step=0, facts=facts())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_model(path)
    assert not (tmp_path / "pwned").exists()


def test_the_callers_own_class_is_built_when_named(tmp_path):
    own = {"net": {"_target_": "test_checkpoint.TinyNet", "width": 3}, "diffusion": DIFFUSION}
    path = tmp_path / "model.safetensors"
    save_model(path, TinyNet(3), own, weights="raw", step=0, facts=facts(num_classes=None))
    with pytest.raises(ValueError, match="buildable"):
        load_model(path)
    assert load_model(path, buildable=["test_checkpoint.TinyNet"]).net.conv.out_channels == 3


def test_a_name_that_does_not_exist_is_a_clear_error():
    with pytest.raises(ValueError, match="my_nets"):
        build({"_target_": "my_nets.TinyNet"}, {"my_nets.TinyNet"})


def test_partials_and_positional_arguments_build_as_in_hydra():
    node = {"_target_": "diffusion.schedule.cosine", "_partial_": True, "_args_": [20], "max_beta": 0.5}
    assert build(node)().num_train_timesteps == 20


def test_all_keys_that_do_not_fit_are_reported_at_once(tmp_path):
    path = save_tiny(tmp_path / "model.safetensors")
    tensors, metadata = load_file(path), _metadata(path)
    tensors["extra.weight"] = torch.zeros(2)
    tensors["conv_in.bias"] = torch.zeros(3)
    del tensors["conv_out.bias"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError) as error:
        load_model(path)
    for part in (
        "missing conv_out.bias",
        "unexpected extra.weight",
        "mis-shaped conv_in.bias: file (3,), network (16,)",
    ):
        assert part in str(error.value)


def _metadata(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def test_compiled_networks_are_saved_under_their_clean_names(tmp_path):
    settings = config()
    net = nn.Module()
    net._orig_mod = random_net(settings)
    path = tmp_path / "model.safetensors"
    save_model(path, net, settings, weights="raw", step=0, facts=facts())
    loaded = load_model(path).net.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in net._orig_mod.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "average"}, "'ema' or 'raw'"),
        ({"facts": {"shape": [1, 8, 8]}}, "facts lack"),
        ({"config": {"net": NET}}, "diffusion"),
        ({"config": {"net": NET, "diffusion": {"schedule": torch.ones(1)}}}, "OmegaConf.to_container"),
    ],
)
def test_a_file_that_could_not_be_sampled_from_is_not_written(tmp_path, changes, message):
    given = {"config": config(), "weights": "raw", "step": 0, "facts": facts(), **changes}
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "model.safetensors", nn.Linear(1, 1), given.pop("config"), **given)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# kinds


CLASSIFIER = {
    "_target_": "diffusion.models.classifier.Classifier",
    "in_channels": 1,
    "image_size": 8,
    "num_classes": 10,
    "channels": 8,
    "norm_groups": 4,
    "stages": [{"depth": 1}],
}
LOADERS = {"denoiser": load_model, "classifier": load_classifier, "autoencoder": load_autoencoder}


def save_kind(kind: str, path):
    """A file of this kind, and the module that is in it."""
    settings = {"denoiser": config(), "classifier": {"classifier": CLASSIFIER, "diffusion": DIFFUSION, "net": None}}
    settings["autoencoder"] = {"net": None, "diffusion": None, "classifier": {}, "autoencoder": {**NODE}}
    module = random_net(config()) if kind == "denoiser" else build(settings[kind][kind])
    save_model(path, module, settings[kind], weights="raw", step=3, facts=facts())
    return module


@pytest.mark.parametrize("kind", LOADERS)
def test_a_file_knows_its_kind_and_comes_back_bit_for_bit(tmp_path, kind):
    module = save_kind(kind, tmp_path / "model.safetensors")
    assert read_header(tmp_path / "model.safetensors").kind == kind
    loaded = LOADERS[kind](tmp_path / "model.safetensors")
    net = loaded if kind == "autoencoder" else loaded.net
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in net.state_dict().items())
    assert not net.training


@pytest.mark.parametrize(("kind", "wanted"), [(a, b) for a in LOADERS for b in LOADERS if a != b])
def test_a_file_of_another_kind_is_one_error_that_says_what_it_is_and_where_it_goes(tmp_path, kind, wanted):
    save_kind(kind, tmp_path / "model.safetensors")
    article = {"denoiser": "a", "classifier": "a", "autoencoder": "an"}
    with pytest.raises(ValueError) as caught:
        LOADERS[wanted](tmp_path / "model.safetensors")
    said = str(caught.value)
    assert f"holds {article[kind]} {kind}, but {article[wanted]} {wanted} is needed here" in said
    assert f"checkpoint={tmp_path}" in said and f"task={wanted}" in said and "\n" not in said


def test_a_loaded_classifier_takes_no_gradients_and_leaves_the_random_state_alone(tmp_path):
    save_kind("classifier", tmp_path / "model.safetensors")
    before = torch.get_rng_state()
    loaded = load_classifier(tmp_path / "model.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.diffusion.num_train_timesteps == 100 and not any(p.requires_grad for p in loaded.net.parameters())


def test_a_classifiers_config_names_no_foreign_callable_either(tmp_path):
    settings = {"classifier": {**CLASSIFIER, "_target_": "os.system"}, "diffusion": DIFFUSION}
    save_model(tmp_path / "model.safetensors", nn.Linear(1, 1), settings, weights="raw", step=0, facts=facts())
    with pytest.raises(ValueError, match=r"os\.system"):
        load_classifier(tmp_path / "model.safetensors")


def test_weights_go_into_a_network_that_is_there(tmp_path):
    saved = save_kind("classifier", tmp_path / "model.safetensors")
    net = build({**CLASSIFIER, "dropout": 0.5})
    load_weights(net, tmp_path / "model.safetensors", "classifier")
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"does not fit the network of this run(.|\n)*mis-shaped head\.out\.bias"):
        load_weights(build({**CLASSIFIER, "num_classes": 4}), tmp_path / "model.safetensors", "classifier")


# ---------------------------------------------------------------------------------------------------------------------
# writing


def test_an_interrupted_write_leaves_the_previous_file_and_no_other(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 832 vs 726"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_librarys_full_disk_is_one_error_that_names_the_file(tmp_path, error):
    path = tmp_path / "model.safetensors"
    path.write_text("before")
    with (
        pytest.raises(OSError, match=r"cannot write .*model\.safetensors: No space left on device; the file") as caught,
        atomic_write(path) as partial,
    ):
        partial.write_text("half")
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "before"


def test_other_errors_of_the_writer_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_write(tmp_path / "x"):
        raise RuntimeError("shapes do not match")
