"""What does a file that we exported say of itself, which its layout has no place for?

Our config nodes and facts, as JSON in its header; they are believed before anything that is guessed from shapes.
"""

import json
from typing import Any

from diffusion.pretrained.weight_files import WeightFile

TOLD = "diffusion.config"  # in the header of files that we exported: our nodes, as JSON; beside it the facts
TOLD_FACTS = "diffusion.facts"


def read_told(file: WeightFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our config nodes and facts from a header. Raises ValueError where they are damaged."""
    try:
        config, facts = json.loads(file.metadata[TOLD]), json.loads(file.metadata.get(TOLD_FACTS, "{}"))
        whole = all(isinstance(config[name], dict) for name in ("net", "diffusion")) and isinstance(facts, dict)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{TOLD} in the header of {file.path} is damaged ({error!r:.80}); take another copy"
        ) from error
    if not whole:
        raise ValueError(f"{TOLD} in the header of {file.path} has no net and no diffusion; take another copy of it")
    return config, facts
