"""How does from=PICTURE become settings of sample.py, in front of those that were typed?

Pictures of ours tell them all, pictures of A1111 and ComfyUI what their text holds. What a picture says is not
trusted: it may set what sample.py sets, name files, and build nothing but samplers and guidances of this project.
Nothing here imports torch, so that `--cfg job` shows what a picture means at once.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffusion.cli import CONFIGS
from diffusion.files import numbered
from diffusion.pictures import comfy_graph, parameters
from diffusion.pictures.foreign_pictures import Found, from_parameters, unique
from diffusion.pictures.model_search import find_file, find_model
from diffusion.pictures.picture_text import FILES, FROM, GROUPS, PICTURES, SETTINGS, TEXT_KEY, picture_texts
from diffusion.sampler_list import translated

FEW = 16  # samples in a batch that need no word
BUILT = re.compile(r"diffusion\.(sampling\.Sampler|guidance\.\w+Guidance|solvers\.\w+)")


def with_picture(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line with those that from=PICTURE stands for in front of them.

    What was typed wins over the picture; a sampler or guidance that was typed replaces the picture's as a whole, but
    for the number of steps. Raises ValueError for a picture that does not say how it was made.
    """
    path = _named(arguments)
    if path is None:
        return list(arguments)
    typed = {word.partition("=")[0].lstrip("+~") for word in arguments}
    texts = picture_texts(path)
    if TEXT_KEY in texts:
        found, notes = settings_of(_made(texts[TEXT_KEY], path), path, typed), []
        if found.get("pad_to", 0) > FEW and not {"pad_to", "batch_size"} & typed:
            notes.append(f"drawn in a batch of {found['pad_to']} as it was, to round alike; pad_to=1 is quicker")
    else:
        found, notes = _foreign(texts, path, typed)
    words, kept = _words(found, typed)
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
        for note in [*notes, *kept]:
            print(f"from={path}: {note}", file=sys.stderr)
    return [*words, f"++{word(FROM, str(path))}", *arguments]


def _named(arguments: Sequence[str]) -> Path | None:
    """Return the picture that was asked for, None without one."""
    given = [word.partition("=")[2] for word in arguments if word.partition("=")[0].lstrip("+") == FROM]
    if not given or given[-1] in ("", "null"):
        return None
    text = given[-1]
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    path = Path(text[1:-1] if quoted else text).expanduser()
    if path.is_dir():
        raise ValueError(f"from={path} is a folder; name one picture of it")
    return path


def _made(text: str, path: Path) -> dict[str, Any]:
    """Return our own JSON of a picture."""
    try:
        made = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"from={path} has a damaged text ({error})") from None
    if not isinstance(made, dict) or not all(isinstance(made.get(name), dict) for name in GROUPS):
        raise ValueError(f"from={path} has a text named {TEXT_KEY!r} that is not of sample.py")
    if "seed" not in made:
        raise ValueError(f"from={path} shows many samples; name one of them, in the folder images beside it")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# pictures of ours


def settings_of(made: Mapping[str, Any], path: Path, typed: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings that make a picture of ours again, with files found where they are now.

    Raises ValueError for a picture that names what no sampler and no guidance is, and for files that are gone, but for
    those that were `typed`.
    """
    found = {name: made[name] for name in (*SETTINGS, "seed", "device") if made.get(name) is not None}
    found |= {"num_samples": 1, "batch_size": 1}
    if "batch" in made:
        found["pad_to"] = made["batch"]  # batches of the same size round in the same way
    found |= {"labels": [made["label"]]} if made.get("label") is not None else {}
    found |= {"weights": made["weights_asked"]} if "weights_asked" in made else {}
    _find_files(found, made, path, set(typed))
    for group in GROUPS:
        if foreign := sorted(name for name in _targets(made[group]) if not BUILT.fullmatch(name)):
            raise ValueError(f"from={path} names {', '.join(foreign)} as its {group}, which a picture may not build")
        found[group] = made[group]
    return found


def _find_files(found: dict[str, Any], made: Mapping[str, Any], path: Path, typed: set[str]) -> None:
    """Replace the paths of files that were moved, by name and SHA-256; of a file of many images, name the one."""
    for name in ("checkpoint", *FILES):
        given = made.get(name)
        if name in typed or not given:
            continue
        one = isinstance(given, str)
        sha256 = made.get(f"{name}_sha256") if one and name != "autoencoder" else None  # that one's is of its weights
        bare = [numbered(file) for file in _listed(given)]
        places = [find_file(str(file), near=path.parent, sha256=sha256) for file, _ in bare]
        if None in places:
            hashed = f" (SHA-256 {sha256[:12]})" if isinstance(sha256, str) else ""
            raise ValueError(f"from={path} was made with {name}={given}{hashed}, which is not there; add {name}=FILE")
        numbers = [number for _, number in bare]
        if name in PICTURES and one and numbers[0] is None and (places[0].suffix == ".npz" or places[0].is_dir()):
            numbers = [made.get("number", 0)]
        spelled = [str(place) if i is None else f"{place}#{i}" for place, i in zip(places, numbers, strict=True)]
        found[name] = spelled[0] if one else spelled


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _targets(node: Any) -> list[str]:
    """Return every callable that a recorded node names."""
    if isinstance(node, Mapping):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [name for child in node.values() for name in _targets(child)]
    return [name for child in node for name in _targets(child)] if isinstance(node, list) else []


# ---------------------------------------------------------------------------------------------------------------------
# pictures of others


def _foreign(texts: Mapping[str, str], path: Path, typed: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a picture of A1111 or ComfyUI, and what is to be said about them."""
    try:
        if parameters.KEY in texts:
            found = from_parameters(parameters.parse(texts[parameters.KEY]))
        elif comfy_graph.KEY in texts:
            found = comfy_graph.from_graph(texts[comfy_graph.KEY])
        else:
            known = ", ".join(texts) or "none at all"
            raise ValueError(
                f"it has no text named {TEXT_KEY!r} (ours), {parameters.KEY!r} (A1111) or {comfy_graph.KEY!r} "
                f"(ComfyUI), but {known}"
            )
    except ValueError as error:
        raise ValueError(f"from={path} does not say how it was made: {error}") from None
    settings = {"num_samples": 1, **found.settings}
    if found.sampler is not None and "sampler" not in typed:
        settings |= _known_sampler(found)
    if found.from_image:
        _check_images(found, path, typed)
    if "checkpoint" not in typed:
        settings["checkpoint"] = str(find_model(found.model, found.model_hash, path))
    if found.vae and "vae" not in typed:
        place = find_file(Path(found.vae.replace("\\", "/")).name, near=path.parent)
        settings |= {} if place is None else {"vae": str(place)}
        found.notes += [f"its VAE {found.vae}, which is not in checkpoints/"] if place is None else []
    shown = " ".join(f"{key}={value}" for key, value in settings.items() if "prompt" not in key)
    lost = "; ".join(unique(found.notes))
    return settings, [f"{found.source}: {shown}", f"cannot be honoured: {lost}"]


def _known_sampler(found: Found) -> dict[str, Any]:
    """Return our sampler of that name in the words of another program, noting the one that is taken for an unknown."""
    name, schedule = found.sampler
    choice, settings, exact = translated(name, schedule, program=found.source)
    if not exact:
        found.notes.append(f"its sampler {name}{f' with {schedule}' if schedule else ''} (sampler={choice} instead)")
    return {"sampler": choice, **{f"sampler.{key}": value for key, value in settings.items()}}


def _check_images(found: Found, path: Path, typed: set[str]) -> None:
    """Raise ValueError where the picture that this one was made from is not given: no text holds it."""
    needed = ["image", "mask"] if found.masked else ["image"]
    if missing := [name for name in needed if name not in typed]:
        words = " and ".join(f"{name}=FILE" for name in missing)
        raise ValueError(f"from={path} was made from another image, which its text does not hold; add {words}")


# ---------------------------------------------------------------------------------------------------------------------
# settings as words of Hydra's


def _words(found: Mapping[str, Any], typed: set[str]) -> tuple[list[str], list[str]]:
    """Return the settings as words, but for what was typed, and what there is to say about it."""
    words, notes = [], []
    values = {key: value for key, value in found.items() if key not in GROUPS}
    if "prompts" in typed:
        values.pop("prompt", None)
    for group in GROUPS:
        node = found.get(group)
        if group in typed:
            dropped = [key for key in values if key.startswith(f"{group}.")]
            steps = node.get("num_steps") if isinstance(node, Mapping) else values.get("sampler.num_steps")
            values = {key: value for key, value in values.items() if key not in dropped}
            if group == "sampler" and isinstance(steps, int) and "sampler.num_steps" not in typed:
                words.append(word("sampler.num_steps", steps))
                notes.append(f"sampler.num_steps={steps} is kept, with another sampler")
        elif isinstance(node, str):
            words.append(f"{group}={node}")
        elif isinstance(node, Mapping):
            words += _node_words(group, node)
    words += [word(key, value) for key, value in values.items() if key not in typed]
    return words, notes


def _node_words(group: str, node: Mapping[str, Any]) -> list[str]:
    """Return words that make a group's node exactly what was recorded, from the option that is nearest to it."""
    paths = (CONFIGS / group).glob("*.yaml")
    options = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) or {} for path in paths}
    alike = {name: len(node.keys() ^ base.keys()) for name, base in sorted(options.items())
             if base.get("_target_") == node.get("_target_")}  # fmt: skip
    chosen = min(alike, key=alike.get, default="none")
    words = [f"{group}={chosen}", *(f"++{word(f'{group}.{key}', value)}" for key, value in node.items())]
    # Hydra cannot take away what is null, which is as good as not there.
    return words + [
        f"~{group}.{key}" for key, value in options[chosen].items() if key not in node and value is not None
    ]


def word(key: str, value: Any) -> str:
    """Return one setting as Hydra reads it, whatever characters are in its texts."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_literal(str(key))}:{_literal(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_literal, value)) + "]"
    # A reference ${...} must stay a text; Hydra reads a backslash as itself, except in front of a quote or a reference.
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return '"' + re.sub(r"(\\+)$", r"\1\1", re.sub(r'(\\*)"', r'\1\1\\"', text)) + '"'
