"""What is compared, and how: batch sizes, learning rates, seeds, and what learning rates are chosen by."""

from __future__ import annotations

import os
import platform

BATCHES = {64: 32, 8: 48}  # responses a step -> steps; every prompt is answered once at most
RATES = (1e-4, 2e-4, 4e-4, 8e-4)
FACTOR, EXTENSIONS = 2.0, 3  # beyond an edge of the grid where the best one lies: so far each time, so often at most
TUNING_SEED, SEEDS = 0, (1, 2, 3)
CRITERIA = ("objective", "reward")  # the measure whose mean over all steps is to be highest
SHARES = (0.5, 0.75, 0.9)  # levels: of the way from the initial model to the lowest of the final values
LEVEL = "90%"  # the one that plots and the first table speak of


def in_sentences(configs: str) -> list[str]:
    """The plan for readers of the report; `configs` is the folder of the configurations."""
    rates, seeds = ", ".join(f"{rate:g}" for rate in RATES), ", ".join(map(str, SEEDS))
    return [
        "Models, prompts and true reward are those of `make demo`; the policy starts from the initial model. "
        f"Configurations: `{configs}/distribution.yaml` and `reinforce.yaml`. β0 0.1, β 0.08 (section 6.5), so the "
        "teacher extrapolates by a constant 1.25. Sampling at temperature 1, at most 96 tokens, one response a prompt, "
        "no prompt twice; AdamW, clip 1, warm-up over a twentieth of the steps, then a constant learning rate.",
        "Reward: token-averaged, the mean over sampled responses of (1/|y|) β0 Σ_t log π_dpo/π_rev(y_t), the same for "
        "all three. Objective: the mean of β0 log π_dpo/π_rev(y) - β log π_θ/π_dpo(y) (eq. 13), from which all three "
        "losses are derived. A step's figures are those of the policy before its update.",
        f"Learning rates: {rates}, and up to {EXTENSIONS} more, each a factor of {FACTOR:g} beyond an edge while the "
        f"best lies there, for each method and batch size on seed {TUNING_SEED}. The one with the highest mean over "
        "all steps is taken, once of the objective and once of the reward, which asks for both, to learn fast and to "
        f"end well. Then seeds {seeds} at that rate.",
        "Final figures: reward and objective over the last quarter of the steps; true reward, KL and length on one "
        "response to each of 512 evaluation prompts; ± is one standard error over seeds (over prompts for the initial "
        "model and DPO).",
        "Levels: shares of the way from the initial model to the lowest of the three final values. Steps: where the "
        "running mean over five steps first reaches the level, linear between steps.",
        f"Each run is one process with one thread; {os.cpu_count()} cores ({platform.machine()}).",
    ]
