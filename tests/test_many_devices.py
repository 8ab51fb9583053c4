"""Two processes that train together see, learn and leave what one does with the same global batch.

Real processes over gloo: one launch for the first half of the tests. Batches are 1 x 16 against 2 x 8.
"""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from autoencoder_cases import GAN, KL, tiny_autoencoder
from rank_cases import SHOWN, finish, run_ranks, shown, start_ranks
from safetensors.torch import load_file
from test_training_classifier import CLASSIFIER, tiny_classifier
from torch import nn
from training_cases import TIMINGS, alone, tiny

from diffusion.checkpoint import read_header
from diffusion.training.checkpoint_files import last_checkpoint
from diffusion.training.merge import merge
from diffusion.training.metrics import read_rows
from diffusion.training.run import build_task, train
from diffusion.training.sharded import clip, norm_of

pytestmark = pytest.mark.slow
STEPS = 6
COMMON = {
    "trainer__max_steps": STEPS,
    "trainer__log_every_n_steps": 1,
    "trainer__limit_val_batches": 1.0,  # 597 images: the last batch of two ranks repeats one of them
    "trainer__val_check_interval": STEPS,
    "callbacks__checkpoints__every_n_steps": 3,
    "callbacks__shown": SHOWN,
    "optimizer__eps": 1e-4,  # Adam makes full steps of what rounding leaves of gradients that are zero (keys' biases)
}
STRATIFIED = {"_target_": "diffusion.timestep_samplers.StratifiedTimesteps", "num_train_timesteps": 50}
DDP = {"trainer__devices": 2, "trainer__strategy": "ddp", "data__batch_size": 8}
FSDP = {**DDP, "trainer__strategy": {"_target_": "diffusion.training.sharded.Sharded"}}
ONE = {"data__batch_size": 16}
HALVES = {"data__batch_size": 8, "trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 2 * STEPS}


def denoiser(run_dir, **changes):
    """With the timestep sampler that learns from the losses of all ranks."""
    return tiny(run_dir, net__dropout=0.0, **COMMON | changes)


def classifier(run_dir, **changes):
    network = {**CLASSIFIER, "dropout": 0.0}
    return tiny_classifier(run_dir, classifier=network, timestep_sampler=STRATIFIED, **COMMON | changes)


def autoencoder(run_dir, **changes):
    """With an adversary from the second step on, whose weight and whose norms depend on the whole batch."""
    adversary = {**GAN["discriminator"], "norm": "act"}
    settings = {**GAN, "discriminator": adversary, "autoencoder": {**KL, "dropout": 0.0}}
    return tiny_autoencoder(run_dir, **settings, loss__adversarial__start=2, **COMMON | changes)


def plain_autoencoder(run_dir, **changes):
    return tiny_autoencoder(run_dir, autoencoder={**KL, "dropout": 0.0}, **COMMON | changes)


MODULES = {"denoiser": denoiser, "classifier": classifier, "autoencoder": autoencoder}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every module on one device and on two, and the denoiser in shards and by halves."""
    root = tmp_path_factory.mktemp("runs")
    together = [make(root / f"{name}-two", **DDP) for name, make in MODULES.items()]
    said = run_ranks([*together, denoiser(root / "denoiser-shards", **FSDP)], root / "configs.json")
    (root / "said_1").write_text(said[1])
    for name, make in MODULES.items():
        train(make(root / f"{name}-one", **ONE))
    for name in ("denoiser", "classifier"):
        train(MODULES[name](root / f"{name}-halves", **HALVES))
    return root


SPLITS = [*(f"{name}-two" for name in MODULES), "denoiser-shards", "denoiser-halves", "classifier-halves"]


def whole_of(split: str) -> str:
    return f"{split.partition('-')[0]}-one"


BY_BATCH = ("val/sharpness", "val/edge_distance")  # that compare the edges of a whole batch with those of another


def assert_alike(one, other, *, rtol: float = 1e-6) -> None:
    """Metrics, and models, that differ by rounding only."""
    expected, got = (read_rows(run_dir / "metrics.csv") for run_dir in (one, other))
    assert [row["step"] for row in expected] == [row["step"] for row in got] == [str(i + 1) for i in range(STEPS)]
    for wanted, found in zip(expected, got, strict=True):
        names = [name for name, value in wanted.items() if value and name not in TIMINGS]
        compared = [name for name in names if not name.startswith(BY_BATCH)]
        assert names == [name for name, value in found.items() if value and name not in TIMINGS]
        numbers = ([float(row[name]) for name in compared] for row in (found, wanted))
        np.testing.assert_allclose(*numbers, rtol=rtol, atol=rtol, err_msg=f"step {wanted['step']}: {compared}")
    weights, others = (load_file(run_dir / "model.safetensors") for run_dir in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_batch_shows_the_same_images_at_the_same_timesteps_with_the_same_noise(runs, split):
    (one, _), (other, _) = (shown(runs / name) for name in (whole_of(split), split))
    assert one.keys() == other.keys() and {"index", "input 0", "input 1"} <= one.keys()
    for name, values in one.items():  # "input 0" is the noisy image, or the image with "input 1", its latent's noise
        assert len(values) == 16 * STEPS
        torch.testing.assert_close(other[name], values, rtol=0, atol=0 if name != "input 0" else 1e-6, msg=name)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_batch_gives_the_same_losses_norms_validation_and_model(runs, split):
    rtol = 1e-6 if "autoencoder" not in split else 1e-5  # an adversary magnifies rounding
    assert_alike(runs / whole_of(split), runs / split, rtol=rtol)


@pytest.mark.parametrize("split", [name for name in SPLITS if "halves" not in name])
def test_ranks_end_with_the_same_weights_averages_and_timestep_history(runs, split):
    _, (first, second) = shown(runs / split)
    assert first.keys() == second.keys() and any(name.startswith("average") for name in first)
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    _, (alone_,) = shown(runs / whole_of(split))
    for name, value in alone_.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_the_same_however_many_draw_them(runs, split):
    pictures = {path.name: path.read_bytes() for path in (runs / split / "samples").glob("*.png")}
    expected = {path.name: path.read_bytes() for path in (runs / whole_of(split) / "samples").glob("*.png")}
    assert pictures.keys() == expected.keys()
    assert ("classifier" in split) == (not pictures)
    assert (
        len([name for name in pictures if pictures[name] != expected[name]]) <= len(pictures) // 2
    )  # by a bit of grey


def test_only_the_first_rank_speaks(runs):
    assert (runs / "said_1").read_text() == ""


def test_shards_leave_one_model_file_like_that_of_one_device(runs):
    headers = [read_header(runs / name / "model.safetensors") for name in ("denoiser-one", "denoiser-shards")]
    assert headers[0].shapes == headers[1].shapes and headers[0].weights == headers[1].weights == "ema"
    assert headers[0].facts == headers[1].facts and headers[0].step == headers[1].step == STEPS
    folder = last_checkpoint(runs / "denoiser-shards")
    assert {path.name for path in folder.iterdir()} == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    shapes = {name: [chunk.sizes for chunk in of.chunks] for name, of in known.items() if hasattr(of, "chunks")}
    for name in ("state_dict.net.first.weight", "optimizer_0.state.net.first.weight.exp_avg"):
        assert shapes[name] == 2 * [torch.Size([4, 1, 3, 3])]
    averages = [chunks for name, chunks in shapes.items() if name.endswith("/first.weight")]
    assert averages == 2 * [2 * [torch.Size([4, 1, 3, 3])]]


@pytest.mark.parametrize("name", ["denoiser-shards", "denoiser-two"])
def test_a_checkpoint_becomes_a_model_by_hand(runs, name, tmp_path):
    exported = load_file(runs / name / "model.safetensors")
    merged = load_file(merge(runs / name, out=tmp_path / "merged.safetensors"))
    assert merged.keys() == exported.keys()
    assert all(torch.equal(merged[key], exported[key]) for key in exported)
    raw = load_file(merge(last_checkpoint(runs / name), out=tmp_path / "raw.safetensors", weights="raw"))
    _, (state, _) = shown(runs / name)
    assert all(torch.equal(raw[key], state[f"weight {key}"]) for key in exported)
    assert read_header(tmp_path / "merged.safetensors").weights == "ema"


def test_what_cannot_be_merged_is_named(runs, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        merge(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*gone\.ckpt"):
        merge(tmp_path / "gone.ckpt")
    with pytest.raises(ValueError, match="is neither ema nor raw"):
        merge(runs / "denoiser-two", weights="best")
    (tmp_path / "bad.ckpt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        merge(tmp_path / "bad.ckpt")


def test_a_checkpoint_in_shards_needs_a_run_in_shards(runs, tmp_path):
    config = denoiser(tmp_path, **ONE, resume=str(last_checkpoint(runs / "denoiser-shards")), trainer__max_steps=9)
    with pytest.raises(ValueError, match="is in shards, and this run keeps its network in one piece"):
        train(config)


# ---------------------------------------------------------------------------------------------------------------------
# the parts, in one process


def test_norms_and_clipping_of_whole_tensors_are_torchs():
    ours, theirs = (nn.Linear(5, 3) for _ in range(2))
    for network in (ours, theirs):
        for number, parameter in enumerate(network.parameters()):
            parameter.grad = torch.full_like(parameter, 1.5 + number)
    assert torch.equal(
        norm_of(p.grad for p in ours.parameters()), nn.utils.get_total_norm([p.grad for p in theirs.parameters()])
    )
    assert torch.equal(clip(list(ours.parameters()), 1.0), nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_discriminator_is_not_trained_in_shards(tmp_path):
    task = alone(build_task(autoencoder(tmp_path)))
    with pytest.raises(ValueError, match=r"a discriminator, .* needs whole ones; use trainer=ddp"):
        task.sharded_networks()


def test_frozen_parts_and_sums_are_never_sent_to_other_devices(tmp_path):
    task = alone(build_task(autoencoder(tmp_path)))
    assert set(task.rank_buffers) == {"means.sums", "gan_means.sums"}
    for make in (denoiser, classifier):
        task = alone(build_task(make(tmp_path)))
        task.configure_model()
        assert task._ddp_params_and_buffers_to_ignore == ["sums"]  # DistributedDataParallel would copy the first rank's


# ---------------------------------------------------------------------------------------------------------------------
# starting again


def stopped(config, step):
    """The same run, of which each process stops after some steps."""
    stop = {"_target_": "training_cases.StopAt", "step": step}
    return {**config, "callbacks": {**config["callbacks"], "stop": stop}}


def test_a_run_in_shards_whose_process_was_killed_goes_on_bit_for_bit(runs, tmp_path):
    config = denoiser(tmp_path / "run", **FSDP)
    killed = {**config, "callbacks": {**config["callbacks"], "kill": {"_target_": "rank_cases.KillAt", "step": 5}}}
    ranks = start_ranks([killed], tmp_path / "configs.json")
    try:
        assert ranks[1].wait(timeout=120) == -9
        ranks[0].communicate(timeout=120)
        assert ranks[0].returncode != 0
    finally:
        for rank in ranks:
            rank.kill()
    run_ranks([config], tmp_path / "configs.json")
    for name in ("model.safetensors", "samples/step=0000006_ema.png"):
        assert (tmp_path / "run" / name).read_bytes()
    one, other = (load_file(folder / "model.safetensors") for folder in (runs / "denoiser-shards", tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (
        [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_rows(folder / "metrics.csv")]
        for folder in (runs / "denoiser-shards", tmp_path / "run")
    )
    assert one == other


@pytest.mark.parametrize(("before", "after"), [(DDP, ONE), (ONE, DDP), (ONE, FSDP), (DDP, FSDP)], ids=lambda c: "")
def test_a_run_goes_on_with_the_same_samples_on_another_number_of_devices(runs, tmp_path, before, after):
    run_dir = tmp_path / "run"
    for part, settings in ((stopped, before), (lambda config, step: config, after)):
        config = part(denoiser(run_dir, **settings), 4)  # checkpoints come last: the one of step 3 is there
        if settings is ONE:
            try:
                train(config)
            except RuntimeError as error:
                assert "at step 4" in str(error)
        else:
            ranks = start_ranks([config], tmp_path / "configs.json")
            if part is stopped:
                for rank in ranks:
                    assert "Stopped" in rank.communicate(timeout=120)[0]
            else:
                finish(ranks)
        assert last_checkpoint(run_dir).exists()
    assert_alike(runs / "denoiser-one", run_dir)


def test_classifiers_and_autoencoders_train_in_shards_as_on_one_device(runs, tmp_path):
    configs = {"classifier": classifier, "plain": plain_autoencoder}
    run_ranks([make(tmp_path / name, **FSDP) for name, make in configs.items()], tmp_path / "configs.json")
    train(plain_autoencoder(tmp_path / "plain-one", **ONE))
    assert_alike(runs / "classifier-one", tmp_path / "classifier")
    assert_alike(tmp_path / "plain-one", tmp_path / "plain", rtol=1e-5)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    poison = {"_target_": "rank_cases.PoisonOne", "step": 3}
    ranks = start_ranks([denoiser(tmp_path / "run", **DDP, callbacks__poison=poison)], tmp_path / "configs.json")
    for rank in ranks:
        said = rank.communicate(timeout=120)[0]
        assert rank.returncode != 0 and "the loss became nan at step" in said
