"""What does `import diffusion` cost over `import torch`? Fresh processes: `python benchmarks/import_time.py`."""

import subprocess
import sys

from harness import interleaved, report


def main() -> None:
    def start(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    seconds = interleaved(
        {
            "import torch": lambda: start("import torch"),
            "import torch, diffusion": lambda: start("import torch, diffusion"),
            "and use its mathematics": lambda: start("import torch, diffusion; diffusion.Sampler, diffusion.UNet"),
        },
        rounds=9,
    )
    rows = {name: f"{value:8.3f} s" for name, value in seconds.items()}
    rows["import diffusion over import torch"] = (
        f"{seconds['import torch, diffusion'] - seconds['import torch']:8.3f} s"
    )
    report("Import time", rows)


if __name__ == "__main__":
    main()
