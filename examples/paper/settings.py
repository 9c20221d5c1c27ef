"""The two settings: the demo's model with its known reward, and a model and pairs of the user's on a GPU node."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from methods import EXTENSIONS, FACTOR, SEEDS, TUNING_SEED, Setting
from records import read_json, read_jsonl, write_jsonl

DEMO = Path("runs/demo")


def demo(folder: Path | None) -> Setting:
    """The demo's models, pairs and prompts, in the demo's sizes."""
    folder = folder or Path("runs/paper")
    variables = {
        "initial": DEMO / "sft" / "policy",
        "dpo": DEMO / "dpo" / "dpo",
        "reverse": DEMO / "dpo" / "reverse",
        "train": DEMO / "pairs" / "train.jsonl",
        "held_out": DEMO / "pairs" / "held_out.jsonl",
        "test_pairs": folder / "test_pairs" / "train.jsonl",
        "batch": 64,
        "micro": 32,
        "max_length": 128,
        "max_prompt_length": 32,
        "max_new_tokens": 96,
        "sampled_together": 256,
        "evaluated_together": 64,
    }
    return Setting(
        folder=folder,
        variables={name: str(value) for name, value in variables.items()},
        validation=str(folder / "data" / "prompts_validation.jsonl"),
        test=str(DEMO / "data" / "prompts_eval.jsonl"),
        rates=(3e-4, 1e-3),
        critic_lr=1e-3,
    )


def node(model: str, data: Sequence[str], judge: str, held_out: int, folder: Path | None) -> Setting:
    """A model and pairs of the user's, in the paper's sizes; the judge gives the reward."""
    folder = folder or Path(f"runs/paper_{Path(model).name}")
    variables = {
        "initial": model,
        "data": _joined(data, folder),
        "held": held_out,
        "half": held_out // 2,
        "dpo": folder / "dpo" / "dpo",
        "reverse": folder / "dpo" / "reverse",
        "train": folder / "pairs" / "train.jsonl",
        "held_out": folder / "halves" / "train.jsonl",
        "test_pairs": folder / "halves" / "held_out.jsonl",
        "batch": 128,
        "micro": 2,
        "max_length": 2048,
        "max_prompt_length": 1024,
        "max_new_tokens": 1024,
        "sampled_together": 128,
        "evaluated_together": 8,
    }
    return Setting(
        folder=folder,
        variables={name: str(value) for name, value in variables.items()},
        validation=str(folder / "halves" / "train.jsonl"),
        test=str(folder / "halves" / "prompts_eval.jsonl"),
        rates=(1e-6, 3e-6),
        critic_lr=9e-6,
        judge=judge,
    )


def _joined(data: Sequence[str], folder: Path) -> str:
    """One file of pairs: the one given, or all in a file of their own."""
    if len(data) == 1:
        return data[0]
    joined = folder / "data.jsonl"
    if not joined.is_file():
        write_jsonl(
            joined, [r for name in data for r in (read_json(name) if name.endswith(".json") else read_jsonl(name))]
        )
    return str(joined)


def in_sentences(setting: Setting) -> list[str]:
    """How it was measured, for readers of the report."""
    rates, seeds = ", ".join(f"{rate:g}" for rate in setting.rates), ", ".join(map(str, SEEDS))
    return [
        *(_demo_sentences() if setting.judge is None else _node_sentences(setting)),
        "Every method learns on the same pairs, each once, one epoch as in the paper; an on-policy one answers the "
        f"prompts of these pairs once. Batch {setting.variables['batch']} pairs or prompts (of KTO, both responses "
        "of so many pairs); AdamW, clip 1, warm-up 0.1, cosine to a tenth of the peak. PPO and RTO take four steps "
        f"on a rollout; critic learning rate {setting.critic_lr:g}. DPO, TDPO, KTO, PPO and RTO are held to the "
        "initial model. RTO and AlignDistil have the training of the DPO models behind them as well, and PPO that of "
        "the reward model.",
        f"Settings are chosen by the mean reward on validation prompts, seed {TUNING_SEED}: first among the "
        f"learning rates {rates} at the published value of the method's own hyper-parameter, up to {EXTENSIONS} "
        f"more beyond an edge, by a factor of {FACTOR:g}, where the best one lies there; then with one more value "
        "of that hyper-parameter at the best rate. Nothing holds this choice to a KL: a method may win by going "
        "far, and both tables of KL and the plot say where it did. The reward model is chosen by its loss on "
        "validation pairs.",
        f"Then seeds {seeds} at that setting, measured on one response to each test prompt, which no choice has "
        "seen; ± is one standard error over seeds (of the initial model, the teacher and accuracies: over prompts "
        "or pairs). A seed is of the order of data and of sampling: initial, DPO, reverse DPO and reward model are "
        "the same for all.",
        "The constants of table 3 and the DPO reward of table 2 take the learning rate (and r) chosen for the adaptive "
        "method; the paper too varies nothing else. KL is Σ_t KL(π_θ‖·) over a sampled response, in nats.",
    ]


def _demo_sentences() -> list[str]:
    return [
        "Models, pairs, prompts and the known reward are those of `make demo`: a Llama of 0.9 M parameters on "
        "stories; pairs of its own samples, labelled with noise so that some 72% agree with the reward. DPO and "
        "reverse DPO as trained there (β 0.1, learning rate 1e-4) are AlignDistil's teachers and RTO's reward; "
        "`DPO` in table 1 is tuned like every other method. Validation prompts and test pairs are drawn fresh, for "
        "this alone.",
        "The upper bound learns on the known reward itself, at PPO's settings; no other method sees it.",
        "Table 4 is on these stories, not on TL;DR, which is not among the data at hand; a win is a response of higher "
        "known reward than the initial model's to the same prompt, a tie counting half.",
        f"Each run is one process with one thread; {os.cpu_count()} cores ({platform.machine()}).",
    ]


def _node_sentences(setting: Setting) -> list[str]:
    return [
        f"Initial model: `{setting.variables['initial']}`; pairs: `{setting.variables['data']}`, of which "
        f"{setting.variables['held']} are kept from training, half to choose settings by, half for the tables.",
        f"The reward is the score of `{setting.judge}`, a reward model that must have been trained on other data: "
        "no method here learns on it, but settings are chosen by it, so it is not independent of the choice; and "
        "no judge of this kind is people's preference. Table 4 counts wins over the initial model by this score.",
    ]
