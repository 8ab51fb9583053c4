"""Grids: every spacing at every length, against the peers that gave it its name, and what a grid refuses."""

import math
from itertools import pairwise

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from diffusers.schedulers import AysSchedules
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from diffusion.grids import ALIGN_YOUR_STEPS, FRACTION_SPACINGS, NOISE_SPACINGS, SPACINGS
from diffusion.sampling import Sampler
from diffusion.schedule import CLEAN, Schedule, cosine, linear, scaled_linear, zero_terminal_snr

LENGTHS = (1, 2, 7, 50, 997, 1000)
properties = settings(max_examples=40, deadline=None, derandomize=True)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RANGED = FRACTION_SPACINGS + NOISE_SPACINGS


def any_schedule(total: int) -> Schedule:
    return cosine(total)


def noises(schedule: Schedule, grid) -> np.ndarray:
    """What k-diffusion calls the sigmas of a grid."""
    return np.array([schedule.noise_to_signal(t) for t in grid])


# -- whole timesteps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "quad"])
@pytest.mark.parametrize("total", LENGTHS)
def test_every_number_of_steps_gives_exactly_that_many_falling_timesteps(spacing, total):
    schedule = any_schedule(total)
    for n in range(1, total + 1):
        grid = schedule.timesteps(n, spacing)
        assert len(grid) == n + 1, n
        assert grid[-1] == CLEAN
        assert all(t > s for t, s in pairwise(grid)), n
        assert grid[0] < total
        if spacing in ("trailing", "linspace"):
            assert grid[0] == total - 1, n
        elif spacing == "leading":
            assert grid[-2] == 0, n


def ldm_uniform(total: int, n: int) -> list[int]:
    return [t + 1 for t in range(0, total, total // n)]


def ldm_quad(total: int, n: int) -> list[int]:
    return (((np.linspace(0, np.sqrt(total * 0.8), n)) ** 2).astype(int) + 1).tolist()


@pytest.mark.parametrize(("spacing", "peer"), [("ldm", ldm_uniform), ("ldm_quad", ldm_quad)])
@pytest.mark.parametrize("total", LENGTHS)
def test_ldm_grids_are_the_peers_for_every_number_of_steps(spacing, peer, total):
    schedule = any_schedule(total)
    for n in range(1, total + 1):
        # Repeated steps do not move; the index beyond the last timestep is an error in the peer.
        wanted = sorted({min(t, total - 1) for t in peer(total, n)})
        assert list(schedule.timesteps(n, spacing)) == [*wanted[::-1], CLEAN], n


@pytest.mark.parametrize("total", LENGTHS)
def test_quad_is_ddims_where_ddims_has_no_repeats(total):
    schedule = any_schedule(total)
    for n in range(1, total + 1):
        peer = [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), n) ** 2]
        if len(set(peer)) == n:
            assert list(schedule.timesteps(n, "quad")[-2::-1]) == peer, n


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("total", LENGTHS)
def test_grids_are_those_of_diffusers_wherever_it_gives_as_many_steps_as_asked(spacing, total):
    schedule, peer = any_schedule(total), DDIMScheduler(total, timestep_spacing=spacing)
    compared = 0
    for n in range(1, total + 1):
        if spacing == "linspace" and n == 1:
            continue  # the peer's single step starts from clean data
        peer.set_timesteps(n)
        theirs = peer.timesteps.tolist()
        if len(theirs) == n:  # its trailing grid has n + 1 entries, the last -1, where a float32 arange overshoots
            assert list(schedule.timesteps(n, spacing)[:-1]) == theirs, n
            compared += 1
    assert compared >= 0.85 * (total - (spacing == "linspace"))


def test_ends_and_offsets_of_a_grid():
    schedule = scaled_linear()
    assert schedule.timesteps(4) == (999, 749, 499, 249, CLEAN)
    assert schedule.timesteps(4, "leading", offset=1) == (751, 501, 251, 1, CLEAN)
    assert schedule.timesteps(4, "leading", offset=1, final=0) == (751, 501, 251, 1, 0)
    assert schedule.timesteps(4, "leading", final=0) == (750, 500, 250, 0)
    assert schedule.timesteps(1, "linspace") == (999, CLEAN)
    assert schedule.timesteps(1000, "quad")[0] == 999


@properties
@given(st.integers(20, 500), st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_section_strings_give_each_equal_part_its_count(total, counts):
    text = ",".join(map(str, counts))
    sizes = [total // len(counts) + (i < total % len(counts)) for i in range(len(counts))]
    if any(count > size for count, size in zip(counts, sizes, strict=True)):
        with pytest.raises(ValueError, match="cannot give"):
            any_schedule(total).timesteps(text)
        return
    rising = any_schedule(total).timesteps(text)[-2::-1]
    edges = np.cumsum([0, *sizes])
    inside = [sum(a <= t < b for t in rising) for a, b in pairwise(edges)]
    assert inside == counts
    assert all(s < t for s, t in pairwise(rising))
    # A section of several steps has both its ends, one of a single step its first timestep.
    assert all((rising[sum(counts[:i])] == a) for i, a in enumerate(edges[:-1]))


@pytest.mark.parametrize("count", [3, 25, 50])
def test_ddim_strings_are_the_smallest_integer_stride(count):
    stride = next(i for i in range(1, 100) if math.ceil(100 / i) == count)
    wanted = (*range((count - 1) * stride, -1, -stride), CLEAN)
    assert any_schedule(100).timesteps(f"ddim{count}") == wanted


# -- levels of noise ---------------------------------------------------------------------------------------------


def ramps(spacing: str, n: int, low: float, high: float, rho: float) -> np.ndarray:
    """k-diffusion's formulas, as its papers print them."""
    u = np.linspace(0, 1, n)
    match spacing:
        case "karras":
            return (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        case "exponential":
            return np.exp(np.linspace(math.log(high), math.log(low), n))
        case "polyexponential":
            return np.exp((1 - u) ** rho * (math.log(high) - math.log(low)) + math.log(low))
    return np.tan(u * np.arctan(low) + (1 - u) * np.arctan(high))


@pytest.mark.parametrize("spacing", NOISE_SPACINGS)
@pytest.mark.parametrize("n", [2, 5, 10, 33])
@pytest.mark.parametrize(("low", "high"), [(None, None), (0.1, 10.0)])
def test_noise_falls_along_its_formula(spacing, n, low, high):
    schedule = scaled_linear()
    rho = {"karras": 5.0, "polyexponential": 2.0}.get(spacing)
    grid = schedule.timesteps(n, spacing, sigma_min=low, sigma_max=high, rho=rho)
    ends = low or schedule.noise_to_signal(0), high or schedule.noise_to_signal(999)
    assert np.allclose(noises(schedule, grid[:-1]), ramps(spacing, n, *ends, rho), rtol=1e-9)
    assert grid[-1] == CLEAN
    if high is None:
        assert (grid[0], grid[-2]) == (999, 0) and type(grid[0]) is type(grid[-2]) is int


def test_the_bends_are_those_people_know():
    schedule = scaled_linear()
    assert schedule.timesteps(9, "karras") == schedule.timesteps(9, "karras", rho=7)
    assert schedule.timesteps(9, "polyexponential") == schedule.timesteps(9, "exponential")


@pytest.mark.parametrize(
    ("spacing", "setting"),
    [("karras", {"use_karras_sigmas": True}), ("exponential", {"use_exponential_sigmas": True}), ("linspace", {})],
)
@pytest.mark.parametrize("n", [2, 10, 25])
def test_noise_and_fractions_are_diffusers(spacing, setting, n):
    peer = EulerDiscreteScheduler(**SD, timestep_spacing="linspace", **setting)
    peer.set_timesteps(n)
    schedule = scaled_linear()
    grid = schedule.timesteps(n, {"linspace": "normal"}.get(spacing, spacing))
    assert np.allclose(noises(schedule, grid), peer.sigmas.numpy(), rtol=2e-4 if spacing == "linspace" else 2e-5)
    assert np.allclose(grid[:-1], peer.timesteps.numpy(), atol=2e-2)  # its tables are float32


@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
@pytest.mark.parametrize("n", [5, 10, 20, 31])
def test_discarding_the_penultimate_is_what_diffusers_dpm_solver_does(spacing, offset, n):
    peer = DPMSolverMultistepScheduler(**SD, timestep_spacing=spacing, steps_offset=offset)
    peer.set_timesteps(n)
    grid = scaled_linear().timesteps(n, spacing, offset=offset, discard_penultimate=spacing != "trailing")
    assert list(grid[:-1]) == peer.timesteps.tolist()


@pytest.mark.parametrize("n", [1, 4, 8, 50])
def test_lcm_chooses_among_the_distilled_timesteps_as_diffusers_does(n):
    peer = LCMScheduler(**SD)
    peer.set_timesteps(n)
    assert list(scaled_linear().timesteps(n, "lcm")[:-1]) == peer.timesteps.tolist()


@pytest.mark.parametrize("n", [1, 4, 10, 30, 300])
def test_comfyuis_and_generative_models_spacings_are_their_formulas(n):
    schedule = scaled_linear()
    simple = [999 - int(k * 1000 / n) for k in range(n)]
    assert list(schedule.timesteps(n, "simple")[:-1]) == simple
    uniform = list(range(1, 1000, 1000 // n))[::-1]
    assert list(schedule.timesteps(n, "ddim_uniform")[:-1]) == (uniform or [0])
    quantiles = np.rint(beta.ppf(1 - np.arange(n) / n, 0.6, 0.6) * 999).astype(int)
    assert list(schedule.timesteps(n, "beta")[:-1]) == sorted(set(quantiles.tolist()), reverse=True)
    assert list(schedule.timesteps(n, "sgm")[:-1]) == np.linspace(999, 0, n, endpoint=False).astype(int).tolist()
    sgm = np.linspace(999, 0, n + 1)[:-1]
    assert np.allclose(schedule.timesteps(n, "sgm_uniform")[:-1], sgm)
    assert schedule.timesteps(n, "sgm_uniform") == schedule.timesteps(n, "normal", discard_penultimate=True)
    assert np.allclose(schedule.timesteps(n, "normal")[:-1], np.linspace(999, 0, n))


@pytest.mark.parametrize(
    ("spacing", "published"),
    [("align_your_steps", "StableDiffusion"), ("align_your_steps_xl", "StableDiffusionXL")],
)
def test_align_your_steps_is_the_published_table_and_interpolates_it(spacing, published):
    schedule = scaled_linear()
    table = AysSchedules[f"{published}Timesteps"]
    assert list(schedule.timesteps(10, spacing)) == [*table, CLEAN]
    sigmas = AysSchedules[f"{published}Sigmas"]
    assert np.allclose(noises(schedule, (*table, 0)), [*sigmas[:-1], 0.029], atol=5e-3)
    for n in (3, 5, 17, 40):
        theirs = np.interp(
            np.linspace(0, 10, n + 1), np.arange(11), np.log(noises(schedule, ALIGN_YOUR_STEPS[spacing]))
        )
        assert np.allclose(noises(schedule, schedule.timesteps(n, spacing)[:-1]), np.exp(theirs)[:-1], rtol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", [scaled_linear(), zero_terminal_snr(scaled_linear())], ids=["sd", "zero-snr"])
def test_every_spacing_falls_along_the_chain_and_starts_where_it_says(spacing, schedule):
    for n in (1, 2, 3, 10, 25, 50):
        for extra in ({}, {"discard_penultimate": True}):
            if spacing == "lcm" and n == 50 and extra:
                continue
            grid = schedule.timesteps(n, spacing, **extra)
            assert all(t > s for t, s in pairwise(grid)) and grid[-1] == CLEAN and grid[0] <= 999
            assert spacing.startswith("ldm") or spacing == "ddim_uniform" or len(grid) == n + 1
            if spacing in (
                *RANGED,
                "align_your_steps",
                "align_your_steps_xl",
                "trailing",
                "simple",
                "sgm",
                "lcm",
                "beta",
            ):
                assert grid[0] == 999
            assert all(type(t) is int or t != int(t) for t in grid)


def test_a_grid_of_noise_at_zero_terminal_snr_starts_in_pure_noise_and_shares_the_finite_levels():
    schedule = zero_terminal_snr(scaled_linear())
    grid = schedule.timesteps(10, "karras")
    assert grid[0] == 999
    wanted = ramps("karras", 10, schedule.noise_to_signal(0), schedule.noise_to_signal(998), 7.0)
    assert np.allclose(noises(schedule, grid[1:-1]), wanted[1:], rtol=1e-9)


def test_ends_typed_with_few_digits_are_the_ends_of_the_chain():
    schedule = scaled_linear()
    assert schedule.timesteps(7, "karras", sigma_min=0.029, sigma_max=14.7) == schedule.timesteps(7, "karras")


@pytest.mark.parametrize(("final", "last"), [(0, (1, 0)), (CLEAN, (1, CLEAN))])
def test_timesteps_given_as_numbers_end_in_final(final, last):
    sampler = Sampler(grid=[999, 850.5, 1], final=final)
    assert sampler.timesteps(scaled_linear()) == (999, 850.5, *last)
    assert Sampler(grid=[999.0, 850.5, *last], final=final).timesteps(scaled_linear()) == (999, 850.5, *last)


def test_a_sampler_passes_all_that_a_grid_takes():
    sampler = Sampler(5, spacing="karras", sigma_min=0.1, sigma_max=9.0, rho=3.0, discard_penultimate=True, final=0)
    wanted = scaled_linear().timesteps(
        5, "karras", sigma_min=0.1, sigma_max=9.0, rho=3.0, discard_penultimate=True, final=0
    )
    assert sampler.timesteps(scaled_linear()) == wanted
    assert scaled_linear().noise_to_signal(wanted[0]) == pytest.approx(9.0)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, -1, 1001, True, False, 2.5, None])
def test_a_wrong_number_of_steps_is_named_with_the_allowed_range(num_steps):
    with pytest.raises(ValueError, match=rf"num_steps must be 1\.\.1000.*got {num_steps!r}"):
        linear().timesteps(num_steps)


@pytest.mark.parametrize("text", ["", "ddim", "fast", "10,,20", "-5", "10, x", "0", "5,0"])
def test_a_string_that_is_no_grid_shows_what_one_looks_like(text):
    with pytest.raises(ValueError, match="'ddim25' or sections like '10,15,20'"):
        linear().timesteps(text)


def test_impossible_strings_say_why():
    with pytest.raises(ValueError, match="no integer stride visits 999 of 1000"):
        linear().timesteps("ddim999")
    with pytest.raises(ValueError, match="section 2 has 500 timesteps, which cannot give 501"):
        linear().timesteps("1,501")


def test_an_unknown_spacing_names_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(SPACINGS)):
        linear().timesteps(10, "uniform")


@pytest.mark.parametrize(("n", "spacing", "offset"), [(10, "trailing", 1), (10, "leading", 100), (10, "leading", -1)])
def test_an_offset_that_leaves_the_chain_says_where_it_went(n, spacing, offset):
    with pytest.raises(ValueError, match=rf"offset {offset} moves the {spacing} grid .* outside 0\.\.999"):
        linear().timesteps(n, spacing, offset=offset)


def test_a_misspelt_spacing_is_told_its_nearest_names():
    with pytest.raises(ValueError, match=r"no spacing 'karas'; did you mean karras\?"):
        Sampler(spacing="karas")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([], "must be timesteps that fall"),
        ([10, 10], "must be timesteps that fall"),
        ([10, 20], "must be timesteps that fall"),
        ([10, math.nan], "must be a list of timesteps"),
        ("999,850", "must be a list of timesteps"),
        (999, "must be a list of timesteps"),
        ([10, "x"], "must be a list of timesteps"),
    ],
)
def test_numbers_that_are_no_grid_are_an_error_when_the_sampler_is_made(numbers, message):
    with pytest.raises(ValueError, match=message):
        Sampler(grid=numbers)


@pytest.mark.parametrize("numbers", [[1000, 5], [5, -0.5], [CLEAN], [5, -1, -2]])
def test_numbers_outside_the_chain_say_its_range(numbers):
    with pytest.raises(ValueError, match=r"timesteps in 0\.\.999"):
        Sampler(grid=numbers).timesteps(scaled_linear())


@pytest.mark.parametrize(
    ("spacing", "fields", "message"),
    [
        ("trailing", {"sigma_min": 0.1}, "sigma_min=0.1 does nothing with trailing; it belongs to spacing=normal"),
        ("exponential", {"rho": 7}, "rho=7 does nothing with exponential; it belongs to spacing=karras"),
        ("karras", {"offset": 1}, "offset=1 does nothing with karras; it belongs to spacing=trailing"),
        ("karras", {"rho": 0}, "rho must be above 0"),
        ("karras", {"sigma_max": 20}, r"must lie in 0\.02917 <= sigma_min <= sigma_max <= 14\.61"),
        ("karras", {"sigma_min": 0.01}, "must lie in"),
        ("karras", {"sigma_min": 5, "sigma_max": 4}, "must lie in"),
        ("lcm", {"num_steps": 51}, r"num_steps must be 1\.\.50, got 51"),
        ("linspace", {"num_steps": 1000, "discard_penultimate": True}, r"num_steps must be 1\.\.999"),
        ("linspace", {"grid": [5, 3], "discard_penultimate": True}, "discard_penultimate=True does nothing with grid"),
    ],
)
def test_settings_that_a_grid_cannot_honour_are_errors(spacing, fields, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**{"num_steps": 10, "spacing": spacing, **fields}).timesteps(scaled_linear())


def test_a_searched_table_is_for_its_own_chain():
    with pytest.raises(ValueError, match="found for 1000 trained timesteps, this model has 100; use spacing=karras"):
        linear(100).timesteps(10, "align_your_steps")
