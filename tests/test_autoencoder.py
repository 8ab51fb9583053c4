"""Autoencoders: normalisation, tiles, half precision and codebook in closed form; unusual configs against diffusers."""

import warnings
from itertools import pairwise

import diffusers
import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tiny import ROOT
from torch import nn

from diffusion.models import tiling
from diffusion.models.autoencoder import AutoencoderKL, Moments
from diffusion.models.coders import FoldedUpsample
from diffusion.models.conv_vae import ConvVAE
from diffusion.models.tiling import (
    SharedNorm,
    Tiles,
    blend_weights,
    in_tiles,
    norm_places,
    shared_norms,
    spans,
    survey_weights,
)
from diffusion.models.vq import Codebook, VQAutoencoder
from diffusion.pretrained import compvis_autoencoder, diffusers_autoencoder

STAGES = [{"depth": 1}, {"depth": 1, "channel_mult": 2}, {"depth": 1, "channel_mult": 2}]


def randomised(net: nn.Module) -> nn.Module:
    """Weights of a scale that keeps activations alive, none zero."""
    numbers = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.data = (torch.randn(parameter.shape, generator=numbers) / fan_in**0.5).to(parameter)
    return net.eval()


def tiny(kind: type = AutoencoderKL, **settings) -> nn.Module:
    return randomised(kind(3, 3, channels=8, norm_groups=4, **({"stages": STAGES} | settings)))


def tiny_vae(**settings) -> ConvVAE:
    return randomised(ConvVAE(1, **({"image_size": 8, "latent_channels": 3, "channels": 4} | settings)))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rough(size: int) -> torch.Tensor:
    """An image calm on one side and restless on the other, where tiles' own statistics differ most."""
    return images(1, 3, size, size) * torch.linspace(0.05, 1, size) + torch.linspace(-0.5, 0.5, size)[:, None]


# --- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale_factor", "shift"), [(None, 0.0), (0.5, 0.0), (2.0, 0.3), ([1.0, 2, 3, 4], [0.0, 1, 2, 3])]
)
@pytest.mark.parametrize("build", [tiny, lambda **s: tiny_vae(latent_channels=4, **s)])
def test_latents_are_shifted_and_multiplied_on_the_way_out_and_back(build, scale_factor, shift):
    net, plain = build(scale_factor=scale_factor, shift=shift), build()
    x = images(2, net.in_channels, 8, 8)
    q = net.moments(x)
    shape = (-1, *[1] * (q.mean.ndim - 2))
    expected = (q.mean - torch.tensor(shift).view(shape)) * torch.tensor(scale_factor or 1.0).view(shape)
    assert net.measured is (scale_factor is not None)
    assert_close(net.encode(x), expected, 1e-6)
    assert_close(net.denormalise(net.encode(x)), q.mean, 1e-6)
    assert_close(net.decode(net.encode(x)), plain.decode(q.mean), 1e-5)
    assert_close(net(x).reconstruction, plain(x).reconstruction, 1e-6)


def test_the_scale_is_a_setting_that_may_come_later_and_is_no_weight():
    net = tiny()
    before = net.state_dict().keys()
    z = net.encode(images(1, 3, 8, 8))
    net.scale_factor = 0.25
    assert net.measured and torch.equal(net.encode(images(1, 3, 8, 8)), z * 0.25)
    assert net.state_dict().keys() == before
    assert net.to(torch.bfloat16).scale_factor == 0.25


def test_a_scale_for_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="scale_factor has 2 entries, but there are 4 latent channels"):
        tiny(scale_factor=[1.0, 2.0])


def test_samples_have_the_moments_mean_and_variance():
    q = Moments(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2 * torch.log(torch.tensor(3.0))]]))
    noise = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    sample = q.sample(noise)
    assert torch.allclose(sample.mean(0), q.mean[0], atol=0.03) and torch.allclose(q.std, torch.tensor([[1.0, 3.0]]))
    assert torch.allclose(sample.std(0), q.std[0], rtol=0.01)


def test_log_variances_are_clamped():
    net = tiny()
    net.to_latent.bias.data[4:] = torch.tensor([-1e3, 1e3, 0.0, 0.0])
    logvar = net.moments(images(1, 3, 8, 8)).logvar
    assert (logvar[:, 0] == -30).all() and (logvar[:, 1] == 20).all()


# --- shapes and refusals --------------------------------------------------------------------------------------------


def test_the_latents_have_the_shape_that_was_announced():
    for net, shape in ((tiny(), (3, 16, 24)), (tiny(VQAutoencoder, num_codes=8), (3, 16, 24)), (tiny_vae(), (1, 8, 8))):
        assert net.encode(images(1, *shape)).shape[1:] == net.latent_shape(shape)
        assert net.decode(net.encode(images(1, *shape))).shape[1:] == shape
        assert net.last_layer is list(net.parameters())[-2] or net.last_layer.shape[0] == shape[0]


@pytest.mark.parametrize(("shape", "message"), [
    ((1, 3, 18, 16), "H=18 is not a multiple of 4.*16 or 20"),
    ((1, 3, 16, 3), "W=3 is not a multiple of 4.*: 4$"),
    ((1, 1, 16, 16), "images of 3 channels.*got \\(1, 1, 16, 16\\).*grey or RGB"),
    ((16, 16), "images of 3 channels"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [AutoencoderKL, VQAutoencoder])
def test_images_that_do_not_fit_are_refused_with_what_would(kind, shape, message):
    net = tiny(kind)
    for call in (net.encode, net, lambda x: net.latent_shape(x.shape)):
        with pytest.raises(ValueError, match=message):
            call(images(*shape))


def test_other_misuse_is_refused_by_name():
    with pytest.raises(ValueError, match="latents have 4 channels, but got"):
        tiny().decode(images(1, 3, 4, 4))
    with pytest.raises(ValueError, match="VQ autoencoder has no moments"):
        tiny(VQAutoencoder).moments(images(1, 3, 8, 8))
    with pytest.raises(ValueError, match="built for images of 8x8"):
        tiny_vae().encode(images(1, 1, 16, 16))
    with pytest.raises(ValueError, match="H=9 is not a multiple of 4"):
        tiny_vae(image_size=9)
    for settings in ({"stages": [{"attention": "cross"}]}, {"stages": [{"resample": "residual"}]}, {"stages": []},
                     {"up_stages": STAGES[:1]}, {"stages": [{"residual_scale": 0.7}]}):  # fmt: skip
        with pytest.raises(ValueError, match="stages"):
            tiny(**settings)
    with pytest.raises(ValueError, match="both projections are needed"):
        tiny(inner_channels=6, encoder_projection=False)


@pytest.mark.parametrize("settings", [
    {}, {"up_stages": [{"depth": 2}, *STAGES[1:]], "middle": {"depth": 1}}, {"inner_channels": 6, "tanh": True},
    {"encoder_projection": False, "decoder_projection": False, "latent_channels": 2}, {"middle": {"depth": 0}},
    {"stages": [{"resample": "pool", "depth": 0}, {"depth": 1, "attention": "self", "num_heads": 2}]},
])  # fmt: skip
def test_every_setting_trains(settings):
    net = tiny(**settings)
    out = net(images(2, 3, 8, 8), torch.zeros(2, *net.latent_shape((3, 8, 8))))
    assert out.reconstruction.shape == (2, 3, 8, 8)
    (out.reconstruction.square().sum() + out.moments.logvar.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
    assert not settings.get("tanh") or out.reconstruction.abs().max() <= 1


def test_a_fresh_autoencoder_can_learn():
    torch.manual_seed(0)
    net, x = AutoencoderKL(1, 1, channels=8, norm_groups=4, latent_channels=2, stages=STAGES[:2]), images(8, 1, 4, 4)
    x = F.interpolate(x, scale_factor=2)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (net(x).reconstruction - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(("name", "factor", "latents"), [
    ("kl_f4", 4, 3), ("kl_f8", 8, 4), ("kl_f16", 16, 16), ("kl_f32", 32, 64), ("vq_f4", 4, 3), ("vq_f8", 8, 4),
    ("digits", 2, 2), ("shapes", 4, 4), ("conv_vae", 4, 8),
])  # fmt: skip
def test_every_config_builds_what_its_name_says(name, factor, latents):
    config = OmegaConf.create(
        {"data": {"channels": 3, "image_size": 32}, "a": OmegaConf.load(ROOT / f"configs/autoencoder/{name}.yaml")}
    )
    with torch.device("meta"):
        net = instantiate(OmegaConf.to_container(config, resolve=True)["a"], _convert_="all")
    assert (net.size_factor, net.latent_channels, net.measured) == (factor, latents, False)
    if name == "kl_f8":
        assert sum(parameter.numel() for parameter in net.parameters()) == 83_653_863  # as Stable Diffusion's


# --- faster kernels, slices, tiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 6)])
def test_folding_the_upsampling_into_its_convolution_changes_no_number(size):
    up, x = FoldedUpsample(6), images(2, 6, *size)
    expected = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    with torch.no_grad():
        assert_close(up(x), expected, 1e-5)
        assert_close(up(x.contiguous(memory_format=torch.channels_last)), expected, 1e-5)
    assert torch.equal(up(x), expected)


def test_one_image_at_a_time_gives_the_same():
    net, x = tiny(), images(3, 3, 16, 8)
    assert_close(net.encode(x, slices=True), net.encode(x), 1e-6)
    assert_close(net.decode(net.encode(x), slices=True), net.decode(net.encode(x)), 1e-5)


@pytest.mark.parametrize("size", [1, 16, 17, 40, 100, 101])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 4), (9, 8), (100, 10)])
def test_tiles_cover_everything_evenly_and_their_weights_sum_to_one(size, tile, overlap):
    parts = spans(size, tile, overlap)
    assert parts[0][0] == 0 and parts[-1][1] == size and all(stop - start <= tile for start, stop in parts)
    assert len({stop - start for start, stop in parts}) == 1
    assert all(here[1] - there[0] >= overlap for here, there in pairwise(parts))
    total = torch.zeros(size * 2)
    for (start, stop), weight in zip(parts, blend_weights(parts, 1.5, 2), strict=True):
        assert weight.min() >= 0
        total[start * 2 : stop * 2] += weight
        if start and overlap > 4:
            assert (weight[:3] == 0).all()  # within the margin of 1.5 steps, of two pixels each
    assert torch.allclose(total, torch.ones_like(total))


def test_a_convolution_in_tiles_is_the_convolution_if_the_margin_is_its_reach():
    convolution, x = nn.Conv2d(2, 2, 5, padding=2), images(2, 2, 50, 37)
    assert_close(in_tiles(convolution, x, Tiles(16, 6, margin=2.0)), convolution(x), 1e-5)
    assert (in_tiles(convolution, x, Tiles(16, 3, margin=0.0)) - convolution(x)).abs().max() > 1e-3


def whole_as_survey(tiles: Tiles, x: torch.Tensor):
    return x, tuple(torch.ones(1, size // tiles.unit) for size in x.shape[-2:])


@pytest.mark.parametrize("kind", [AutoencoderKL, VQAutoencoder])
def test_tiles_that_share_exact_statistics_give_the_whole_image(kind, monkeypatch):
    """This proves the margins, and that normalisation is all that tiles can differ in."""
    monkeypatch.setattr(Tiles, "survey", whole_as_survey)
    net, x = tiny(kind).double(), rough(160).double()
    with torch.no_grad():
        z = net.encode(x)
        assert_close(net.encode(x, tile=20, overlap=12), z, 1e-5)
        assert_close(net.decode(z, tile=20, overlap=12), net.decode(z), 1e-5)


def test_the_survey_makes_tiles_far_more_like_the_whole_than_tiles_alone(monkeypatch):
    net, x = tiny(), rough(256)
    with torch.no_grad():
        z = net.encode(x)
        whole = net.decode(z)
        tile = {"tile": 96 // net.size_factor, "overlap": 40 // net.size_factor}
        surveyed = [(net.encode(x, **tile) - z).std(), (net.decode(z, **tile) - whole).std()]
        monkeypatch.setattr("diffusion.models.autoencoder.in_tiles", lambda call, x, tiles, norms: tiles(call, x))
        alone = [(net.encode(x, **tile) - z).std(), (net.decode(z, **tile) - whole).std()]
    assert all(ours < 0.5 * theirs for ours, theirs in zip(surveyed, alone, strict=True)), (surveyed, alone)


def test_an_image_of_one_tile_is_coded_whole_and_a_long_one_has_tiles_along_one_side():
    net, x = tiny(), rough(32)
    with torch.no_grad():
        assert torch.equal(net.encode(x, tile=8, overlap=2), net.encode(x))
        long = torch.cat([x] * 6, dim=-1)
        assert net.decode(net.encode(long, tile=16, overlap=8), tile=16, overlap=8).shape == long.shape


def test_a_shared_norm_that_surveys_the_whole_is_the_group_norm():
    norm, x = nn.GroupNorm(2, 6, eps=1e-3), images(3, 6, 8, 10)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    parts = torch.stack([x[..., :5], x[..., 5:]], dim=1).flatten(0, 1)  # two crops an image, measured together
    shared = SharedNorm(norm, (torch.ones(1, 4), torch.ones(2, 5)))
    shared(parts)
    assert_close(shared(x), norm(x), 1e-5)
    assert_close(shared(x[..., 2:4]), norm(x)[..., 2:4], 1e-5)


@pytest.mark.parametrize(("count", "part", "steps"), [(2, 8, 9), (3, 8, 40), (6, 11, 256), (1, 5, 5)])
def test_a_survey_counts_every_step_once(count, part, steps):
    weights = survey_weights(count, part, steps)
    assert weights.shape == (count, part) and weights.sum() == pytest.approx(steps) and weights.min() >= 0
    assert weights[0, 0] == weights[-1, -1] == 1  # the image's edges
    assert count == 1 or weights[0, -1] == weights[-1, 0] == 0  # inner borders


@pytest.mark.parametrize(
    ("count", "part", "steps", "bound"), [(3, 8, 40, 0.02), (6, 11, 256, 0.004), (12, 8, 256, 0.002)]
)
def test_a_survey_sums_what_bends_as_the_trapezoidal_rule_does(count, part, steps, bound):
    starts = torch.tensor([round(i * (steps - part) / (count - 1)) for i in range(count)])
    places = (starts[:, None] + torch.arange(part) + 0.5) / steps
    mean = (survey_weights(count, part, steps) * places.square()).sum() / steps
    assert mean.item() == pytest.approx(1 / 3, abs=bound)


def test_the_norms_are_put_back_even_after_an_error():
    net = tiny()
    before = dict(net.named_modules())
    with pytest.raises(RuntimeError), shared_norms(norm_places(net), (torch.ones(1, 1), torch.ones(1, 1))):
        assert any(isinstance(module, SharedNorm) for module in net.modules())
        raise RuntimeError
    assert dict(net.named_modules()) == before


@pytest.mark.parametrize(("tile", "overlap"), [(8, 8), (0, 0), (8, -1), (8.0, 2)])
def test_tiles_that_cannot_be_are_refused(tile, overlap):
    with pytest.raises(ValueError, match="whole numbers, overlap is at least 0 and tile above it"):
        tiny().encode(images(1, 3, 64, 64), tile=tile, overlap=overlap)


def test_tiles_take_less_memory(monkeypatch):
    """The largest tensor that a convolution meets, not the process's memory, which other tests share."""
    seen, convolve = [], F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, *args, **kwargs: seen.append(x.numel()) or convolve(x, *args, **kwargs))
    net = tiny()
    with torch.no_grad():
        z = net.encode(rough(256))
        peaks = []
        for tile in ({}, {"tile": 24, "overlap": 8}):
            seen.clear()
            net.decode(z, **tile)
            peaks.append(max(seen))
    assert seen and peaks[1] < 0.3 * peaks[0]


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_close_and_silent_where_it_suffices(dtype):
    net, x = tiny(scale_factor=0.5), images(2, 3, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        z = net.encode_safely(x, dtype=dtype)
        y = net.decode_safely(z, dtype=dtype)
        assert z.dtype == y.dtype == torch.float32
        assert_close(z, net.encode(x), 0.03)
        assert_close(y, net.decode(z), 0.03)


def wild(x: torch.Tensor, *numbers: int) -> torch.Tensor:
    """Make these of the batch so large that a first convolution of weights to match passes float16's 65504."""
    x[list(numbers)] *= 1e3
    return x


def amplifying(net: nn.Module) -> nn.Module:
    for half in (net.encoder, net.decoder):
        half.conv_in.weight.data *= 1e3
    return net


def test_what_overflows_is_decoded_again_in_float32_with_one_warning():
    net, z = amplifying(tiny()), wild(images(4, 4, 2, 2), 1, 3)
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            assert net.decode(z).isfinite().flatten(1).all(1).tolist() == [True, False, True, False]
        with pytest.warns(UserWarning, match="2 of 4 overflowed float16.*again in float32") as caught:
            y = net.decode_safely(z)
        assert len(caught) == 1
        expected = net.decode(z)
        assert_close(y[[1, 3]], expected[[1, 3]], 1e-6)
        assert not torch.equal(y[[0, 2]], expected[[0, 2]])
        assert_close(y, expected, 0.02)


def test_weights_in_half_precision_are_widened_for_the_second_attempt_and_stay_as_they_were():
    net, z = amplifying(tiny()).half(), wild(images(2, 4, 2, 2), 0, 1)
    with torch.no_grad(), pytest.warns(UserWarning, match="overflowed float16"):
        y = net.decode_safely(z.half())
    assert y.isfinite().all() and net.last_layer.dtype == torch.float16
    assert_close(y, net.float().decode(z.half().float()).detach(), 1e-5)


def test_noise_of_images_that_overflow_stays_theirs():
    net, x, noise = amplifying(tiny()), wild(images(2, 3, 8, 8), 1), images(2, 4, 2, 2, seed=1)
    with torch.no_grad(), pytest.warns(UserWarning, match="1 of 2 overflowed"):
        z = net.encode_safely(x, noise)
    with torch.no_grad():
        assert_close(z[1], net.encode(x, noise)[1], 1e-6)


def test_what_is_not_finite_in_float32_either_is_an_error():
    z = images(1, 4, 2, 2)
    z[0, 0, 0, 0] = float("nan")
    with torch.no_grad(), pytest.raises(FloatingPointError, match="hold NaN or infinity"):
        tiny().decode_safely(z, dtype=torch.float32)
    with torch.no_grad(), pytest.warns(UserWarning), pytest.raises(FloatingPointError):
        tiny().decode_safely(z, dtype=torch.bfloat16)


# --- the codebook ---------------------------------------------------------------------------------------------------


def test_each_vector_takes_the_nearest_code_whatever_the_portion():
    codebook, z = Codebook(37, 5), images(2, 5, 3, 4)
    nn.init.normal_(codebook.weight, std=0.5)
    expected = torch.cdist(z.movedim(1, -1).flatten(0, 2), codebook.weight).argmin(1).view(2, 3, 4)
    assert torch.equal(codebook.nearest(z), expected)
    codebook.rows = 37 * 5
    assert torch.equal(codebook.nearest(z), expected)
    assert torch.equal(codebook.lookup(expected)[1, :, 2, 3], codebook.weight[expected[1, 2, 3]])


def test_the_gradient_passes_straight_through_to_the_latents():
    codebook, z = Codebook(8, 3), images(2, 3, 4, 4).requires_grad_()
    upstream = images(2, 3, 4, 4, seed=1)
    (codebook(z).z * upstream).sum().backward()
    assert torch.equal(z.grad, upstream) and codebook.weight.grad is None


@pytest.mark.parametrize(("legacy", "to_codes", "to_latents"), [(True, 0.1, 1.0), (False, 1.0, 0.1)])
def test_the_codebooks_loss_pulls_codes_and_latents_as_its_settings_say(legacy, to_codes, to_latents):
    codebook, z = Codebook(8, 3, beta=0.1, legacy=legacy), images(1, 3, 2, 2).requires_grad_()
    loss, indices = codebook(z)[1:]
    loss.backward()
    gap = (codebook.lookup(indices) - z).detach()
    assert_close(loss.detach(), 1.1 * gap.square().mean(), 1e-6)
    assert_close(z.grad, to_latents * -2 * gap / gap.numel(), 1e-6)
    expected = torch.zeros(8, 3).index_add_(
        0, indices.flatten(), to_codes * 2 * gap.movedim(1, -1).flatten(0, 2) / gap.numel()
    )
    assert_close(codebook.weight.grad, expected, 1e-6)


def test_decoding_quantises_unless_told_otherwise_and_encoding_never_does():
    net, x = tiny(VQAutoencoder, num_codes=16, scale_factor=0.5), images(2, 3, 8, 8)
    with torch.no_grad():
        z = net.encode(x, noise=torch.full((2, 3, 2, 2), 9.0))
        out = net(x)
        codes = net.normalise(net.codebook.lookup(out.indices))
        assert not torch.allclose(codes, z, atol=1e-3)
        assert_close(net.decode(z), out.reconstruction, 1e-5)
        assert_close(net.decode(z), net.decode(codes, quantise=False), 1e-5)
        assert_close(net.decode_indices(out.indices), out.reconstruction, 1e-5)
        assert not torch.allclose(net.decode(z, quantise=False), out.reconstruction, atol=1e-3)


# --- foreign configs ------------------------------------------------------------------------------------------------

PEER = {
    "block_out_channels": (16, 24),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 8,
}
PEERS = {
    "plain": {},
    "attention at one level down, another up": {
        "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "no attention, no projections": {
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latent_channels": 3,
    },
    "depth, grey, other ends": {"layers_per_block": 2, "in_channels": 1, "out_channels": 2, "act_fn": "swish"},
}


@pytest.mark.parametrize("name", PEERS)
def test_diffusers_autoencoder_agrees_through_the_table(name):
    config = PEER | PEERS[name]
    torch.manual_seed(0)
    peer = randomised(diffusers.AutoencoderKL(**config))
    net = diffusers_autoencoder.load_autoencoder(dict(peer.config), peer.state_dict()).eval()
    x = images(2, config.get("in_channels", 3), 16, 8)
    with torch.no_grad():
        theirs = peer.encode(x).latent_dist
        ours = net.moments(x)
        assert_close(ours.mean, theirs.mean, 5e-5)
        assert_close(ours.logvar, theirs.logvar, 5e-5)
        assert_close(net.encode(x), theirs.mean * 0.18215, 5e-5)
        assert_close(net.decode(theirs.mean * 0.18215), peer.decode(theirs.mean).sample, 5e-5)
    exported = diffusers_autoencoder.export_autoencoder(config, net.state_dict())
    assert all(torch.equal(exported[key], tensor) for key, tensor in peer.state_dict().items())


def test_diffusers_vq_model_agrees_through_the_table():
    config = PEER | {"num_vq_embeddings": 32, "vq_embed_dim": 5, "scaling_factor": 0.5}
    torch.manual_seed(0)
    peer = randomised(diffusers.VQModel(**config))
    net = diffusers_autoencoder.load_autoencoder(dict(peer.config), peer.state_dict()).eval()
    x = images(2, 3, 16, 8)
    with torch.no_grad():
        h = peer.encode(x).latents
        assert_close(net.encode(x), h * 0.5, 5e-5)
        assert_close(net.decode(h * 0.5), peer.decode(h).sample, 5e-5)
        assert_close(net(x).codebook_loss, peer.decode(h).commit_loss, 5e-5)


def test_diffusers_statistics_of_latents_become_scale_and_shift():
    config = PEER | {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2, 4, 5], "scaling_factor": 0.5}
    settings = diffusers_autoencoder.autoencoder_config(config)
    assert settings["shift"] == [0.1, 0.2, 0.3, 0.4] and settings["scale_factor"] == [0.5, 0.25, 0.125, 0.1]
    settings = diffusers_autoencoder.autoencoder_config(PEER | {"shift_factor": 0.1159, "scaling_factor": 0.3611})
    assert (settings["shift"], settings["scale_factor"]) == (0.1159, 0.3611)


LDM = {"ch": 32, "out_ch": 3, "in_channels": 3, "z_channels": 4, "resolution": 12, "num_res_blocks": 1,
       "attn_resolutions": [3], "ch_mult": [2, 1, 2], "double_z": True}  # fmt: skip


def ldm(**changes) -> dict:
    return {"embed_dim": 2, "ddconfig": LDM | changes}


@pytest.mark.parametrize(("module", "config", "message"), [
    (compvis_autoencoder, ldm(double_z=False), "double_z=False is not supported"),
    (compvis_autoencoder, ldm(double_z=True) | {"n_embed": 8}, "double_z=True is not supported"),
    (compvis_autoencoder, ldm(attn_type="linear"), "attn_type='linear' is not supported"),
    (compvis_autoencoder, ldm(use_linear_attn=True), "use_linear_attn=True"),
    (compvis_autoencoder, ldm(give_pre_end=True), "give_pre_end=True"),
    (compvis_autoencoder, ldm(chanels=8), "takes no chanels"),
    (compvis_autoencoder, {"ddconfig": LDM}, "lacks embed_dim"),
    (compvis_autoencoder, ldm(double_z=False) | {"n_embed": 8, "remap": "used.npy"}, "remap='used.npy'"),
    (compvis_autoencoder, ldm() | {"colorize_nlabels": 3}, "colorize_nlabels=3"),
    (diffusers_autoencoder, PEER | {"act_fn": "gelu"}, "act_fn='gelu'"),
    (diffusers_autoencoder, PEER | {"down_block_types": ("DownEncoderBlock2D", "DownBlock2D")}, "'DownBlock2D' is not"),
    (diffusers_autoencoder, PEER | {"up_block_types": ("UpDecoderBlock2D",)}, "up_block_types has 1 entries"),
    (diffusers_autoencoder, PEER | {"latents_mean": [0.0] * 4}, "latents_mean with latents_std"),
    (diffusers_autoencoder, PEER | {"num_vq_embeddings": 8, "norm_type": "spatial"}, "norm_type='spatial'"),
    (diffusers_autoencoder, PEER | {"unknown": 1}, "takes no unknown"),
])  # fmt: skip
def test_foreign_settings_that_cannot_be_honoured_are_refused(module, config, message):
    with pytest.raises(ValueError, match=message):
        module.autoencoder_config(config)


def test_ldm_settings_have_their_meaning():
    table = compvis_autoencoder.autoencoder_table(ldm(resamp_with_conv=False))
    shapes = table.foreign_shapes
    assert shapes["encoder.conv_in.weight"] == (32, 3, 3, 3)  # ch, not ch * ch_mult[0]
    assert shapes["encoder.down.0.block.0.nin_shortcut.weight"] == (64, 32, 1, 1)
    assert shapes["decoder.norm_out.weight"] == (64,)
    assert shapes["quant_conv.weight"] == (4, 8, 1, 1) and shapes["post_quant_conv.weight"] == (4, 2, 1, 1)
    assert not any("sample" in key for key in shapes)
    assert "encoder.down.2.attn.0.q.weight" in shapes and "decoder.up.2.attn.1.q.weight" in shapes
    assert not any("attn" in key for key in compvis_autoencoder.autoencoder_table(ldm(attn_type="none")).foreign_shapes)
    # The encoder halves 13 to 6 and 3, the decoder doubles 3 to 6 and 12.
    odd = compvis_autoencoder.autoencoder_config(ldm(resolution=13, attn_resolutions=[12, 13]))
    assert [stage["attention"] for stage in odd["stages"]] == ["self", "none", "none"]
    assert [stage["attention"] for stage in odd["up_stages"]] == ["self", "none", "none"]


def test_loaded_weights_take_the_scale_of_their_diffusion_model():
    config = ldm()
    net = randomised(AutoencoderKL(**compvis_autoencoder.autoencoder_config(config)))
    weights = compvis_autoencoder.export_autoencoder(config, net.state_dict())
    again = compvis_autoencoder.load_autoencoder(config, weights, scale_factor=0.18215).eval()
    assert again.scale_factor == 0.18215 and not compvis_autoencoder.load_autoencoder(config, weights).measured
    with torch.no_grad():
        assert_close(again.encode(images(1, 3, 8, 8)), net.encode(images(1, 3, 8, 8)) * 0.18215, 1e-6)


def test_tiling_is_a_matter_of_the_upper_levels():
    assert [tiny(stages=STAGES[:n]).encoder.split for n in (1, 2, 3)] == [0, 1, 2]
    attends = [STAGES[0], {**STAGES[1], "attention": "self"}, STAGES[2]]
    assert tiny(stages=attends).decoder.split == 1
    assert {type(getattr(owner, name)) for owner, name in tiling.norm_places(tiny())} == {nn.GroupNorm}
