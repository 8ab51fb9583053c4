"""Every solver's order of convergence on data with an exact denoiser is the one that it claims."""

import pytest
from order_cases import ORDERED, STOCHASTIC, errors, path_errors, slope

from diffusion.solvers import SOLVERS

COUNTS = (32, 64, 128)
LATER = {"lms": (64, 128, 256)}  # fourth order takes more steps to show


@pytest.mark.parametrize("name", ORDERED)
def test_the_order_of_convergence_is_the_solvers_own(name):
    # The first three steps are exact: a multistep solver's own begin at first order, which hides what comes after.
    counts = LATER.get(name, COUNTS)
    found, _ = errors(ORDERED[name], counts, known=3)
    assert abs(slope(found, counts) - ORDERED[name].order) < 0.3, found


@pytest.mark.parametrize("name", ["plms", "pndm", "dpmpp_2m", "dpmpp_3m", "unipc"])
def test_up_to_second_order_and_for_unipc_the_start_does_not_show(name):
    found, _ = errors(ORDERED[name], COUNTS)
    assert abs(slope(found, COUNTS) - ORDERED[name].order) < 0.3, found


def test_plms_is_of_higher_order_where_its_steps_are_even():
    # Adams-Bashforth's weights are those of even steps in sigma/alpha: PLMS misses fourth order elsewhere, not here.
    counts = (256, 512)
    even, uneven = (slope(errors(SOLVERS["plms"], counts, known=3, spacing=kind)[0], counts) for kind in ("rho", "log"))
    assert even > 3.2
    assert abs(uneven - 2) < 0.1


def test_the_published_third_order_halves_what_would_make_it_one():
    published, whole = (errors(ORDERED[name], COUNTS, known=3)[0] for name in ("dpmpp_3m", "dpmpp_3m, exact"))
    assert abs(slope(published, COUNTS) - 2) < 0.1
    assert slope(whole, COUNTS) > 2.7


@pytest.mark.parametrize("name", ORDERED)
def test_a_step_takes_as_many_evaluations_as_the_solver_says(name):
    solver, steps = ORDERED[name], 12
    _, [calls] = errors(solver, (steps,))
    extra = {"plms": 1, "pndm": 9}.get(solver.name, 0)  # of their first steps
    assert calls == steps * solver.evaluations + extra


@pytest.mark.parametrize("name", STOCHASTIC)
def test_with_noise_every_solver_comes_near_to_the_same_path(name):
    """Strong convergence of first order: the noise is additive, and its share in a step is the path's increment."""
    counts = (12, 24, 48)
    found = path_errors(STOCHASTIC[name], counts, seeds=range(1))
    assert found[-1] < 0.06
    assert 0.6 < slope(found, counts) < 1.5, found
