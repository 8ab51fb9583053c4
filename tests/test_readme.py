"""The README's code, run as it is written."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sd_cases

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PUBLISHED = "checkpoints/v1-5-pruned-emaonly.safetensors"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
PARTS = re.split(r"\n(?=\*\*A )", README.split("## Add a part")[1].split("\n## ")[0])[1:]


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(text) if found == language]


@pytest.mark.parametrize("code", list(blocks(README.split("## Add a part")[0], "python")))
def test_python_examples_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {}
    if PUBLISHED in code:  # a tiny one, since those are not in the repository
        code = code.replace(PUBLISHED, str(sd_cases.folder("sd1")))
    exec(compile(code, "README.md", "exec"), namespace)
    assert "x0" in namespace or "theirs" in namespace  # what the examples end with


def test_there_is_a_short_recipe_for_each_kind_of_part():
    kinds = [re.match(r"\*\*A (\w+)\*\*", part)[1] for part in PARTS]
    assert kinds == ["sampler", "schedule", "dataset", "network"]
    for part in PARTS:
        code = [line for text in blocks(part, "python") + blocks(part, "yaml") for line in text.split("\n")]
        written = [line for line in code if line.strip() and not line.startswith("#")]
        assert len(written) <= 25, f"{part[:20]} takes {len(written)} lines"
        assert len([line for line in blocks(part, "python")[0].split("\n") if line.strip()]) <= 20


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS, ids=lambda part: re.match(r"\*\*A (\w+)", part)[1])
def test_parts_are_added_as_the_readme_says(part, tmp_path):
    """Write the files that the section names into a copy of the repository, and run its commands there."""
    for name in ("diffusion", "configs", "checkpoints"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)
    for code in blocks(part, "python") + blocks(part, "yaml"):
        path = tmp_path / code.split("\n")[0].removeprefix("# ")
        path.write_text(code, encoding="utf-8")
    commands = [line for text in blocks(part, "sh") for line in text.strip().split("\n")]
    assert commands
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in commands:
        words = shlex.split(command.removeprefix("uv run "))
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert list(tmp_path.glob("outputs/**/*.png"))
