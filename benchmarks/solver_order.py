"""How does each solver's error fall with the number of evaluations? The plot and tables of configs/sampler/README.md.

Data with an exact denoiser (`tests/order_cases.py`); a minute or two on one core: `python benchmarks/solver_order.py`.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # the data with known answers

from order_cases import HIGH, LOW, ORDERED, STOCHASTIC, errors, path_errors, slope  # noqa: E402

PAGE = ROOT / "configs" / "sampler" / "README.md"
MARKS = ("<!-- written by benchmarks/solver_order.py -->\n", "<!-- end of it -->\n")
COUNTS = (8, 16, 32, 64, 128, 256)
FINEST = slice(-3, None)  # what the orders are measured on
PATHS = (16, 32, 64, 128)
WHY = {
    "plms": "Adams-Bashforth's weights are those of steps even in sigma/alpha, where it is of fourth order; these "
    "steps are not, and PNDM's authors prove second order only",
    "pndm": "as PLMS; the Runge-Kutta start changes nothing in that",
    "lms": "starts at first order, which shows at its small errors",
    "deis": "starts at first order, which shows at its small errors",
    "deis, order 4": "starts at first order, which shows at its small errors",
    "dpmpp_3m": "third by name: k-diffusion and diffusers halve the weight of the curvature, and so does this; "
    "`sampler.kind=exact` does not",
    "dpmpp_3m_sde": "as dpmpp_3m",
    "dpmpp_3m, exact": "starts at first order, which shows at its small errors",
}


def measured() -> tuple[list[str], dict[str, tuple[list[float], list[int]]]]:
    """The table's rows, and errors and evaluations of every solver as it runs."""
    rows, curves = [], {}
    for name, solver in ORDERED.items():
        after, _ = errors(solver, COUNTS[FINEST], known=3)
        curves[name] = errors(solver, COUNTS)
        cold = slope(curves[name][0][FINEST], COUNTS[FINEST])
        at = COUNTS.index(16)
        rows.append(
            f"| {name} | {solver.evaluations} | {solver.order} | {slope(after, COUNTS[FINEST]):.2f} | {cold:.2f} | "
            f"{curves[name][0][at]:.1e} ({curves[name][1][at]}) | {WHY.get(name, '')} |"
        )
        print(rows[-1], flush=True)
    return rows, curves


def with_noise() -> tuple[list[str], dict[str, list[float]]]:
    """Rows and errors of the solvers that take noise, along Brownian paths."""
    found = {name: path_errors(solver, PATHS) for name, solver in STOCHASTIC.items()}
    rows = [f"| {name} | 1 | {slope(each, PATHS):.2f} | {each[0]:.1e} |" for name, each in found.items()]
    print("\n".join(rows), flush=True)
    return rows, found


def plot(curves: dict[str, tuple[list[float], list[int]]], noisy: dict[str, list[float]], path: Path) -> None:
    """Error against evaluations, without noise and with."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), sharex=True, width_ratios=(3, 2))
    without_noise = [name for name in curves if "," not in name and not name.endswith("sde")]
    for i, name in enumerate(without_noise):
        left.plot(*curves[name][::-1], marker="o^sDv"[i % 5], markersize=4, label=name, color=plt.cm.tab20(i % 20))
    for i, (name, found) in enumerate(noisy.items()):
        calls = [steps * STOCHASTIC[name].evaluations for steps in PATHS]
        right.plot(calls, found, marker="o^sDv"[i % 5], markersize=4, label=f"{name}, eta=1")
    for axes, title in (
        (left, "without noise: from the exact flow"),
        (right, "all noise renewed: from the end of the path"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylabel("mean error of a pixel")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(128).save(path, optimize=True)


def section(rows: list[str], noisy: list[str]) -> str:
    """What the page says."""
    return f"""## Order of convergence

![Error against evaluations](orders.png)

Pixels from a mixture of two Gaussians, whose denoiser and flow are known exactly; float64; steps even in
log(sigma/alpha) from {HIGH:g} to {LOW:g}. *Theory* is the solver's own order; *measured* the slope of log error
from {COUNTS[FINEST][0]} to {COUNTS[FINEST][-1]} steps when the first three are exact, *as run* from a cold start.
The error is that of 16 steps as run, with the evaluations that they took in brackets. Every measured order is within
0.3 of the theory; where a run from a cold start is not, or the name promises more, the last column says why. At the
few steps that people take, the error counts more than its order.

| solver | evaluations a step | theory | measured | as run | error | why |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

With all noise renewed (`eta=1`) along one Brownian path a seed (`noise=brownian`): the error is the distance from the
end of the same path in much finer steps. The noise is additive, so the order is 1 for all.

| solver | theory | measured | error of {PATHS[0]} steps |
|---|---|---|---|
{chr(10).join(noisy)}

lcm is not in the tables: it is for consistency models, and renews all noise at every step, so nothing converges.
"""


def main() -> None:
    torch.set_num_threads(1)
    rows, curves = measured()
    noisy_rows, noisy = with_noise()
    plot(curves, noisy, PAGE.parent / "orders.png")
    text = section(rows, noisy_rows)
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "".join(MARKS)
    if MARKS[0] not in page:
        page = page.rstrip("\n") + "\n\n" + "".join(MARKS)
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + text + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
