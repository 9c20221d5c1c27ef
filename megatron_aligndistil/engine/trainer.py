"""One training stage, from checkpoints and records to a trained checkpoint, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch.distributed as dist

from megatron_aligndistil import algorithms
from megatron_aligndistil.algorithms.base import Algorithm, Frozen, LossOutput
from megatron_aligndistil.config import RolloutConfig, TrainConfig
from megatron_aligndistil.data.batch import MicroBatch
from megatron_aligndistil.data.loader import GlobalBatches
from megatron_aligndistil.data.tokenizer import load_tokenizer
from megatron_aligndistil.engine import bad_rows, checkpoint, run_folder, skips, watchdog
from megatron_aligndistil.engine.batches import load_batches
from megatron_aligndistil.engine.frozen import load_frozen
from megatron_aligndistil.engine.hf import draw_weights, save_folder
from megatron_aligndistil.engine.loop import Loop
from megatron_aligndistil.engine.model import build_model, check_fits, transformer_config
from megatron_aligndistil.engine.optimiser import Trained, make_trained
from megatron_aligndistil.engine.parallel import Parallel, on_first_rank, parallel_session
from megatron_aligndistil.engine.preparation import prepare
from megatron_aligndistil.engine.reporter import Reporter
from megatron_aligndistil.engine.rollout import Answer, Rollout, Rollouts, answer_metrics, make_rollouts
from megatron_aligndistil.engine.samples import write_samples
from megatron_aligndistil.engine.schedule import Model, check_microbatches, losses, reduce_metrics
from megatron_aligndistil.engine.sources import Source, find_sources
from megatron_aligndistil.errors import ConfigError


def train(config: TrainConfig) -> None:
    """Run the stage that `config` describes; a run that was cut short goes on from its last checkpoint.

    Writes into ``run.dir``: config.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/, and one Hugging Face
    folder a trained model, named after it. Raises AlignDistilError with the remedy for anything the user can mend.
    """
    algorithm = algorithms.build(config.algorithm)
    if config.precision.dtype == "fp16":
        raise ConfigError(
            "training in fp16 would need loss scaling, which is not there; set precision.dtype to bf16 or fp32"
        )
    if config.run.wandb and find_spec("wandb") is None:
        raise ConfigError(
            "run.wandb needs the package wandb, which is not installed; install it, or leave run.wandb out"
        )
    if algorithm.rated and config.rollout.reward is None:
        raise ConfigError(
            f"{algorithm.name} is to be rewarded by a function; name it in rollout.reward, as in rewards.py:helpfulness"
        )
    sources = find_sources(config.models, algorithm)
    arch = sources[algorithm.trained[0]].arch
    with parallel_session(config.parallel) as parallel:
        folder = Path(config.run.dir)
        on_first_rank(run_folder.check_free, folder, config, algorithm)
        if run_folder.is_complete(folder, algorithm):
            if dist.get_rank() == 0:
                print(f"{folder} is already complete; delete it to train again", flush=True)
            return
        # What cannot be built is told before the data are read.
        check_fits(arch, parallel)
        transformer_config(arch, parallel, config.precision, config.run.recompute)
        stage = _Stage(config, algorithm, sources, parallel)
        # Not earlier: a run that cannot begin leaves no configuration behind that would forbid the mended one.
        on_first_rank(run_folder.claim, folder, config, algorithm)
        try:
            stage.run(folder)
        finally:
            for item in stage.trained:
                item.release()
        if parallel.is_reporter:
            print(f"wrote {', '.join(str(folder / name) for name in algorithm.trained)}", flush=True)


class _Stage:
    """The models, data and loop of one run."""

    def __init__(
        self,
        config: TrainConfig,
        algorithm: Algorithm,
        sources: Mapping[str, Source],
        parallel: Parallel,
    ) -> None:
        self.config, self.algorithm, self.sources, self.parallel = config, algorithm, sources, parallel
        self.arch = sources[algorithm.trained[0]].arch
        self.tokenizer = load_tokenizer(checkpoint.description_folder(config.models.policy))
        read = partial(load_batches, config, algorithm, self.tokenizer, self.arch, parallel)
        self.batches = read(config.data.train, training=True)
        self.eval_batches = read(config.data.eval, training=False) if config.data.eval else None
        self.num_steps = config.run.steps or config.run.epochs * self.batches.steps_per_epoch
        if config.batch.max_tokens is None:  # packed micro-batches come in the number that is needed
            check_microbatches(config.batch.global_size // (config.batch.micro_size * parallel.dp), parallel)
        self.frozen = {name: self._frozen(name) for name in algorithm.frozen if name not in algorithm.trained}
        self.trained = [self._trained(name) for name in algorithm.trained]
        self.rollouts = self._rollouts(self.batches, config.rollout, config.run.seed * 1_000_003, self.num_steps)

    def _frozen(self, name: str) -> Model:
        source = self.sources[name]
        return load_frozen(source.path, source.arch, self.parallel, self.config.precision)

    def _rollouts(self, source: GlobalBatches, config: RolloutConfig, seed: int, num_steps: int) -> Rollouts | None:
        """What the policy answers to prompts, where that is what the algorithm learns on."""
        if self.algorithm.data != "prompts":
            return None
        precision = self.config.precision
        policy = next(item.model for item in self.trained if item.name == "policy")
        return make_rollouts(policy, source, config, precision, self.tokenizer, self.parallel, seed, num_steps)

    def _trained(self, name: str) -> Trained:
        config, source = self.config, self.sources[name]
        chunks = build_model(source.arch, self.parallel, config.precision, config.run.recompute)
        if source.drawn:
            draw_weights(chunks, source.arch, self.parallel, config.run.seed)
        else:
            checkpoint.load_model(chunks, source.path, source.arch, self.parallel, config.run.seed)
        optim = config.optim.model_copy(update={"lr": self.algorithm.learning_rates.get(name, config.optim.lr)})
        return make_trained(name, chunks, source.arch, optim, self.num_steps, self.parallel)

    def run(self, folder: Path) -> None:
        """Train from the last checkpoint, or the beginning, to the end; save and export."""
        Loop(self, folder).run()
        for item in self.trained:
            description = checkpoint.description_folder(self.sources[item.name].path)
            save_folder(item.model.chunks, item.model.arch, description, folder / item.name, parallel=self.parallel)

    def step(self, step: int, reporter: Reporter) -> None:
        """One optimiser step of every trained model, counted from 0."""
        began = time.perf_counter()
        watchdog.at(step + 1, "rollout" if self.rollouts else "batch")
        rollout = self.rollouts.at(step) if self.rollouts else _given(self.batches, step)
        sampled = time.perf_counter()
        watchdog.at(step + 1, "models without gradient")
        batches, frozen = self._prepared(rollout.batches, self.batches, step)
        self.parallel.backend.synchronize()
        scored = time.perf_counter()
        metrics: dict[str, float] = {f"rollout/{key}": value for key, value in rollout.metrics.items()}
        skipped: dict[str, list[float]] = {}
        for item in self.trained:
            watchdog.at(step + 1, f"update of {item.name}")
            item.zero_grad()
            lr = item.lr
            outputs = self._losses(item, batches, frozen, backward=True)
            loss_sums = [output.loss_sum for output in outputs]
            grad_norm = item.step(loss_sums)
            reduced = reduce_metrics(outputs, self.parallel) | {"lr": lr, "grad_norm": grad_norm}
            if item.skips.in_a_row:
                skipped[item.name] = [float(loss_sum) for loss_sum in loss_sums]
                reduced = {key: value for key, value in reduced.items() if math.isfinite(value)}
            reduced["skipped"] = item.skips.total
            metrics |= {f"train/{item.name}/{key}": value for key, value in reduced.items()}
        ended = time.perf_counter()
        tokens_per_second = rollout.num_tokens / (ended - began)
        metrics |= {"tokens_per_second": tokens_per_second, "seconds/total": ended - began}
        # All ranks have as many micro-batches, of one shape.
        num_places = self.parallel.dp * sum(batch.tokens_BS.numel() for batch in batches)
        metrics["padding"] = 1 - rollout.num_tokens / num_places
        metrics |= {
            "seconds/batch": sampled - began,
            "seconds/frozen": scored - sampled,
            "seconds/update": ended - scored,
            "update/tokens_per_second": rollout.num_tokens / (ended - scored),
        }
        if self.algorithm.frozen or self.algorithm.mismatched:
            metrics["frozen/tokens_per_second"] = rollout.num_tokens / (scored - sampled)
        if (step + 1) % self.config.run.log_every == 0 or step + 1 == self.num_steps:
            reporter.log(step + 1, metrics)
        shown = "  ".join(
            f"{item.name} loss {metrics.get(f'train/{item.name}/loss', math.nan):.4f}" for item in self.trained
        )
        reporter.advance(step + 1, f"{shown}  {tokens_per_second:,.0f} tokens/s")
        if skipped:
            self._tell_skipped(step + 1, batches, skipped, reporter)

    def _tell_skipped(
        self, done: int, batches: Sequence[MicroBatch], losses: Mapping[str, Sequence[float]], reporter: Reporter
    ) -> None:
        """Write down the rows of a step and say which models it did not change; `losses` has these models."""
        path = Path(self.config.run.dir) / "bad_batches" / f"step_{done:06d}.jsonl"
        bad_rows.write(path, batches, losses, self.tokenizer, self.parallel, self.algorithm.shifted_mask)
        for item in self.trained:
            if item.name in losses:
                reporter.say(skips.told(item.name, item.skips, done, self.config.run.max_skipped, path))

    def stuck(self, done: int) -> list[str]:
        """Models whose last updates were all skipped, more than may be; the same on all ranks."""
        return [item.name for item in self.trained if item.skips.in_a_row > self.config.run.max_skipped]

    def _prepared(
        self, given: Sequence[MicroBatch], source: GlobalBatches, step: int
    ) -> tuple[list[MicroBatch], list[dict[str, Frozen]]]:
        """Micro-batches as losses see them, and what models without gradient say about each."""
        models = self.frozen | {item.name: item.model for item in self.trained}
        mismatched = source.mismatched(step) if self.algorithm.mismatched else []
        return prepare(self.algorithm, models, given, mismatched, self.parallel)

    def _losses(
        self,
        item: Trained,
        batches: Sequence[MicroBatch],
        frozen: Sequence[Mapping[str, Frozen]],
        *,
        backward: bool,
    ) -> list[LossOutput]:
        loss, kind = partial(self.algorithm.loss, item.name), self.algorithm.head(item.name)
        return losses(item.model, loss, batches, frozen, self.parallel, backward=backward, kind=kind)

    def evaluate(self, step: int) -> dict[str, float]:
        """Means over the evaluation records of the loss and metrics of every trained model.

        Where the policy answers prompts, its answers go to a file too.
        """
        assert self.eval_batches is not None
        outputs: dict[str, list[LossOutput]] = {item.name: [] for item in self.trained}
        answers: list[Answer] = []
        num_steps = self.eval_batches.steps_per_epoch
        plain = self.config.rollout.model_copy(update={"updates": 1, "ahead": False, "on_policy_fraction": 1.0})
        # Seeds below those of training, and the same at every evaluation: what differs is the policy.
        rollouts = self._rollouts(self.eval_batches, plain, self.config.run.seed * 1_000_003 - num_steps, num_steps)
        for index in range(num_steps):
            watchdog.at(step, f"evaluation, batch {index + 1} of {num_steps}")
            rollout = rollouts.at(index) if rollouts else _given(self.eval_batches, index)
            answers += rollout.answers
            batches, frozen = self._prepared(rollout.batches, self.eval_batches, index)
            for item in self.trained:
                outputs[item.name] += self._losses(item, batches, frozen, backward=False)
        if answers and self.parallel.is_reporter:
            write_samples(Path(self.config.run.dir) / "samples" / f"step_{step:06d}.txt", answers, self.tokenizer)
        metrics = {
            f"eval/{name}/{key}": value
            for name, collected in outputs.items()
            for key, value in reduce_metrics(collected, self.parallel).items()
        }
        return metrics | {f"eval/rollout/{key}": value for key, value in answer_metrics(answers).items()}


def _given(source: GlobalBatches, step: int) -> Rollout:
    """A global batch read from the data."""
    return Rollout(source.at(step), source.num_tokens(step))
