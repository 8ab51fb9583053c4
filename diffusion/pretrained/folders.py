"""What is in a folder in diffusers' layout: unet/, vae/, text_encoder/, and what do the configs beside the weights say?

Configs are believed; where one is missing, sizes are read from shapes as in single files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion.pretrained import diffusers, diffusers_autoencoder, families, ldm_text, transformers
from diffusion.pretrained.diffusers_shapes import CODER, autoencoder_arguments, unet_arguments
from diffusion.pretrained.families import BY_CHANNELS, FAMILIES, KNOWN_CHANNELS, Family
from diffusion.pretrained.keymap import KeyMap
from diffusion.pretrained.places import Place, Recognised, compared, part_alone, table_in_names, template
from diffusion.pretrained.prediction import assumed_scale
from diffusion.pretrained.scheduler_config import SAMPLERS, read_scheduler
from diffusion.pretrained.text_places import encoder_settings, text_parts, text_place, towers_of
from diffusion.pretrained.told import TOLD, read_told
from diffusion.pretrained.weight_files import WeightFile, find_weights, open_weights, read_json, variant_of

PIPELINE = "model_index.json"
UNETS = ("UNet2DConditionModel", "UNet2DModel")
AUTOENCODERS = ("AutoencoderKL", "VQModel")
TEXTS = ("CLIPTextModel", "CLIPTextModelWithProjection", "LDMBertModel")
# What reading a config whose values are of other kinds than they should be ends in.
DAMAGED = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
AUTOENCODER_FOLDERS = ("vae", "vqvae")
TEXT_FOLDERS = ("text_encoder", "text_encoder_2")


def is_diffusers_folder(path: Path) -> bool:
    """Whether this is a pipeline's folder, or that of one of its networks."""
    if not path.is_dir():
        return False
    config = path / "config.json"
    return (path / PIPELINE).is_file() or (path / "unet").is_dir() or (config.is_file() and bool(_class_of(config)))


def _class_of(config: Path) -> str | None:
    said = read_json(config)
    names = [said.get("_class_name"), *(said.get("architectures") or [])]
    return next((name for name in names if name in (*UNETS, *AUTOENCODERS, *TEXTS)), None)


def recognise_folder(path: Path, *, weights: str = "auto") -> Recognised:
    """What a pipeline's folder is, or that of one network. Raises ValueError for one without a network to sample."""
    if not (path / PIPELINE).is_file() and (path / "config.json").is_file():
        kind = _class_of(path / "config.json")
        if kind in AUTOENCODERS:
            return _autoencoder_alone(path)
        if kind in TEXTS:
            return _text_alone(path)
        if kind in UNETS:
            return _pipeline(path, Folders(path, unet=path), weights)
    return _pipeline(path, _folders(path), weights)


@dataclass
class Folders:
    """The folders of a pipeline's networks, those that hold weights, and what its index says."""

    path: Path
    unet: Path | None = None
    autoencoder: Path | None = None
    texts: list[Path] = field(default_factory=list)
    bert: Path | None = None
    index: Mapping[str, Any] = field(default_factory=dict)


def _folders(path: Path) -> Folders:
    index = read_json(path / PIPELINE) if (path / PIPELINE).is_file() else {}
    there = {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and any(p.iterdir())}
    if "unet" not in there:
        said = f", a {index['_class_name']}" if "_class_name" in index else ""
        raise ValueError(
            f"{path}{said} has no unet/, the network that is sampled from; it has {', '.join(there) or 'no folders'}. "
            "Download the rest of it, or name one of its parts alone"
        )
    coder = next((there[name] for name in AUTOENCODER_FOLDERS if name in there), None)
    texts = [there[name] for name in TEXT_FOLDERS if name in there]
    return Folders(path, there["unet"], coder, texts, there.get("bert"), index)


def _open(folder: Path, weights: str, notes: list[str]) -> WeightFile:
    """A network's file: without a variant if there is one; `weights` raw means non_ema, where both were uploaded."""
    variant = None
    if weights != "auto":
        names = {variant_of(p.name) for p in folder.iterdir()}
        wanted = {"raw": "non_ema", "ema": "ema"}[weights]
        variant = wanted if wanted in names else None
    chosen = find_weights(folder, variant=variant)
    if (found := variant_of(chosen.name)) is not None:
        notes.append(f"{folder.name}: the variant {found} is taken ({chosen.name})")
    return open_weights(chosen)


def _config(folder: Path, file: WeightFile, by_shapes: Any, notes: list[str]) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    notes.append(f"{folder.name} has no config.json; its sizes are read from its weights' shapes")
    return by_shapes(file.shapes)


# ---------------------------------------------------------------------------------------------------------------------
# whole pipelines


def _pipeline(path: Path, folders: Folders, weights: str) -> Recognised:
    notes: list[str] = []
    file = _open(folders.unet, weights, notes)
    return _assembled(folders, file, _config(folders.unet, file, unet_arguments, notes), notes)


def _assembled(folders: Folders, file: WeightFile, arguments: Mapping[str, Any], notes: list[str]) -> Recognised:
    """A denoiser in diffusers' names, with what is in the folders beside it."""
    path = folders.path
    settings, table = unet_part(file.path, arguments)
    net = {"_target_": "diffusion.models.unet.UNet", **settings}
    places = [Place("net", file, "", table)]
    kind = _structure(arguments, settings, folders)
    pixels = kind == "ldm" and folders.autoencoder is None and settings["in_channels"] in (1, 3)
    family = FAMILIES[kind] if pixels else _family(path, kind, settings)
    config: dict[str, Any] = {"net": net}
    absent: list[str] = []
    factor = 1
    if not pixels:
        config["autoencoder"] = _autoencoder(folders, family, places, absent, notes)
        factor = 2 ** (len(config["autoencoder"]["stages"]) - 1)
    if kind != "ldm":
        config["conditioner"] = _conditioner(folders, kind, places, absent, notes)
    config["diffusion"], told, scheduler = read_scheduler(path / "scheduler", file, family, notes)
    told_config, told_facts = read_told(file) if TOLD in file.metadata else ({}, {})
    if own := told_config.get("diffusion"):
        config["diffusion"], told = own, own.get("parameterization")
    size = _size(arguments, factor)
    facts = families.facts_of(family, image_size=size, told=told is not None)
    facts["sampler"] = SAMPLERS.get(scheduler.get("_class_name", ""), facts["sampler"])
    if pixels:
        facts["shape"][0] = settings["in_channels"]
        facts |= {"num_classes": settings["num_classes"], "condition_drop": 0.0}
    facts |= {"scheduler": scheduler, **told_facts}
    if conditioner := config.get("conditioner"):
        if _alike(conditioner, own := told_config.get("conditioner") or {}):
            config["conditioner"] = own
        elif "texts" in conditioner:
            conditioner["image_size"] = facts["shape"][1]
    found = Recognised(
        path=path,
        layout="diffusers",
        kind="denoiser",
        family="custom" if pixels else family.name,
        title="a model of pixels in diffusers' layout" if pixels else families.title_of(family, settings),
        config=config,
        facts=facts,
        places=tuple(places),
        absent=tuple(absent),
        parameterization=told,
        notes=tuple(notes),
        files=tuple({id(place.file): place.file for place in places}.values()),
    )
    return compared(found)


def _alike(found: dict[str, Any], told: dict[str, Any]) -> bool:
    """Whether a folder that we wrote still has the text encoders that it had then."""
    mine, other = ([(e["channels"], e["num_layers"]) for e in text_parts(node).values()] for node in (found, told))
    return bool(mine) and mine == other


def unet_part(where: Path, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], KeyMap]:
    """Our settings of a UNet with this config, and its table."""
    try:
        return diffusers.unet_config(arguments), diffusers.unet_table(arguments)
    except DAMAGED as error:
        raise ValueError(f"{where} holds a UNet that cannot be built here: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error)[:300] if isinstance(error, ValueError) else f"its config is damaged ({error!r:.200})"


def _structure(arguments: Mapping[str, Any], settings: Mapping[str, Any], folders: Folders) -> str:
    towers = []
    names = [folder.name for folder in folders.texts]
    if folders.index.get("requires_aesthetics_score") or names == ["text_encoder_2"]:
        towers = ["open_clip"]  # XL's refiner
    linear = bool(arguments.get("use_linear_projection"))
    if folders.bert is None and settings["context_channels"] in (512, 1280) and not settings.get("vector_channels"):
        return "sd2" if linear else "sd1"  # a small CLIP's
    vocabulary = "bert" if folders.bert is not None else None
    return families.structure(settings, towers=towers, linear=linear, vocabulary=vocabulary)


def _family(path: Path, kind: str, settings: Mapping[str, Any]) -> Family:
    beside = settings["in_channels"] - settings["out_channels"]
    if beside in BY_CHANNELS[kind]:
        return FAMILIES[BY_CHANNELS[kind][beside]]
    known = KNOWN_CHANNELS.get((kind, beside), "no model that is known here")
    raise ValueError(
        f"{path} is {known}, for which there is no task; the nearest is {FAMILIES[kind].title}, but its unet takes "
        f"{settings['in_channels']} channels and gives {settings['out_channels']}"
    )


def _size(arguments: Mapping[str, Any], factor: int) -> int | None:
    """The side of the images that a network was made for, as its config says."""
    size = arguments.get("sample_size")
    size = max(size) if isinstance(size, (list, tuple)) and size else size
    return size * factor if isinstance(size, int) else None


def _autoencoder(
    folders: Folders, family: Family, places: list[Place], absent: list[str], notes: list[str]
) -> dict[str, Any]:
    if folders.autoencoder is None:
        absent.append("autoencoder")
        return families.autoencoder_node(family.scale_factor)
    file = _open(folders.autoencoder, "auto", notes)
    arguments = _config(folders.autoencoder, file, autoencoder_arguments, notes)
    node, place = autoencoder_part(folders.autoencoder, file, arguments)
    places.append(place)
    return node


def autoencoder_part(where: Path, file: WeightFile, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Place]:
    """Config node and place of an autoencoder in diffusers' names of today or before 2023."""
    try:
        settings = diffusers_autoencoder.autoencoder_config(arguments)
        table = diffusers_autoencoder.autoencoder_table(arguments)
    except DAMAGED as error:
        raise ValueError(f"{where} holds an autoencoder that cannot be built here: {_reason(error)}") from error
    quantises = "num_codes" in settings
    node = {"_target_": f"diffusion.models.{'vq.VQAutoencoder' if quantises else 'autoencoder.AutoencoderKL'}"}
    node |= settings
    old = diffusers_autoencoder.OLD_NAMES
    if any(name.rsplit(".", 2)[-2:-1] and name.rsplit(".", 2)[-2] in old for name in file):
        table = table_in_names(template(node, file.path), table.rules, _old_names(table, old))
    return node, Place("autoencoder", file, "", table)


def _old_names(table: KeyMap, old: Mapping[str, str]) -> dict[str, str]:
    """Today's names of attention layers -> those of uploads before 2023."""
    names = {}
    for name in (name for rule in table.rules for name in rule.foreign if ".attentions." in name):
        for former, today in old.items():
            if f".{today}." in name:
                names[name] = name.replace(f".{today}.", f".{former}.")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# text


def _conditioner(
    folders: Folders, kind: str, places: list[Place], absent: list[str], notes: list[str]
) -> dict[str, Any]:
    if kind == "ldm-text":
        return _bert(folders, places, absent, notes)
    wanted = {"sdxl-base": 2}.get(kind, 1)
    if len(folders.texts) != wanted:
        absent.append("conditioner")
        if folders.texts:
            notes.append(
                f"of {wanted} text encoders only {folders.texts[0].name} is there; give all: text_encoder=[...]"
            )
        return _text_node(kind, [], folders)
    files = [_open(folder, "auto", notes) for folder in folders.texts]
    encoders = [_encoder(folder, file) for folder, file in zip(folders.texts, files, strict=True)]
    node = _text_node(kind, encoders, folders)
    for file, (part, encoder) in zip(files, text_parts(node).items(), strict=True):
        places.append(text_place(part, file, _tower(file), encoder))
    return node


def _tower(file: WeightFile) -> Any:
    towers = towers_of(file.shapes)
    if len(towers) != 1:
        raise ValueError(f"{file.path} holds {len(towers)} text encoders in the names of transformers, not one")
    return towers[0]


def _encoder(folder: Path, file: WeightFile) -> dict[str, Any]:
    """The encoder's config node, by its config.json or else by its shapes."""
    if not (folder / "config.json").is_file():
        return encoder_settings(_tower(file))
    config = read_json(folder / "config.json")
    try:
        settings = transformers.text_config(config, projected="text_projection.weight" in file)
    except DAMAGED as error:
        raise ValueError(f"{folder} holds a text encoder that cannot be built here: {_reason(error)}") from error
    return {"_target_": families.TEXT_TARGET, **settings}


def _text_node(kind: str, encoders: list[dict[str, Any]], folders: Folders) -> dict[str, Any]:
    """The conditioner: what diffusers' pipelines take of the text encoders, and how their tokenizers pad."""
    pads = [_pad(folders.path / folder.name.replace("text_encoder", "tokenizer")) for folder in folders.texts]
    if kind.startswith("sdxl"):
        build = families.refiner_text if kind == "sdxl-refiner" else families.xl_text
        node = build(*encoders)
        node["zero_null"] = bool(folders.index.get("force_zeros_for_empty_prompt", node["zero_null"]))
        texts = node["texts"]
    else:
        # Its copies of Stable Diffusion 2's encoder end before the last layer.
        node = families.sd2_text(*encoders, whole=not encoders) if kind == "sd2" else families.sd1_text(*encoders)
        texts = [node]
    if len(pads) == len(texts):
        for text, pad in zip(texts, pads, strict=True):
            text["pad"] = pad or text["pad"]
    return node


def _pad(tokenizer: Path) -> str | None:
    """How a tokenizer pads: "zero" with the token of id 0, "end" with the end token."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            said = read_json(tokenizer / name).get("pad_token")
            said = said.get("content") if isinstance(said, dict) else said
            if isinstance(said, str):
                return "zero" if said == "!" else "end"
    return None


def _bert(folders: Folders, places: list[Place], absent: list[str], notes: list[str]) -> dict[str, Any]:
    if folders.bert is None:
        absent.append("conditioner")
        return families.bert_text()
    file = _open(folders.bert, "auto", notes)
    settings = ldm_text.shapes_config(file.shapes)
    if (folders.bert / "config.json").is_file():
        settings = ldm_text.text_config(read_json(folders.bert / "config.json"))
    node = families.bert_text({"_target_": families.TEXT_TARGET, **settings})
    places.append(Place("conditioner.encoder", file, "", ldm_text.text_table(settings, "diffusers")))
    return node


# ---------------------------------------------------------------------------------------------------------------------
# one network alone


def _autoencoder_alone(path: Path) -> Recognised:
    notes: list[str] = []
    file = _open(path, "auto", notes)
    return autoencoder_alone(path, file, read_json(path / "config.json"), notes)


def autoencoder_alone(path: Path, file: WeightFile, arguments: Mapping[str, Any], notes: list[str]) -> Recognised:
    """An autoencoder in diffusers' names, with its config."""
    node, place = autoencoder_part(path, file, arguments)
    return part_alone(path, "diffusers", "an autoencoder in diffusers' names", node, place, notes)


def _text_alone(path: Path) -> Recognised:
    notes: list[str] = []
    file = _open(path, "auto", notes)
    encoder = _encoder(path, file)
    node = (
        families.sd1_text(encoder) if encoder["activation"] == "quick_gelu" else families.sd2_text(encoder, whole=False)
    )
    place = text_place("conditioner.encoder", file, _tower(file), encoder)
    return part_alone(path, "diffusers", "a CLIP text encoder in transformers' names", node, place, notes)


def recognise_network(file: WeightFile) -> Recognised:
    """One network's file in diffusers' names, with the config.json beside it if that is its own, else by shapes."""
    notes: list[str] = []
    coder = CODER in file
    by_shapes, kinds = (autoencoder_arguments, AUTOENCODERS) if coder else (unet_arguments, UNETS)
    beside = file.path.parent / "config.json"
    try:
        if beside.is_file() and _class_of(beside) in kinds:
            arguments = read_json(beside)
        else:
            arguments = by_shapes(file.shapes)
            notes.append(
                "there is no config.json of it; its sizes are read from shapes, its heads are Stable Diffusion's"
            )
    except ValueError as error:
        raise ValueError(f"{file.path} has diffusers' names, but is damaged or of another kind: {error}") from error
    if not coder:
        return _assembled(Folders(file.path), file, arguments, notes)
    if "scaling_factor" not in arguments:
        arguments = {**arguments, "scaling_factor": assumed_scale(file, notes)}
    return autoencoder_alone(file.path, file, arguments, notes)
