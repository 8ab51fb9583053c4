"""What bends a denoiser's belief: classifier-free guidance, classifier scores, clipping. Wrappers, their order visible.

A classifier score belongs outside the clipping (guided-diffusion does not clip again), clipping outside
classifier-free guidance. arXiv 2207.12598, 2105.05233, 2205.11487 (dynamic thresholding), 2305.08891 (rescale).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoiser import Denoiser, Network, check_null, denoiser, denoiser_each, denoiser_pair
from .process import GaussianDiffusion, Prediction, mix, target
from .schedule import Level

Levels = Callable[[int | float | Tensor], Level]
Interval = tuple[float, float] | None  # the timesteps low <= t <= high at which guidance is on; None: all
# An image of 256x256 says less than a tenth of a nat about anything at this alpha^2 / sigma^2. Cosine schedules end
# far below it: there, a classifier's score would be its error, multiplied by thousands.
LEAST_SNR = 1e-6
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Gradient = Callable[[Tensor, int | float | Tensor], Tensor | None]  # of log p(label | x_t), by (x, t); None: not now


def check_scale(name: str, value: float) -> float:
    """Raise ValueError unless the scale is a finite number of at least 0."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}; 1 is the plain conditional model")
    return value


def check_interval(interval: Interval) -> None:
    """Raise ValueError unless the interval is None or (low, high) with low <= high."""
    if interval is not None and not (len(interval) == 2 and interval[0] <= interval[1]):
        raise ValueError(f"interval must be (low, high) timesteps with low <= high, got {interval}")


def within(interval: Interval, t: int | float) -> bool:
    """Say whether guidance is on at timestep t."""
    return interval is None or interval[0] <= t <= interval[1]


@dataclass(frozen=True)
class NoGuidance:
    """The conditional model as it is."""

    def __call__(
        self, diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
    ) -> Denoiser:
        return denoiser(diffusion, net, **condition)


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """null + guidance_scale (conditional - null): 1 is the plain conditional model, 0 the unconditional one.

    `rescale` is phi of arXiv 2305.08891 eq. 16: 0 leaves the result, 1 gives it the conditional answer's standard
    deviation, measured on what the network predicts. `interval` (low, high) restricts guidance to timesteps
    low <= t <= high (arXiv 2404.07724); outside it the conditional model answers alone, at half the cost. A learned
    variance is the conditional half's.
    """

    guidance_scale: float = 2.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        check_scale("guidance_scale", self.guidance_scale)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1], got {self.rescale}")
        check_interval(self.interval)

    def __call__(
        self, diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
    ) -> Denoiser:
        """Bind to a network; `null` holds the null values of those conditions that guidance is about."""
        conditional = denoiser(diffusion, net, **condition)
        if self.guidance_scale == 1:
            return conditional
        if not null:
            raise ValueError(
                "classifier-free guidance needs a condition; this model is unconditional: use guidance=none"
            )
        pair = denoiser_pair(diffusion, net, condition, null)

        def denoise(x: Tensor, t: int | float | Tensor) -> Prediction:
            if not within(self.interval, t):
                return conditional(x, t)
            given, without = pair(x, t)
            guided = Prediction(
                torch.lerp(without.x0, given.x0, self.guidance_scale),
                torch.lerp(without.eps, given.eps, self.guidance_scale),
                given.var_frac,
            )
            return rescaled(diffusion, guided, given, x, t, self.rescale)

        return denoise


def rescaled(
    diffusion: GaussianDiffusion, guided: Prediction, given: Prediction, x: Tensor, t: int | float | Tensor, phi: float
) -> Prediction:
    """Give a guided belief, by the part `phi`, the standard deviation of the conditional one: 2305.08891 eq. 16."""
    if not phi:
        return guided
    # Measured on what the network predicts; "mean" has no spread of its own to keep, so it is read as eps.
    kind = "eps" if diffusion.parameterization == "mean" else diffusion.parameterization
    at = diffusion.schedule.level(t).to(x)
    wanted, got = (target(kind, p.x0, p.eps, at) for p in (given, guided))
    spread = wanted.std((1, 2, 3), keepdim=True) / got.std((1, 2, 3), keepdim=True)
    output = got * (phi * spread + (1 - phi))
    read = {"eps": Prediction.from_eps, "x0": Prediction.from_x0, "v": Prediction.from_v}[kind]
    return read(x, output, at, given.var_frac)


@dataclass(frozen=True)
class TwoScaleGuidance:
    """InstructPix2Pix's guidance (2211.09800 eq. 3): how much to follow the text, and how much to keep of the picture.

    null + image_guidance_scale (picture - null) + guidance_scale (picture and text - picture). The picture is the
    condition `concat`, the text everything else. Up to three answers, in one batch: those that count for nothing at
    these scales are not asked for. `rescale` and `interval` as in `ClassifierFreeGuidance`.
    """

    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        ClassifierFreeGuidance(self.guidance_scale, self.rescale, self.interval)  # what is wrong with them is found
        check_scale("image_guidance_scale", self.image_guidance_scale)

    def __call__(
        self, diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
    ) -> Denoiser:
        """Bind to a network; `null` holds the null values of text and picture."""
        if "concat" not in null:
            raise ValueError(
                "guidance by two scales needs a picture as condition (InstructPix2Pix); this model takes none: use "
                "guidance=classifier_free"
            )
        check_null(condition, null)
        picture = condition | {name: value for name, value in null.items() if name != "concat"}
        text, image = self.guidance_scale, self.image_guidance_scale
        shares = [(text, condition), (image - text, picture), (1 - image, condition | null)]
        weights, told = zip(*[share for share in shares if share[0]], strict=True)
        conditional = denoiser(diffusion, net, **condition)
        if weights == (1,):
            return denoiser(diffusion, net, **told[0])
        told = told if text else (condition, *told)  # its learned variance and spread are kept
        each = denoiser_each(diffusion, net, told)

        def denoise(x: Tensor, t: int | float | Tensor) -> Prediction:
            if not within(self.interval, t):
                return conditional(x, t)
            given, *_ = found = each(x, t)
            counted = list(zip(weights, found[-len(weights) :], strict=True))
            x0, eps = (sum(w * getattr(p, name) for w, p in counted) for name in ("x0", "eps"))
            return rescaled(diffusion, Prediction(x0, eps, given.var_frac), given, x, t, self.rescale)

        return denoise


class NonFiniteGradient(ValueError):
    """A classifier's gradient with values that are not numbers."""


class LogProbGrad:
    """`scale` times the gradient of log p(label | x_t) with respect to x_t: what a classifier pushes x_t towards.

    A function of x (B, C, H, W) and t; None outside `interval`. One forward and one backward through the network
    `classifier(x, time) -> logits (B, K)`, in the precision of its weights whatever the sampler's; `dtype` bfloat16
    or float16 runs it under autocast instead, float16 with the gradient lifted over its underflow. `time(x, t)` is
    what the classifier was told of t when it was trained (`GaussianDiffusion.time`). `labels` (B,) lie on x's device.
    Raises NonFiniteGradient, at once on the CPU; other devices are not waited for in a step: call `check` at the end.
    """

    def __init__(
        self,
        classifier: Network,
        labels: Tensor,
        *,
        time: Callable[[Tensor, int | float | Tensor], Tensor],
        scale: float = 1.0,
        interval: Interval = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.classifier, self.labels, self.time = classifier, labels, time
        self.scale, self.interval, self.dtype = check_scale("classifier_scale", scale), interval, dtype
        self._sums: list[tuple[int | float | Tensor, Tensor]] = []  # t, and the sum of the gradient there

    def __call__(self, x: Tensor, t: int | float | Tensor) -> Tensor | None:
        if not within(self.interval, t):
            return None
        gradient = self._gradient(x, t)
        self._sums.append((t, gradient.sum()))  # one value that is no number makes the sum none
        if x.device.type == "cpu":
            self.check()
        return gradient

    def _gradient(self, x: Tensor, t: int | float | Tensor) -> Tensor:
        own = torch.float32 if self.dtype else weights_dtype(self.classifier) or x.dtype
        lift = 2.0**10 if torch.float16 in (own, self.dtype) else 1.0  # a power of two changes no digit
        half = torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None)
        with torch.inference_mode(False), torch.enable_grad(), half:
            # Tensors made in inference mode cannot take part in a gradient; copies can.
            x_t, labels = (v.clone() if v.is_inference() else v.detach() for v in (x, self.labels))
            x_t = x_t.to(own).requires_grad_()
            logits = self.classifier(x_t, self.time(x_t, t))
            logits = logits.float() if logits.dtype in HALF.values() else logits
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(lift * loss, x_t)
        return gradient.to(x.dtype).mul_(-self.scale / lift)

    def check(self) -> None:
        """Raise NonFiniteGradient for the first step whose gradient was not finite; this waits for the device."""
        sums, self._sums = self._sums, []
        if not sums or bool(torch.stack([total for _, total in sums]).isfinite().all()):
            return
        t = next(t for t, total in sums if not total.isfinite())
        raise NonFiniteGradient(
            f"the classifier's gradient is not finite at timestep {t}, with classifier_scale={self.scale}; lower the "
            "scale, or leave out such timesteps with interval=[low,high]. If nothing helps, the denoiser or the "
            "classifier has diverged"
        )


def weights_dtype(network: Network) -> torch.dtype | None:
    """Return the type of a network's first floating-point weight; None for what has none, a function say."""
    weights = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((weight.dtype for weight in weights if weight.is_floating_point()), None)


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance:
    """Push samples towards what a classifier of noisy images takes for their label (arXiv 2105.05233, section 4).

    `classifier` is what `load_classifier` returns for `classifier_checkpoint`, or a network of your own, net(x, t) ->
    logits, trained on the denoiser's own diffusion. `classifier_dtype` None computes in the precision of its weights;
    bfloat16 and float16 run it under autocast. The denoiser may know the classes (ADM-G) or not, and it may be guided
    without a classifier, too: `guidance_scale` and `rescale` are `ClassifierFreeGuidance`'s, 1 and 0 being none.
    `interval` (low, high) restricts both guidances to timesteps low <= t <= high.

    Where the gradient acts is the sampler's choice, not the user's: see `Sampler.shifts_mean`.
    """

    classifier_scale: float = 1.0
    classifier_checkpoint: str | None = None
    classifier: Any = None
    classifier_dtype: str | None = None
    guidance_scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self):
        check_scale("classifier_scale", self.classifier_scale)
        if self.classifier_dtype not in (None, *HALF):
            raise ValueError(f"classifier_dtype must be null, {' or '.join(HALF)}, got {self.classifier_dtype!r}")
        self.classifier_free()  # what is wrong with its settings is found now

    def classifier_free(self) -> ClassifierFreeGuidance:
        """The guidance of the denoiser without the classifier."""
        return ClassifierFreeGuidance(self.guidance_scale, self.rescale, self.interval)

    @property
    def name(self) -> str:
        """What errors call the classifier: its file, if it came from one."""
        return str(self._loaded("path", None) or self.classifier_checkpoint or "the classifier")

    @property
    def net(self) -> Network:
        """The classifier's network. Raises ValueError where none was loaded."""
        if self.classifier is None:
            raise ValueError(
                "classifier guidance has no classifier yet; give classifier=load_classifier(FILE), or "
                "guidance.classifier_checkpoint=FILE on the command line"
            )
        return self._loaded("net", self.classifier)

    @property
    def num_classes(self) -> int | None:
        """How many classes the classifier knows; None where it does not say."""
        return getattr(self.net, "num_classes", None)

    def __call__(
        self, diffusion: GaussianDiffusion, net: Network, condition: dict[str, Tensor], null: dict[str, Tensor]
    ) -> Denoiser:
        """Bind the denoiser's side; the classifier's is `log_prob_grad`."""
        return self.classifier_free()(diffusion, net, condition, null)

    def log_prob_grad(
        self,
        diffusion: GaussianDiffusion,
        x: Tensor,
        labels: Sequence[int] | None,
        *,
        num_classes: int | None = None,
    ) -> LogProbGrad | None:
        """Return the gradient for samples x (B, C, H, W) and their `labels`; None at scale 0, which costs nothing.

        `num_classes` is the denoiser's, if it knows classes. Raises ValueError for labels that are missing or that the
        classifier does not know, and as `check`.
        """
        self.check(diffusion, x.shape[1:], num_classes=num_classes)
        self._check_labels(labels, len(x))
        if self.classifier_scale == 0:
            return None
        return LogProbGrad(
            self.net,
            torch.tensor(labels, device=x.device),
            time=self._loaded("diffusion", diffusion).time,
            scale=self.classifier_scale,
            interval=self.interval,
            dtype=HALF.get(self.classifier_dtype),
        )

    def _check_labels(self, labels: Sequence[int] | None, count: int) -> None:
        if labels is None or len(labels) != count:
            got = "no labels" if labels is None else f"{len(labels)} labels for {count} samples"
            raise ValueError(f"classifier guidance needs a label for each sample, got {got}; give labels=[...]")
        known = self.num_classes
        if wrong := sorted({label for label in labels if label < 0 or (known is not None and label >= known)}):
            allowed = "0 and above" if known is None else f"0 to {known - 1}"
            raise ValueError(
                f"the classifier cannot guide towards the labels {wrong}; they must be {allowed}, and -1 (no class) is "
                "no direction: use guidance=none for samples without a class"
            )

    def _loaded(self, part: str, otherwise: Any) -> Any:
        """Return a part of what `load_classifier` gave; a network of the user's own, or a function, has none."""
        own = isinstance(self.classifier, torch.nn.Module)
        return otherwise if own else getattr(self.classifier, part, otherwise)

    def check(self, diffusion: GaussianDiffusion, shape: Sequence[int], *, num_classes: int | None = None) -> None:
        """Raise ValueError where the classifier was made for other images, noise or classes than the denoiser.

        `shape` (C, H, W) is that of the samples, or of their latents; `num_classes` the denoiser's, if it has classes.
        """
        channels, *size = shape
        name, known = self.name, self.num_classes
        reads = getattr(self.net, "in_channels", None)
        if reads not in (None, channels):
            raise ValueError(
                f"{name} reads images of {reads} channels, but the denoiser's have {channels}; take a classifier of "
                "such images, or train one"
            )
        wide = getattr(self.net, "image_size", None)
        if wide is not None and any(side != wide for side in size):
            raise ValueError(
                f"{name} was made for {wide}x{wide}, but the denoiser draws {size[0]}x{size[1]}; take a classifier of "
                "that resolution, or train one"
            )
        if None not in (known, num_classes) and known != num_classes:
            raise ValueError(
                f"{name} knows {known} classes, but the denoiser {num_classes}; take two that were trained on the same "
                "classes"
            )
        check_same_noise(self._loaded("diffusion", diffusion), diffusion, name)


def check_same_noise(classifier: GaussianDiffusion, denoiser: GaussianDiffusion, name: str) -> None:
    """Raise ValueError unless x_t has the same noise in both, since a classifier knows the noise of its own only."""
    ours, theirs = (diffusion.schedule.alphas_cumprod for diffusion in (denoiser, classifier))
    if len(ours) != len(theirs):
        raise ValueError(
            f"{name} was trained with num_train_timesteps={len(theirs)}, but the denoiser with {len(ours)}; train a "
            "classifier with the denoiser's schedule"
        )
    if not torch.allclose(ours, theirs, rtol=1e-6, atol=0):
        t = ((ours - theirs) / ours.clamp(min=1e-20)).abs().argmax().item()
        raise ValueError(
            f"{name} was trained with another noise schedule than the denoiser: at timestep {t} alphas_cumprod is "
            f"{theirs[t].item():.3g}, and {ours[t].item():.3g} there; train a classifier with the denoiser's schedule"
        )


def classifier_score(
    denoise: Denoiser, log_prob_grad: Gradient, level: Levels, *, scale: float = 1.0, least_snr: float = 0.0
) -> Denoiser:
    """Guide eps by the classifier's gradient (2105.05233, algorithm 2): for DDIM and ODE solvers.

    `log_prob_grad(x, t)` is the gradient of log p(label | x_t) with respect to x_t. Where alpha^2 / sigma^2 is
    `least_snr` or less, the belief stays as it is: x0 moves by sigma^2 / alpha times the gradient, and a trained
    classifier does not know well enough that the true gradient falls as fast as alpha (see `LEAST_SNR`).
    """
    check_scale("classifier_scale", scale)

    def guided(x: Tensor, t: int | float | Tensor) -> Prediction:
        p, at = denoise(x, t), level(t).to(x)
        if is_noise(at, least_snr) or (gradient := log_prob_grad(x, t)) is None:
            return p
        push = scale * at.sigma
        return Prediction(
            mix(1.0, p.x0, push * at.sigma / at.alpha, gradient), mix(1.0, p.eps, -push, gradient), p.var_frac
        )

    return guided


def is_noise(at: Level, least_snr: float = LEAST_SNR) -> bool:
    """Say whether x_t at this level, one for all samples, has no more signal than that."""
    return not isinstance(at.alpha, Tensor) and at.alpha**2 <= least_snr * at.sigma**2


def clip_x0(denoise: Denoiser, level: Levels, *, bound: float = 1.0, keep_eps: bool = False) -> Denoiser:
    """Clamp the believed x0 to [-bound, bound]; eps follows, unless `keep_eps` (diffusers' DDIM leaves it)."""
    return _bounded(denoise, level, lambda x0: x0.clamp(-bound, bound), keep_eps)


def threshold_x0(
    denoise: Denoiser, level: Levels, *, quantile: float = 0.995, max_bound: float = math.inf, keep_eps: bool = False
) -> Denoiser:
    """Imagen's dynamic thresholding: clamp x0 to its own `quantile` of |x0| (between 1 and max_bound), divide by it."""

    def threshold(x0: Tensor) -> Tensor:
        bound = x0.flatten(1).abs().float().quantile(quantile, dim=1).clamp(1.0, max_bound).to(x0.dtype)
        bound = bound.view(-1, 1, 1, 1)
        return torch.minimum(torch.maximum(x0, -bound), bound) / bound

    return _bounded(denoise, level, threshold, keep_eps)


def _bounded(denoise: Denoiser, level: Levels, bound: Callable[[Tensor], Tensor], keep_eps: bool) -> Denoiser:
    def bounded(x: Tensor, t: int | float | Tensor) -> Prediction:
        p = denoise(x, t)
        x0 = bound(p.x0)
        return p._replace(x0=x0) if keep_eps else Prediction.from_x0(x, x0, level(t).to(x), p.var_frac)

    return bounded
