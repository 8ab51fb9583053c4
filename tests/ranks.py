"""One of several processes that train together: `python ranks.py FILE` trains each config of a JSON list in turn."""

import json
import sys
from pathlib import Path

import torch

from diffusion.training.run import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for config in json.loads(Path(sys.argv[1]).read_text()):
        train(config)
