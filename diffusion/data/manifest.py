"""What does the command that packed a folder say of its shards: how many samples each has, and the classes' names?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
FORMAT = "diffusion-shards"
FORMAT_VERSION = 1


class Manifest(NamedTuple):
    """`classes` (None: no labels) and `sizes` {shard as it was asked for: number of its samples}."""

    classes: tuple[str, ...] | None
    sizes: dict[str, int]


def read_manifest(urls: Sequence[str]) -> Manifest | None:
    """Read the manifests that lie beside these shards; None where one has none, or is in none.

    Raises ValueError for manifests that number the classes differently.
    """
    parents = {url: url.rpartition("/")[0] if "/" in url else "." for url in urls}
    contents = {parent: _content(parent) for parent in dict.fromkeys(parents.values())}
    if any(content is None for content in contents.values()):
        return None
    classes = {tuple(content["classes"] or ()) for content in contents.values()}
    if len(classes) > 1:
        raise ValueError(
            f"the shards in {', '.join(contents)} number their classes differently, as their {MANIFEST} say; pack them "
            "together, from one folder"
        )
    sizes = {}
    for url, parent in parents.items():
        sizes[url] = contents[parent]["sizes"].get(url.rpartition("/")[2])
    if None in sizes.values():
        return None
    return Manifest(next(iter(classes)) or None, sizes)


def _content(parent: str) -> dict[str, Any] | None:
    """Read one manifest, of a folder or a URL; None where there is none of ours."""
    from webdataset.gopen import gopen

    if parent.startswith("pipe:"):
        return None
    try:
        if "://" in parent:
            with gopen(f"{parent}/{MANIFEST}", "rb") as stream:
                text = stream.read()
        else:
            text = (Path(parent) / MANIFEST).read_bytes()
        content = json.loads(text)
        if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
            return None
        return {
            "classes": content["classes"],
            "sizes": {shard["name"]: int(shard["samples"]) for shard in content["shards"]},
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
