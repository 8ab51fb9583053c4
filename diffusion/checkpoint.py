"""How is a trained model rebuilt from its file alone, so that a bad file can do no harm?

Loading builds only classes on an allow-list from the config that `model_file.py` reads, and checks every tensor.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion.files import atomic_write, exists
from diffusion.model_file import (
    CARRIED,
    NODES,
    Header,
    Part,
    clean,
    git_commit,
    is_ours,
    package_version,
    read_header,
    save_model,
    weights_hash,
)
from diffusion.pretrained.keymap import without_memory
from diffusion.pretrained.weight_files import WeightFile, open_weights

__all__ = [
    "BUILDABLE",
    "Header",
    "LoadedClassifier",
    "LoadedModel",
    "Part",
    "atomic_write",
    "build",
    "git_commit",
    "load_autoencoder",
    "load_classifier",
    "load_model",
    "load_weights",
    "locate",
    "package_version",
    "read_header",
    "save_model",
    "weights_hash",
]

ALIGNED = 64  # bytes, at multiples of which PyTorch's own memory begins

# The only callables a checkpoint's config may name; each takes plain numbers, words and other entries of this list.
BUILDABLE: frozenset[str] = frozenset(
    {
        "diffusion.process.GaussianDiffusion",
        "diffusion.schedule.Schedule",
        "diffusion.schedule.power",
        "diffusion.schedule.linear",
        "diffusion.schedule.scaled_linear",
        "diffusion.schedule.cosine",
        "diffusion.schedule.sigmoid",
        "diffusion.schedule.shifted_cosine",
        "diffusion.schedule.shifted",
        "diffusion.schedule.zero_terminal_snr",
        "diffusion.models.stages.equal_stages",
        "diffusion.models.unet.UNet",
        "diffusion.models.unet.SuperResolutionUNet",
        "diffusion.models.classifier.Classifier",
        "diffusion.models.autoencoder.AutoencoderKL",
        "diffusion.models.vq.VQAutoencoder",
        "diffusion.models.conv_vae.ConvVAE",
        "diffusion.models.text.TextTransformer",
        "diffusion.models.vision.PatchEncoder",
        "diffusion.conditioning.TextConditioner",
        "diffusion.text_conditioning.TextConditioner",
        "diffusion.text_conditioning.XLConditioner",
        "diffusion.tokenizer.WordPieceTokenizer",
        "diffusion.conditioning.ClassConditioner",
        "diffusion.conditioning.ImageConditioner",
        "diffusion.conditioning.LowResolutionConditioner",
        "diffusion.conditioning.JointConditioner",
    }
)


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Header):
    """A rebuilt model, in eval mode on its device, with everything its file said.

    `recognised` says what a published file is and where its tensors lie (`pretrained.recognise.Recognised`); None for
    files that train.py wrote.
    """

    net: nn.Module
    diffusion: Any
    autoencoder: nn.Module | None = None
    conditioner: nn.Module | None = None
    recognised: Any = None

    def __post_init__(self):
        if "task" in self.facts and hasattr(self.net, "allow_any_size"):  # published weights, as their users know them
            self.net.allow_any_size()


@dataclass(frozen=True, kw_only=True)
class LoadedClassifier(Header):
    """A rebuilt classifier of noisy images, in eval mode on its device; one of latents names their autoencoder.

    `parts["autoencoder"]["sha256"]` is the `weights_hash` of the autoencoder whose latents it judges.
    """

    net: nn.Module
    diffusion: Any


USES = {  # what a file of each kind is given as
    "denoiser": "sample.py checkpoint=FILE",
    "classifier": "guidance=classifier guidance.classifier_checkpoint=FILE",
    "autoencoder": "autoencoder=trained autoencoder.checkpoint=FILE",
}


def check_kind(header: Header, wanted: str) -> None:
    """Raise ValueError for a file of another kind than `wanted`, saying what it is for and what is needed."""
    if header.kind != wanted:
        found, needed = (f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in (header.kind, wanted))
        raise ValueError(
            f"{header.path} holds {found}, but {needed} is needed here. Its own use is "
            f"{USES[header.kind].replace('FILE', str(header.path))}; {needed} is what train.py makes with task={wanted}"
        )
    for name in NODES[wanted]:
        if not isinstance(header.config.get(name), dict):
            raise ValueError(
                f"the config in {header.path} has no `{name}` node; take a model.safetensors that train.py wrote"
            )


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    buildable: Sequence[str] = (),
    autoencoder: str | Path | None = None,
    settled: bool = True,
    **foreign: Any,
) -> LoadedModel:
    """Rebuild a denoiser, its diffusion process and what it needs beside it from one file, strictly.

    The file is one of ours or, told by what is in it, a published one in whatever layout, for which `foreign` holds
    further settings of `load_foreign` (text_encoder, tokenizer, parameterization, weights). dtype None keeps the
    file's. `buildable` adds dotted names of your own classes (`["my_nets.TinyNet"]`) to the allow-list `BUILDABLE`; a
    config that names anything else is refused before anything is imported. `autoencoder` is the file of one that is
    not bundled; it must have the weights that the denoiser was trained with. settled=False leaves a published file's
    weights as they lie there, for who moves them by `settle` later. Raises ValueError with every key that does not fit.
    """
    if not is_ours(path):
        from diffusion.conversion.foreign import load_foreign

        where = {"device": device, "dtype": dtype, "settled": settled}
        return load_foreign(path, autoencoder=autoencoder, **where, **foreign)
    header = read_header(path)
    check_kind(header, "denoiser")
    if given := {name: value for name, value in foreign.items() if value not in (None, "auto")}:
        raise ValueError(
            f"{_worded(given)}: {path} is a model of this package, which holds its own; this is for published files"
        )
    allowed = BUILDABLE | set(buildable)
    nodes = {name: header.config[name] for name in NODES["denoiser"]}
    nodes |= {name: part["config"] for name, part in header.parts.items() if part["bundled"]}
    built = _rebuilt(header, nodes, allowed, empty=not buildable)
    bundled = {name: built[name] for name in header.parts if name in built}
    modules = {"": built["net"], **{f"{name}.": module for name, module in bundled.items()}}
    _load_strictly(modules, header, assign=True)
    beside = bundled | _unbundled(header, autoencoder, allowed)
    for module in (built["net"], *beside.values()):
        module.to(device, dtype).eval()
    return LoadedModel(net=built["net"], diffusion=built["diffusion"], **beside, **vars(header))


def load_classifier(
    path: str | Path, *, device: torch.device | str = "cpu", buildable: Sequence[str] = ()
) -> LoadedClassifier:
    """Rebuild a classifier and the process whose noise it knows, strictly; its weights take no gradients.

    Raises ValueError as `load_model`, also for a file that holds a denoiser or an autoencoder.
    """
    header = read_header(path)
    check_kind(header, "classifier")
    nodes = {name: header.config[name] for name in NODES["classifier"]}
    built = _rebuilt(header, nodes, BUILDABLE | set(buildable))
    net = built["classifier"]
    _load_strictly({"": net}, header)
    net.to(device).eval().requires_grad_(False)
    return LoadedClassifier(net=net, diffusion=built["diffusion"], **vars(header))


def _unbundled(
    header: Header, autoencoder: str | Path | None, allowed: set[str] | frozenset[str]
) -> dict[str, nn.Module]:
    """Return the parts whose weights are in files of their own, after comparing them with the recorded hash."""
    found = {}
    for name, part in header.parts.items():
        if part["bundled"]:
            continue
        if name == "autoencoder":
            source = autoencoder or part["source"]
            if source is None or not exists(Path(source)):
                raise ValueError(
                    f"{header.path} needs the autoencoder that it was trained with, and {source} is not there; "
                    f"give its file: autoencoder=FILE (weights {part['sha256'][:12]})"
                )
            found[name] = load_autoencoder(source)
            scale = {key: found[name].origin.config.get(key) for key in ("scale_factor", "shift")}
            if any(part["config"].get(key) != value for key, value in scale.items()):
                wanted = {key: part["config"].get(key) for key in scale}
                raise ValueError(
                    f"{header.path} was trained with an autoencoder of {_worded(wanted)}, but {source} has "
                    f"{_worded(scale)}: its scale was measured anew; find the file as it was"
                )
        else:
            found[name] = _rebuilt(header, {name: part["config"]}, allowed)[name]
        if (now := weights_hash(found[name])) != part["sha256"]:
            raise ValueError(
                f"{header.path} was trained with the {name} of weights {part['sha256'][:12]}, but this one has "
                f"{now[:12]}; find the file that it was trained with"
            )
    return found


def _worded(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def load_weights(net: nn.Module, path: str | Path, kind: str) -> None:
    """Copy the weights of a file of this kind (a key of `NODES`) into `net`, which training goes on from, strictly."""
    header = read_header(path)
    check_kind(header, kind)
    _load_strictly({"": net}, header, network="network of this run")


def load_autoencoder(
    checkpoint: str | Path, *, device: torch.device | str = "cpu", buildable: Sequence[str] = ()
) -> nn.Module:
    """Rebuild an autoencoder from its own file, or from a denoiser's that bundles it; in eval mode, without gradients.

    The file may also be a published one, in whatever layout.
    Its attribute `origin` is the `Part` that a denoiser's checkpoint names. Raises ValueError as `load_model`.
    """
    if not is_ours(checkpoint):
        from diffusion.conversion.foreign import load_foreign_autoencoder

        return load_foreign_autoencoder(checkpoint, device=device)
    header = read_header(checkpoint)
    part = header.parts.get("autoencoder")
    if part is not None and part["bundled"]:
        prefix, node = "autoencoder.", part["config"]
    else:
        check_kind(header, "autoencoder")
        prefix, node = "", header.config["autoencoder"]
    autoencoder = _rebuilt(header, {"autoencoder": node}, BUILDABLE | set(buildable))["autoencoder"]
    _load_strictly({prefix: autoencoder}, header, others=bool(prefix))
    autoencoder.to(device).eval().requires_grad_(False)
    autoencoder.origin = Part(module=autoencoder, config=node, source=str(checkpoint))
    return autoencoder


def _rebuilt(
    header: Header, nodes: Mapping[str, Any], allowed: set[str] | frozenset[str], *, empty: bool = False
) -> dict[str, Any]:
    """Build objects from a file's config; building draws initial weights, and the caller's random stream stays.

    `empty` builds networks on the meta device, without memory: their weights are to be assigned.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            return {
                name: build_empty(node, allowed) if empty and name != "diffusion" else build(node, allowed)
                for name, node in nodes.items()
            }
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cannot rebuild {header.path} (written by version {header.package_version}): {error}"
            ) from error


def _load_strictly(
    modules: Mapping[str, nn.Module],
    header: Header,
    *,
    others: bool = False,
    assign: bool = False,
    network: str = "network its config describes",
) -> None:
    """Copy the file's weights into modules, by prefix, or raise one ValueError that lists every key that does not fit.

    `others` allows tensors of other prefixes in the file. `assign` puts the file's tensors in the place of the
    modules', with their type, and copies nothing. `network` says which one it is, for the error.
    """
    states = {prefix: module.state_dict() for prefix, module in modules.items()}
    wanted = {prefix + key: tuple(tensor.shape) for prefix, state in states.items() for key, tensor in state.items()}
    found = {clean(key): shape for key, shape in header.shapes.items() if not key.startswith(CARRIED)}
    if others:
        found = {key: shape for key, shape in found.items() if key.startswith(tuple(modules))}
    problems = [f"missing {key} {wanted[key]}" for key in wanted if key not in found]
    problems += [f"unexpected {key} {found[key]}" for key in found if key not in wanted]
    problems += [
        f"mis-shaped {key}: file {found[key]}, network {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    if problems:
        listing = "\n  ".join(problems)
        raise ValueError(f"{header.path} does not fit the {network}, {len(problems)} keys:\n  {listing}")
    names = {clean(key): key for key in header.shapes}
    if assign:
        file = open_weights(header.path)
        for prefix, module in modules.items():
            templates = module.state_dict()
            assign_weights(module, {key: _from(file, names[prefix + key], like) for key, like in templates.items()})
        return
    try:
        weights = load_file(header.path)
    except SafetensorError as error:
        raise ValueError(f"{header.path} is damaged ({error}); take another copy of the file") from error
    for prefix, module in modules.items():
        module.load_state_dict({key: weights[names[prefix + key]] for key in states[prefix]}, strict=True)


def _from(file: WeightFile, name: str, like: Tensor) -> Tensor:
    return ordered(mapped(lambda own: file.read(name, own=own), like), like)


# ---------------------------------------------------------------------------------------------------------------------
# networks without memory, and weights put into them


def build_empty(node: Mapping[str, Any], allowed: frozenset[str] | set[str] = BUILDABLE) -> nn.Module:
    """Build a module of a config without memory for its weights, on the meta device."""
    with without_memory():
        return build(node, allowed)


def assign_weights(module: nn.Module, state: Mapping[str, Tensor], *, settled: bool = True) -> None:
    """Make tensors a module's own, without a copy except, where `settled`, of those that it keeps in another order.

    Those are its convolutions, in channels_last. Raises RuntimeError for names or shapes that are not the module's.
    """
    templates = module.state_dict() if settled else {}
    state = {key: ordered(tensor, templates[key]) if key in templates else tensor for key, tensor in state.items()}
    module.load_state_dict(state, strict=True, assign=True)
    for owner in module.modules():
        for key, buffer in owner.named_buffers(recurse=False):
            if buffer.is_meta and not buffer.numel():  # empty ones, which no file holds
                setattr(owner, key, torch.empty_like(buffer, device="cpu"))


def mapped(read: Callable[[bool], Tensor], like: Tensor, *, changed: bool = False) -> Tensor:
    """A tensor of a file, by `read(own)` as of `WeightFile.read`: the mapped memory itself where that can stay.

    It cannot where `like` has another order of memory, where it is `changed` otherwise, or at an odd address, see
    `settle`.
    """
    if changed or not like.is_contiguous():
        return read(True)
    tensor = read(False)
    return tensor if tensor.data_ptr() % ALIGNED == 0 else read(True)


def settle(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> nn.Module:
    """Move a module whose weights still lie as in a published file, and return it: one copy of each at most.

    Convolutions get our networks' order of memory, channels_last. What lies at an odd address is copied: the last bits
    of a matrix product depend on it, and a model must answer alike from whatever file.
    """
    module.to(device, dtype, memory_format=torch.channels_last)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNED:
            tensor.data = tensor.data.clone()
    return module


def ordered(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in `like`'s order of memory, itself if it has that."""
    if tensor.shape != like.shape or tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


# ---------------------------------------------------------------------------------------------------------------------
# config -> objects, without Hydra and without trust


def build(node: Any, allowed: frozenset[str] | set[str] = BUILDABLE) -> Any:
    """Build the objects of a plain config (nested `_target_` mappings), if every callable it names is `allowed`.

    `_partial_` and `_args_` mean what they mean in Hydra. All names are checked before the first is imported.
    """
    if foreign := sorted(set(_targets(node)) - set(allowed)):
        raise ValueError(
            f"its config names {', '.join(foreign)}, which is not on the list of classes a checkpoint may build; "
            "nothing was imported or run. If it is your own and you trust this file, pass its name in buildable=[...]"
        )
    return _build(node)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for child in node.values():
            yield from _targets(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _targets(child)


def _build(node: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return [_build(child) for child in node]
    if not isinstance(node, Mapping):
        return node
    built = {
        key: _build(child) for key, child in node.items() if key not in ("_target_", "_partial_", "_args_", "_convert_")
    }
    if "_target_" not in node:
        return built
    call = locate(node["_target_"])
    arguments = _build(node.get("_args_", []))
    if node.get("_partial_", False):
        return functools.partial(call, *arguments, **built)
    return call(*arguments, **built)


def locate(name: str) -> Any:
    """Return the object of a dotted name, `package.module.Name`. Raises ValueError where it does not exist."""
    module_name, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"there is no {name} ({error}); its module must be importable from here") from error
