"""The autoencoders against outputs and gradients of the original codebases, in whatever configs they carry."""

import pytest
import torch
from golden_cases import GOLDEN, Case, assert_bijection, assert_close, key_configs, key_list, key_lists, load, names

from diffusion.autoencoder_losses import kl_to_standard_normal
from diffusion.models.vq import VQAutoencoder
from diffusion.pretrained import compvis_autoencoder, diffusers_autoencoder

OUTPUT, GRADIENT = 5e-5, 3e-4  # of the tensor's scale; a second run of the peers themselves differs by up to 3e-5
CASES = names("vae/*") + names("two_layouts/vae*")
KL = [name for name in CASES if "n_embed" not in load(name).config]
VQ = [name for name in CASES if "n_embed" in load(name).config]
LAYOUTS = sorted({name.rsplit(".", 1)[0] for name in names("two_layouts/vae*")})
STABLE_DIFFUSION = {
    "embed_dim": 4,
    "monitor": "val/rec_loss",
    "lossconfig": {"target": "torch.nn.Identity"},
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


def layout(name: str):
    """The module of foreign names that a case speaks."""
    return diffusers_autoencoder if name.endswith(".diffusers") else compvis_autoencoder


def loaded(case: Case):
    net = layout(case.name).load_autoencoder(case.config, case.group("weights")).eval()
    net.scale_factor, net.shift = None, 0.0  # the peers' outputs are not normalised
    return net


def in_both_modes(compute):
    """The result with and without gradients: faster kernels are used where none is tracked."""
    with torch.no_grad():
        yield compute()
    yield compute()


@pytest.mark.parametrize("name", KL)
def test_moments_sample_and_decoding_are_the_peers(name):
    case = load(name)
    net, out, given = loaded(case), case.group("out"), case.group("in")
    for q in in_both_modes(lambda: net.moments(given["x"])):
        assert_close(q.mean, out["mean"], OUTPUT, "mean")
        assert_close(q.logvar, out["logvar"], OUTPUT, "logvar")
        assert_close(torch.cat(q, dim=1), torch.cat([out["mean"], out["logvar"]], dim=1), OUTPUT, "both")
        if "sample" in out:
            assert_close(q.std, out["std"], OUTPUT, "std")
            assert_close(q.sample(given["noise"]), out["sample"], OUTPUT, "sample")
            assert_close(net.encode(given["x"], given["noise"]), out["sample"], OUTPUT, "encode with noise")
        assert_close(net.encode(given["x"]), out["mean"], OUTPUT, "encode")
    for key, z in (
        ("decode_z", given.get("z")),
        ("decode_mean", out.get("mean")),
        ("decode_mode", out.get("mode")),
        ("decode_sample", out.get("sample")),
    ):
        if key in out:
            for y in in_both_modes(lambda z=z: net.decode(z)):
                assert_close(y, out[key], OUTPUT, key)


@pytest.mark.parametrize("name", KL)
def test_kl_and_likelihood_of_a_sample_are_the_peers(name):
    case = load(name)
    net, out, given = loaded(case), case.group("out"), case.group("in")
    with torch.no_grad():
        q = net.moments(given["x"])
    assert_close(kl_to_standard_normal(*q).sum(1), out["kl"], OUTPUT, "kl")
    if "nll_of_sample" in out:
        nll = -torch.distributions.Normal(q.mean, q.std).log_prob(out["sample"]).flatten(1).sum(1)
        assert_close(nll, out["nll_of_sample"], OUTPUT, "nll")


@pytest.mark.parametrize("name", [name for name in KL if "out.grad_x_of_sum_recon_squared" in load(name).tensors])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_peers_also_with_checkpointing(name, checkpointing):
    case = load(name)
    net, given = loaded(case), case.group("in")
    net.encoder.checkpointing = net.decoder.checkpointing = checkpointing
    x = given["x"].clone().requires_grad_()
    net(x).reconstruction.square().sum().backward()
    expected = case["out.grad_x_of_sum_recon_squared"]
    error = (x.grad - expected).abs().max() / expected.abs().max()
    assert error <= GRADIENT, f"off by {error:.3g} of the scale"


@pytest.mark.parametrize("name", VQ)
def test_quantisation_and_decoding_are_the_peers(name):
    case = load(name)
    net, out, x = loaded(case), case.group("out"), case.group("in")["x"]
    for z in in_both_modes(lambda: net.encode(x)):
        assert_close(z, out["pre_quant"], OUTPUT, "pre_quant")
        quantised, loss, indices = net.codebook(z)
        assert_close(quantised, out["quantized"], OUTPUT, "quantized")
        assert_close(loss.view(1), out["codebook_loss"].view(1), OUTPUT, "codebook_loss")
        assert torch.equal(indices, out["indices"])
    for y in in_both_modes(lambda: net.decode(out["pre_quant"])):
        assert_close(y, out["decode"], OUTPUT, "decode")
    for y in in_both_modes(lambda: net.decode(out["pre_quant"], quantise=False)):
        assert_close(y, out["decode_force_not_quantize"], OUTPUT, "decode without quantising")
    whole = net(x)
    assert_close(whole.reconstruction, out["decode"], OUTPUT, "forward")
    assert_close(net.decode_indices(out["indices"]), out["decode"], OUTPUT, "decode_indices")
    assert whole.moments is None and torch.equal(whole.indices, out["indices"])


@pytest.mark.parametrize("name", CASES)
def test_autoencoder_table_is_a_bijection_bit_for_bit(name):
    case = load(name)
    assert_bijection(layout(name).autoencoder_table(case.config), case.group("weights"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_layouts_of_one_autoencoder_become_the_same_autoencoder(name):
    """Where only one layout was copied here, the other's names come from our table and its config from the first."""
    one = load(f"{name}.diffusers")
    first = diffusers_autoencoder.load_autoencoder(one.config, one.group("weights")).state_dict()
    widths = one.config["block_out_channels"]
    config = {
        "embed_dim": one.config["latent_channels"],
        "ddconfig": {
            "double_z": True,
            "z_channels": one.config["latent_channels"],
            "resolution": one.config["sample_size"],
            "in_channels": one.config["in_channels"],
            "out_ch": one.config["out_channels"],
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": one.config["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
    if (GOLDEN / f"{name}.ldm.safetensors").exists():
        other = load(f"{name}.ldm")
        config, theirs = other.config, other.group("weights")
    else:
        theirs = compvis_autoencoder.export_autoencoder(config, first)
        assert "decoder.up.0.block.1.conv2.weight" in theirs and "encoder.mid.attn_1.q.weight" in theirs
    second = compvis_autoencoder.load_autoencoder(config, theirs).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def full_size_lists() -> list[str]:
    return [stem for stem in key_lists() if stem.endswith(("_checkpoint", "_diffusers"))]


@pytest.mark.parametrize("name", full_size_lists())
def test_full_size_names_and_shapes_match_one_to_one(name):
    shapes = key_list(name)
    prefix = "vae/" if name.endswith("_diffusers") else "first_stage_model."
    expected = {key.removeprefix(prefix): tuple(v[:-1]) for key, v in shapes.items() if key.startswith(prefix)}
    if name.endswith("_diffusers"):
        table = diffusers_autoencoder.autoencoder_table(full_size_config(name))
    else:
        table = compvis_autoencoder.autoencoder_table(STABLE_DIFFUSION)
    assert len(expected) == 248 and table.foreign_shapes == expected
    numbers = torch.Generator().manual_seed(0)
    # One small number a tensor, so that a mix-up shows; real weights of this size would take a second each.
    theirs = {key: torch.rand(1, generator=numbers).expand(shape) for key, shape in expected.items()}
    assert_bijection(table, theirs)


def full_size_config(name: str) -> dict:
    return key_configs()[name]["vae"]


def test_older_attention_names_of_diffusers_load_too():
    case = load(names("two_layouts/vae*.diffusers")[0])
    weights = case.group("weights")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, tensor in weights.items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.") if "attentions" in key else key
        renamed[key] = tensor
    assert renamed.keys() != weights.keys()
    one = diffusers_autoencoder.load_autoencoder(case.config, renamed).state_dict()
    other = diffusers_autoencoder.load_autoencoder(case.config, weights).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_the_codebook_belongs_to_the_class_that_has_one():
    assert all(isinstance(loaded(load(name)), VQAutoencoder) for name in VQ)
    assert not any(isinstance(loaded(load(name)), VQAutoencoder) for name in KL)
