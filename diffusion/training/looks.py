"""What does one look through the loss microscope measure? Curves by timestep on fixed images and noise, plain numbers.

Nothing of the training changes: gradients are returned, not accumulated, and `undisturbed` puts back modes and random
states. What the numbers may mean is `diffusion.report.hints`' question.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.latents import encode_moments
from diffusion.losses import DenoisingLoss, classifier_loss
from diffusion.process import GaussianDiffusion, q_sample, target
from diffusion.randomness import generator
from diffusion.training.sharded import local

KINDS = ("eps", "x0", "v")  # what an answer may be meant as
OFFSETS = (-2, -1, 0, 1, 2)  # of the timestep whose noise an input may have from the one that the network is told
MARKS = 16  # numbers of each parameter that tell whether it has moved
EARLY = 20  # timesteps whose neighbours have clearly more or less noise: 3.5 % more at 20 of 1000, 45 % at 0
BINS = 8  # parts of the chain in which the noise of training is measured


@dataclass(frozen=True)
class Subject:
    """What is looked at each time: x0 (B, C, H, W), its condition, the null condition (or none), its labels."""

    x0: Tensor
    condition: dict[str, Tensor]
    null: dict[str, Tensor] | None = None
    label: Tensor | None = None

    def rows(self, index: Tensor | slice) -> "Subject":
        """Choose samples."""
        null = self.null and {name: value[index] for name, value in self.null.items()}
        condition = {name: value[index] for name, value in self.condition.items()}
        return Subject(self.x0[index], condition, null, None if self.label is None else self.label[index])

    def parts(self, size: int) -> Iterator["Subject"]:
        """Cut into parts of at most `size` samples."""
        for start in range(0, len(self.x0), size):
            yield self.rows(slice(start, start + size))


class Listening:
    """A network that keeps its last answer."""

    def __init__(self, net: Callable[..., Tensor]) -> None:
        self.net = net
        self.answer: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        self.answer = self.net(x, t, **condition)
        return self.answer


@dataclass(frozen=True)
class Lens:
    """How a denoiser is looked at: `size` samples at once, under autocast where training is (`context`).

    The noise is a function of (`seed`, t). Gradients, unless there are to be none, are taken of `scale` times the loss,
    for half precision.
    """

    net: nn.Module
    diffusion: GaussianDiffusion
    loss: DenoisingLoss | None = None
    size: int = 32
    seed: int = 0
    scale: float = 1.0
    gradients: bool = True
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    @property
    def ask(self) -> Callable[..., Tensor]:
        """The network; where it is compiled, uncompiled: another batch size would be compiled for minutes."""
        return self.net.forward if getattr(self.net, "_compiled_call_impl", None) is not None else self.net

    def noise(self, x0: Tensor, t: int) -> Tensor:
        """Return the noise of this timestep, shaped like x0."""
        draws = generator(self.seed, "microscope", t, device=x0.device)
        return torch.randn(x0.shape, generator=draws, device=x0.device).to(x0.dtype)

    # -- the curve -----------------------------------------------------------------------------------------------------

    def row(self, subject: Subject, t: int) -> dict[str, float]:
        """Return the columns of one timestep that need gradients, and all that follows from the answer."""
        x0, eps = subject.x0, self.noise(subject.x0, t)
        total, losses, answers, beliefs = None, [], [], []
        for start, part in zip(range(0, len(x0), self.size), subject.parts(self.size), strict=True):
            at = self._at(part, t)
            listening, noise = Listening(self.ask), eps[start : start + self.size]
            with torch.set_grad_enabled(self.gradients), self.context():
                loss = self.loss(self.diffusion, listening, part.x0, at, noise, part.condition).loss
                total = self._gradients(total, loss.sum() / len(x0))
            answer = listening.answer.detach().to(x0.dtype)
            beliefs.append(
                self.diffusion.prediction(answer, q_sample(part.x0, noise, self.diffusion.schedule.level(at)), at).x0
            )
            answers.append(self._said(answer))
            losses.append(loss.detach())
        row = {"t": t, **dict(zip(("alpha", "sigma"), self.diffusion.schedule.level(t), strict=True))}
        row |= {"loss": float(torch.cat(losses).mean()), **self._norm(total)}
        return row | self._judged(torch.cat(answers), torch.cat(beliefs), x0, eps, t)

    def _gradients(self, total: list[Tensor | None] | None, loss: Tensor) -> list[Tensor | None]:
        """Add the gradients of another part of the batch; parameters that take no part have none."""
        if not self.gradients:
            return []
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.scale * loss, parameters, allow_unused=True)
        pairs = zip(total or [None] * len(found), found, strict=True)
        return [new if old is None else old if new is None else old.add_(new) for old, new in pairs]

    def _norm(self, gradients: list[Tensor | None]) -> dict[str, float]:
        known = [gradient.float() for gradient in gradients if gradient is not None]
        return {"grad_norm": float(nn.utils.get_total_norm(known)) / self.scale} if self.gradients else {}

    def _at(self, subject: Subject, t: int) -> Tensor:
        return torch.full((len(subject.x0),), t, device=subject.x0.device)

    def _said(self, output: Tensor) -> Tensor:
        return output.chunk(2, dim=1)[0] if self.diffusion.learned_variance else output

    def _judged(self, answer: Tensor, belief: Tensor, x0: Tensor, eps: Tensor, t: int) -> dict[str, float]:
        """Return errors and correlations of the answer and of the x0 that it implies."""
        at = self.diffusion.schedule.level(t)
        trivial = trivial_error(float(x0.float().var(unbiased=False)), at.alpha, at.sigma)
        meant = {kind: target(kind, x0, eps, at).float() for kind in KINDS} | {"x": q_sample(x0, eps, at).float()}
        answer, goal = answer.float(), self.diffusion.target(x0, eps, torch.full((len(x0),), t, device=x0.device))
        return {
            "mse": float(F.mse_loss(answer, goal.float())),
            "mse_trivial": trivial * per_x0(self.diffusion.parameterization, at.alpha, at.sigma),
            "x0_mse": float(F.mse_loss(belief.float(), x0.float())),
            "x0_trivial": trivial,
            **{f"{kind}_error": float(F.mse_loss(answer, meant[kind]) / meant[kind].square().mean()) for kind in KINDS},
            **{f"{name}_correlation": correlation(answer, value) for name, value in meant.items()},
        }

    # -- without gradients ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def error(self, subject: Subject, t: int) -> float:
        """Return the MSE of the answers at one timestep."""
        eps, total = self.noise(subject.x0, t), 0.0
        for start, part in zip(range(0, len(eps), self.size), subject.parts(self.size), strict=True):
            at, noise = self._at(part, t), eps[start : start + self.size]
            x = q_sample(part.x0, noise, self.diffusion.schedule.level(at))
            with self.context():
                answer = self.ask(x, self.diffusion.time(x, at), **part.condition)
            goal = self.diffusion.target(part.x0, noise, at)
            total += float((self._said(answer).float() - goal.float()).square().flatten(1).mean(1).sum())
        return total / len(eps)

    # -- classifiers ---------------------------------------------------------------------------------------------------

    def classifier_row(self, subject: Subject, t: int, *, noised: bool) -> dict[str, float]:
        """Return loss, gradient norm and accuracy of a classifier at one timestep."""
        eps = self.noise(subject.x0, t)
        total, losses, right = None, [], []
        for start, part in zip(range(0, len(eps), self.size), subject.parts(self.size), strict=True):
            at = self._at(part, t)
            x = (
                q_sample(part.x0, eps[start : start + self.size], self.diffusion.schedule.level(at))
                if noised
                else part.x0
            )
            with torch.set_grad_enabled(self.gradients), self.context():
                terms = classifier_loss(self.ask(x, self.diffusion.time(x, at)), part.label)
                total = self._gradients(total, terms.loss.sum() / len(eps))
            losses.append(terms.loss.detach())
            right.append(terms.top1)
        alpha, sigma = self.diffusion.schedule.level(t) if noised else (1.0, 0.0)
        row = {"t": t, "alpha": alpha, "sigma": sigma, "loss": float(torch.cat(losses).mean())}
        return row | self._norm(total) | {"accuracy": float(torch.cat(right).mean())}


class InputNoise:
    """How much noise was in what the network was shown in training, and at which timestep would that be right?

    Sums on the device, never waited for. For early timesteps: log-likelihoods of x_t - alpha x0 ~ N(0, sigma^2) at the
    levels of the timestep told and of its neighbours. By part of the chain: its mean square over sigma^2, which is 1.
    """

    def __init__(self, device: torch.device) -> None:
        self.likelihoods = torch.zeros(len(OFFSETS), dtype=torch.float64, device=device)
        self.samples = torch.zeros((), dtype=torch.long, device=device)
        self.ratios = torch.zeros(2, BINS, dtype=torch.float64, device=device)  # sums and counts

    @torch.no_grad()
    def add(
        self, diffusion: GaussianDiffusion, x0: Tensor, x: Tensor, told: Tensor, variance: Tensor | float = 0.0
    ) -> None:
        """Take in x0 and x_t (B, C, H, W), and the times (B,) that the network was told.

        `variance` (B,) is what x0 itself varies by around what is given here: that of latents, whose draw is unknown.
        """
        last = diffusion.num_train_timesteps - 1
        t = (told.double() / diffusion.time_scale).round().long()
        fits = (t >= 0) & (t <= last)
        x0, x, t = x0.float(), x[:, : x0.shape[1]].float(), t.clamp(0, last)
        early = fits & (t >= -OFFSETS[0]) & (t <= min(EARLY, last // 4))
        for i, offset in enumerate(OFFSETS):
            at = diffusion.schedule.level((t + offset).clamp(0, last))
            square = (x - at.alpha.to(x) * x0).square().flatten(1).mean(1).double()
            expected = at.sigma.flatten().square() + at.alpha.flatten().square() * variance
            likelihood = -(x0[0].numel() / 2) * (expected.log() + square / expected)
            self.likelihoods[i] += torch.where(early, likelihood, 0.0).sum()
            if not offset:
                ratio = torch.stack([torch.where(fits, square / expected, 0.0), fits.double()])
                self.ratios.index_add_(1, t * BINS // (last + 1), ratio)
        self.samples += early.sum()

    def facts(self) -> dict[str, Any] | None:
        """Return what was seen: {"samples", "offsets", "likelihoods" (in nats, above that of no offset), "ratios"}."""
        sums, counts = self.ratios.tolist()
        if not sum(counts):
            return None
        own = self.likelihoods[OFFSETS.index(0)]
        return {
            "samples": int(self.samples),
            "offsets": list(OFFSETS),
            "likelihoods": (self.likelihoods - own).tolist(),
            "ratios": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
            "counts": [int(count) for count in counts],
        }


# ---------------------------------------------------------------------------------------------------------------------
# formulas


def trivial_error(variance: float, alpha: float, sigma: float) -> float:
    """Return the MSE of the best x0 that knows no more of the data than one mean and one variance (Wiener's filter).

    x0_hat = m + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha m) is off by s^2 sigma^2 / (alpha^2 s^2 + sigma^2).
    """
    return variance * sigma**2 / (alpha**2 * variance + sigma**2)


def per_x0(parameterization: str, alpha: float, sigma: float) -> float:
    """Return by what a squared error of x0 is multiplied to be one of the answer: 1 for x0 (`in_output_space`)."""
    return {"eps": alpha**2 / sigma**2, "v": 1 / sigma**2}.get(parameterization, 1.0)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two tensors, 0 where one is constant."""
    a, b = (value.double().flatten() - value.double().mean() for value in (a, b))
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30))


def data_facts(x0: Tensor) -> dict[str, float]:
    """Return least and greatest value, mean and standard deviation."""
    x0 = x0.detach().double()
    low, high = x0.aminmax()
    return {"low": float(low), "high": float(high), "mean": float(x0.mean()), "std": float(x0.std(unbiased=False))}


def schedule_facts(diffusion: GaussianDiffusion) -> dict[str, float]:
    """Return the chain's ends, and the share of its timesteps whose signal is gone (SNR below 1e-4)."""
    signal = diffusion.schedule.alphas_cumprod
    return {
        "num_train_timesteps": diffusion.num_train_timesteps,
        "first_sigma": float((1 - signal[0]).sqrt()),
        "last_alpha": float(signal[-1].sqrt()),
        "dead": float((signal < 1e-4 * (1 - signal)).double().mean()),
    }


def exported_facts(trained: GaussianDiffusion, exported: GaussianDiffusion) -> dict[str, float]:
    """Return how far the process that samplers will be given is from the one that training uses."""
    one, other = (process.schedule.alphas_cumprod.sqrt() for process in (trained, exported))
    shorter = min(len(one), len(other))
    return {
        "num_train_timesteps": len(other),
        "away": float((one[:shorter] - other[:shorter]).abs().max()),  # of alpha
        "away_at": int((one[:shorter] - other[:shorter]).abs().argmax()),
        "time_scale": exported.time_scale / trained.time_scale,
    }


@torch.no_grad()
def marks(parameters: Mapping[str, Tensor]) -> Tensor:
    """Return a few numbers of each parameter, in float64 on the CPU: enough to tell whether and how far it moved.

    Of parameters in shards they are numbers of this process's shards.
    """
    few = []
    for tensor in parameters.values():
        flat = local(tensor.detach()).flatten()
        few.append(flat[:: max(1, len(flat) // MARKS)][:MARKS].double())
    return torch.cat(few).cpu() if few else torch.zeros(0, dtype=torch.float64)


def rank_facts(timesteps: Tensor, noise: Tensor | None) -> dict[str, Any]:
    """Compare what ranks drew for one batch: timesteps (ranks, B) and noise (ranks, B, D), if it is known.

    Returns the share of equal timesteps and the correlation of the noise, each the greatest of any two ranks: two that
    draw alike waste one of them.
    """
    pairs = [(i, j) for i in range(len(timesteps)) for j in range(i)]
    same = max(float((timesteps[i] == timesteps[j]).double().mean()) for i, j in pairs)
    alike = None if noise is None else max(abs(correlation(noise[i], noise[j])) for i, j in pairs)
    found = {"world_size": len(timesteps), "samples": timesteps.shape[1]}
    return found | {"same_timesteps": same, "noise_correlation": alike}


@torch.no_grad()
def known_clean(autoencoder: nn.Module | None, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | float]:
    """Return what is known of a batch's x0 and by how much it varies around that, a mean over dimensions (B,).

    Images are known exactly; of latents, which are drawn from q(z | x), the mean is.
    """
    if autoencoder is None:
        return batch["image"], 0.0
    moments = batch["moments"] if "moments" in batch else encode_moments(autoencoder, batch["image"])
    mean, logvar = moments.chunk(2, dim=1)
    x0 = autoencoder.normalise(mean)
    spread = autoencoder.normalise(mean + torch.exp(logvar / 2)) - x0
    return x0, spread.double().square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def undisturbed(*modules: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Run the block with these modules in evaluation mode; modes and global random states return as they were."""
    modes = [(part, part.training) for module in modules if module is not None for part in module.modules()]
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            for part, _ in modes:
                part.training = False
            yield
        finally:
            for part, training in modes:
                part.training = training
