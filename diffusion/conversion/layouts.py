"""Where does each tensor of one of our models go in CompVis' single file, in diffusers' folder, and in our own file?

Tables alone, on modules without memory; `convert.py` moves the tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.conditioning import ClassConditioner
from diffusion.conversion.diffusers_folder import pipeline_json, scheduler_json, text_json
from diffusion.models.text import TextTransformer
from diffusion.pretrained import export_compvis, export_diffusers, ldm_text, open_clip, transformers
from diffusion.pretrained.keymap import KeyMap, Rule, without_memory
from diffusion.process import GaussianDiffusion
from diffusion.text_conditioning import TextConditioner, XLConditioner
from diffusion.tokenizer import VOCAB_SIZE, ClipTokenizer

WEIGHTS = "diffusion_pytorch_model.safetensors"  # what diffusers calls its networks' files
TEXT_WEIGHTS = "model.safetensors"  # and transformers


@dataclass(frozen=True)
class Target:
    """One of our modules in another layout: `part` as in `Place`, the file below the output, and the names in it."""

    part: str
    file: str  # "" for a single file
    prefix: str
    table: KeyMap


@dataclass
class Plan:
    """All of a model in another layout: modules, what lies beside their weights, and what had to be decided."""

    targets: list[Target]
    json: dict[str, dict[str, Any]] = field(default_factory=dict)  # by path below the output
    tokenizers: dict[str, ClipTokenizer] = field(default_factory=dict)  # by folder
    buffers: dict[str, Tensor] = field(default_factory=dict)  # tensors that are computed, not stored by us
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """A model's modules, on the meta device or with weights, and what is known of it."""

    kind: str  # "denoiser" or "autoencoder"
    modules: Mapping[str, nn.Module]  # net, autoencoder, conditioner: those that are there
    diffusion: GaussianDiffusion | None
    facts: Mapping[str, Any]

    @property
    def linear_projections(self) -> bool | None:
        """How the transformers of the file that this came from projected; None where it came from none."""
        return self.facts.get("linear_projections")


def plan_ours(content: Content) -> Plan:
    """Our own file: every tensor under its own name."""
    prefixes = {"net": "", content.kind: "", "classifier": ""}
    targets = [
        Target(name, "", prefixes.get(name, f"{name}."), KeyMap(module, (Rule(k, (k,)) for k in module.state_dict())))
        for name, module in content.modules.items()
    ]
    return Plan(targets)


# ---------------------------------------------------------------------------------------------------------------------
# CompVis


def plan_compvis(content: Content, *, complete: bool = True) -> Plan:
    """A single file in the names of ldm and sgm. Raises ValueError for what they would compute otherwise.

    complete: add the buffers of the schedule that ldm's files hold, and the markers that sgm's are told by.
    """
    modules = content.modules
    if content.kind == "autoencoder":
        return Plan([Target("autoencoder", "", "", export_compvis.autoencoder_table(modules["autoencoder"]))])
    diffusion, net = content.diffusion, modules["net"]
    if diffusion.time_scale != 1 or diffusion.learned_variance or diffusion.parameterization == "mean":
        raise ValueError(
            f"{export_compvis.WHAT} samples with no variance={diffusion.variance}, time_scale={diffusion.time_scale:g} "
            f"and parameterization={diffusion.parameterization}, which this model has"
        )
    table = export_compvis.unet_table(net, linear_projections=content.linear_projections)
    targets = [Target("net", "", "model.diffusion_model.", table)]
    if (autoencoder := modules.get("autoencoder")) is not None:
        targets.append(Target("autoencoder", "", "first_stage_model.", export_compvis.autoencoder_table(autoencoder)))
    conditioner = modules.get("conditioner")
    targets += [] if conditioner is None else _compvis_conditioner(conditioner)
    buffers = {}
    if complete and not isinstance(conditioner, XLConditioner):
        buffers = export_compvis.schedule_buffers(diffusion.schedule.betas)
    elif complete and diffusion.parameterization == "v":
        buffers = {"v_pred": torch.empty(0)}
        buffers |= {"ztsnr": torch.empty(0)} if diffusion.schedule.zero_terminal_snr else {}
    return Plan(targets, buffers=buffers)


def _compvis_conditioner(conditioner: nn.Module) -> list[Target]:
    if isinstance(conditioner, ClassConditioner):
        table = conditioner.embedding
        rules = KeyMap(table, [Rule("weight", ("weight",))])
        return [Target("conditioner.embedding", "", "cond_stage_model.embedding.", rules)]
    what = export_compvis.WHAT
    if isinstance(conditioner, XLConditioner):
        _check_texts(conditioner, what, XL_STATES)
        names = ["transformer.", "model."][-len(conditioner.texts) :]
        return [
            _text_target(f"conditioner.texts.{i}.encoder", text.encoder, f"conditioner.embedders.{i}.{name}")
            for i, (text, name) in enumerate(zip(conditioner.texts, names, strict=True))
        ]
    if not isinstance(conditioner, TextConditioner):
        raise ValueError(f"{what} has no {type(conditioner).__name__}, which this model is conditioned by")
    part, encoder = "conditioner.encoder", conditioner.encoder
    if not isinstance(conditioner.tokenizer, ClipTokenizer):
        rules = ldm_text.text_rules(encoder, "compvis")
        return [Target(part, "", "cond_stage_model.transformer.", KeyMap(encoder, rules))]
    _check_text(conditioner, what, [("end", -1, True, False), ("zero", -1, True, False), ("zero", -2, True, False)])
    padded = conditioner.tokenizer.padding == conditioner.tokenizer.end
    return [_text_target(part, encoder, f"cond_stage_model.{'transformer.' if padded else 'model.'}")]


def _text_target(part: str, encoder: TextTransformer, prefix: str) -> Target:
    rules = transformers.text_rules if prefix.endswith("transformer.") else open_clip.text_rules
    text_json(encoder)  # raises ValueError for one that is no CLIP
    return Target(part, "", prefix, KeyMap(encoder, rules(encoder)))


# ---------------------------------------------------------------------------------------------------------------------
# text conditioners as they were published: padding, layer, final norm, pooled

State = tuple[str, int, bool, bool]
XL_STATES: list[State] = [("end", -2, False, False), ("zero", -2, False, True)]


def _state(text: TextConditioner) -> State:
    pad = "end" if text.tokenizer.padding == text.tokenizer.end else "zero"
    return pad, text.layer, text.final_norm, text.pooled


def _check_texts(conditioner: XLConditioner, what: str, wanted: list[State]) -> None:
    for text, state in zip(conditioner.texts, wanted[-len(conditioner.texts) :], strict=True):
        _check_text(text, what, [state])


def _check_text(text: TextConditioner, what: str, wanted: list[State]) -> None:
    """Raise ValueError for a way of reading text that foreign code does not have."""
    pad, layer, norm, pooled = state = _state(text)
    if state not in wanted or text.masked or text.tokenizer.max_length != text.encoder.max_length:
        raise ValueError(
            f"{what} has no text encoder read at pad={pad} layer={layer} final_norm={norm} pooled={pooled} "
            f"masked={text.masked} max_length={text.tokenizer.max_length}, as this model's is"
        )
    if text.encoder.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"{what} has no text encoder of {text.encoder.vocab_size} tokens, as this model's; only {VOCAB_SIZE}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# diffusers


def plan_diffusers(content: Content) -> Plan:
    """A folder that diffusers loads. Raises ValueError for what it would compute otherwise."""
    modules, what = content.modules, export_diffusers.WHAT
    if content.kind == "autoencoder":
        net = modules["autoencoder"]
        config = export_diffusers.autoencoder_json(net, sample_size=content.facts.get("shape", [256])[-1])
        table = export_diffusers.autoencoder_table(net, config)
        return Plan([Target("autoencoder", WEIGHTS, "", table)], {"config.json": config})
    net, autoencoder, conditioner = (modules.get(name) for name in ("net", "autoencoder", "conditioner"))
    size = content.facts["shape"][-1] // (autoencoder.size_factor if autoencoder is not None else 1)
    unet = export_diffusers.unet_json(
        net,
        linear_projections=content.linear_projections,
        sample_size=size,
        sized_text=isinstance(conditioner, XLConditioner),
    )
    plan = Plan([Target("net", f"unet/{WEIGHTS}", "", export_diffusers.unet_table(net, unet))])
    plan.json["unet/config.json"] = unet
    coder = None
    if autoencoder is not None:
        coder = export_diffusers.autoencoder_json(autoencoder, sample_size=content.facts["shape"][-1])
        folder = "vqvae" if conditioner is None else "vae"
        table = export_diffusers.autoencoder_table(autoencoder, coder)
        plan.targets.append(Target("autoencoder", f"{folder}/{WEIGHTS}", "", table))
        plan.json[f"{folder}/config.json"] = coder
    short = bool(content.facts.get("short_text_names"))
    texts = {} if conditioner is None else _diffusers_texts(conditioner, plan, short=short)
    latent = autoencoder is not None or conditioner is not None
    scheduler = scheduler_json(content.diffusion, published=content.facts.get("scheduler"), latent=latent)
    plan.json["scheduler/scheduler_config.json"] = scheduler
    index = pipeline_json(
        task=content.facts.get("task", "text-to-image"),
        texts=texts,
        unet=unet["_class_name"],
        autoencoder=coder and coder["_class_name"],
        scheduler=scheduler["_class_name"],
        labels=net.num_classes is not None or net.vector_channels is not None,
        zero_null=getattr(conditioner, "zero_null", False),
    )
    if index is not None:
        plan.json["model_index.json"] = index
    else:
        plan.notes.append(
            f"{what} has no pipeline for such a model; its parts load one by one, with {unet['_class_name']}."
            "from_pretrained(FOLDER, subfolder='unet') and the like"
        )
    return plan


def _diffusers_texts(conditioner: nn.Module, plan: Plan, *, short: bool) -> dict[str, TextTransformer]:
    """The encoders by folder, added to the plan with their tokenizers; `short` as in `_text_table`."""
    what = export_diffusers.WHAT
    if isinstance(conditioner, XLConditioner):
        _check_texts(conditioner, what, XL_STATES)
        names = ["text_encoder", "text_encoder_2"][-len(conditioner.texts) :]
        parts = [f"conditioner.texts.{i}.encoder" for i in range(len(names))]
        owners = dict(zip(names, zip(parts, conditioner.texts, strict=True), strict=True))
    elif isinstance(conditioner, TextConditioner) and isinstance(conditioner.tokenizer, ClipTokenizer):
        _check_text(conditioner, what, [(p, -k, True, False) for p in ("end", "zero") for k in (1, 2)])
        owners = {"text_encoder": ("conditioner.encoder", conditioner)}
    else:
        raise ValueError(f"{what} has no pipeline with this model's {type(conditioner).__name__} and its tokenizer")
    encoders = {}
    for name, (part, text) in owners.items():
        encoder = text.encoder
        if text.final_norm:  # its pipelines take the last state, so what comes after the wanted one is left out
            encoder = _shortened(encoder, len(encoder.blocks) + 1 + text.layer, plan)
        encoders[name] = encoder
        plan.json[f"{name}/config.json"] = text_json(encoder)
        plan.targets.append(Target(part, f"{name}/{TEXT_WEIGHTS}", "", _text_table(encoder, short)))
        plan.tokenizers[name.replace("text_encoder", "tokenizer")] = text.tokenizer
    return encoders


def _text_table(encoder: TextTransformer, short: bool) -> KeyMap:
    """The names of transformers; `short` those of its version 5, in which CLIPTextModel has lost `text_model.`."""
    rules = transformers.text_rules(encoder)
    if short and encoder.projection is None:
        rules = (Rule(r.ours, tuple(n.removeprefix("text_model.") for n in r.foreign), r.transform) for r in rules)
    return KeyMap(encoder, rules)


def _shortened(encoder: TextTransformer, num_layers: int, plan: Plan) -> TextTransformer:
    """The encoder's first layers, without its projection, on the meta device; itself where that is all of it."""
    if num_layers == len(encoder.blocks) and encoder.projection is None:
        return encoder
    block = encoder.blocks[0]
    with without_memory():
        short = TextTransformer(
            encoder.vocab_size,
            encoder.channels,
            num_layers=num_layers,
            num_heads=block.num_heads,
            max_length=encoder.max_length,
            hidden_channels=block.expand.out_features,
            activation=block.activation,
            causal=encoder.causal,
            norm_eps=encoder.norm_out.eps,
        )
    left = len(encoder.blocks) - num_layers
    if left:
        plan.notes.append(f"the text encoder's last layer{'s' * (left > 1)}, which this model never reads, lie apart")
    return short


PLANS: Mapping[str, Callable[[Content], Plan]] = {
    "compvis": plan_compvis,
    "diffusers": plan_diffusers,
    "ours": plan_ours,
}
