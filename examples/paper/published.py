"""The paper's own figures (AlignDistil, arXiv 2503.02832), to be read beside ours; None where it gives none."""

from __future__ import annotations

# Qwen2.5-1.5B-Instruct on UltraFeedback: accuracy in % on train and test pairs.
ACCURACY: dict[str, tuple[float, float]] = {
    "reward_model": (70.41, 71.19),
    "dpo_reward": (72.85, 69.53),
    "contrastive_reward": (74.71, 71.29),
}
# Of policies distilled with either reward: length-controlled win rate on AlpacaEval 2, in %.
WIN_RATE = {"vanilla": 16.51, "off_policy": 19.45}
# Off-policy: KL(policy, DPO), mean length as printed, length-controlled win rate on AlpacaEval 2 in %.
TABLE_3: dict[str, tuple[float, int, float]] = {
    "constant_1": (10.16, 2332, 18.40),
    "constant_1.2": (13.95, 2481, 18.33),
    "constant_1.5": (20.71, 2973, 19.49),
    "constant_1.8": (28.55, 3644, 21.87),
    "constant_2": (34.52, 4434, 25.17),
    "off_policy": (22.95, 2424, 21.16),
}
# TL;DR: win rate against SFT in %, mean reward.
TABLE_4: dict[str, tuple[float, float]] = {
    "initial": (50.0, 0.55),
    "dpo": (85.7, 1.67),
    "ppo": (87.7, 2.22),
    "rto": (90.8, 1.98),
    "off_policy": (92.8, 2.28),
    "on_policy": (92.5, 2.46),
}
