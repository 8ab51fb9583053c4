"""How does a model get from one layout to another, tensor by tensor, so that the way back gives the same bytes?

`convert` goes from file to file and never holds more than a few tensors; `save_foreign` writes a model in memory.
What the other layout has no place for travels along under names that begin with `carried.`.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.checkpoint import LoadedModel, build, build_empty, read_header
from diffusion.conversion.diffusers_folder import write_json, write_tokenizer
from diffusion.conversion.foreign import check_keys, linear_projections, read_ours
from diffusion.conversion.layouts import PLANS, Content, Plan, plan_compvis
from diffusion.conversion.tensor_stream import Slot, write_stream
from diffusion.files import exists
from diffusion.model_file import CARRIED, clean, is_ours, kind_of, model_metadata, tensors_hash
from diffusion.pretrained.keymap import CONV1D, CONV2D, SAME, Rule, Transform
from diffusion.pretrained.recognise import Place, Recognised, recognise
from diffusion.pretrained.weight_files import WeightFile, open_weights

LAYOUTS = (*PLANS, "guided-diffusion")
DTYPES = {"keep": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ASIDE = ("safety_checker", "feature_extractor", "image_encoder")  # folders beside those of the networks
CARRIED_FILE = "carried.safetensors"  # in a folder, where each network has a file of its own
# Of training alone and often larger than the model; left out, and said so.
TRAINING = re.compile(
    r"^(first_stage_model\.)?(model_ema\.(?!decay$|num_updates$)|loss\.)|^(optimizer|lr_scheduler|callbacks)\."
)


RESHAPES = (SAME, CONV1D, CONV2D)  # transforms that leave the elements in their order


@dataclass(frozen=True)
class Tensors:
    """A tensor somewhere: what it is, how it is read, and how its elements are read in order, portion by portion."""

    slot: Slot
    read: Callable[[], Tensor]
    portions: Callable[[], Iterable[Tensor]]


@dataclass
class Source:
    """A model to convert: `tensors` by part and our name ("net.conv_in.weight"), `carried` by layout and name there."""

    name: str
    layout: str
    content: Content
    config: dict[str, Any]
    tensors: dict[str, Tensors]
    carried: dict[str, Tensors] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)  # what a single file said of itself
    whole_conditioner: dict[str, Any] | None = None  # the config node where carried layers are put back
    record: dict[str, Any] = field(default_factory=lambda: {"weights": "raw", "step": 0, "ema_decay": None})
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    layout: str,
    dtype: str = "keep",
    weights: str = "auto",
    recipe: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a model file or folder in another layout, and return its path.

    layout: "compvis" (a single .safetensors), "diffusers" (a folder), "ours" or "guided-diffusion" (a .pt). dtype: of
    the weights, "keep" for as they are. weights: "ema" or "raw" where a file has both. recipe: of a guided-diffusion
    file without its published name, see `published`. `say` gets every decision, a line each; None prints on stderr.
    One tensor, or what makes one of ours, is in memory at a time. Raises ValueError for what the layout cannot hold
    and for keys that do not fit, before anything is written.
    """
    say = say or _print
    _check(source, out, layout, dtype)
    if (written := _by_recipe(source, out, layout, dtype, recipe)) is not None:
        return written
    return write(read_source(source, weights=weights), out, layout=layout, dtype=DTYPES[dtype], say=say)


def save_foreign(
    model: LoadedModel,
    out: str | Path,
    *,
    layout: str,
    dtype: str = "keep",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a model in memory in another layout; see `convert`. What its file had besides travels along."""
    _check(None, out, layout, dtype)
    if layout == "guided-diffusion":
        raise ValueError(
            "layout=guided-diffusion is written from a file: convert(FILE, OUT, layout='guided-diffusion')"
        )
    modules = {name: getattr(model, name) for name in ("net", "autoencoder", "conditioner")}
    modules = {name: module for name, module in modules.items() if module is not None}
    facts = dict(model.facts)
    found: Recognised | None = model.recognised
    source = Source(
        name=str(model.path),
        layout="ours" if found is None else found.layout,
        content=Content("denoiser", modules, model.diffusion, facts),
        config=dict(model.config),
        tensors={
            f"{name}.{clean(key)}": _held(tensor)
            for name, module in modules.items()
            for key, tensor in module.state_dict().items()
        },
        carried={} if found is None else _leftovers(found, []),
        record={"weights": model.weights, "step": model.step, "ema_decay": model.ema_decay},
    )
    for name, part in model.parts.items():
        source.config.setdefault(name, part["config"])
    return write(source, out, layout=layout, dtype=DTYPES[dtype], say=say or _print)


def _check(source: str | Path | None, out: str | Path, layout: str, dtype: str) -> None:
    for name, value, allowed in (("layout", layout, LAYOUTS), ("dtype", dtype, tuple(DTYPES))):
        if value not in allowed:
            raise ValueError(f"{name}={value} is unknown; choose one of {', '.join(allowed)}")
    out = Path(out).expanduser()
    if layout == "diffusers":
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise ValueError(f"{out} is there already; diffusers' layout is a folder, name a new or an empty one")
        return
    ending = ".pt" if layout == "guided-diffusion" else ".safetensors"
    if out.suffix != ending or out.is_dir():
        raise ValueError(f"{out}: layout={layout} is one file, which ends in {ending}")
    if source is not None and exists(out) and Path(source).expanduser().resolve() == out.resolve():
        raise ValueError(f"{out} would be written over the file that is read; name another")


def _by_recipe(source: str | Path, out: str | Path, layout: str, dtype: str, recipe: str | None) -> Path | None:
    """guided-diffusion's files by their recipes, where layout or names ask for that."""
    from diffusion.conversion.published import from_published, to_published
    from diffusion.pretrained.guided_diffusion_files import FILES

    name = Path(source).name
    if layout == "guided-diffusion" or (
        layout == "ours" and Path(source).suffix == ".pt" and (recipe or name in FILES)
    ):
        if dtype not in ("keep", "float32"):
            raise ValueError(f"dtype={dtype}: files of guided-diffusion are converted in float32, as they are")
        return (to_published if layout == "guided-diffusion" else from_published)(source, out, recipe=recipe)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_source(path: str | Path, *, weights: str = "auto") -> Source:
    """What is in a file or folder, none of it read yet."""
    if is_ours(path):
        return _from_ours(Path(path))
    found = recognise(path, weights=weights)
    if found.kind not in ("denoiser", "autoencoder"):
        raise ValueError(f"{path} is {found.title}; denoisers and autoencoders are converted")
    check_keys(found)
    linear = linear_projections(found)
    facts = {**found.facts, **({} if linear is None else {"linear_projections": linear})}
    facts |= {"short_text_names": True} if _short(found) else {}
    facts |= {"published_layout": "compvis"} if found.layout == "compvis" else {}
    tensors = {}
    for place in found.places:
        for rule in place.table.rules:
            slot = Slot(place.table.shapes[rule.ours], _dtype(place, rule.foreign))
            tensors[f"{place.part}.{rule.ours}"] = _placed(slot, place, rule)
    there = {place.part.partition(".")[0] for place in found.places}
    modules = {name: build_empty(node) for name, node in found.config.items() if name in there}
    diffusion = build(found.config["diffusion"]) if "diffusion" in found.config else None
    notes = [*found.notes]
    notes += [f"it has no {name}; what is written has none either" for name in found.absent]
    return Source(
        name=str(path),
        layout=found.layout,
        content=Content(found.kind, modules, diffusion, facts),
        config={name: node for name, node in found.config.items() if name in (*there, "diffusion")},
        tensors=tensors,
        carried=_leftovers(found, notes),
        metadata=dict(found.files[0].metadata) if found.layout == "compvis" else {},
        whole_conditioner=_whole_conditioner(found),
        record={
            "weights": "ema" if any("ema" in p.prefix for p in found.places) else "raw",
            "step": 0,
            "ema_decay": None,
        },
        notes=notes,
    )


def _from_ours(path: Path) -> Source:
    header = read_header(path)
    if absent := [name for name, part in header.parts.items() if not part["bundled"]]:
        raise ValueError(
            f"{path} names its {' and '.join(absent)} in a file apart; load both and write them: "
            "save_foreign(load_model(FILE, autoencoder=FILE), OUT, layout=...)"
        )
    kind, file = header.kind, open_weights(path)
    nodes = {"net": header.config["net"]} if kind == "denoiser" else {kind: header.config[kind]}
    nodes |= {name: part["config"] for name, part in header.parts.items()}
    if kind not in ("denoiser", "autoencoder"):
        raise ValueError(f"{path} holds a {kind}; only layout=guided-diffusion has such files")
    own = "net" if kind == "denoiser" else kind
    tensors, carried = {}, {}
    for name in file:
        key = clean(name)
        held = _whole(file, name)
        if key.startswith(CARRIED):
            carried[key.removeprefix(CARRIED)] = held
        else:
            part = key.partition(".")[0]
            tensors[key if part in nodes and part != own and part in header.parts else f"{own}.{key}"] = held
    return Source(
        name=str(path),
        layout="ours",
        content=Content(
            kind,
            {name: build_empty(node) for name, node in nodes.items()},
            build(header.config["diffusion"]) if kind == "denoiser" else None,
            header.facts,
        ),
        config=header.config | {name: part["config"] for name, part in header.parts.items()},
        tensors=tensors,
        carried=carried,
        metadata=json.loads(file.metadata.get("carried", "{}")),
        record={"weights": header.weights, "step": header.step, "ema_decay": header.ema_decay},
    )


def _leftovers(found: Recognised, notes: list[str]) -> dict[str, Tensors]:
    """What a file holds beside the networks and its training: by layout and name, of folders with their names."""
    used = {(id(place.file), name) for place in found.places for name in place.names}
    raw = any("ema" in place.prefix for place in found.places)
    carried, dropped = {}, 0
    for file in found.files:
        folder = f"{file.path.parent.name}/" if found.layout == "diffusers" else ""
        for name in file:
            if (id(file), name) in used:
                continue
            if TRAINING.match(name) or (raw and name.startswith("model.diffusion_model.")):
                dropped += 1
            elif name.startswith(CARRIED):
                carried[name.removeprefix(CARRIED)] = _whole(file, name)
            else:
                carried[f"{found.layout}.{folder}{name}"] = _whole(file, name)
    if (file := _carried_file(found)) is not None:
        carried |= {name: _whole(file, name) for name in file}
    if found.layout == "diffusers" and (aside := [p for p in ASIDE if (Path(found.path) / p).is_dir()]):
        notes.append(f"{', '.join(aside)}: not part of what is converted, and left out")
    if dropped:
        notes.append(f"{dropped} tensors of its training (averages or raw weights not taken, losses) are left out")
    return carried


def _carried_file(found: Recognised) -> WeightFile | None:
    path = Path(found.path) / CARRIED_FILE
    return open_weights(path) if found.layout == "diffusers" and path.is_file() else None


def _whole_conditioner(found: Recognised) -> dict[str, Any] | None:
    """The conditioner as it was before layers that it never reads were put aside."""
    if (file := _carried_file(found)) is None:
        return None
    return json.loads(file.metadata.get("diffusion.config", "{}")).get("conditioner")


def _short(found: Recognised) -> bool:
    """Whether the text encoders have the names of transformers 5, without `text_model.`."""
    texts = (rule.foreign[0] for p in found.places if p.part.startswith("conditioner") for rule in p.table.rules)
    return any(name.startswith("embeddings.") for name in texts)


def _dtype(place: Place, names: tuple[str, ...]) -> torch.dtype:
    kinds = [place.file[place.prefix + name].dtype for name in names]
    dtype = kinds[0]
    for kind in kinds[1:]:
        dtype = torch.promote_types(dtype, kind)
    return dtype


def _placed(slot: Slot, place: Place, rule: Rule) -> Tensors:
    """One of our tensors in a foreign file."""

    def read() -> Tensor:
        return read_ours(place, rule, own=True)

    if rule.transform in RESHAPES:
        return Tensors(slot, read, lambda: place.file.portions(place.prefix + rule.foreign[0]))
    return Tensors(slot, read, lambda: [read()])


def _whole(file: WeightFile, name: str) -> Tensors:
    """A tensor of a file as it is."""
    return Tensors(Slot(*file[name]), lambda: file.read(name, own=True), lambda: file.portions(name))


def _held(tensor: Tensor) -> Tensors:
    return Tensors(Slot(tuple(tensor.shape), tensor.dtype), lambda: tensor, lambda: [tensor])


# ---------------------------------------------------------------------------------------------------------------------
# writing


@dataclass
class Writing:
    """One file to be: its slots by name, and the moves: a tensor, the names that it gets, and how it gets into them."""

    slots: dict[str, Slot] = field(default_factory=dict)
    moves: list[tuple[Tensors, tuple[str, ...], Transform]] = field(default_factory=list)

    def add(self, held: Tensors, names: Iterable[str], transform: Transform, dtype: torch.dtype | None) -> None:
        """Move a tensor; floating-point ones are cast to `dtype` unless that is None."""
        kind = held.slot.dtype if dtype is None or not held.slot.dtype.is_floating_point else dtype
        outline = transform.save(torch.empty(held.slot.shape, device="meta"))
        self.moves.append((held, tuple(names), transform))
        self.slots |= {name: Slot(tuple(o.shape), kind) for name, o in zip(names, outline, strict=True)}

    def add_whole(self, name: str, held: Tensors) -> None:
        """A tensor that keeps its type and shape; one that is there already wins."""
        if name not in self.slots:
            self.add(held, [name], SAME, None)

    def tensors(self) -> Iterator[tuple[str, Iterable[Tensor]]]:
        """What `write_stream` writes."""
        for held, names, transform in self.moves:
            if transform in RESHAPES:
                yield names[0], held.portions()
            else:
                yield from zip(names, ([part] for part in transform.save(held.read())), strict=True)


def write(
    source: Source, out: str | Path, *, layout: str, dtype: torch.dtype | None, say: Callable[[str], None]
) -> Path:
    """Write all of a source in a layout, atomically."""
    out = Path(out).expanduser()
    plan = PLANS[layout](source.content)
    if "compvis" in (source.layout, source.content.facts.get("published_layout")):
        plan.buffers = {}  # its file had its own, or had none
    for note in (*source.notes, *plan.notes):
        say(note)
    files = _files(source, plan, layout, dtype)
    if layout == "diffusers":
        _write_folder(out, plan, files, source)
    else:
        write_stream(out, files[""].slots, files[""].tensors(), _metadata(source, layout, dtype))
    return out


def _files(source: Source, plan: Plan, layout: str, dtype: torch.dtype | None) -> dict[str, Writing]:
    """The files of the plan, by path, with what they are to hold."""
    files: dict[str, Writing] = {}
    placed = set()
    for target in plan.targets:
        file = files.setdefault(target.file, Writing())
        for rule in target.table.rules:
            full = f"{target.part}.{rule.ours}"
            placed.add(full)
            file.add(source.tensors[full], [target.prefix + name for name in rule.foreign], rule.transform, dtype)
    for name, tensor in plan.buffers.items():
        files[""].add_whole(name, _held(tensor))
    carried = dict(source.carried)
    if unplaced := [full for full in source.tensors if full not in placed]:
        carried |= _named(source, set(unplaced))
    for name, held in carried.items():
        _add_carried(files, name, held, layout)
    return files


def _named(source: Source, unplaced: set[str]) -> dict[str, Tensors]:
    """What a layout has no place for, in CompVis' names, which have one for all that was published."""
    named = {}
    for target in plan_compvis(source.content, complete=False).targets:
        for rule in target.table.rules:
            if (full := f"{target.part}.{rule.ours}") in unplaced:
                held = source.tensors[full]
                outline = rule.transform.save(torch.empty(held.slot.shape, device="meta"))
                for number, (name, part) in enumerate(zip(rule.foreign, outline, strict=True)):
                    slot = Slot(tuple(part.shape), held.slot.dtype)
                    named[f"compvis.{target.prefix}{name}"] = _one(slot, held, rule, number)
    return named


def _one(slot: Slot, held: Tensors, rule: Rule, number: int) -> Tensors:
    """One of the foreign tensors that a tensor of ours becomes."""

    def read() -> Tensor:
        return rule.transform.save(held.read())[number]

    return Tensors(slot, read, lambda: [read()])


def _add_carried(files: dict[str, Writing], name: str, held: Tensors, layout: str) -> None:
    """A tensor of another layout goes home if this is the one, else it travels along."""
    home, _, own = name.partition(".")
    if layout == "diffusers":
        folder = own.partition("/")[0]
        into = next((path for path in files if home == layout and path.partition("/")[0] == folder), None)
        if into is None:
            files.setdefault(CARRIED_FILE, Writing()).add_whole(name, held)
        else:
            files[into].add_whole(own.partition("/")[2], held)
    else:
        files[""].add_whole(own if home == layout else CARRIED + name, held)


def _metadata(source: Source, layout: str, dtype: torch.dtype | None) -> dict[str, str]:
    if layout == "ours":
        return _own_metadata(source, dtype)
    return {
        "format": "pt",
        **{k: v for k, v in source.metadata.items() if k != "format"},
        **told(source, restored=True),
    }


def told(source: Source, *, restored: bool = False) -> dict[str, str]:
    """What weights do not tell and a file of another layout should: our config, and what the network predicts.

    restored: whether layers that were put aside are in the file again.
    """
    config = {name: node for name, node in source.config.items() if name in NODES_TOLD}
    if restored and source.whole_conditioner is not None:
        config["conditioner"] = source.whole_conditioner
    said = {"diffusion.config": json.dumps(config), "diffusion.facts": json.dumps(dict(source.content.facts))}
    if source.content.diffusion is not None:
        kinds = {"eps": "epsilon", "v": "v", "x0": "sample"}
        said["modelspec.prediction_type"] = kinds[source.content.diffusion.parameterization]
    return said


NODES_TOLD = ("net", "diffusion", "autoencoder", "conditioner")


def _own_metadata(source: Source, dtype: torch.dtype | None) -> dict[str, str]:
    content = source.content
    facts = {"num_classes": None, "class_names": None, "condition_drop": 0.0, **content.facts}
    if "shape" not in facts:
        facts["shape"] = [content.modules["autoencoder"].in_channels, 256, 256]
    parts = {
        name: {"config": source.config[name], "sha256": _hash(source, name, dtype), "bundled": True, "source": None}
        for name in content.modules
        if name in ("autoencoder", "conditioner") and content.kind == "denoiser"
    }
    assert kind_of(source.config) == content.kind
    metadata = model_metadata(source.config, **source.record, facts=facts, parts=parts)
    return metadata | ({"carried": json.dumps(source.metadata)} if source.metadata else {})


def _hash(source: Source, part: str, dtype: torch.dtype | None) -> str:
    """`weights_hash` of a part as it is to be, one tensor after the other."""
    names = sorted(name for name in source.tensors if name.startswith(f"{part}."))

    def tensors() -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Iterable[Tensor]]]:
        for name in names:
            held = source.tensors[name]
            kind = held.slot.dtype if dtype is None or not held.slot.dtype.is_floating_point else dtype
            yield name.removeprefix(f"{part}."), kind, held.slot.shape, (p.to(kind) for p in held.portions())

    return tensors_hash(tensors())


def _write_folder(out: Path, plan: Plan, files: Mapping[str, Writing], source: Source) -> None:
    """Write a folder beside its name and move it there when all is in it."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for path, value in plan.json.items():
            write_json(partial / path, value)
        for folder, tokenizer in plan.tokenizers.items():
            write_tokenizer(partial / folder, tokenizer)
        for path, file in files.items():
            metadata = {"format": "pt"} | (told(source) if path in (plan.targets[0].file, CARRIED_FILE) else {})
            write_stream(partial / path, file.slots, file.tensors(), metadata)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _print(line: str) -> None:
    print(line, file=sys.stderr)
