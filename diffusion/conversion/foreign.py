"""How is a published file, in whatever layout, made a model of ours in memory without a second copy of its weights?

`pretrained.recognise` says what a file holds; here that is built on the meta device and given the mapped tensors.
"""

import contextlib
import copy
import ctypes
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.checkpoint import LoadedModel, assign_weights, build, build_empty, mapped, ordered
from diffusion.model_file import Part, git_commit, package_version
from diffusion.pretrained.keymap import SAME, Rule
from diffusion.pretrained.recognise import Place, Recognised, recognise

TRIM = 2**27  # bytes of weights read between two calls of `trim_memory`
USES = {  # what a file of each kind is given as, where a whole model is asked for
    "autoencoder": "an autoencoder alone: give it beside a model, as vae=FILE, or train on it, as "
    "autoencoder=trained autoencoder.checkpoint=FILE",
    "text": "a text encoder alone: give it beside a model, as text_encoder=FILE",
    "classifier": "a classifier: give it beside a denoiser, as guidance=classifier guidance.classifier_checkpoint=FILE",
    "lora": "a LoRA, small changes to another model's weights, and no model; applying it is not supported yet",
    "textual-inversion": "a textual inversion, the embedding of a word for another model, and no model; "
    "using it is not supported yet",
}
GIVEN_BY = {"autoencoder": "vae=FILE", "conditioner": "text_encoder=FILE"}


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Within this, Python looks for no garbage: a third of the time when thousands of modules and tensors are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@collecting_later()
def load_foreign(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    autoencoder: str | Path | None = None,
    text_encoder: str | Path | Sequence[str | Path] | None = None,
    tokenizer: str | Path | None = None,
    parameterization: str | None = None,
    weights: str = "auto",
    settled: bool = True,
    say: Callable[[str], None] | None = None,
) -> LoadedModel:
    """A published denoiser with its autoencoder and text encoders, in eval mode, from a single file or a folder.

    dtype None keeps the file's. autoencoder, text_encoder (several for several encoders, in the model's order) and
    tokenizer are files for parts that the file lacks, or to be used instead of its own; parameterization overrides
    what the file seems to predict; weights is "ema", "raw" or "auto". settled=False copies nothing: the weights stay
    the file's mapped memory until `checkpoint.settle` gives them the order that our networks compute in. `say` gets
    every decision made for the user, a line each; None prints them on stderr. Raises ValueError for what is no model,
    for missing parts with how to give them, and for keys that do not fit, all at once.
    """
    found = recognise(path, weights=weights)
    check_is_model(found)
    check_complete(found, {"autoencoder": autoencoder, "conditioner": text_encoder})
    for note in found.notes:
        (say or _print)(note)
    found = with_settings(found, parameterization=parameterization, tokenizer=tokenizer)
    parts: dict[str, Part] = {}
    if autoencoder is not None:
        parts["autoencoder"] = _given_autoencoder(autoencoder, found)
    if text_encoder is not None:
        found = with_text_encoders(found, text_encoder)
    modules = {name: node for name, node in found.config.items() if name in ("net", "autoencoder", "conditioner")}
    built = {name: build_empty(node) for name, node in modules.items() if node and name not in parts}
    fill(built, found.places, device=device, dtype=dtype, settled=settled)
    for part in parts.values():
        part.module.to(device, dtype)
    diffusion = build(found.config["diffusion"])
    described = {name: part.described() for name, part in parts.items()}
    described |= {
        name: {"config": modules[name], "sha256": None, "bundled": True, "source": str(found.path)}
        for name in built
        if name != "net"
    }
    return LoadedModel(
        **({name: part.module for name, part in parts.items()} | built),
        diffusion=diffusion,
        path=Path(found.path),
        config=dict(found.config),
        facts=dict(found.facts),
        weights="ema" if any("ema" in place.prefix for place in found.places) else "raw",
        step=0,
        ema_decay=None,
        package_version=package_version(),
        git_commit=git_commit(),
        torch_version=str(torch.__version__),
        shapes={name: entry.shape for place in found.places for name, entry in place.file.items()},
        parts=described,
        recognised=found,
    )


def load_foreign_autoencoder(path: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """The autoencoder of a published file, alone or within a model; its attribute `origin` is its `Part`."""
    found = recognise(path)
    places = [place for place in found.places if place.part == "autoencoder"]
    if not places:
        raise ValueError(f"{path} holds no autoencoder: it is {describe(found)}")
    check_keys(found)
    node = found.config["autoencoder"]
    module = build_empty(node)
    fill({"autoencoder": module}, places, device=device, dtype=None)
    module.requires_grad_(False)
    module.origin = Part(module=module, config=node, source=str(path))
    return module


def check_is_model(found: Recognised) -> None:
    """Raise ValueError for a file that holds something else than a denoiser, saying what it is and what it is for."""
    if found.kind != "denoiser":
        raise ValueError(f"{found.path} is {USES.get(found.kind, found.title)}")
    check_keys(found)


def check_keys(found: Recognised) -> None:
    """Raise one ValueError with every key that does not fit what the file was recognised as."""
    problems = [f"missing     {name}" for name in found.missing]
    problems += [f"unexpected  {name}" for name in found.unexpected]
    problems += [f"mis-shaped  {name}" for name in found.misshaped]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"{found.path} looks like {found.title}, but {len(problems)} keys do not fit:\n  {listing}")


def check_complete(found: Recognised, given: Mapping[str, Any]) -> None:
    """Raise one ValueError that names the parts that are neither in the file nor given, and how to give them."""
    if lacking := [name for name in found.absent if given.get(name) is None]:
        names = {"conditioner": "text encoder"}
        raise ValueError(
            f"{found.path} ({found.title}) has no {' and no '.join(names.get(name, name) for name in lacking)}; give "
            f"the file that holds it: {' '.join(GIVEN_BY[name] for name in lacking)}"
        )


def describe(found: Recognised) -> str:
    """What a file is, in words."""
    return USES.get(found.kind, found.title)


def with_settings(
    found: Recognised, *, parameterization: str | None = None, tokenizer: str | Path | None = None
) -> Recognised:
    """The same with the user's word for what the file cannot say."""
    config = copy.deepcopy(dict(found.config))
    if parameterization is not None:
        config["diffusion"]["parameterization"] = parameterization
    if tokenizer is not None:
        words = (config.get("conditioner") or {}).get("tokenizer") or {}
        if "vocabulary" not in words:
            raise ValueError(
                f"tokenizer={tokenizer}: the text encoder of {found.path} ({found.title}) reads CLIP's tokens, whose "
                "vocabulary is there already; leave tokenizer out"
            )
        words["vocabulary"] = str(tokenizer)
    return replace(found, config=config)


def with_text_encoders(found: Recognised, given: str | Path | Sequence[str | Path]) -> Recognised:
    """The same with the text encoders of other files in their places; `found.config` says where they belong."""
    files = [given] if isinstance(given, str | Path) else list(given)
    config = copy.deepcopy(dict(found.config))
    node = config.get("conditioner")
    if not node:
        raise ValueError(f"text_encoder={given}: {found.path} is {found.title}, which reads no text; leave it out")
    wanted = text_nodes(node)
    sources = [place for file in files for place in _text_places(file)]
    if len(sources) != len(wanted):
        raise ValueError(
            f"{found.path} ({found.title}) reads text through {len(wanted)} encoder(s), but text_encoder={given} holds "
            f"{len(sources)}; give {len(wanted)} files, in the model's order: text_encoder=[FILE,...]"
        )
    places = [place for place in found.places if not place.part.startswith("conditioner.")]
    for (part, text), (theirs, encoder) in zip(wanted.items(), sources, strict=True):
        text["encoder"] = encoder
        places.append(replace(theirs, part=part))
    have, need = [text["encoder"]["channels"] for text in wanted.values()], config["net"]["context_channels"]
    if sum(have) != need:
        raise ValueError(
            f"text_encoder={given} gives contexts of {' + '.join(map(str, have))} channels, but {found.path} "
            f"({found.title}) was trained on {need}"
        )
    if any(text.get("pooled") and not text["encoder"]["projection_channels"] for text in wanted.values()):
        raise ValueError(
            f"text_encoder={given}: {found.title} reads the projected text of its last encoder, and this one has no "
            "projection; give them in the model's order, the one with text_projection last"
        )
    return replace(found, config=config, places=tuple(places))


def text_nodes(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The config nodes of a conditioner's text encoders' owners, by the part that each encoder is."""
    if "texts" in node:
        return {f"conditioner.texts.{i}.encoder": text for i, text in enumerate(node["texts"])}
    return {"conditioner.encoder": node}


def _text_places(file: str | Path) -> list[tuple[Place, dict[str, Any]]]:
    """The text encoders in a file, and the config nodes that rebuild them."""
    found = recognise(file)
    node = found.config.get("conditioner")
    nodes = text_nodes(node) if node else {}
    if not (places := [place for place in found.places if place.part in nodes]):
        raise ValueError(f"text_encoder={file} holds no text encoder: it is {describe(found)}")
    return [(place, nodes[place.part]["encoder"]) for place in places]


def _given_autoencoder(path: str | Path, found: Recognised) -> Part:
    """An autoencoder given beside a model, with the scale of latents that the model was trained with."""
    from diffusion.checkpoint import load_autoencoder

    module = load_autoencoder(path)
    node, own = dict(module.origin.config), found.config.get("autoencoder") or {}
    if (theirs := own.get("latent_channels", module.latent_channels)) != module.latent_channels:
        raise ValueError(
            f"vae={path} has latents of {module.latent_channels} channels, but {found.path} ({found.title}) was "
            f"trained on {theirs}"
        )
    for key in ("scale_factor", "shift"):
        if key in own and (own[key] or 0.0) != (node.get(key) or 0.0):
            warnings.warn(
                f"vae={path} says {key}={node.get(key)}; {own[key]} is used, which {found.title} was trained with",
                stacklevel=3,
            )
            node[key] = own[key]
            setattr(module, key, own[key])
    return Part(module=module, config=node, bundled=False, source=str(path))


# ---------------------------------------------------------------------------------------------------------------------
# modules without memory, and the mapped tensors put into them


def fill(
    modules: Mapping[str, nn.Module],
    places: Sequence[Place],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None,
    settled: bool = True,
) -> None:
    """Give every tensor of modules on the meta device its weight from where `places` says.

    What needs no change stays the file's mapped memory until it is written to; order and address are no reason to
    change it unless `settled`.
    """
    copied = 0
    for place in places:
        name, _, inside = place.part.partition(".")
        if name in modules:
            module = modules[name].get_submodule(inside)
            templates = module.state_dict()
            state = {}
            for rule in place.table.rules:
                kinds = {_type(place.file[place.prefix + name].dtype, dtype) for name in rule.foreign}
                changed = rule.transform is not SAME or kinds != {place.file[place.prefix + rule.foreign[0]].dtype}
                like, read = templates[rule.ours], partial(read_ours, place, rule)
                if not settled and rule.transform is SAME:
                    state[rule.ours] = (tensor := read()).to(device, _type(tensor.dtype, dtype))
                    continue
                tensor = mapped(lambda own, read=read: read(own=own), like, changed=changed)
                state[rule.ours] = ordered(tensor.to(device, _type(tensor.dtype, dtype)), like)
                if (copied := copied + tensor.nbytes) > TRIM:
                    copied = trim_memory()
            assign_weights(module, state, settled=settled)
    for name, module in modules.items():
        if not module.state_dict():
            assign_weights(module, {})  # a conditioner without weights has a place all the same
        empty = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        assert not empty, f"no place in the file for {name}.{empty[0]} and {len(empty) - 1} more"
        module.to(device).eval()


def trim_memory() -> int:
    """Give back to the system what was freed, which glibc keeps between what was not: 4 % of a model. Return 0."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # other systems have other allocators
        ctypes.CDLL(None).malloc_trim(0)
    return 0


def read_ours(place: Place, rule: Rule, *, own: bool = False) -> Tensor:
    """One of our tensors from its place; `own` as of `WeightFile.read`."""
    return rule.transform.load(*(place.file.read(place.prefix + name, own=own) for name in rule.foreign))


def linear_projections(found: Recognised) -> bool | None:
    """Whether the transformers of a file project linearly or by 1x1 convolution; None where it has none."""
    for place in found.places:
        for rule in place.table.rules:
            if rule.ours.endswith("proj_in.weight"):
                return len(place.file[place.prefix + rule.foreign[0]].shape) == 2
    return None


def _type(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return own if wanted is None or not own.is_floating_point else wanted


def _print(line: str) -> None:
    print(line, file=sys.stderr)
