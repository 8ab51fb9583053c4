"""Report on sweeps and runs: one page, and a CSV file.

    uv run python -m diffusion.report outputs/sweeps/NAME             # report.html and report.csv in that folder
    uv run python -m diffusion.report FOLDER FOLDER out=ablation.html  # several sweeps, or single runs, in one page
    uv run python -m diffusion.report diff RUN RUN [tolerance=0.01]    # what differs between two runs, and since when

A folder is a sweep's, a run's, or one that holds either. Runs may be unfinished, failed or still running. The page
needs no network: it can be mailed, or kept beside a paper. `diff` ends with status 0 where nothing differs, else 1.
"""

from diffusion.cli import run_words
from diffusion.report import build


def main(words: list[str]) -> None:
    """Do what the words ask for."""
    if words[:1] == ["diff"]:
        from diffusion.report.difference import run_difference

        raise SystemExit(run_difference(words[1:]))
    folders = [word for word in words if not word.startswith("out=")]
    outs = [word.partition("=")[2] for word in words if word.startswith("out=")]
    if not folders:
        raise ValueError("of which runs? Give the folder of a sweep or of a run: python -m diffusion.report FOLDER")
    print(build(folders, out=outs[-1] if outs else None))


if __name__ == "__main__":
    run_words(main, __doc__)
