"""Say what a file of weights is, or write a model in another layout.

    uv run python -m diffusion.pretrained inspect FILE [weights=auto|ema|raw] [nan=sample|all|none]
    uv run python -m diffusion.pretrained convert IN OUT --layout compvis|diffusers|ours|guided-diffusion
        [--dtype keep|float16|bfloat16|float32] [--weights auto|ema|raw] [--recipe NAME]

FILE is a .safetensors, .ckpt or .pt file, an index of shards, or a folder in diffusers' layout. `inspect` reads the
header and a few values of some tensors, nan=all every value; its exit status is 1 for a file that cannot be used.
`convert` writes a single file (compvis), a folder that diffusers loads, our own model.safetensors or a .pt file, tensor
by tensor; --dtype keep leaves the weights' types as they are; --recipe names that of a guided-diffusion file.
"""

import gc
import os
import sys
from collections.abc import Sequence

LAYOUTS = ("compvis", "diffusers", "ours", "guided-diffusion")
DTYPES = ("keep", "float16", "bfloat16", "float32")
CHOICES = {"weights": ("auto", "ema", "raw"), "nan": ("sample", "all", "none"), "layout": LAYOUTS, "dtype": DTYPES}
USES = {"inspect": (1, ("weights", "nan")), "convert": (2, ("layout", "dtype", "weights", "recipe"))}


def read_words(command: str, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """File names and settings of a command; `--name value`, `--name=value` and `name=value` are the same."""
    count, allowed = USES[command]
    files, settings, rest = [], {}, list(words)
    while rest:
        word = rest.pop(0)
        name, is_setting, value = word.lstrip("-").partition("=")
        if word.startswith("--") and not is_setting:
            if not rest:
                choices = f"; choose one of {', '.join(CHOICES[name])}" if name in CHOICES else ""
                raise ValueError(f"{word} needs a value{choices}")
            value = rest.pop(0)
        elif not is_setting or (name not in CHOICES and not word.startswith("--")):
            files.append(word)
            continue
        if name not in allowed:
            raise ValueError(f"{command} takes no {name}; it takes {' and '.join(allowed)}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name}={value} is unknown; choose one of {', '.join(CHOICES[name])}")
        settings[name] = value
    if len(files) != count:
        wanted = "one file or folder" if count == 1 else "what to read and what to write"
        raise ValueError(f"{command} takes {wanted}, got {len(files)}: {' '.join(files) or 'nothing'}")
    return files, settings


def inspect(words: Sequence[str]) -> int:
    """Print the report of a file; the exit status is 1 where it cannot be used."""
    from diffusion.pretrained.recognise import recognise
    from diffusion.pretrained.report import report

    (file,), settings = read_words("inspect", words)
    found = recognise(file, weights=settings.get("weights", "auto"))
    print("\n".join(report(found, nan=settings.get("nan", "sample"))))
    return 0 if found.fits else 1


def convert(words: Sequence[str]) -> int:
    """Write a model in another layout."""
    (source, out), settings = read_words("convert", words)
    if "layout" not in settings:
        raise ValueError(f"convert needs --layout; choose one of {', '.join(LAYOUTS)}")
    from diffusion.conversion.convert import convert as write

    print(write(source, out, **settings))
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run the command, or print the help; a mistake is one line on stderr and status 2."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    command, *words = arguments
    try:
        if command not in USES:
            raise ValueError(f"{command} is unknown; choose inspect or convert")
        return {"inspect": inspect, "convert": convert}[command](words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    gc.disable()  # torch is imported a tenth faster, and all ends soon
    status = main(sys.argv[1:])
    if sys.argv[1:2] == ["inspect"]:  # nothing is open: not taking torch apart saves a third of the time
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
