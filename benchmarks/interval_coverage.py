"""Coverage of 95 % t intervals of a best loss, by how the best learning rate is chosen.

Run: `python benchmarks/interval_coverage.py`

Simulated studies: the loss of a seed at one of five rates is a curve plus noise of standard deviation 0.01, half of
whose variance is the seed's at all rates. Rules: *own*, the minimum of each seed; *shared*, the rate of the lowest mean
over the seeds (the report's); *elsewhere*, for each seed the rate of the lowest mean over the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lit_mult.analysis.seeds import t_quantile

Floats = NDArray[np.float64]
STUDIES, SD = 20_000, 0.01
STEPS = np.arange(5.0)
CURVES = {
    "flat": 0 * STEPS,
    "shallow": 0.003 * (STEPS - 1.7) ** 2,
    "bent": 0.01 * (STEPS - 2) ** 2,
    "steep": 0.03 * (STEPS - 2.4) ** 2,
}


def at(losses: Floats, rates: NDArray[np.intp]) -> Floats:
    """Losses (studies, seeds) at a rate for each study and seed, of losses (studies, seeds, rates)."""
    return np.take_along_axis(losses, np.broadcast_to(rates, losses.shape[:2])[..., None], 2)[..., 0]


def own(losses: Floats) -> Floats:
    return losses.min(axis=2)


def shared(losses: Floats) -> Floats:
    return at(losses, losses.mean(axis=1).argmin(axis=1)[:, None])


def elsewhere(losses: Floats) -> Floats:
    return at(losses, (losses.sum(axis=1, keepdims=True) - losses).argmin(axis=2))


def coverage(values: Floats, true: float) -> float:
    seeds = values.shape[1]
    reach = t_quantile(0.975, seeds - 1) * values.std(axis=1, ddof=1) / np.sqrt(seeds)
    return float((np.abs(values.mean(axis=1) - true) <= reach).mean())


def main() -> None:
    rng = np.random.default_rng(0)
    print("coverage in per cent of the best loss / of its difference from the curve `bent`\n")
    print("| curve | seeds | own | shared | elsewhere |\n|---|---|---|---|---|")
    for name, curve in CURVES.items():
        for seeds in (2, 3, 5, 10):
            common, *noise = (rng.normal(scale=SD / np.sqrt(2), size=(STUDIES, seeds, n)) for n in (1, 5, 5))
            losses, other = curve + common + noise[0], CURVES["bent"] + common + noise[1]
            cells = [
                f"{100 * coverage(rule(losses), curve.min()):.1f} / "
                f"{100 * coverage(rule(losses) - rule(other), curve.min()):.1f}"
                for rule in (own, shared, elsewhere)
            ]
            print(f"| {name} | {seeds} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
