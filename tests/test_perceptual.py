"""Is LPIPS what torchmetrics computes, and what is said where its weights are absent? Random ones: no network."""

from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from diffusion.autoencoder_losses import AutoencoderLoss
from diffusion.training.perceptual import LPIPS, cached_file

NET = "squeeze"  # the smallest backbone


@pytest.fixture(scope="module")
def weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.squeezenet1_1(weights=None).state_dict()


@pytest.fixture
def backbone(weights, tmp_path):
    path = tmp_path / "squeezenet.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def downloads(monkeypatch, answer):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", answer)


def unreachable(url, *args, **kwargs):
    raise URLError("Name or service not known")


def images(channels=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(2, channels, 48, 40, generator=draws) * 2 - 1


def test_the_distance_is_torchmetrics(backbone, weights, monkeypatch):
    downloads(monkeypatch, lambda *args, **kwargs: weights)
    theirs = learned_perceptual_image_patch_similarity(images(), images(seed=1), net_type=NET, reduction="none")
    ours = LPIPS(NET, backbone=str(backbone))(images(), images(seed=1))
    assert ours.shape == (2,) and (ours > 0).all()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["safetensors", "cache", "download"])
def test_weights_come_from_wherever_they_are(kind, backbone, weights, empty_cache, tmp_path, monkeypatch):
    expected = LPIPS(NET, backbone=str(backbone))(images(), images(seed=1))
    downloads(monkeypatch, unreachable if kind != "download" else lambda *args, **kwargs: weights)
    path = None
    if kind == "safetensors":
        path = str(tmp_path / "weights.safetensors")
        save_file(weights, path)
    if kind == "cache":
        empty_cache.mkdir(parents=True)
        torch.save(weights, cached_file(NET))
    torch.testing.assert_close(LPIPS(NET, backbone=path)(images(), images(seed=1)), expected)


def test_equal_images_are_at_distance_zero_and_grey_counts_thrice(backbone):
    distance = LPIPS(NET, backbone=str(backbone))
    assert torch.equal(distance(images(), images()), torch.zeros(2))
    grey, other = images(1), images(1, seed=1)
    torch.testing.assert_close(distance(grey, other), distance(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_the_reconstruction_gets_a_gradient_and_the_backbone_none(backbone):
    loss = AutoencoderLoss(perceptual=LPIPS(NET, backbone=str(backbone)), perceptual_weight=2.0)
    reconstruction = images(seed=1).requires_grad_()
    terms = loss(images(), reconstruction)
    terms.loss.backward()
    assert reconstruction.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.perceptual.net.parameters())
    values = images()[0].numel()
    plain = AutoencoderLoss()(images(), reconstruction)
    torch.testing.assert_close(terms.nll, plain.nll + values * 2.0 * terms.perceptual)


def test_no_checkpoint_and_no_optimizer_sees_the_backbone(backbone):
    loss = AutoencoderLoss(perceptual=LPIPS(NET, backbone=str(backbone)))
    assert set(loss.state_dict()) == {name for name, _ in loss.named_parameters()} == {"log_variance"}


def test_building_it_leaves_the_callers_random_numbers_alone(backbone):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    LPIPS(NET, backbone=str(backbone))
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def test_absent_weights_say_where_to_put_them_and_offer_training_without(empty_cache, monkeypatch):
    downloads(monkeypatch, unreachable)
    with pytest.raises(ValueError) as error:
        LPIPS("vgg")
    for part in ("vgg16", str(empty_cache), "https://", "loss.perceptual.backbone=FILE", "loss.perceptual=null"):
        assert part in str(error.value)


def test_without_download_the_network_is_not_asked(empty_cache, monkeypatch):
    downloads(monkeypatch, lambda *args, **kwargs: pytest.fail("asked the network"))
    with pytest.raises(ValueError, match=r"there is no such file.*train without the perceptual loss"):
        LPIPS(NET, download=False)


def test_a_backbone_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no such file \(.*nowhere\.pth\)"):
        LPIPS(NET, backbone=str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 half a file", b"\x80\x02cos\nsystem\n."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"bad.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no weights that can be read"):
        LPIPS(NET, backbone=str(path))


def test_the_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match="does not hold this backbone's weights"):
        LPIPS(NET, backbone=str(path))


def test_images_of_two_channels_and_unknown_backbones_are_refused(backbone):
    with pytest.raises(ValueError, match=r"these have 2; train without it: loss\.perceptual=null"):
        LPIPS(NET, backbone=str(backbone))(images(2), images(2))
    with pytest.raises(ValueError, match="must be one of vgg, alex, squeeze, got 'resnet'"):
        LPIPS("resnet")
