"""What is in a model file? The weights and, in its header, the resolved config as plain JSON and where it came from.

`model.safetensors` is written atomically and read without unpickling: a damaged or foreign file is one clear error.
`checkpoint.py` rebuilds the model.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion.code_state import git_commit
from diffusion.files import atomic_write, exists
from diffusion.pretrained.weight_files import WeightFile, is_safetensors, open_safetensors, what_else

FORMAT = "diffusion-model"
FORMAT_VERSION = 1
PICKLED = (".ckpt", ".pt", ".pth", ".bin")  # endings of files that torch.save wrote
FOLDERS = ("model_index.json", "config.json", "unet", "vae")  # what tells a folder of diffusers or transformers
CARRIED = "carried."  # begins the names of tensors that a published file had and no network of ours has
# What a file may hold, and the config nodes that rebuild it. A denoiser's config may have the others' nodes, too.
NODES = {
    "denoiser": ("net", "diffusion"),
    "classifier": ("classifier", "diffusion"),
    "autoencoder": ("autoencoder",),
}
PARTS = ("autoencoder", "conditioner")  # what a network may need beside it; their tensors are named PART.NAME


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module that a denoiser or classifier needs beside it, and the config node that rebuilds it.

    `bundled` puts its weights into the model's file; else the file names it by hash, and by `source`, its own file.
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

    `parts` describes the autoencoder and the conditioner that it needs: config, sha256, bundled, source.
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
        """Return "denoiser", "classifier" or "autoencoder"."""
        return kind_of(self.config)


def kind_of(config: Mapping[str, Any]) -> str:
    """Say what a run with this config trains: the first kind of `NODES` whose network the config describes."""
    return next((kind for kind, nodes in NODES.items() if config.get(nodes[0])), "denoiser")


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
    """Write a denoiser, classifier or autoencoder, and all that rebuilds it, to one safetensors file, atomically.

    `config` is the resolved config as plain data and must have the nodes that `NODES` lists for what `net` is;
    `weights` says which weights `net` holds now ("ema" or "raw"); `facts` are shape (C, H, W) of the images,
    num_classes, class_names, condition_drop; `parts` what `net` needs beside it, by a name of `PARTS`.
    """
    parts = dict(parts or {})
    metadata = model_metadata(
        config,
        weights=weights,
        step=step,
        facts=facts,
        ema_decay=ema_decay,
        parts={name: part.described() for name, part in parts.items()},
    )
    states = {"": net, **{f"{name}.": part.module for name, part in parts.items() if part.bundled}}
    with atomic_write(path) as partial:
        save_file(_plain_tensors(states), partial, metadata=metadata)


def model_metadata(
    config: Mapping[str, Any],
    *,
    weights: str,
    step: int,
    facts: Mapping[str, Any],
    ema_decay: float | None,
    parts: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """What the header of a model file says, see `save_model`; `parts` as `Part.described` says. Raises ValueError."""
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights={weights!r} says nothing; it must be 'ema' or 'raw', whichever the net holds now")
    nodes = NODES[kind_of(config)]
    if lacking := [name for name in nodes if not config.get(name)]:
        raise ValueError(
            f"the config lacks {lacking}; a checkpoint is rebuilt from its nodes `net` and `diffusion`, `classifier` "
            "and `diffusion`, or `autoencoder`"
        )
    if lacking := {"shape", "num_classes", "class_names", "condition_drop"} - set(facts):
        raise ValueError(f"facts lack {sorted(lacking)}; sampling cannot know them from the weights")
    return {
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
        "parts": _json("parts", dict(parts)),
    }


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors: names, types, shapes and values, wherever and in whatever order."""
    state = {clean(key): tensor.detach() for key, tensor in module.state_dict().items()}
    return tensors_hash((key, state[key].dtype, tuple(state[key].shape), [state[key]]) for key in sorted(state))


def tensors_hash(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...], Iterable[Tensor]]]) -> str:
    """Return the SHA-256 of tensors, in the order of their names: name, type, shape, and values in portions."""
    digest = hashlib.sha256()
    for key, dtype, shape, portions in tensors:
        digest.update(f"{key} {dtype} {shape}\n".encode())
        for portion in portions:
            digest.update(portion.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
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
        tensors[clean(key)] = plain.clone() if address in seen else plain
        seen.add(address)
    return tensors


def clean(key: str) -> str:
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


def read_header(path: str | Path) -> Header:
    """Read what the file says about itself, not its weights. Raises FileNotFoundError or ValueError, each clear."""
    path = Path(path)
    file = _opened(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        names = ", ".join(sorted(file)[:2])
        raise ValueError(
            f"{path} is a safetensors file, but not one of ours: its header has no config to rebuild the model from "
            f"({len(file)} tensors, such as {names}). Use the model.safetensors that train.py writes"
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
            shapes=file.shapes,
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r}); take another copy of the file") from error
    if not isinstance(header.config, dict) or not isinstance(header.facts, dict):
        raise ValueError(
            f"the header of {path} is damaged (config and facts are no mappings); take another copy of the file"
        )
    return header


def is_ours(path: str | Path) -> bool:
    """Say whether a path is for `read_header`, which knows our files and what is wrong with damaged ones.

    Not ours are safetensors files without our config in their header, files of torch.save by their ending, and folders
    in which published models come.
    """
    path = Path(path)
    if path.is_dir():
        return not any((path / name).exists() for name in FOLDERS) and not any(path.glob("*.index.json"))
    if path.suffix in PICKLED:
        return not exists(path)
    try:
        return _opened(path).metadata.get("format") == FORMAT
    except (ValueError, OSError):
        return True


def _opened(path: Path) -> WeightFile:
    """The safetensors file at a path, with its header checked. Raises FileNotFoundError or ValueError."""
    if path.is_dir():
        inside = path / "model.safetensors"
        hint = f"name the file: {inside}" if inside.is_file() else "name the model.safetensors file inside a run folder"
        raise ValueError(f"{path} is a folder; {hint}")
    if not exists(path):
        raise FileNotFoundError(f"there is no file {path}{_neighbours(path)}")
    with open(path, "rb") as file:
        start = file.read(256)
    if not is_safetensors(start):
        raise ValueError(f"{path} is not a safetensors file: {_looks_like(start, path.stat().st_size)}")
    return open_safetensors(path)


def _looks_like(start: bytes, size: int) -> str:
    if start.startswith(b"PK\x03\x04"):
        return (
            "it looks like a file of torch.save (a zip of pickles, such as checkpoints/last.ckpt), which could run "
            "code and is never unpickled here. Use its run's model.safetensors; to train on, use train.py run_dir="
        )
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        return "it looks like a pickle, which could run code and is never unpickled here. Use a model.safetensors file"
    return what_else(start, size) or "its first bytes are no header. Use a model.safetensors of train.py"


def _neighbours(path: Path) -> str:
    """Return a hint with the safetensors files near a path that does not exist."""
    folder = next((p for p in path.parents if p.is_dir()), Path())
    found = sorted(str(p) for p in folder.glob("*.safetensors"))[:4]
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return "; train one with `uv run train.py`, whose last line names the file it wrote"
