"""How is a trained model kept, so that the file alone rebuilds it and a bad file can do no harm?

`model.safetensors` holds the weights and, in its header, the resolved config as plain JSON. Loading builds only classes
on an allow-list, never unpickles and checks every tensor; writing is atomic, so a full disk leaves the previous file.
"""

import errno
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT = "diffusion-model"
FORMAT_VERSION = 1
LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself

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
        "diffusion.models.unet.UNet",
        "diffusion.models.unet.SuperResolutionUNet",
        "diffusion.models.autoencoder.AutoencoderKL",
        "diffusion.models.vq.VQAutoencoder",
        "diffusion.models.conv_vae.ConvVAE",
        "diffusion.models.text.TextTransformer",
        "diffusion.models.vision.PatchEncoder",
        "diffusion.conditioning.TextConditioner",
        "diffusion.conditioning.ClassConditioner",
        "diffusion.conditioning.ImageConditioner",
        "diffusion.conditioning.LowResolutionConditioner",
        "diffusion.conditioning.JointConditioner",
    }
)
PARTS = ("autoencoder", "conditioner")  # what a denoiser may need beside it; their tensors are named PART.NAME


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module that a denoiser needs beside it, and the config node that rebuilds it.

    `bundled` puts its weights into the denoiser's file; else the file names it by hash, and by `source`, its own file.
    """

    module: nn.Module
    config: Mapping[str, Any]
    bundled: bool = True
    source: str | None = None

    @functools.cached_property
    def sha256(self) -> str:
        """`weights_hash` of the module as it was when first asked for: a frozen module is hashed once."""
        return weights_hash(self.module)

    def described(self) -> dict[str, Any]:
        """Return what a file says about this part."""
        config = dict(self.config)
        return {"config": config, "sha256": self.sha256, "bundled": self.bundled, "source": self.source}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a model file says about itself. `facts` has shape (C, H, W), num_classes, class_names and condition_drop.

    `parts` describes the autoencoder and the conditioner of a denoiser: config, sha256, bundled, source.
    """

    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    weights: str  # "ema" or "raw"
    step: int
    ema_decay: float | None
    package_version: str
    git_commit: str
    torch_version: str
    shapes: dict[str, tuple[int, ...]]  # of every tensor in the file
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return "denoiser" or "autoencoder"."""
        return "denoiser" if self.config.get("net") else "autoencoder"


@dataclass(frozen=True, kw_only=True)
class LoadedModel(Header):
    """A rebuilt model, in eval mode on its device, with everything its file said."""

    net: nn.Module
    diffusion: Any
    autoencoder: nn.Module | None = None
    conditioner: nn.Module | None = None


# ---------------------------------------------------------------------------------------------------------------------
# writing


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it becomes `path`, on any failure `path` stays what it was.

    Folders are made as needed. A full disk or a folder that cannot be written raises one OSError that names `path`,
    also where the library that writes reports it as something else. `durable` waits until the disk has it.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")  # a fixed name: a killed run leaves at most one behind
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.chmod(partial, 0o666 & ~_umask())  # safetensors writes for the owner alone
        if durable:
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            _sync_folder(path.parent)
    except BaseException as error:
        _remove(partial)
        if (reason := _write_failure(error)) is None:
            raise
        kept = "the file that was there is untouched" if _exists(path) else "nothing was written"
        raise OSError(reason, f"cannot write {path}: {os.strerror(reason)}; {kept}") from error


def _umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write_failure(error: BaseException) -> int | None:
    """Return the errno of a failed write, or None where `error` is about something else."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    # torch.save and safetensors write from C++ and Rust, and wrap the operating system's answer in their own types.
    if isinstance(error, (RuntimeError, SafetensorError)):
        text = str(error)
        if numbered := re.search(r"os error (\d+)", text):
            return int(numbered[1])
        if "No space left" in text:
            return errno.ENOSPC
        if "PytorchStreamWriter" in text or "inline_container" in text or "iostream error" in text:
            return errno.ENOSPC  # the zip writer does not say why; a full disk is what stops it half way
    return None


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; Windows offers no such call and needs none."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if _exists(path):
        path.unlink()


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a path under a file, a name too long
        return False


def save_model(
    path: str | Path,
    net: nn.Module,
    config: Mapping[str, Any],
    *,
    weights: str,
    step: int,
    facts: Mapping[str, Any],
    ema_decay: float | None = None,
    parts: Mapping[str, Part] | None = None,
) -> None:
    """Write a denoiser or an autoencoder, and all that rebuilds it, to one safetensors file, atomically.

    `config` is the resolved config as plain data and must have the nodes `net` and `diffusion`, or `autoencoder` where
    `net` is one; `weights` says which weights `net` holds now ("ema" or "raw"); `facts` are shape (C, H, W) of the
    images, num_classes, class_names, condition_drop; `parts` what a denoiser needs beside it, by a name of `PARTS`.
    """
    parts = dict(parts or {})
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} says nothing; it must be 'ema' or 'raw', whichever the net holds now")
    denoises = config.get("net") or not config.get("autoencoder")
    if denoises and (lacking := {name for name in ("net", "diffusion") if not config.get(name)}):
        raise ValueError(
            f"the config lacks {sorted(lacking)}; a checkpoint is rebuilt from its `net` and `diffusion` nodes, or "
            "from its `autoencoder` node"
        )
    if lacking := {"shape", "num_classes", "class_names", "condition_drop"} - set(facts):
        raise ValueError(f"facts lack {sorted(lacking)}; sampling cannot know them from the weights")
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": _json("config", config),
        "facts": _json("facts", dict(facts)),
        "weights": weights,
        "step": str(int(step)),
        "ema_decay": json.dumps(ema_decay),
        "package_version": package_version(),
        "git_commit": git_commit(),
        "torch_version": str(torch.__version__),
        "parts": _json("parts", {name: part.described() for name, part in parts.items()}),
    }
    states = {"": net, **{f"{name}.": part.module for name, part in parts.items() if part.bundled}}
    with atomic_write(path) as partial:
        save_file(_plain_tensors(states), partial, metadata=metadata)


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors: names, types, shapes and values, wherever and in whatever order."""
    digest = hashlib.sha256()
    for key, tensor in sorted((_clean(key), tensor) for key, tensor in module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(states: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the states, by prefix, as safetensors wants them: row-major, on the CPU, no two names sharing memory."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in (
        (p + key, tensor) for p, module in states.items() for key, tensor in module.state_dict().items()
    ):
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        tensors[_clean(key)] = plain.clone() if address in seen else plain
        seen.add(address)
    return tensors


def _clean(key: str) -> str:
    """Strip the prefix that torch.compile(net) puts into names (net.compile() does not)."""
    return key.replace("_orig_mod.", "")


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ValueError(
            f"the {name} must be plain data ({error}); resolve it first: OmegaConf.to_container(cfg, resolve=True)"
        ) from error


def package_version() -> str:
    """Return the installed version of this package, or "unknown" where it is not installed."""
    try:
        return version("diffusion")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def git_commit() -> str:
    """Return the commit of this code, "+dirty" where tracked files were edited, or "unknown" outside its repository."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"  # installed inside somebody else's repository
        dirty = "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_header(path: str | Path) -> Header:
    """Read what the file says about itself, not its weights. Raises FileNotFoundError or ValueError, each clear."""
    path = Path(path)
    raw = _raw_header(path)
    metadata = raw.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        names = ", ".join(sorted(raw)[:2])
        raise ValueError(
            f"{path} is a safetensors file, but not one of ours: its header has no config to rebuild the model from "
            f"({len(raw)} tensors, such as {names}). Use the model.safetensors that train.py writes"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format {metadata.get('format_version')}, this package reads {FORMAT_VERSION}: update it"
        )
    try:
        header = Header(
            path=path,
            config=json.loads(metadata["config"]),
            facts=json.loads(metadata["facts"]),
            weights=metadata["weights"],
            step=int(metadata["step"]),
            ema_decay=json.loads(metadata["ema_decay"]),
            package_version=metadata["package_version"],
            git_commit=metadata["git_commit"],
            torch_version=metadata["torch_version"],
            parts=json.loads(metadata.get("parts", "{}")),
            shapes={name: tuple(entry["shape"]) for name, entry in raw.items()},
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r}); take another copy of the file") from error
    if not isinstance(header.config, dict) or not isinstance(header.facts, dict):
        raise ValueError(
            f"the header of {path} is damaged (config and facts are no mappings); take another copy of the file"
        )
    return header


def _raw_header(path: Path) -> dict[str, Any]:
    """Return the safetensors header as JSON, after checking that the bytes it promises are there."""
    if path.is_dir():
        inside = path / "model.safetensors"
        hint = f"name the file: {inside}" if inside.is_file() else "name the model.safetensors file inside a run folder"
        raise ValueError(f"{path} is a folder; {hint}")
    if not _exists(path):
        raise FileNotFoundError(f"there is no file {path}{_neighbours(path)}")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(256)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or start[8:9] != b"{":
            raise ValueError(f"{path} is not a safetensors file: {_looks_like(start, size)}")
        if length > LONGEST_HEADER or 8 + length > size:
            raise ValueError(
                f"{path} is truncated or damaged: its header claims {length} bytes, the file has {size}; copy it again"
            )
        file.seek(8)
        text = file.read(length)
    try:
        raw = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in raw.items() if name != "__metadata__"), default=0)
        promised = 8 + length + int(end)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the header of {path} is damaged ({type(error).__name__}); take another copy of the file"
        ) from error
    if promised != size:
        what = "truncated" if promised > size else "longer than its header says"
        raise ValueError(f"{path} is {what}: it should have {promised} bytes and has {size}; copy it again")
    return raw


def _looks_like(start: bytes, size: int) -> str:
    if size == 0:
        return "it is empty; a download or copy did not finish"
    if start.startswith(b"PK\x03\x04"):
        return (
            "it looks like a file of torch.save (a zip of pickles, such as checkpoints/last.ckpt), which could run "
            "code and is never unpickled here. Use its run's model.safetensors; to train on, use train.py run_dir="
        )
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return "it looks like a pickle, which could run code and is never unpickled here. Use a model.safetensors file"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "it looks like a web page, so a download was answered by an error page; download it again"
    if size < 8:
        return f"it has only {size} bytes; a download or copy did not finish"
    return "its first bytes are no header. Use a model.safetensors of train.py"


def _neighbours(path: Path) -> str:
    """Return a hint with the safetensors files near a path that does not exist."""
    folder = next((p for p in path.parents if p.is_dir()), Path())
    found = sorted(str(p) for p in folder.glob("*.safetensors"))[:4]
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return "; train one with `uv run train.py`, whose last line names the file it wrote"


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    buildable: Sequence[str] = (),
    autoencoder: str | Path | None = None,
) -> LoadedModel:
    """Rebuild a denoiser, its diffusion process and what it needs beside it from one file, strictly.

    `buildable` adds dotted names of your own classes (`["my_nets.TinyNet"]`) to the allow-list `BUILDABLE`; a config
    that names anything else is refused before anything is imported. `autoencoder` is the file of one that is not
    bundled; it must have the weights that the denoiser was trained with. Raises ValueError with every key that does
    not fit.
    """
    header = read_header(path)
    if header.kind != "denoiser":
        raise ValueError(
            f"{path} holds an autoencoder, which draws nothing by itself; train a denoiser on its latents: "
            f"train.py experiment=... autoencoder.checkpoint={path}"
        )
    for name in ("net", "diffusion"):
        if not isinstance(header.config.get(name), dict):
            raise ValueError(f"the config in {path} has no `{name}` node; take a model.safetensors that train.py wrote")
    allowed = BUILDABLE | set(buildable)
    nodes = {name: header.config[name] for name in ("net", "diffusion")}
    nodes |= {name: part["config"] for name, part in header.parts.items() if part["bundled"]}
    built = _rebuilt(header, nodes, allowed)
    bundled = {name: built[name] for name in header.parts if name in built}
    _load_strictly({"": built["net"], **{f"{name}.": module for name, module in bundled.items()}}, header)
    beside = bundled | _unbundled(header, autoencoder, allowed)
    for module in (built["net"], *beside.values()):
        module.to(device).eval()
    known = {field.name: getattr(header, field.name) for field in fields(Header)}
    return LoadedModel(net=built["net"], diffusion=built["diffusion"], **beside, **known)


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
            if source is None or not _exists(Path(source)):
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


def load_autoencoder(
    checkpoint: str | Path, *, device: torch.device | str = "cpu", buildable: Sequence[str] = ()
) -> nn.Module:
    """Rebuild an autoencoder from its own file, or from a denoiser's that bundles it; in eval mode, without gradients.

    Its attribute `origin` is the `Part` that a denoiser's checkpoint names. Raises ValueError as `load_model`.
    """
    header = read_header(checkpoint)
    if header.kind == "autoencoder":
        prefix, node = "", header.config.get("autoencoder")
    else:
        part = header.parts.get("autoencoder", {"bundled": False})
        prefix, node = "autoencoder.", part["config"] if part["bundled"] else None
    if not isinstance(node, dict):
        raise ValueError(f"{checkpoint} holds no autoencoder; take the model.safetensors of an autoencoder's training")
    autoencoder = _rebuilt(header, {"autoencoder": node}, BUILDABLE | set(buildable))["autoencoder"]
    _load_strictly({prefix: autoencoder}, header, others=bool(prefix))
    autoencoder.to(device).eval().requires_grad_(False)
    autoencoder.origin = Part(module=autoencoder, config=node, source=str(checkpoint))
    return autoencoder


def _rebuilt(header: Header, nodes: Mapping[str, Any], allowed: set[str] | frozenset[str]) -> dict[str, Any]:
    """Build objects from a file's config; building draws initial weights, and the caller's random stream stays."""
    with torch.random.fork_rng(devices=[]):
        try:
            return {name: build(node, allowed) for name, node in nodes.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"cannot rebuild {header.path} (written by version {header.package_version}): {error}"
            ) from error


def _load_strictly(modules: Mapping[str, nn.Module], header: Header, *, others: bool = False) -> None:
    """Copy the file's weights into modules, by prefix, or raise one ValueError that lists every key that does not fit.

    `others` allows tensors of other prefixes in the file.
    """
    states = {prefix: module.state_dict() for prefix, module in modules.items()}
    wanted = {prefix + key: tuple(tensor.shape) for prefix, state in states.items() for key, tensor in state.items()}
    found = {_clean(key): shape for key, shape in header.shapes.items()}
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
        raise ValueError(
            f"{header.path} does not fit the network its config describes, {len(problems)} keys:\n  {listing}"
        )
    try:
        weights = {_clean(key): tensor for key, tensor in load_file(header.path).items()}
    except SafetensorError as error:
        raise ValueError(f"{header.path} is damaged ({error}); take another copy of the file") from error
    for prefix, module in modules.items():
        module.load_state_dict({key: weights[prefix + key] for key in states[prefix]}, strict=True)


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
