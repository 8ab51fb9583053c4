"""Does a noisy classifier's training do what it says: learn, draw the same numbers, log the truth, refuse nonsense?"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from safetensors.torch import load_file
from test_latent_denoiser import autoencoder_file
from training_cases import Stopped, assert_same_outcome, tiny

from diffusion.checkpoint import load_autoencoder, load_classifier, read_header, weights_hash
from diffusion.data.digits import Digits
from diffusion.draws import SampleDraws
from diffusion.latents import encode_moments
from diffusion.process import q_sample
from diffusion.randomness import fold
from diffusion.timestep_samplers import ImportanceTimesteps
from diffusion.training.guard import NonFiniteLoss
from diffusion.training.metrics import read_rows
from diffusion.training.noised import QUARTERS, add_quarters, quarter_means, quarter_sums
from diffusion.training.run import build_task, train

CLASSIFIER = {
    "_target_": "diffusion.models.classifier.Classifier",
    "in_channels": 1,
    "image_size": 8,
    "num_classes": 10,
    "channels": 8,
    "norm_groups": 4,
    "num_heads": 2,
    "dropout": 0.1,
    "pool": "attention",
    "stages": [{"depth": 1}, {"depth": 1, "attention": "self"}],
}
ON_LATENTS = {**CLASSIFIER, "in_channels": 2, "image_size": 4}
# Six full batches an epoch; seven, of which the last makes an optimizer step of its own when two are accumulated.
EVEN = {"data__batch_size": 200}
ODD = {"data__batch_size": 171, "trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 6}
PLAIN = {"lr_scheduler": None, "timestep_sampler": None, "ema": None}


def tiny_classifier(run_dir: Any, **changes: Any) -> dict[str, Any]:
    """The config of a tiny run; `changes` are dotted keys with `__` for the dot, as for `tiny`."""
    config = {
        "task": {"_target_": "diffusion.training.classifier.ClassifierTask"},
        "classifier": changes.pop("classifier", CLASSIFIER),
        "net": {},
        "callbacks__samples": None,
    }
    return tiny(run_dir, **config, **changes)


def latent_classifier(run_dir: Any, autoencoder: Path, **changes: Any) -> dict[str, Any]:
    """The same on the digits' latents."""
    trained = {"_target_": "diffusion.checkpoint.load_autoencoder", "checkpoint": str(autoencoder)}
    return tiny_classifier(run_dir, **{"autoencoder": trained, "classifier": ON_LATENTS, **changes})


def stop(step, hook="on_train_batch_end"):
    return {"_target_": "training_cases.StopAt", "step": step, "hook": hook}


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def rows(run_dir):
    return read_rows(run_dir / "metrics.csv")


def column(run_dir, name):
    return [float(row[name]) for row in rows(run_dir) if row.get(name)]


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


class Shown(Callback):
    """Keep what the classifier is shown and told, by a list that outlives the run."""

    seen: list[tuple[torch.Tensor, torch.Tensor, dict]]

    def __init__(self) -> None:
        type(self).seen = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx) -> None:
        self.batch = batch
        self.hook = task.classifier.register_forward_pre_hook(self._note)

    def on_train_batch_end(self, *args) -> None:
        self.hook.remove()

    def _note(self, module, args) -> None:
        self.seen.append((args[0].clone(), args[1].clone(), self.batch))


SHOWN = {"_target_": "test_training_classifier.Shown"}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    return autoencoder_file(tmp_path_factory.mktemp("autoencoder") / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_classifier(folder, **EVEN))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# resuming and draws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "stops"),
    [
        ("pixels", [(2,), (5, "on_validation_batch_end"), (10, "on_validation_start")]),
        ("odd_accumulated", [(7, "on_train_batch_start")]),
        ("latents", [(4,)]),
        ("cached", [(4,)]),
    ],
)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, autoencoder, way, stops):
    def config(name: str, **changes: Any) -> dict[str, Any]:
        if way in ("pixels", "odd_accumulated"):
            return tiny_classifier(tmp_path / name, **(EVEN if way == "pixels" else ODD), **changes)
        cache = {"latent_cache": str(tmp_path / f"{name}_cache")} if way == "cached" else {}
        short = {"trainer__max_steps": 6, **EVEN}
        return latent_classifier(tmp_path / name, autoencoder, **short, **changes) | cache

    train(config("whole"))
    for at in stops:
        with pytest.raises(Stopped):
            train(config("parts", callbacks__stop=stop(*at)))
    train(config("parts"))
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_a_cache_of_latents_gives_the_run_that_encoding_gives(tmp_path, autoencoder):
    short = {"trainer__max_steps": 6, **EVEN}
    train(latent_classifier(tmp_path / "encoding", autoencoder, **short))
    train(latent_classifier(tmp_path / "cached", autoencoder, **short) | {"latent_cache": str(tmp_path / "cache")})
    for name in ("train/loss", "val/loss"):
        one, other = (column(tmp_path / folder, name) for folder in ("encoding", "cached"))
        assert one == pytest.approx(other, rel=1e-4) and len(one) > 0


def test_another_seed_gives_another_run_and_the_process_seed_does_not(tmp_path):
    for name, seed, process in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        torch.manual_seed(process)
        train(tiny_classifier(tmp_path / name, seed=seed, trainer__max_steps=2))
    one, two, other = (checkpoint(tmp_path / name)["state_dict"] for name in "abc")
    assert same(one, two) and not same(one, other)


def test_each_step_shows_the_keyed_noise_at_the_keyed_timesteps(tmp_path):
    plain = {**PLAIN, "trainer__max_steps": 3, "callbacks__shown": SHOWN}
    train(tiny_classifier(tmp_path, **plain))
    schedule = build_task(tiny_classifier(tmp_path)).diffusion.schedule
    assert len(Shown.seen) == 3
    for number, (x, t, batch) in enumerate(Shown.seen):
        draws = SampleDraws(0, range(number * len(x), (number + 1) * len(x)))
        assert torch.equal(t, (draws.uniform("timestep") * 50).long())
        assert torch.equal(x, q_sample(batch["image"], draws.normal("eps", (1, 8, 8)), schedule.level(t)))


def test_latents_are_drawn_anew_for_each_key_and_alike_for_the_same(tmp_path, autoencoder):
    task = build_task(latent_classifier(tmp_path, autoencoder))
    batch = {"image": torch.linspace(-1, 1, 3 * 64).view(3, 1, 8, 8)}
    mean, logvar = encode_moments(task.autoencoder, batch["image"]).chunk(2, dim=1)
    for seed, first in ((0, 0), (0, 3), (1, 0)):
        draws = SampleDraws(seed, range(first, first + 3))
        noise = draws.normal("latent", mean.shape[1:])
        drawn = (mean + (logvar / 2).exp() * noise - 0.1) * 0.7  # the file's shift and scale_factor
        torch.testing.assert_close(task.clean(batch, draws), drawn)


def test_the_network_is_told_scaled_times_where_the_process_says_so(tmp_path):
    config = tiny_classifier(tmp_path, **PLAIN, trainer__max_steps=1, callbacks__shown=SHOWN)
    config["diffusion"]["time_scale"] = 20.0
    train(config)
    ((_, time, _),) = Shown.seen
    assert torch.equal(time / 20, (SampleDraws(0, range(len(time))).uniform("timestep") * 50).floor().float())


def test_clean_images_are_shown_clean_at_timestep_zero(tmp_path):
    clean = {"task__noised": False, "callbacks__shown": SHOWN, "trainer__max_steps": 5}
    train(tiny_classifier(tmp_path, **clean))
    for x, t, batch in Shown.seen:
        assert torch.equal(x, batch["image"]) and not t.any()
    found = set().union(*(row.keys() for row in rows(tmp_path)))
    assert {"train/loss", "train/accuracy@1", "val/accuracy@5_ema"} <= found
    assert not any("_q" in name for name in found)  # one timestep has no quarters


def test_the_timestep_sampler_hears_of_the_losses(whole):
    told = {k: v for k, v in checkpoint(whole)["state_dict"].items() if k.startswith("timestep_sampler.")}
    fresh = ImportanceTimesteps(50, history_per_timestep=2).state_dict()
    assert told and not same({k.partition(".")[2]: v for k, v in told.items()}, fresh)


# ---------------------------------------------------------------------------------------------------------------------
# what is logged


def test_the_log_has_loss_and_accuracies_in_all_and_by_quarter_of_training_and_validation(whole):
    for row in rows(whole):
        kinds = {name.partition("/")[0] for name, value in row.items() if value and "/" in name}
        for kind in kinds:
            for suffix in ("",) if kind == "train" else ("", "_ema", "_ema_0.5"):
                for name in ("loss", "accuracy@1", "accuracy@5"):
                    for quarter in ("", *(f"_q{number + 1}" for number in range(QUARTERS))):
                        assert math.isfinite(float(row[f"{kind}/{name}{quarter}{suffix}"]))
    assert column(whole, "val/loss") and len(column(whole, "train/loss")) == 7


def test_the_logged_means_are_those_of_the_classifiers_answers(tmp_path):
    """One batch, no step before it: the answers of the initial weights, judged by hand."""
    quiet = {**PLAIN, "classifier": {**CLASSIFIER, "dropout": 0.0}, "trainer__log_every_n_steps": 1}
    config = tiny_classifier(tmp_path, **quiet, trainer__max_steps=1, callbacks__shown=SHOWN)
    train(config)
    ((x, t, batch),) = Shown.seen
    with torch.no_grad():
        logits = build_task(config).classifier(x, t)
    right = logits.argmax(1) == batch["label"]
    among = (logits.topk(5).indices == batch["label"][:, None]).any(1)
    losses = F.cross_entropy(logits, batch["label"], reduction="none")
    (row,) = [row for row in rows(tmp_path) if row.get("train/loss")]
    for name, values in (("loss", losses), ("accuracy@1", right.float()), ("accuracy@5", among.float())):
        assert float(row[f"train/{name}"]) == pytest.approx(float(values.mean()), rel=1e-5)
        for quarter in range(QUARTERS):
            chosen = values[t * QUARTERS // 50 == quarter]
            assert float(row[f"train/{name}_q{quarter + 1}"]) == pytest.approx(float(chosen.mean()), rel=1e-5)


def test_validation_repeats_its_noise_and_covers_all_images_alike(tmp_path):
    still = {**PLAIN, "optimizer__lr": 0.0, "trainer__limit_val_batches": 1.0, "data__batch_size": 250}
    config = tiny_classifier(tmp_path, **still, trainer__max_steps=8, trainer__val_check_interval=4)
    train(config)
    first, second = column(tmp_path, "val/loss")
    assert first == second
    task, data = build_task(config).eval(), Digits(batch_size=250)
    losses = []
    for number, batch in enumerate(data.val_dataloader()):  # 250, 250, 97
        draws = SampleDraws(fold(0, "validation"), range(250 * number, 250 * number + len(batch["image"])))
        t = (draws.spread() * 50).long()
        x = q_sample(batch["image"], draws.normal("eps", (1, 8, 8)), task.diffusion.schedule.level(t))
        with torch.no_grad():
            losses.append(F.cross_entropy(task.classifier(x, t), batch["label"], reduction="none"))
    assert first == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_means_by_quarter_are_means_of_their_samples():
    sums = quarter_sums(("loss", "accuracy"))
    assert quarter_means(sums, ("loss", "accuracy")) == {}
    quarters, values = torch.tensor([0, 3, 3]), torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    add_quarters(sums, quarters, values, values.mean(1), weight=3)
    add_quarters(sums, torch.tensor([0]), torch.tensor([[5.0], [1.0]]), torch.tensor([5.0, 1.0]), weight=1)
    means = quarter_means(sums, ("loss", "accuracy"))
    assert means == pytest.approx(
        {"loss_q1": 3, "loss_q4": 3, "loss": 3, "accuracy_q1": 0.5, "accuracy_q4": 0.5, "accuracy": 0.5}
    )


# ---------------------------------------------------------------------------------------------------------------------
# learning


@pytest.mark.parametrize("noised", [True, False])
def test_it_learns_better_than_chance_and_first_where_there_is_little_noise(tmp_path, noised):
    short = {"trainer__max_steps": 90, "trainer__val_check_interval": 90, "trainer__log_every_n_steps": 20}
    quiet = {"callbacks__checkpoints__every_n_steps": 90, "lr_scheduler": None, "timestep_sampler": None}
    train(tiny_classifier(tmp_path, **short, **quiet, optimizer__lr=5e-3, task__noised=noised, data__batch_size=120))
    accuracy = column(tmp_path, "val/accuracy@1")[-1]
    if noised:
        quarters = [column(tmp_path, f"val/accuracy@1_q{number + 1}")[-1] for number in range(QUARTERS)]
        assert quarters[0] > 0.5 > quarters[-1]
    assert accuracy > (0.25 if noised else 0.6)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"non-finite|not finite"):
        train(tiny_classifier(tmp_path, optimizer__lr=math.inf, lr_scheduler=None))


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("pool", ["adaptive", "spatial", "spatial_v2"])
def test_every_head_trains_in_every_precision(tmp_path, pool, precision):
    head = {**CLASSIFIER, "pool": pool, "pool_channels": 16}
    short = {"trainer__max_steps": 2, "trainer__precision": precision, "ema": None}
    train(tiny_classifier(tmp_path, classifier=head, **short))
    assert all(math.isfinite(value) for value in column(tmp_path, "train/loss"))


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_the_file_holds_the_averaged_classifier_and_its_process(whole):
    header = read_header(whole / "model.safetensors")
    assert (header.kind, header.weights, header.step, header.ema_decay) == ("classifier", "ema", 14, 0.9)
    loaded = load_classifier(whole / "model.safetensors")
    assert loaded.facts["num_classes"] == loaded.net.num_classes == 10 and loaded.facts["shape"] == [1, 8, 8]
    assert loaded.diffusion.num_train_timesteps == 50
    assert not loaded.net.training and not any(p.requires_grad for p in loaded.net.parameters())
    ema = next(state for name, state in checkpoint(whole)["callbacks"].items() if name.startswith("EMA"))
    average = ema["averages"]["0.9"]
    assert all(torch.equal(p, average[name]) for name, p in loaded.net.named_parameters())


def test_a_classifier_of_latents_names_its_autoencoder_by_hash_and_does_not_carry_it(tmp_path, autoencoder):
    train(latent_classifier(tmp_path, autoencoder, trainer__max_steps=1))
    loaded = load_classifier(tmp_path / "model.safetensors")
    part = loaded.parts["autoencoder"]
    assert part["sha256"] == weights_hash(load_autoencoder(autoencoder))
    assert (part["bundled"], part["source"]) == (False, str(autoencoder))
    assert not any(name.startswith("autoencoder.") for name in load_file(tmp_path / "model.safetensors"))
    assert loaded.facts["shape"] == [1, 8, 8] and loaded.net.image_size == 4


def test_a_network_left_in_the_config_does_not_make_the_file_a_denoisers(tmp_path):
    config = tiny_classifier(tmp_path, trainer__max_steps=1)
    config["net"] = {"_target_": "training_cases.TinyNet", "num_classes": 10}
    train(config)
    assert load_classifier(tmp_path / "model.safetensors").net.num_classes == 10


def test_a_classifier_left_in_the_config_does_not_make_a_denoisers_file_one(tmp_path):
    train(tiny(tmp_path, trainer__max_steps=1, callbacks__samples=None) | {"classifier": CLASSIFIER})
    assert read_header(tmp_path / "model.safetensors").kind == "denoiser"


def test_fine_tuning_begins_where_the_file_ended(tmp_path, whole):
    file = whole / "model.safetensors"
    task = build_task(tiny_classifier(tmp_path, task__weights=str(file)))
    assert same(task.classifier.state_dict(), load_classifier(file).net.state_dict())
    assert all(p.requires_grad for p in task.classifier.parameters())
    train(tiny_classifier(tmp_path, task__weights=str(file), trainer__max_steps=2, task__noised=False))
    later = load_classifier(tmp_path / "model.safetensors")
    assert later.step == 2 and not same(later.net.state_dict(), load_classifier(file).net.state_dict())


def test_a_fine_tuned_run_goes_on_from_its_own_checkpoint(tmp_path, whole):
    file = whole / "model.safetensors"
    tuned = {"task__weights": str(file), "trainer__max_steps": 4}
    train(tiny_classifier(tmp_path / "whole", **tuned))
    with pytest.raises(Stopped):
        train(tiny_classifier(tmp_path / "parts", **tuned, callbacks__stop=stop(2)))
    train(tiny_classifier(tmp_path / "parts", **tuned))
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


# ---------------------------------------------------------------------------------------------------------------------
# what it refuses


def test_weights_of_another_classifier_are_refused_with_every_key(tmp_path, whole):
    other = {**CLASSIFIER, "num_classes": 7, "pool": "adaptive"}
    with pytest.raises(ValueError) as caught:
        build_task(tiny_classifier(tmp_path, classifier=other, task__weights=str(whole / "model.safetensors")))
    for part in (
        "does not fit the network of this run, 5 keys",
        "unexpected head.position (17, 8)",
        "mis-shaped head.out.weight: file (10, 8), network (7, 8)",
    ):
        assert part in str(caught.value)


def test_weights_that_are_no_classifiers_are_refused(tmp_path, autoencoder):
    with pytest.raises(ValueError, match="holds an autoencoder, but a classifier is needed here"):
        build_task(tiny_classifier(tmp_path, task__weights=str(autoencoder)))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        build_task(tiny_classifier(tmp_path, task__weights=str(tmp_path / "none.safetensors")))


class Unlabelled(Digits):
    """The digits without their labels, or with wrong ones."""

    def __init__(self, add: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.add = add

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        super().setup(stage)
        load = self.train_set.load

        def changed(indices):
            batch = load(indices)
            label = batch.pop("label")
            return batch if self.add is None else batch | {"label": label + self.add}

        self.train_set.load = changed


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (None, r"the data give no labels.*data\.num_classes=N"),
        (3, "labels from 3 to 12, but the classifier knows the classes 0 to 9"),
        (-1, "labels from -1 to 8, but the classifier knows the classes 0 to 9"),
    ],
)
def test_labels_that_are_missing_or_name_no_class_are_refused_before_the_first_step(tmp_path, add, message):
    data = {"_target_": "test_training_classifier.Unlabelled", "add": add, "batch_size": 200}
    with pytest.raises(ValueError, match=message):
        train(tiny_classifier(tmp_path) | {"data": data})


def test_data_without_classes_are_refused_when_the_classifier_takes_its_count_from_them(tmp_path):
    with pytest.raises(Exception, match=r"needs classes, got num_classes=None.*data\.num_classes=N"):
        train(tiny_classifier(tmp_path, classifier={**CLASSIFIER, "num_classes": None}))


def test_images_of_another_size_are_refused_with_what_to_set(tmp_path):
    with pytest.raises(ValueError, match=r"images are 1x8x8, but .* 1x16x16; set .* classifier.image_size=8"):
        train(tiny_classifier(tmp_path, classifier={**CLASSIFIER, "image_size": 16}))


def test_latents_of_another_shape_are_refused_with_what_to_set(tmp_path, autoencoder):
    with pytest.raises(ValueError, match=r"latents are 2x4x4, but .* 1x8x8; set classifier.in_channels=2 .*=4"):
        train(latent_classifier(tmp_path, autoencoder, classifier=CLASSIFIER))


def test_an_autoencoder_of_unknown_scale_is_refused(tmp_path):
    file = autoencoder_file(tmp_path / "autoencoder.safetensors", scale_factor=None)
    with pytest.raises(ValueError, match="scale_factor has not been measured"):
        train(latent_classifier(tmp_path / "run", file))


def test_a_sampler_of_another_chain_is_refused(tmp_path):
    with pytest.raises(ValueError, match="draws from 40 timesteps, the schedule has 50"):
        build_task(tiny_classifier(tmp_path, timestep_sampler__num_train_timesteps=40))
