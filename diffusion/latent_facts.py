"""What does a folder of cached latents say of its images, for configs that refer to the data's shape and classes?

Nothing here imports torch; `diffusion.cli` lets configs refer to these facts.
"""

import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def facts(root: Path) -> dict[str, Any]:
    """Return "channels", "image_size" and "num_classes"; {} where the folder holds no latents."""
    try:
        found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))["facts"]
        channels, image_size = found["shape"][:2]
        return {"channels": channels, "image_size": image_size, "num_classes": found["num_classes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
