"""Pack an image folder into tar shards in webdataset's layout.

    uv run python -m diffusion.data.pack ROOT OUT                        # files as they are, 1000 samples a shard
    uv run python -m diffusion.data.pack ROOT OUT image_size=256         # resized, centre cut out, as PNG
    uv run python -m diffusion.data.pack ROOT OUT shard_size=5000 shuffle=false

ROOT is laid out as data=image_folder reads it: class folders, a metadata.jsonl with captions and labels, or images.
A sample becomes KEY.png (or as it was), KEY.cls with its class number, and KEY.txt with its caption. Samples lie in a
shuffled order that is always the same, and so are all bytes. OUT gets 000000.tar, ..., an index beside each, and a
manifest.json; the same command goes on where it was stopped. Then: uv run train.py data=shards data.shards=OUT
"""

from pathlib import Path

from diffusion.cli import read_words, run_words

SETTINGS = {"shard_size": 1000, "image_size": 0, "channels": 3, "shuffle": True, "max_broken": 100}


def main(arguments: list[str]) -> None:
    """Read the words ROOT OUT [name=value ...] and pack."""
    from diffusion.data.packing import pack  # torch and lightning: not for --help

    folders = [word for word in arguments if "=" not in word]
    settings = read_words([word for word in arguments if "=" in word], SETTINGS)
    if len(folders) != 2:
        raise ValueError(f"expected two folders, ROOT and OUT, got {folders or 'none'}; see --help")
    for name, least in (("shard_size", 1), ("image_size", 0), ("max_broken", 0)):
        if settings[name] < least:
            raise ValueError(f"{name}={settings[name]}; it must be at least {least}")
    if settings["channels"] not in (1, 3):
        raise ValueError(f"channels={settings['channels']}; choose 1 (grey) or 3 (RGB)")
    root, out = (Path(folder).expanduser() for folder in folders)
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{out} lies in {root}, whose images are packed; name a folder outside of it")
    manifest = pack(root, out, settings)
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    print(
        f"{out} holds {manifest['num_samples']} samples in {len(manifest['shards'])} shards, {size / 1e6:,.2f} MB; "
        f"{len(manifest['left_out'])} images were left out"
    )
    classes = f" data.num_classes={len(manifest['classes'])}" if manifest["classes"] else ""
    print(f"train on it: uv run train.py data=shards data.shards={out}{classes}")


if __name__ == "__main__":
    run_words(main, __doc__)
