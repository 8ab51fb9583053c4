"""Where in foreign files are the weights of each of our modules, and what else was found out about those files?

Only data: `recognise` fills it in, loading, converting and the report of `inspect` read it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.classifier import Classifier
from diffusion.models.text import TextTransformer
from diffusion.models.unet import SuperResolutionUNet, UNet
from diffusion.models.vq import VQAutoencoder
from diffusion.pretrained.keymap import KeyMap, Rule, without_memory
from diffusion.pretrained.weight_files import WeightFile

AVERAGED = "model_ema.diffusion_model"  # then the names without their dots
HARMLESS = re.compile(
    r"^((sqrt_|log_one_minus_)?alphas_cumprod(_prev)?|sqrt_(one_minus|recip|recipm1)_alphas_cumprod|betas"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|lvlb_weights|scale_factor|v_pred|ztsnr"
    r"|denoiser\.(log_)?sigmas|(first_stage_model\.)?(model_ema|loss)\..*|embedding_manager\..*"
    r"|cond_stage_model\.(logit_scale|text_projection|mapper\..*|final_ln\..*)"
    r"|(.*\.)?(position_ids|logit_scale|logit_bias|attn_mask|to_logits\.(weight|bias))|(.*\.)?(visual|vision_model)\..*"
    r"|(carried|optimizer|lr_scheduler|callbacks)\..*|epoch|global_step)$"
)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """One module of ours in a foreign file.

    part: its prefix in our model file: "net", "autoencoder", "conditioner.encoder", "conditioner.texts.0.encoder".
    The file's names are `prefix` + the table's foreign names.
    """

    part: str
    file: WeightFile
    prefix: str
    table: KeyMap

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Name in the file and shape of every tensor that this module needs."""
        return {self.prefix + name: shape for name, shape in self.table.foreign_shapes.items()}


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """What a file or folder is, as far as it can be told without reading its weights."""

    path: Path
    layout: str  # "compvis", "diffusers", "guided-diffusion", "ours", "lora", "textual-inversion", "transformers", ...
    kind: str  # "denoiser", "autoencoder", "text", "classifier", "lora", "textual-inversion"
    family: str  # a name of `families.FAMILIES`, or "custom"
    title: str
    config: dict[str, Any] = field(default_factory=dict)  # our nodes net, diffusion, autoencoder, conditioner
    facts: dict[str, Any] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    absent: tuple[str, ...] = ()  # parts that the model needs and the file lacks; `config` says what would fit
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    parameterization: str | None = None  # None: the file does not tell; `config` then says eps
    notes: tuple[str, ...] = ()  # decisions made for the user, a line each
    files: tuple[WeightFile, ...] = ()  # every file that was looked into

    @property
    def fits(self) -> bool:
        """Whether every key that is needed is there, and no other."""
        return not (self.missing or self.unexpected or self.misshaped)


@dataclass(frozen=True)
class Fit:
    """How a place's tensors compare with its file's: words for what is missing or mis-shaped, and the names it uses."""

    missing: tuple[str, ...]
    misshaped: tuple[str, ...]
    used: frozenset[str]


def fit(place: Place) -> Fit:
    """Compare what a module needs with what its file holds."""
    names, missing, misshaped = place.names, [], []
    for name, shape in names.items():
        if name not in place.file:
            missing.append(f"{name} {list(shape)}")
        elif place.file[name].shape != shape:
            misshaped.append(f"{name} {list(place.file[name].shape)}, expected {list(shape)}")
        elif not place.file[name].dtype.is_floating_point:
            misshaped.append(f"{name} of {str(place.file[name].dtype)[6:]}, expected a floating type")
    return Fit(tuple(missing), tuple(misshaped), frozenset(names))


def compared(found: Recognised) -> Recognised:
    """The same with every key that is missing, unexpected, mis-shaped or harmless."""
    fits = [fit(place) for place in found.places]
    used: dict[int, set[str]] = {id(file): set() for file in found.files}
    for place, result in zip(found.places, fits, strict=True):
        used[id(place.file)] |= result.used
    rest = [(file, name) for file in found.files for name in file if name not in used[id(file)]]
    raw = found.places and found.places[0].prefix == AVERAGED
    harmless = [n for _, n in rest if HARMLESS.match(n) or (raw and n.startswith("model.diffusion_model."))]
    kept = set(harmless)
    return replace(
        found,
        missing=tuple(line for result in fits for line in result.missing),
        misshaped=tuple(line for result in fits for line in result.misshaped),
        unexpected=tuple(f"{name} {list(file[name].shape)}" for file, name in rest if name not in kept),
        harmless=tuple(harmless),
    )


ALONE = {"autoencoder": ("autoencoder", "vae"), "conditioner": ("text", "clip")}  # kind and family of a part alone


def part_alone(path: Path, layout: str, title: str, node: dict[str, Any], place: Place, notes: list[str]) -> Recognised:
    """What holds an autoencoder or a text encoder and no denoiser; `node` is our config of what `place` is part of."""
    name = place.part.partition(".")[0]
    kind, family = ALONE[name]
    found = Recognised(path=path, layout=layout, kind=kind, family=family, title=title, config={name: node})
    return compared(replace(found, places=(place,), notes=tuple(notes), files=(place.file,)))


def table_in_names(template: nn.Module, rules: Iterable[Rule], names: Mapping[str, str]) -> KeyMap:
    """The two-way table with foreign names replaced by those of `names`; others stay."""
    replaced = (Rule(r.ours, tuple(names.get(name, name) for name in r.foreign), r.transform) for r in rules)
    return KeyMap(template, replaced)


MODELS = {
    "diffusion.models.unet.UNet": UNet,
    "diffusion.models.unet.SuperResolutionUNet": SuperResolutionUNet,
    "diffusion.models.classifier.Classifier": Classifier,
    "diffusion.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "diffusion.models.vq.VQAutoencoder": VQAutoencoder,
    "diffusion.models.text.TextTransformer": TextTransformer,
}


def template(node: Mapping[str, Any], where: Path | str = "the config") -> nn.Module:
    """The module of a config node on the meta device: names and shapes without memory.

    Raises ValueError for settings that make no network; `where` is what they were found in, for the message.
    """
    settings = {name: value for name, value in node.items() if not name.startswith("_")}
    if (target := node.get("_target_")) not in MODELS:
        raise ValueError(
            f"{where} names {target}, which is no network that foreign files hold; those are {', '.join(MODELS)}"
        )
    try:
        with without_memory():
            return MODELS[target](**settings)
    except (TypeError, ValueError, RuntimeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{where} is damaged, or no network of ours has these sizes: {str(error)[:300]}") from error
