"""Has a look through the loss microscope the shape of a classic bug? Pure functions of its numbers, in plain words.

Each rule tells what was seen, what it usually means and what to check, or nothing. A threshold stands with the closed
form or with what was measured on healthy runs, so that silence is the rule: see tests/test_hints.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Look = Mapping[str, Any]  # what `diffusion.training.microscope` measures at one step

KINDS = ("eps", "x0", "v")
# Images in [-1, 1] nearly all have dark pixels: some value below 0 is in any 16 of them. 0.02 is rounding by 8 bits.
BRIGHTEST_LOW, ONE = -0.02, 1.02
# Levels are made for unit variance; a factor of 2 moves the log-SNR by 1.4 of the 20 or so that a chain spans. Measured
# scales give latents of 0.9 to 1.1 on other images of the same kind, single channels of Stable Diffusion 0.7 to 1.3.
LATENT_STD = (0.5, 2.0)
# Where sigma > alpha the three targets are told apart: there a network of v answers eps with a relative error of 1.0 to
# 1.3 and its own with 0.2 to 0.4 (digits, from 60 steps on), one of eps answers v with 1.2 to 2.2 and its own with 0.01
# to 0.12. Untrained networks answer 0, which is off by 1 from all of them.
CLEAR_SIGMA, FRACTION, LEARNT = 0.7, 0.6, 0.7
# A likelihood ratio of e^10 for one timestep's neighbour. After 60 steps of 64 digits inputs as they should be give
# -500, on a chain of 1000 -60; inputs that are one off give +750 and +37. Nats grow with the number of pixels.
CERTAIN, SOME = 10.0, 10
# The mean square of noise over sigma^2 is 1 with a standard deviation of sqrt(2 / (pixels samples)), 0.006 on digits
# after 120 steps, where 0.98 to 1.01 were measured, and 0.04 for 20 of them. Input perturbation (2301.11706) adds 1 %.
NOISE_RATIO, MANY, BINS_OFF = (0.8, 1.25), 20, 2
# DDPM's chain ends with alpha 0.006, Stable Diffusion's with 0.068, known to be a little much (2305.08891).
LAST_ALPHA = 0.1
# SNR below 1e-4 on 4 % of DDPM's chain and on 5 % of the cosine one shifted to 512 pixels.
DEAD = 0.3
# Cosine on 50 steps begins with sigma 0.05; on 10 with 0.17.
FIRST_SIGMA = 0.3
# Tables of float64 from the same numbers are equal to 1e-12.
ALPHA_AWAY = 1e-4
# The chance that a network that drops with probability p has dropped none of n: (1 - p)^n.
CHANCE = 1e-6
# Ranks that draw apart correlate by 1 / sqrt(16 samples of 64 pixels) = 0.03, ranks that draw alike by 1. Equal
# timesteps occur with probability 1/T; ranks that draw alike have no others.
ALIKE, SAME_TIMES, ENOUGH_SAMPLES = 0.5, 0.9, 8
# What of an average is still initial weights when the run ends. The default rule, ldm's warm-up, leaves none after 20
# updates; a run of fewer than 100 is only a trial.
INITIAL, UPDATES = 0.1, 100


class Hint(NamedTuple):
    """What was seen, in numbers; what it usually means; what to check. No full stops at the ends."""

    name: str
    seen: str
    means: str
    check: str


def hints_of(look: Look) -> list[Hint]:
    """Return the hints that one look gives, none for a healthy run."""
    return [hint for rule in RULES for hint in rule(look)]


# ---------------------------------------------------------------------------------------------------------------------
# data


def data_range(look: Look) -> Iterator[Hint]:
    """Images in 0..1 or 0..255, where the process expects -1..1."""
    if look["latents"]:
        return
    for name, facts in look["data"].items():
        low, high = facts["low"], facts["high"]
        if low >= BRIGHTEST_LOW and high > BRIGHTEST_LOW:
            top = "0..1" if high <= ONE else "0..255"
            yield Hint(
                f"data in {top}",
                f"the {name} images lie in {low:.2f}..{high:.2f}, with mean {facts['mean']:.2f} and standard deviation "
                f"{facts['std']:.2f}; none is below 0",
                "images that a loader divided by 255 (or not at all) and did not move to -1..1: noise levels are made "
                "for that range, and samples come out pale or are clipped",
                "scale them where they are loaded: 2 x - 1 for images in 0..1",
            )
            return
        if low < -2 or high > 2:
            yield Hint(
                "data beyond -1..1",
                f"the {name} images lie in {low:.2f}..{high:.2f}",
                "images normalised by a data set's mean and standard deviation, or not scaled; samplers clip to -1..1",
                "scale them to -1..1 where they are loaded",
            )
            return


def latent_scale(look: Look) -> Iterator[Hint]:
    """Latents whose standard deviation is far from 1."""
    facts = look["data"]["validation"]
    low, high = LATENT_STD
    if look["latents"] and not low <= facts["std"] <= high:
        yield Hint(
            "latents unscaled",
            f"the latents have standard deviation {facts['std']:.3g} (mean {facts['mean']:.3g}), not about 1",
            "the autoencoder's scale_factor was not applied, was measured on other data, or was applied twice; every "
            f"noise level is {'too weak' if facts['std'] > 1 else 'too strong'} for them by that factor",
            "measure it: uv run python -m diffusion.training.latent_scale checkpoint=FILE data=NAME",
        )


# ---------------------------------------------------------------------------------------------------------------------
# the network's answer and its input


def parameterization(look: Look) -> Iterator[Hint]:
    """A network that has learnt another target than the one that samplers will take its answer for."""
    declared = (look.get("exported") or look)["parameterization"]
    clear = [row for row in look["curve"] if row["sigma"] >= CLEAR_SIGMA and "eps_error" in row]
    if declared not in KINDS or not clear:
        return
    errors = {kind: mean(row[f"{kind}_error"] for row in clear) for kind in KINDS}
    answer = min(KINDS, key=errors.__getitem__)
    if answer != declared and errors[answer] < LEARNT and errors[answer] < FRACTION * errors[declared]:
        yield Hint(
            f"{answer} read as {declared}",
            f"over the noisier part of the chain the answer is off from {answer} by {errors[answer]:.2f} of its mean "
            f"square, but from {declared}, which it is read as, by {errors[declared]:.2f}",
            f"the network learns {answer}, while the process says parameterization={declared}: samples will be noise "
            "or grey",
            f"let training and sampling read the same task.parameterization, {answer} or {declared}",
        )


def timestep_offset(look: Look) -> Iterator[Hint]:
    """Inputs whose noise is that of the timestep before or after the one that the network is told."""
    inputs = look["inputs"]
    if (offset := likeliest_offset(inputs)) is None:
        return
    nats = inputs["likelihoods"][inputs["offsets"].index(offset)]
    noise = "timestep t" + (f" + {offset}" if offset > 0 else f" - {-offset}")
    yield Hint(
        "timestep off by one",
        f"in training the noise of the inputs is that of {noise} where the network is told t (log-likelihood better by "
        f"{nats:.0f} nats on {inputs['samples']} early timesteps)",
        "a chain counted from 1 in one place and from 0 in the other; sampling will tell the network the wrong times, "
        "which blurs or leaves noise in the last steps, most on short chains",
        "compare the t that the noise is mixed at with the t that the network is given",
    )


def likeliest_offset(inputs: Mapping[str, Any] | None) -> int | None:
    """Return 1 or -1 where inputs are off by that many timesteps and the chain is otherwise as it should be."""
    if inputs is None or inputs["samples"] < SOME:
        return None
    best = max(range(len(inputs["offsets"])), key=inputs["likelihoods"].__getitem__)
    later = inputs["ratios"][len(inputs["ratios"]) // 2 :]
    sound = all(NOISE_RATIO[0] <= ratio <= NOISE_RATIO[1] for ratio in later if ratio is not None)
    certain = inputs["likelihoods"][best] > CERTAIN and abs(inputs["offsets"][best]) == 1
    return inputs["offsets"][best] if certain and sound else None


# ---------------------------------------------------------------------------------------------------------------------
# schedule


def schedule(look: Look) -> Iterator[Hint]:
    """Noise that is not the schedule's, a schedule that samplers do not share, or one that no chain should have."""
    for seen, means, check in (*_input_noise(look), *_exported_schedule(look), *_chain(look)):
        yield Hint("schedule wrong", seen, means, check)
        return


Words = tuple[str, str, str]


def _input_noise(look: Look) -> Iterator[Words]:
    inputs = look["inputs"]
    if inputs is None or likeliest_offset(inputs) is not None:
        return
    enough = [i for i, count in enumerate(inputs["counts"]) if count >= MANY]
    low, high = NOISE_RATIO
    off = [i for i in enough if not low <= inputs["ratios"][i] <= high]
    if len(off) >= BINS_OFF:
        worst = max(off, key=lambda i: abs(inputs["ratios"][i] - 1))
        parts, ratio = len(inputs["ratios"]), inputs["ratios"][worst]
        yield (
            f"in training the inputs at {100 * worst // parts} to {100 * (worst + 1) // parts} % of the chain have "
            f"{ratio:.2f} times the noise (in variance) that the schedule gives them; {len(off)} of {parts} parts are "
            "off by more than a quarter",
            "training mixes its noise by other betas than the process has, by a square root too many or too few, or "
            "its images are not those of the batch; samplers will go through other noise levels than were learnt",
            "mix noise with diffusion.schedule.level(t), and compare alpha and sigma at both ends",
        )


def _exported_schedule(look: Look) -> Iterator[Words]:
    exported, own = look.get("exported"), look["schedule"]
    if exported is None:
        return
    if exported["num_train_timesteps"] != own["num_train_timesteps"] or exported["away"] > ALPHA_AWAY:
        at = f"alpha differs by up to {exported['away']:.3g}, at t={exported['away_at']}"
        yield (
            f"training's chain has {own['num_train_timesteps']} timesteps, the one in the config, which samplers get, "
            f"{exported['num_train_timesteps']}; {at}",
            "the network is trained on one schedule and will be sampled on another",
            "build both from the same config node",
        )
    elif abs(exported["time_scale"] - 1) > ALPHA_AWAY:
        yield (
            f"samplers will tell the network times {exported['time_scale']:.3g} times those of training",
            "a time_scale (rescale_timesteps) in one place only",
            "give training and config the same diffusion.time_scale",
        )


def _chain(look: Look) -> Iterator[Words]:
    chain = look["schedule"]
    if chain["last_alpha"] > LAST_ALPHA:
        yield (
            f"at the last timestep {chain['last_alpha']:.3g} of the image is left (alpha; its square is "
            f"{chain['last_alpha'] ** 2:.2g})",
            "betas that were made for a longer chain, or too small ones: sampling starts from pure noise, which "
            "training never shows, so samples have wrong brightness or no large shapes",
            "scale betas to the length of the chain (schedule=linear does), or use cosine or zero_snr",
        )
    elif chain["dead"] > DEAD:
        yield (
            f"on {100 * chain['dead']:.0f} % of the chain hardly any signal is left (SNR below 0.0001)",
            "betas that are too large, or a square root of them: most training steps see noise alone",
            "look at alphas_cumprod over t: it should fall to nearly 0 at the end, and not before",
        )
    elif chain["first_sigma"] > FIRST_SIGMA:
        yield (
            f"the first timestep already has noise of {chain['first_sigma']:.2f} (sigma)",
            "betas in reversed order, or too large ones: fine detail is never learnt",
            "the first beta should be about 0.0001 to 0.01",
        )


# ---------------------------------------------------------------------------------------------------------------------
# condition, ranks, averages


def condition_drop(look: Look) -> Iterator[Hint]:
    """Guidance needs a network that was sometimes told nothing."""
    facts = look.get("condition")
    if facts is None:
        return
    guided = facts["guidance_scale"] not in (None, 1, 1.0)
    declared, samples = facts["drop"], facts["samples"]
    never = declared > 0 and not facts["dropped"] and (1 - declared) ** samples < CHANCE
    if not never and not (guided and declared == 0 and samples) and not (declared > 0 and not facts["null"]):
        return
    if never:
        seen = f"none of {samples} training samples lost its condition, though task.condition_drop={declared:g}"
    elif declared:
        seen = "a sample that loses its condition is told the same as before"
    else:
        seen = f"guidance_scale={facts['guidance_scale']:g}, but task.condition_drop=0: all {samples} training samples "
        seen += "were told their condition"
    yield Hint(
        "condition never dropped",
        seen + _null_curve(look),
        "classifier-free guidance moves away from the answer without a condition, which this network never learns",
        "train with task.condition_drop=0.1 and see that dropped samples get the null condition, or sample with "
        "guidance=none",
    )


def _null_curve(look: Look) -> str:
    rows = [row for row in look["curve"] if row.get("mse_null") is not None]
    if not rows:
        return ""
    worst = max(rows, key=lambda row: row["mse_null"] / max(row["mse"], 1e-12))
    return f"; without it the error at t={worst['t']} is {worst['mse_null']:.3g}, with it {worst['mse']:.3g}"


def same_noise(look: Look) -> Iterator[Hint]:
    """Ranks that train on the same noise."""
    facts = look.get("ranks")
    if facts is None:
        return
    alike = facts["noise_correlation"]
    same = facts["same_timesteps"] > SAME_TIMES and facts["samples"] >= ENOUGH_SAMPLES
    if (alike is not None and alike > ALIKE) or same:
        noise = (
            "" if alike is None else f"the noise of two of {facts['world_size']} processes correlates by {alike:.2f}, "
        )
        yield Hint(
            "the same noise on all ranks",
            f"{noise or 'of two processes '}{100 * facts['same_timesteps']:.0f} % of their timesteps are equal",
            "every process seeds its generator alike: the gradient is noisier than the batch promises, as from one "
            "process's noise",
            "let the seed of training's draws depend on the rank, or on the sample's number in the global batch",
        )


def frozen_average(look: Look) -> Iterator[Hint]:
    """An average that does not follow the weights."""
    facts = look.get("ema")
    if facts is None or not facts["weights_moved"]:
        return
    curve = [row for row in look["curve"] if row.get("mse_ema") is not None]
    errors = f"; its error is {mean(row['mse_ema'] for row in curve):.3g}, that of the weights " if curve else ""
    errors += f"{mean(row['mse'] for row in curve):.3g}" if curve else ""
    if facts["average_moved"] == 0:
        yield Hint(
            "EMA frozen",
            f"after {look['step']} steps the averaged weights are the initial ones, bit for bit, while the weights "
            f"have moved{errors}",
            "the average is never updated, or follows another copy of the network; model.safetensors would hold an "
            "untrained network",
            "update it after each optimizer step, on the parameters that the optimizer changes",
        )
    elif facts["initial_share"] > INITIAL and facts["updates"] >= UPDATES:
        yield Hint(
            "EMA too slow",
            f"when the run ends {100 * facts['initial_share']:.0f} % of the average will still be initial weights "
            f"(decay {facts['decay']:g}){errors}",
            "the decay is made for a longer run, and starts without warm-up",
            "lower ema.decays, train longer, or use ldm's warm-up rule (ema=default)",
        )


def mean(values: Sequence[float] | Iterator[float]) -> float:
    """Return the arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


RULES: tuple[Callable[[Look], Iterator[Hint]], ...] = (
    data_range,
    latent_scale,
    parameterization,
    timestep_offset,
    schedule,
    condition_drop,
    same_noise,
    frozen_average,
)
