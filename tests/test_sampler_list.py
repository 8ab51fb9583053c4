"""The table of samplers: every config is in it, says what it is, and is found by the names of other programs."""

import runpy
from contextlib import nullcontext
from functools import cache

import pytest
from omegaconf import OmegaConf
from test_configs import CONFIGS, composed, options
from tiny import ROOT

from diffusion.cli import list_of
from diffusion.grids import SPACINGS as SPACINGS_OF_GRIDS
from diffusion.sampler_list import (
    INSTEAD,
    KNOWN,
    LABELS,
    SCHEDULERS,
    SPACINGS,
    a1111_name,
    listing,
    of_scheduler,
    translated,
)
from diffusion.solvers import SOLVERS


@cache
def values(name: str) -> dict:
    return composed(f"sampler={name}", name="sample")["sampler"]


def test_every_sampler_is_in_the_table_and_the_table_has_no_other():
    assert set(KNOWN) == set(options("sampler"))
    lines = list_of("sampler").splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(KNOWN)
    assert lines[0].split() == ["sampler=", "order", "evals", "noise", "spacing", "A1111", "ComfyUI", "diffusers"]


@pytest.mark.parametrize("name", options("sampler"))
def test_a_row_says_what_the_config_does(name):
    row = listing({name: values(name)}).splitlines()[1].split()
    solver = SOLVERS[values(name)["solver"]].having(values(name)["order"])
    assert row[:3] == [name, str(solver.order or "?"), str(solver.evaluations)]
    assert row[3] == ("yes" if values(name)["eta"] else "-")
    assert row[4] == values(name)["spacing"]
    first = (CONFIGS / "sampler" / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")


def test_a_sampler_of_ones_own_is_listed_after_the_others():
    mine = {"mine": {**values("euler"), "solver": "heun"}, "euler": values("euler")}
    assert [line.split()[0] for line in listing(mine).splitlines()] == ["sampler=", "euler", "mine"]


@pytest.mark.parametrize(("program", "field"), [("A1111", "a1111"), ("ComfyUI", "comfyui")])
@pytest.mark.parametrize("name", KNOWN)
def test_a_name_of_another_program_finds_its_config_again(name, program, field):
    pair = getattr(KNOWN[name], field)
    if pair is None or name in ("ddim", "ddpm") or pair[1] == "any":  # ComfyUI's DDIM is its Euler, whatever the grid
        return
    config, changes, exact = translated(*pair, program=program)
    assert config == name and exact
    assert changes.get("spacing", values(name)["spacing"]) == SPACINGS.get(
        pair[1].lower().replace(" ", "_"), values(name)["spacing"]
    )


@pytest.mark.parametrize(
    ("name", "schedule", "program", "wanted"),
    [
        ("DPM++ 2M Karras", None, "A1111", ("dpmpp_2m_karras", {}, True)),
        ("DPM++ 2M", "Automatic", "A1111", ("dpmpp_2m_karras", {}, True)),
        ("DPM++ 2M", "Beta", "A1111", ("dpmpp_2m", {"spacing": "beta"}, True)),
        ("DPM++ 2M SDE Heun Karras", None, "A1111", ("dpmpp_2m_sde", {"kind": "heun", "spacing": "karras"}, True)),
        ("DPM++ SDE", "Automatic", "A1111", ("dpmpp_sde", {}, True)),
        ("Euler a", "Automatic", "A1111", ("euler_ancestral", {}, True)),
        ("Euler a", None, "A1111", ("euler_ancestral", {}, True)),
        ("Euler", "SGM Uniform", "A1111", ("euler", {"spacing": "sgm_uniform"}, True)),
        ("Euler", "Align Your Steps", "A1111", ("euler", {"spacing": "align_your_steps"}, True)),
        ("Euler", "Turbo", "A1111", ("euler", {}, False)),
        ("Restart", "Karras", "A1111", (INSTEAD, {"spacing": "karras"}, False)),
        ("dpmpp_2m_sde_gpu", "karras", "ComfyUI", ("dpmpp_2m_sde", {"spacing": "karras"}, True)),
        ("dpmpp_2m", "normal", "ComfyUI", ("dpmpp_2m", {}, True)),
        ("dpmpp_2m", None, "ComfyUI", ("dpmpp_2m", {}, True)),
        ("ddim", "ddim_uniform", "ComfyUI", ("euler", {"spacing": "ddim_uniform"}, True)),
        ("uni_pc", "simple", "ComfyUI", ("unipc", {"kind": "bh1", "order": 3, "spacing": "simple"}, True)),
        ("uni_pc_bh2", "normal", "ComfyUI", ("unipc", {"order": 3}, True)),
        ("lcm", "sgm_uniform", "ComfyUI", ("lcm", {"spacing": "sgm_uniform"}, True)),
        ("res_multistep", "simple", "ComfyUI", (INSTEAD, {"spacing": "simple"}, False)),
    ],
)
def test_names_of_other_programs_are_understood_or_said_to_be_unknown(name, schedule, program, wanted):
    config, changes, exact = translated(name, schedule, program=program)
    assert (config, changes, exact) == wanted
    assert values(config) | changes  # a config there is
    assert set(changes) <= set(values(config))


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.a1111])
def test_what_is_written_into_a_picture_names_the_same_sampler_to_a1111(name):
    assert translated(*a1111_name(values(name)))[0] == name


def test_samplers_that_a1111_lacks_keep_their_own_name():
    assert a1111_name(values("deis")) == ("deis", "Uniform")
    assert a1111_name(values("ddim")) == ("DDIM", None)
    assert a1111_name({**values("heun"), "spacing": "quad"}) == ("Heun", None)


def test_every_label_of_a1111_is_read_back():
    assert {SPACINGS[label.lower().replace(" ", "_")] for label in LABELS.values()} == set(LABELS)


@pytest.mark.parametrize("name", options("sampler"))
def test_every_sampler_starts_from_the_one_that_lists_all_values(name):
    own = OmegaConf.load(CONFIGS / "sampler" / f"{name}.yaml")
    assert set(own) - {"defaults"} <= set(values("ddim"))


def test_the_command_prints_the_table_for_an_empty_choice_and_after_an_unknown_one(monkeypatch, capsys):
    for word, status in (("sampler=", None), ("sampler=eulr", 2)):
        monkeypatch.setattr("sys.argv", ["sample.py", word])
        command = runpy.run_path(str(ROOT / "sample.py"))["main"]
        with pytest.raises(SystemExit) if status else nullcontext() as stopped:
            command()
        printed = capsys.readouterr()
        assert status is None or stopped.value.code == status
        assert list_of("sampler") in (printed.err if status else printed.out)
        assert status is None or printed.err.startswith("error: sampler has no option 'eulr'; did you mean euler")


def test_the_page_about_samplers_shows_this_table_and_every_spacing():
    page = (CONFIGS / "sampler" / "README.md").read_text()
    assert f"```text\n{list_of('sampler')}\n```" in page
    told = {
        name
        for line in page.splitlines()
        if line.startswith("| ")
        for name in line.split("|")[1].replace(",", " ").split()
    }
    assert set(SPACINGS_OF_GRIDS) <= told


def test_published_families_and_schedulers_name_samplers_that_are_there():
    from diffusion.pretrained import families, scheduler_config

    named = {family.sampler for family in families.FAMILIES.values()}
    assert len(named) > 1 and named <= set(KNOWN)
    assert {cls.removesuffix("Scheduler").removesuffix("Discrete") for cls in scheduler_config.SAMPLERS} == set(
        SCHEDULERS
    )
    assert all(of_scheduler({"_class_name": cls})[0] == name for cls, name in scheduler_config.SAMPLERS.items())
