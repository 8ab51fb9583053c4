"""What is in a single file of weights: a whole model in CompVis' layout, or one network of it alone?

The parts are found by the names that they all have below whatever prefix, and their sizes are read from shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusion.pretrained import (
    adm_files,
    architecture,
    compvis_autoencoder,
    diffusers_shapes,
    families,
    guided_diffusion,
    ldm_text,
)
from diffusion.pretrained.export_compvis import autoencoder_table
from diffusion.pretrained.families import BY_CHANNELS, FAMILIES, KNOWN_CHANNELS, Family
from diffusion.pretrained.folders import recognise_network
from diffusion.pretrained.keymap import KeyMap, Rule, Transform
from diffusion.pretrained.nearest import describe_unknown
from diffusion.pretrained.other_files import recognise_other
from diffusion.pretrained.places import (
    AVERAGED,
    Place,
    Recognised,
    Shapes,
    compared,
    part_alone,
    table_in_names,
    template,
)
from diffusion.pretrained.prediction import assumed_scale, read_parameterization, read_schedule
from diffusion.pretrained.text_files import Tower
from diffusion.pretrained.text_places import encoder_settings, text_conditioner, text_parts, text_place, towers_of
from diffusion.pretrained.told import TOLD, read_told
from diffusion.pretrained.weight_files import WeightFile

UNET = "input_blocks.0.0.weight"
CODER = "encoder.down.0.block.0.conv1.weight"
TOKENS = "token_emb.weight"
CLASSES = "cond_stage_model.embedding.weight"
ADDED_ROW = Transform(lambda rows: nn.functional.pad(rows, (0, 0, 0, 1)), lambda rows: (rows[:-1],))


@dataclass(frozen=True)
class Parts:
    """The prefixes below which a file has a UNet and an autoencoder, and its text encoders."""

    unet: str | None
    autoencoder: str | None
    towers: list[Tower]
    bert: str | None = None  # of latent diffusion's own text encoder


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the names that start with a prefix, without it."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def find_parts(shapes: Shapes) -> Parts:
    """Where the networks are in a file of CompVis' names."""
    unets = [n.removesuffix(UNET) for n in shapes if n.endswith(UNET) and _ends(n, UNET)]
    unets = [prefix for prefix in unets if architecture.has_unet(below(shapes, prefix))]
    coders = [n.removesuffix(CODER) for n in shapes if n.endswith(CODER) and _ends(n, CODER)]
    first = min(unets, key=lambda prefix: (prefix != "model.diffusion_model.", prefix), default=None)
    berts = [n.removesuffix(TOKENS) for n in shapes if n.endswith(TOKENS) and _ends(n, TOKENS)]
    bert = next((prefix for prefix in berts if ldm_text.layout_of(below(shapes, prefix)) is not None), None)
    return Parts(first, min(coders, default=None), towers_of(shapes), bert)


def _ends(name: str, suffix: str) -> bool:
    rest = name.removesuffix(suffix)
    return not rest or (rest.endswith(".") and "control" not in rest)


def recognise_file(file: WeightFile, *, weights: str = "auto") -> Recognised:
    """What one file is. Raises ValueError for what we do not know, naming the nearest and what differs."""
    if (other := recognise_other(file)) is not None:
        return other
    parts = find_parts(file.shapes)
    if parts.unet is not None and TOLD in file.metadata:
        return _told_denoiser(file, parts, weights)
    if parts.unet == "" and adm_files.is_classifier(file.shapes):
        return adm_files.recognise_classifier(file)
    if parts.unet == "" and not any(".transformer_blocks." in name for name in file) and parts.autoencoder is None:
        return adm_files.recognise_denoiser(file)
    if parts.unet is not None:
        return _denoiser(file, parts, weights)
    if diffusers_shapes.UNET in file or diffusers_shapes.CODER in file:
        return recognise_network(file)
    if parts.autoencoder is not None:
        return _autoencoder(file, parts.autoencoder)
    if parts.towers:
        return _text(file, parts.towers)
    raise ValueError(describe_unknown(file))


# ---------------------------------------------------------------------------------------------------------------------
# denoisers


def _denoiser(file: WeightFile, parts: Parts, weights: str) -> Recognised:
    shapes = below(file.shapes, parts.unet)
    linear = architecture.linear_projections(shapes)
    rough = _settings(file, shapes, "sd1", linear)
    kind = families.structure(
        rough,
        towers=[tower.layout for tower in parts.towers],
        linear=linear,
        vocabulary="class" if CLASSES in file else "bert" if parts.bert is not None else None,
    )
    settings = _settings(file, shapes, kind, linear)
    family = _family(file, kind, settings)
    notes: list[str] = []
    net = {"_target_": "diffusion.models.unet.UNet", **settings}
    places = [_unet_place(file, parts.unet, net, linear, family, weights, notes)]
    config: dict[str, Any] = {"net": net}
    scale = _scale_factor(file, family, notes)
    config["autoencoder"], absent = _autoencoder_node(file, parts.autoencoder, scale, places)
    config["conditioner"] = _conditioner(file, parts, kind, places, absent)
    parameterization = read_parameterization(file, family, notes)
    schedule = read_schedule(file, family, parameterization, notes)
    config["diffusion"] = families.diffusion_node(schedule, parameterization)
    classes = config["conditioner"]["num_classes"] if kind == "ldm-class" else None
    size = families.SIZES_BY_PARAMETERIZATION.get(parameterization or "") if family.name == "sd2" else None
    facts = families.facts_of(family, image_size=size, num_classes=classes, told=parameterization is not None)
    if kind == "ldm-class" and any(rule.transform is ADDED_ROW for place in places for rule in place.table.rules):
        notes.append("it was trained without a null class, so there is no guidance without a classifier")
        facts |= {"condition_drop": 0.0, "guidance_scale": 1.0}
    found = Recognised(
        path=file.path,
        layout="compvis",
        kind="denoiser",
        family=family.name,
        title=families.title_of(family, settings),
        config={name: node for name, node in config.items() if node is not None},
        facts=facts,
        places=tuple(places),
        absent=tuple(absent),
        parameterization=parameterization,
        notes=tuple(notes),
        files=(file,),
    )
    return compared(found)


def _told_denoiser(file: WeightFile, parts: Parts, weights: str) -> Recognised:
    """A denoiser in a file that says itself what it is, as those that we export do; all but the names is believed."""
    config, facts = read_told(file)
    net = config["net"]
    linear = architecture.linear_projections(below(file.shapes, parts.unet))
    family, title = _told_family(parts, config, linear)
    notes: list[str] = []
    places = [_unet_place(file, parts.unet, net, linear, family or FAMILIES["sd1"], weights, notes)]
    absent: list[str] = []
    if node := config.get("autoencoder"):
        if parts.autoencoder is None:
            absent.append("autoencoder")
        else:
            table = autoencoder_table(template(node, file.path))
            places.append(Place("autoencoder", file, parts.autoencoder, table))
    if node := config.get("conditioner"):
        _told_conditioner(file, parts, node, places, absent)
    return compared(
        Recognised(
            path=file.path,
            layout="compvis",
            kind="denoiser",
            family=family.name if family else "custom",
            title=title,
            config=config,
            facts=facts,
            places=tuple(places),
            absent=tuple(absent),
            parameterization=config["diffusion"].get("parameterization"),
            notes=tuple(notes),
            files=(file,),
        )
    )


def _told_family(parts: Parts, config: Mapping[str, Any], linear: bool) -> tuple[Family | None, str]:
    """The published family that it is like, if it is one of latents, and a title."""
    net = config["net"]
    family = None
    if config.get("autoencoder") and {"in_channels", "out_channels"} <= set(net):
        towers = [tower.layout for tower in parts.towers]
        kind = families.structure({"context_channels": None, **net}, towers=towers, linear=linear)
        family = FAMILIES.get(BY_CHANNELS[kind].get(net["in_channels"] - net["out_channels"], ""))
    title = families.title_of(family, {"context_channels": None, **net}) if family else "a model of ours"
    return family, f"{title}, exported with its config"


def _told_conditioner(
    file: WeightFile, parts: Parts, node: dict[str, Any], places: list[Place], absent: list[str]
) -> None:
    encoders = text_parts(node)
    if not encoders:
        if "num_classes" in node:
            _class_conditioner(file, places, absent, num_classes=node["num_classes"])
        return
    if parts.bert is not None:
        _bert(file, parts.bert, places, absent)
    elif len(parts.towers) != len(encoders):
        absent.append("conditioner")
    else:
        for tower, (part, encoder) in zip(parts.towers, encoders.items(), strict=True):
            places.append(text_place(part, file, tower, encoder))


def _settings(file: WeightFile, shapes: Shapes, kind: str, linear: bool) -> dict[str, Any]:
    try:
        convention = {"linear": linear, "family": kind, "channels": architecture.width_of(shapes, UNET)}
        return architecture.unet_settings(shapes, lambda width, _: families.heads(width, **convention))
    except ValueError as error:
        raise ValueError(
            f"{file.path} has a UNet in CompVis' names, but it is damaged or of another kind: {error}"
        ) from error


def _family(file: WeightFile, kind: str, settings: Mapping[str, Any]) -> Family:
    beside = settings["in_channels"] - settings["out_channels"]
    names = BY_CHANNELS[kind]
    if beside in names:
        return FAMILIES[names[beside]]
    known = KNOWN_CHANNELS.get((kind, beside))
    raise ValueError(
        f"{file.path} is {f'{known}, for which there is no task here' if known else 'no model that is known here'}; "
        f"the nearest is {FAMILIES[kind].title}, but it takes {settings['in_channels']} input channels and gives "
        f"{settings['out_channels']}: {beside} more, where {' or '.join(map(str, names))} are known"
    )


def _unet_place(
    file: WeightFile,
    prefix: str,
    net: Mapping[str, Any],
    linear: bool,
    family: Family,
    weights: str,
    notes: list[str],
) -> Place:
    module = template(net, file.path)
    vector = architecture.vector_prefix(below(file.shapes, prefix))
    rules = list(guided_diffusion.unet_rules(module, linear_projections=linear, vector_prefix=vector))
    averages = any(name.startswith(AVERAGED) for name in file)
    if weights == "ema" and not averages:
        raise ValueError(f"{file.path} has no averaged weights (model_ema.*); leave weights out")
    if averages and (weights == "ema" or (weights == "auto" and family.averaged)):
        dotless = {name: name.replace(".", "") for rule in rules for name in rule.foreign}
        if weights == "auto":
            notes.append("both raw and averaged weights are there; the averaged are taken (weights=raw for the others)")
        return Place("net", file, AVERAGED, table_in_names(module, rules, dotless))
    if averages and weights == "auto":
        notes.append(
            "both raw and averaged weights are there; the raw are taken, as its original code does (weights=ema)"
        )
    return Place("net", file, prefix, KeyMap(module, rules))


def _autoencoder_node(
    file: WeightFile, prefix: str | None, scale_factor: float, places: list[Place]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The autoencoder's config, its place added; without one in the file, the published one's, as what is absent."""
    if prefix is None:
        return families.autoencoder_node(scale_factor), ["autoencoder"]
    node, place = autoencoder_part(file, prefix, scale_factor)
    places.append(place)
    return node, []


def autoencoder_part(file: WeightFile, prefix: str, scale_factor: float) -> tuple[dict[str, Any], Place]:
    """Config node and place of an autoencoder in CompVis' names."""
    try:
        arguments = architecture.autoencoder_arguments(below(file.shapes, prefix))
        settings = compvis_autoencoder.autoencoder_config(arguments)
        table = compvis_autoencoder.autoencoder_table(arguments)
    except ValueError as error:
        raise ValueError(f"{file.path} has an autoencoder in CompVis' names, but it is damaged: {error}") from error
    target = "vq.VQAutoencoder" if "n_embed" in arguments else "autoencoder.AutoencoderKL"
    node = {"_target_": f"diffusion.models.{target}", **settings, "scale_factor": scale_factor}
    return node, Place("autoencoder", file, prefix, table)


def _scale_factor(file: WeightFile, family: Family, notes: list[str]) -> float:
    if "scale_factor" in file and file["scale_factor"].shape in ((), (1,)):
        value = float(file.read("scale_factor").float())
        if value != 1.0 and abs(value - family.scale_factor) > 1e-5:
            notes.append(f"the file says scale_factor={value:.6g}, which is taken instead of {family.scale_factor}")
            return value
    return family.scale_factor


def _conditioner(
    file: WeightFile, parts: Parts, kind: str, places: list[Place], absent: list[str]
) -> dict[str, Any] | None:
    towers = parts.towers
    if kind == "ldm":
        return None
    if kind == "ldm-class":
        return _class_conditioner(file, places, absent)
    if kind == "ldm-text":
        return _bert(file, parts.bert, places, absent)
    node = text_conditioner(towers, kind)
    if node is None:
        raise ValueError(
            f"{file.path} has a UNet like that of {FAMILIES[kind].title}, but {len(towers)} text encoders "
            f"({'; '.join(map(str, towers))}); give a file with the model's own, or its UNet alone"
        )
    if not towers:
        absent.append("conditioner")
    for tower, (part, encoder) in zip(towers, text_parts(node).items(), strict=False):
        places.append(text_place(part, file, tower, encoder))
    return node


def _bert(file: WeightFile, prefix: str | None, places: list[Place], absent: list[str]) -> dict[str, Any]:
    """Latent diffusion's own text encoder."""
    if prefix is None:
        absent.append("conditioner")
        return families.bert_text()
    shapes = below(file.shapes, prefix)
    settings = ldm_text.shapes_config(shapes)
    table = ldm_text.text_table(settings, ldm_text.layout_of(shapes))
    places.append(Place("conditioner.encoder", file, prefix, table))
    return families.bert_text({"_target_": families.TEXT_TARGET, **settings})


def _class_conditioner(
    file: WeightFile, places: list[Place], absent: list[str], *, num_classes: int | None = None
) -> dict[str, Any]:
    """Latent diffusion's table of classes; that of 1001 rows has one for no class, that of 1000 none."""
    if CLASSES not in file:
        absent.append("conditioner")
        return families.class_node(1000, 512)
    rows, channels = file[CLASSES].shape if len(file[CLASSES].shape) == 2 else (2, 1)
    lacks_null = rows == (1000 if num_classes is None else num_classes)
    num_classes = rows if lacks_null else rows - 1
    table = nn.Embedding(num_classes + 1, channels, device="meta")
    rule = Rule("weight", ("weight",), ADDED_ROW) if lacks_null else Rule("weight", ("weight",))
    places.append(Place("conditioner.embedding", file, CLASSES.removesuffix("weight"), KeyMap(table, [rule])))
    return families.class_node(num_classes, channels)


# ---------------------------------------------------------------------------------------------------------------------
# parts alone


def _autoencoder(file: WeightFile, prefix: str) -> Recognised:
    notes: list[str] = []
    node, place = autoencoder_part(file, prefix, assumed_scale(file, notes))
    return part_alone(file.path, "compvis", "an autoencoder in CompVis' names", node, place, notes)


def _text(file: WeightFile, towers: list[Tower]) -> Recognised:
    if len(towers) > 1:
        raise ValueError(f"{file.path} holds {len(towers)} text encoders and no UNet; give a file with one")
    tower = towers[0]
    encoder = encoder_settings(tower)
    node = families.sd2_text(encoder) if tower.layout == "open_clip" else families.sd1_text(encoder)
    place = text_place("conditioner.encoder", file, tower, encoder)
    return part_alone(file.path, tower.layout, f"a CLIP text encoder in {tower}", node, place, [])
