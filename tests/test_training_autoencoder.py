"""Does an autoencoder's training do what it says: count batches, resume exactly, log the truth, refuse nonsense?"""

import math
import warnings

import numpy as np
import pytest
import torch
from autoencoder_cases import DISCRIMINATOR, GAN, KL, LOSS, VECTOR, VQ, Watch, tiny_autoencoder
from PIL import Image
from safetensors.torch import load_file
from training_cases import Stopped, alone, assert_same_outcome

from diffusion.autoencoder_losses import AdversarialLoss, AutoencoderLoss
from diffusion.checkpoint import load_autoencoder, read_header
from diffusion.data.digits import Digits
from diffusion.draws import SampleDraws
from diffusion.latents import encode_moments
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.training.autoencoder import AutoencoderTask
from diffusion.training.guard import NonFiniteLoss
from diffusion.training.latent_scale import measure_scale, training_images, write_scale
from diffusion.training.metrics import read_rows
from diffusion.training.optimizers import JointOptimizer
from diffusion.training.run import build, build_task, train
from diffusion.training.similarity import gradient_magnitude, sharpness, similarity

# Six full batches an epoch; seven, of which the last makes an optimizer step of its own when two are accumulated.
EVEN = {"data__batch_size": 200}
ODD = {"data__batch_size": 171, "trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 6}
WAYS = {"even": {**GAN, **EVEN}, "odd_accumulated": {**GAN, **ODD}, "vq": {**EVEN, "autoencoder": VQ}}


def stop(step, hook="on_train_batch_end"):
    return {"_target_": "training_cases.StopAt", "step": step, "hook": hook}


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def column(run_dir, name):
    return [float(row[name]) for row in read_rows(run_dir / "metrics.csv") if row.get(name)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs, made once for each way to train."""
    made = {}

    def run(way):
        if way not in made:
            made[way] = tmp_path_factory.mktemp("whole")
            train(tiny_autoencoder(made[way], **WAYS[way]))
        return made[way]

    return run


# ---------------------------------------------------------------------------------------------------------------------
# counting and resuming


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, whole, way):
    stops = [(2,), (4,), (5, "on_validation_batch_end"), (7, "on_train_batch_start"), (10, "on_validation_start")]
    for at in stops:
        with pytest.raises(Stopped):
            train(tiny_autoencoder(tmp_path, callbacks__stop=stop(*at), **WAYS[way]))
    train(tiny_autoencoder(tmp_path, **WAYS[way]))
    assert_same_outcome(whole(way), tmp_path)


def test_steps_count_batches_though_two_optimizers_step(whole):
    saved = checkpoint(whole("even"))
    assert saved["global_step"] == saved["batches_seen"] == 14
    assert saved["lr_schedulers"][0]["last_epoch"] == 14
    ema = next(state for name, state in saved["callbacks"].items() if name.startswith("EMA"))
    assert ema["num_updates"] == 14
    autoencoder, discriminator = saved["optimizer_states"][0]["parts"]
    assert {float(state["step"]) for state in autoencoder["state"].values()} == {14.0}
    assert {float(state["step"]) for state in discriminator["state"].values()} == {10.0}  # it began at 4
    rows = [int(row["step"]) for row in read_rows(whole("even") / "metrics.csv")]
    assert rows == [2, 4, 5, 6, 8, 10, 12, 14]


def test_accumulated_batches_make_one_step(whole):
    saved = checkpoint(whole("odd_accumulated"))
    assert saved["global_step"] == 14
    assert saved["batches_seen"] == 25  # three epochs of 7 batches in 4 steps, and 4 more for the last two steps


def test_one_schedule_moves_both_rates(whole):
    autoencoder, discriminator = checkpoint(whole("even"))["optimizer_states"][0]["parts"]
    factors = [part["param_groups"][0]["lr"] / rate for part, rate in ((autoencoder, 2e-3), (discriminator, 1e-3))]
    assert factors[0] == pytest.approx(factors[1]) and factors[0] < 0.1


def test_the_discriminator_stands_still_until_it_starts(tmp_path):
    task = build_task(tiny_autoencoder(tmp_path, **GAN))
    before = {name: value.clone() for name, value in task.discriminator.state_dict().items()}
    train(tiny_autoencoder(tmp_path / "run", **GAN, trainer__max_steps=4))
    after = checkpoint(tmp_path / "run")["state_dict"]
    assert all(torch.equal(value, after[f"discriminator.{name}"]) for name, value in before.items())
    train(tiny_autoencoder(tmp_path / "run", **GAN, trainer__max_steps=5))
    later = checkpoint(tmp_path / "run")["state_dict"]
    assert not any(torch.equal(before[name], later[f"discriminator.{name}"]) for name in before if "weight" in name)


def test_until_it_starts_the_run_is_one_without_a_discriminator(tmp_path):
    train(tiny_autoencoder(tmp_path / "with", **GAN, trainer__max_steps=4))
    train(tiny_autoencoder(tmp_path / "without", trainer__max_steps=4))
    one, other = (checkpoint(tmp_path / name)["state_dict"] for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_another_seed_gives_another_run_and_the_process_seed_does_not(tmp_path):
    for name, seed, process in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        torch.manual_seed(process)
        train(tiny_autoencoder(tmp_path / name, seed=seed, trainer__max_steps=2))
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains_both(tmp_path, precision):
    train(tiny_autoencoder(tmp_path, **GAN, trainer__precision=precision, trainer__max_steps=8))
    assert all(math.isfinite(value) for value in column(tmp_path, "train/discriminator"))
    assert column(tmp_path, "train/discriminator_grad_norm")


def test_a_compiled_autoencoder_trains_against_a_discriminator(tmp_path, monkeypatch):
    compiled, compile_ = [], torch.nn.Module.compile

    def without_code(module):  # all of torch.compile but the C++ compiler
        compiled.append(module)
        compile_(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code)
    short = {"trainer__max_steps": 6, "callbacks__reconstructions": None, "trainer__limit_val_batches": 0}
    train(tiny_autoencoder(tmp_path, **GAN, **short, autoencoder=VECTOR, callbacks__scale=None, task__compile=True))
    assert len(compiled) == 1 and column(tmp_path, "train/adaptive_weight")


# ---------------------------------------------------------------------------------------------------------------------
# one step


def one_step(tmp_path, **changes):
    """Return the task after one forward and backward pass of the discriminator's first step, without Lightning."""
    config = tiny_autoencoder(tmp_path, **GAN, loss__adversarial__start=0, autoencoder__dropout=0.0, **changes)
    task, data = build_task(config), build(config["data"])
    alone(task)
    batch = next(iter(data.train_dataloader()))
    out = task.training_step(batch, 0)
    out["loss"].backward()
    return task, batch["image"], out


def test_each_side_gets_the_gradient_of_its_own_loss(tmp_path):
    task, x, _ = one_step(tmp_path)
    got = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    task.gan_means.pop(lambda sums: sums)
    # The same by two backward passes over separate graphs.
    output = task.autoencoder(x, task._noise(x, SampleDraws(0, range(len(x)))))
    terms = task._terms(x, output)
    wanted = -task.discriminator(output.reconstruction).mean()
    norms = [
        torch.autograd.grad(term, task.autoencoder.last_layer, retain_graph=True)[0].norm()
        for term in (terms.nll, wanted)
    ]
    weight = 0.5 * norms[0] / (norms[1] + 1e-4)
    autoencoder = dict(task.autoencoder.named_parameters())
    expected = torch.autograd.grad(terms.loss + weight * wanted, list(autoencoder.values()))
    for name, gradient in zip(autoencoder, expected, strict=True):
        torch.testing.assert_close(got[f"autoencoder.{name}"], gradient, rtol=1e-4, atol=1e-4)
    real, fake = task.discriminator(x), task.discriminator(output.reconstruction.detach())
    loss = 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    discriminator = dict(task.discriminator.named_parameters())
    for name, gradient in zip(discriminator, torch.autograd.grad(loss, list(discriminator.values())), strict=True):
        torch.testing.assert_close(got[f"discriminator.{name}"], gradient, rtol=1e-4, atol=1e-5)


def test_without_the_adaptive_weight_the_fixed_one_counts(tmp_path):
    task, _, out = one_step(tmp_path, loss__adversarial__adaptive=False, loss__adversarial__weight=2.0)
    means = task.means.pop(lambda sums: sums) | {
        f"gan_{name}": value for name, value in task.gan_means.pop(lambda sums: sums).items()
    }
    plain = means["nll"] + task.loss.kl_weight_at(0) * means["kl"]
    assert means["loss"] == pytest.approx(plain + 2.0 * means["gan_gan"], rel=1e-5)
    assert float(out["loss"].detach()) == pytest.approx(means["loss"] + means["gan_discriminator"], rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_both_sides_are_clipped_apart_and_measured_before(tmp_path, clip):
    changes = {"trainer__max_steps": 1, "trainer__log_every_n_steps": 1, "trainer__limit_val_batches": 0}
    still = {"autoencoder__dropout": 0.0, "loss__adversarial__start": 0}
    train(tiny_autoencoder(tmp_path, **GAN, **changes, **still, trainer__gradient_clip_val=clip))
    task, _, _ = one_step(tmp_path)
    norm = {name: float(nn_norm(getattr(task, name))) for name in ("autoencoder", "discriminator")}
    assert column(tmp_path, "train/grad_norm")[0] == pytest.approx(norm["autoencoder"], rel=1e-4)
    assert column(tmp_path, "train/discriminator_grad_norm")[0] == pytest.approx(norm["discriminator"], rel=1e-4)


def nn_norm(module):
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def test_two_accumulated_batches_are_one_step_of_their_mean():
    a, b = (torch.nn.Linear(2, 1) for _ in range(2))
    joint = JointOptimizer([torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.SGD(b.parameters(), lr=1.0)])
    before = [p.detach().clone() for p in (*a.parameters(), *b.parameters())]
    for x in (torch.ones(1, 2), 3 * torch.ones(1, 2)):
        ((a(x) + b(x)).sum() / 2).backward()
    joint.step()
    rates = [0.1, 0.1, 1.0, 1.0]
    for old, rate, p, gradient in zip(before, rates, (*a.parameters(), *b.parameters()), [2.0, 1.0] * 2, strict=True):
        torch.testing.assert_close(p.detach(), old - rate * gradient)


def test_the_joint_optimizer_carries_both_states_there_and_back():
    def make():
        layers = [torch.nn.Linear(2, 1) for _ in range(2)]
        return layers, JointOptimizer([torch.optim.Adam(layer.parameters(), lr=0.1) for layer in layers])

    (layers, joint), (_, other) = make(), make()
    sum(layer(torch.ones(1, 2)).sum() for layer in layers).backward()
    torch.optim.lr_scheduler.LambdaLR(joint, lambda step: 0.5)
    joint.step()
    other.load_state_dict(joint.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.05, 0.05]
    assert other.param_groups[1] is other.parts[1].param_groups[0]
    assert [len(part.state) for part in other.parts] == [2, 2]


def test_the_state_of_one_optimizer_does_not_restore_two():
    alone, other = (torch.optim.SGD(torch.nn.Linear(2, 1).parameters()) for _ in range(2))
    with pytest.raises(ValueError, match=r"1 optimizer.*this run has 2.*another run_dir"):
        JointOptimizer([alone, other]).load_state_dict(alone.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# what is logged and drawn


def test_every_term_is_logged(whole):
    logged = {name for row in read_rows(whole("even") / "metrics.csv") for name, value in row.items() if value}
    terms = {"loss", "nll", "reconstruction", "kl", "kl_00", "kl_01", "log_variance", "lr", "images_per_second"}
    gan = {"gan", "adaptive_weight", "discriminator", "logits_real", "logits_fake", "discriminator_grad_norm"}
    values = {
        f"{name}{suffix}" for name in ("loss", "psnr", "ssim", "sharpness") for suffix in ("", "_ema", "_ema_0.5")
    }
    latents = {f"latent_{what}_{channel}" for what in ("mean", "std") for channel in ("00", "01")}
    assert {f"train/{name}" for name in terms | gan} | {f"val/{name}" for name in values | latents} <= logged
    assert len(column(whole("even"), "train/gan")) == 5 and len(column(whole("even"), "train/loss")) == 7


def test_a_codebook_is_logged_in_place_of_a_kl(whole):
    usage, perplexity = (column(whole("vq"), f"train/codebook_{name}") for name in ("usage", "perplexity"))
    assert all(1 / 16 <= value <= 1 for value in usage)
    assert all(1 <= value <= 16 * share + 1e-6 for value, share in zip(perplexity, usage, strict=True))
    assert not column(whole("vq"), "train/kl")


def test_the_means_are_those_of_the_batches(tmp_path):
    quiet = {"trainer__max_steps": 3, "trainer__log_every_n_steps": 3, "trainer__limit_val_batches": 0}
    train(tiny_autoencoder(tmp_path, **quiet, callbacks__watch={"_target_": "autoencoder_cases.Watch"}))
    assert column(tmp_path, "train/loss")[0] == pytest.approx(np.mean([loss for _, loss in Watch.seen]), rel=1e-5)


def test_the_validation_of_the_same_weights_is_the_same(tmp_path):
    frozen = {"optimizer__lr": 0.0, "optimizer__weight_decay": 0.0, "loss__kl_warmup_steps": 0}
    train(tiny_autoencoder(tmp_path, trainer__val_check_interval=4, **frozen))
    for name in ("val/loss", "val/psnr_ema", "val/latent_std_00"):
        assert len(column(tmp_path, name)) == 3 and len(set(column(tmp_path, name))) == 1


def test_pictures_pair_images_with_their_reconstructions_and_show_the_latents(whole):
    folder = whole("even") / "samples"
    steps = [f"step={step:07d}{what}" for step in (4, 8, 12, 14) for what in ("", "_latents")]
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(
        f"{step}_{weights}" for step in steps for weights in ("raw", "ema")
    )
    data = Digits()
    data.setup()
    with Image.open(folder / "step=0000014_ema.png") as picture:
        shown = np.asarray(picture)
    scale = 8  # 8x8 digits in cells of 64 pixels, 2 pixels apart
    first = ((data.val_set[0]["image"][0] + 1) * 127.5).round().numpy()
    assert np.array_equal(shown[2:66:scale, 2:66:scale, 0], first)
    assert shown.shape == (2 * 66 + 2, 4 * 66 + 2, 3)


def test_vectors_are_shown_by_traversing_them(tmp_path):
    short = {"trainer__max_steps": 4, "trainer__limit_val_batches": 0}
    train(tiny_autoencoder(tmp_path, autoencoder=VECTOR, **short))
    names = {path.name for path in (tmp_path / "samples").glob("*.png")}
    assert {"step=0000004_traversal_ema.png", "step=0000004_traversal_raw.png"} <= names
    assert not any("latents" in name for name in names)


def test_pictures_and_averages_do_not_change_the_weights(tmp_path):
    train(tiny_autoencoder(tmp_path / "with", **GAN))
    quiet = {"callbacks__reconstructions": None, "callbacks__log": None, "callbacks__scale": None, "ema": None}
    train(tiny_autoencoder(tmp_path / "without", **GAN, **quiet, trainer__limit_val_batches=0))
    one, other = (checkpoint(tmp_path / name)["state_dict"] for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one if "means" not in name)


def test_psnr_is_that_of_each_image():
    x = torch.zeros(2, 1, 8, 8)
    noisy = x + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert float(similarity(noisy, x)["psnr"]) == pytest.approx((20 + 40) / 2, abs=1e-4)


@pytest.mark.parametrize("size", [8, 15, 16, 32])
def test_ssim_of_an_image_with_itself_is_one_at_any_size(size):
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(similarity(x, x)["ssim"]) == pytest.approx(1.0, abs=1e-5)


def step_edge(width):
    """An edge of height 1, `width` pixels wide: 1 is as sharp as pixels allow."""
    return ((torch.arange(32) - 16 + width) / width).clamp(0, 1).expand(1, 1, 32, 32)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_edge_that_is_n_times_as_wide_is_an_nth_as_sharp(width):
    blurred, real = (gradient_magnitude(step_edge(w)) for w in (width, 1))
    assert float(sharpness(blurred, real)) == pytest.approx(1 / width)
    assert float(blurred.sum()) == pytest.approx(float(real.sum()))
    got = similarity(step_edge(width), step_edge(1))
    assert float(got["edge_distance"]) == pytest.approx(2 * (1 - 1 / width), abs=1e-5)


def test_noise_is_sharper_than_the_original_and_still_at_a_distance():
    noisy = step_edge(1) + 0.05 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    got = similarity(noisy, step_edge(1))
    assert float(got["sharpness"]) > 1 and float(got["edge_distance"]) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# the latents' scale


def test_the_model_file_carries_a_scale_that_gives_unit_variance(whole):
    path = whole("even") / "model.safetensors"
    assert read_header(path).facts["shape"] == [1, 8, 8]
    autoencoder = load_autoencoder(path)
    assert autoencoder.measured
    data = Digits()
    batch = next(iter(training_images(data, 100)))
    draws = torch.Generator().manual_seed(0)
    noise = [torch.randn(100, 2, 4, 4, generator=draws) for _ in range(50)]
    latents = torch.cat([autoencoder.encode(batch["image"], one) for one in noise])
    assert float(latents.std()) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("settings", [KL, VQ, VECTOR], ids=["kl", "vq", "vector"])
def test_a_scale_and_shift_for_each_channel_give_zero_mean_and_unit_variance(settings):
    torch.manual_seed(0)
    autoencoder = build(settings).eval()
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    scale, shift = measure_scale(autoencoder, [{"image": images}], num_images=64, per_channel=True)
    moments = encode_moments(autoencoder, images).double().transpose(0, 1).flatten(1)
    mean, variance = (moments.chunk(2)[0], moments.chunk(2)[1].exp())
    std = ((mean**2 + variance).mean(1) - mean.mean(1) ** 2).sqrt()
    torch.testing.assert_close(torch.tensor(shift), mean.mean(1).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(scale), (1 / std).float(), rtol=1e-4, atol=1e-5)


def test_only_as_many_images_are_measured_as_asked():
    torch.manual_seed(0)
    autoencoder, images = build(KL).eval(), torch.rand(8, 1, 8, 8)
    whole = measure_scale(autoencoder, [{"image": images[:5]}], num_images=5)
    assert measure_scale(autoencoder, [{"image": images[:3]}, {"image": images[3:]}], num_images=5) == whole
    with pytest.raises(ValueError, match="no images"):
        measure_scale(autoencoder, [], num_images=5)
    with pytest.raises(ValueError, match="num_images must be at least 1"):
        measure_scale(autoencoder, [], num_images=0)


def test_latents_that_never_change_have_no_scale():
    autoencoder = build(VQ)
    for p in autoencoder.parameters():
        torch.nn.init.zeros_(p)
    with pytest.raises(ValueError, match="standard deviation"):
        measure_scale(autoencoder, [{"image": torch.rand(4, 1, 8, 8)}], num_images=4)


def test_writing_a_scale_changes_nothing_else(whole, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((whole("even") / "model.safetensors").read_bytes())
    before, weights = read_header(path), load_file(path)
    write_scale(path, [2.0, 3.0], [0.5, -0.5])
    after = read_header(path)
    assert load_autoencoder(path).scale_factor == [2.0, 3.0]
    node = {**before.config["autoencoder"], "scale_factor": [2.0, 3.0], "shift": [0.5, -0.5]}
    assert after.config == {**before.config, "autoencoder": node}
    assert (after.step, after.facts, after.weights) == (before.step, before.facts, before.weights)
    assert all(torch.equal(value, weights[name]) for name, value in load_file(path).items())


def test_a_scale_that_the_config_gives_is_not_measured(tmp_path):
    train(tiny_autoencoder(tmp_path, autoencoder__scale_factor=0.25, trainer__max_steps=1))
    assert load_autoencoder(tmp_path / "model.safetensors").scale_factor == 0.25


def test_the_command_measures_a_file_anew(whole, tmp_path, monkeypatch, capsys):
    from diffusion.training import latent_scale

    path = tmp_path / "model.safetensors"
    path.write_bytes((whole("even") / "model.safetensors").read_bytes())
    arguments = ["latent_scale", f"checkpoint={path}", "data=digits", "num_images=50", "per_channel=true", "device=cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("warnings.formatwarning", None, raising=False)
    latent_scale.main()
    assert len(load_autoencoder(path).scale_factor) == 2
    assert "by 50 images" in capsys.readouterr().err


def test_a_file_of_another_kind_has_no_scale_to_write(tmp_path):
    from tiny import save_tiny

    with pytest.raises(ValueError, match="holds a denoiser"):
        write_scale(save_tiny(tmp_path / "model.safetensors"), 1.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def task(**settings):
    autoencoder = AutoencoderKL(**{key: value for key, value in KL.items() if key != "_target_"})
    return AutoencoderTask(autoencoder, optimizer=torch.optim.SGD, **{"loss": AutoencoderLoss(), **settings})


def test_a_discriminator_that_starts_after_the_last_step_is_warned_of(tmp_path):
    late = {"loss__adversarial__start": 14, "trainer__limit_val_batches": 0}
    with pytest.warns(UserWarning, match=r"starts after the last step: loss\.adversarial\.start=14.*ends after 14 st"):
        train(tiny_autoencoder(tmp_path, **GAN, **late))


def test_a_discriminator_that_starts_in_time_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts after the last step.*")
        train(tiny_autoencoder(tmp_path, **GAN, trainer__max_steps=5))


def test_a_discriminator_without_a_part_in_the_loss_is_refused():
    with pytest.raises(ValueError, match="use loss=autoencoder_gan"):
        task(discriminator=PatchDiscriminator(1, num_layers=1))


def test_a_loss_that_wants_a_discriminator_is_refused_without_one():
    with pytest.raises(ValueError, match="add discriminator=patch"):
        task(loss=AutoencoderLoss(adversarial=AdversarialLoss()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 9, 8), "H=9 is not a multiple of 2.*8 or 10"), ((3, 8, 8), "1 channels"), ((1, 4, 4), "at least 6 pixels")],
)
def test_images_that_do_not_fit_are_refused_before_training(shape, message):
    whole = task(loss=AutoencoderLoss(adversarial=AdversarialLoss()), discriminator=PatchDiscriminator(1, num_layers=1))
    with pytest.raises(ValueError, match=message):
        whole.check_shape(shape)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path):
    diverging = {"_target_": "autoencoder_cases.Diverge", "step": 5}
    with pytest.raises(NonFiniteLoss, match=r"the loss became nan at step 6\. Try a lower"):
        train(tiny_autoencoder(tmp_path, **GAN, callbacks__diverge=diverging))
    assert checkpoint(tmp_path)["global_step"] == 5
    assert all(value.isfinite().all() for value in load_file(tmp_path / "model.safetensors").values())


@pytest.mark.parametrize("name", ["every_n_steps", "num_images", "columns", "rows"])
def test_a_picture_without_contents_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"callbacks\.reconstructions\.{name} must be at least 1, got 0"):
        train(tiny_autoencoder(tmp_path, **{f"callbacks__reconstructions__{name}": 0}))


def test_constants_of_the_cases_are_what_the_tests_assume():
    assert DISCRIMINATOR["num_layers"] == 1 and LOSS["kl_warmup_steps"] == 5 and KL["latent_channels"] == 2
