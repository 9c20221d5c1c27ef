"""The steps of a run, and what happens between them: evaluation, checkpoints, requests to stop."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_aligndistil.algorithms.base import Algorithm
from megatron_aligndistil.config import RunConfig, TrainConfig
from megatron_aligndistil.engine import checkpoint, kept, skips, watchdog
from megatron_aligndistil.engine.optimiser import Trained
from megatron_aligndistil.engine.parallel import Parallel, on_first_rank
from megatron_aligndistil.engine.reporter import Reporter
from megatron_aligndistil.engine.rollout import Rollouts
from megatron_aligndistil.engine.saving import Saver
from megatron_aligndistil.engine.sources import Source
from megatron_aligndistil.engine.stopping import StopRequest, agree, stop_requests
from megatron_aligndistil.errors import AlignDistilError


class Stage(Protocol):
    """What is run: the models and data of a run, and what one step and one evaluation are."""

    config: TrainConfig
    algorithm: Algorithm
    parallel: Parallel
    sources: Mapping[str, Source]
    trained: list[Trained]
    rollouts: Rollouts | None
    num_steps: int

    def step(self, step: int, reporter: Reporter) -> None:
        """Take one optimiser step, counted from 0."""
        ...

    def evaluate(self, done: int) -> dict[str, float]:
        """Metrics of the evaluation records after so many steps, on the last pipeline stage."""
        ...

    def stuck(self, done: int) -> list[str]:
        """Models that cannot go on after so many steps."""
        ...


class Loop:
    """Takes a stage from its last checkpoint, or from the beginning, to its last step."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self._stage, self._folder = stage, folder
        self._run: RunConfig = stage.config.run
        self._checkpoints = folder / "checkpoints"

    def run(self) -> None:
        """Go on where the last checkpoint ends, to the end.

        Raises SystemExit with 128 + n where signal n asks for a stop, once a checkpoint has been saved.
        """
        stage = self._stage
        resumable = on_first_rank(kept.latest, self._checkpoints)
        progress: Mapping[str, Any] = {"step": 0}
        if resumable is not None:
            progress = checkpoint.resume_training(resumable, stage.trained)
        start = progress["step"]
        if stage.rollouts:
            stage.rollouts.restore(start, progress.get("rollouts") or [])
        title = f"{self._folder.name} ({stage.algorithm.name})"
        with (
            Reporter(
                self._folder, title, stage.num_steps, start, stage.parallel.is_reporter, self._run.wandb
            ) as reporter,
            stop_requests() as request,
            watchdog.expect_progress(self._run.hang_timeout),
        ):
            if resumable is not None:
                reporter.say(f"going on from {resumable}")
            saver = self._saver(reporter)
            saver.clear()
            if self._evaluates(start) and "evaluation" in progress and progress["evaluation"] is None:
                # A request to stop left no time for it.
                saver.evaluated(start, self._evaluation(start, reporter, saver))
            for step in range(start, stage.num_steps):
                stage.step(step, reporter)
                self._between(step + 1, reporter, saver, request)
            saver.finish()
        watchdog.at(0, "export")

    def _saver(self, reporter: Reporter) -> Saver:
        stage = self._stage
        sources = {item.name: stage.sources[item.name].path for item in stage.trained}
        order = kept.Order.parse(self._run.best or stage.algorithm.best)
        return Saver(self._checkpoints, sources, self._run.keep, order, reporter.say)

    def _between(self, done: int, reporter: Reporter, saver: Saver, request: StopRequest) -> None:
        """After `done` steps: all that is due there."""
        stage = self._stage
        # One all-reduce of two numbers a step, so that all ranks stop, and finish a checkpoint, at the same step.
        signalled, writing = agree(stage.parallel.backend.device, request.number, saver.is_writing)
        if saver.is_pending and not writing:
            saver.finish()
        stuck = stage.stuck(done)
        last, evaluation = done == stage.num_steps, None
        if self._evaluates(done) and not signalled:
            evaluation = self._evaluation(done, reporter, saver)
        if last or signalled or stuck or (self._run.save_every and done % self._run.save_every == 0):
            watchdog.at(done, "checkpoint")
            rollouts = stage.rollouts.state(done) if stage.rollouts else None
            saver.start(done, stage.trained, {"evaluation": evaluation, "rollouts": rollouts})
        if stuck:
            saver.finish()
            raise AlignDistilError(skips.end(stuck, self._run.max_skipped, done, stage.num_steps, self._run.dir))
        if signalled:
            saver.finish()
            self._stop(done, signalled, reporter)

    def _evaluates(self, done: int) -> bool:
        every = self._run.eval_every
        due = done == self._stage.num_steps or (done > 0 and every is not None and done % every == 0)
        return self._stage.config.data.eval is not None and due

    def _evaluation(self, done: int, reporter: Reporter, saver: Saver) -> dict[str, float]:
        """The metrics of an evaluation, the same on all ranks."""
        found: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, self._stage.evaluate(done))
        metrics = max(found, key=len)  # only the last pipeline stage knows losses
        reporter.log(done, metrics)
        if saver.order.metric not in metrics and self._run.best:
            known = ", ".join(sorted(metrics))
            reporter.say(
                f"run.best: no evaluation gives {saver.order.metric}, so no checkpoint is the best; {known} do"
            )
        return metrics

    def _stop(self, done: int, number: int, reporter: Reporter) -> None:
        saved = on_first_rank(kept.latest, self._checkpoints)
        where = f"the same command goes on from {saved}" if saved else "the same command begins again"
        reporter.say(f"stopped by {signal.Signals(number).name} after step {done} of {self._stage.num_steps}; {where}")
        raise SystemExit(128 + number)
