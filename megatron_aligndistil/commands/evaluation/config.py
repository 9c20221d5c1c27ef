"""The settings of ``aligndistil evaluate --suite``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_aligndistil.commands.evaluate import EvaluatedModels
from megatron_aligndistil.config import ParallelConfig, PrecisionConfig, Section
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.suites.alpaca_eval import AlpacaEvalConfig
from megatron_aligndistil.suites.arena_hard import ArenaHardConfig
from megatron_aligndistil.suites.mt_bench import MTBenchConfig
from megatron_aligndistil.suites.policy_shift import PolicyShiftConfig
from megatron_aligndistil.suites.reward_accuracy import RewardAccuracyConfig
from megatron_aligndistil.suites.tldr import TldrConfig

SUITES = ("alpaca_eval", "mt_bench", "arena_hard", "tldr", "policy_shift", "reward_accuracy")
JUDGED = SUITES[:4]
ANSWERED = SUITES[:5]


class JudgeConfig(Section):
    endpoint: str | None = None
    """Base URL of the OpenAI-compatible server that judges, as in http://host:8000/v1."""
    model: str | None = None
    """What that server calls the judge."""
    temperature: float = Field(0.0, ge=0)
    """Temperature of verdicts; alpaca_eval asks for log-probabilities at 1."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest verdict in tokens; the suite's own when not given."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the judge's API key, where it wants one."""


class SamplingConfig(Section):
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature of answers; the suite's own when not given."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens; the suite's own when not given."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = Field(0, ge=0)
    """Seed of the answers."""


class RequestsConfig(Section):
    concurrency: int = Field(16, ge=1)
    """Requests under way at a time at one endpoint."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that one attempt may take."""
    retries: int = Field(6, ge=0)
    """Attempts after the first for a request that fails; rate limits (429) are waited for ten times as often."""


class SuiteConfig(Section):
    suite: str | list[str]
    """Suites to run, separated by commas."""
    out: str
    """Folder for answers, verdicts and the report; one folder for all models that are to be compared."""
    model: str | None = None
    """Checkpoint to evaluate, or with `endpoint` what the server there calls the model."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server that answers, as in http://host:8000/v1."""
    name: str | None = None
    """What the report calls the model; the last part of `model` when not given."""
    stage: Literal["all", "answers", "engine", "verdicts"] = "all"
    """`answers`: answer and measure, and leave the judging; `verdicts`: judge what is stored, where model and judge
    share the GPUs; `engine`: only what the engine does in processes of ours, which torchrun may start."""
    route: Literal["chat", "completions"] = "chat"
    """Route of `endpoint`: `completions` for a model without a chat template, which gets the conversation as text."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key of `endpoint`, where it wants one."""
    max_questions: int | None = Field(None, ge=1)
    """Ask only so many questions of each suite, spread evenly over its file."""
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig = JudgeConfig()
    requests: RequestsConfig = RequestsConfig()
    alpaca_eval: AlpacaEvalConfig = AlpacaEvalConfig()
    mt_bench: MTBenchConfig = MTBenchConfig()
    arena_hard: ArenaHardConfig = ArenaHardConfig()
    tldr: TldrConfig = TldrConfig()
    policy_shift: PolicyShiftConfig = PolicyShiftConfig()
    reward_accuracy: RewardAccuracyConfig = RewardAccuracyConfig()
    models: EvaluatedModels = EvaluatedModels()
    batch_size: int = Field(64, ge=1)
    """Answers sampled together on one data parallel rank."""
    max_length: int = Field(2048, ge=2)
    """Longest sequence in tokens where the engine measures."""
    max_prompt_length: int = Field(1024, ge=1)
    """Longest prompt in tokens where the engine measures."""
    micro_size: int = Field(8, ge=1)
    """Examples in one forward pass of one data parallel rank where the engine measures."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()

    @property
    def suites(self) -> list[str]:
        """The suites asked for."""
        named = self.suite.split(",") if isinstance(self.suite, str) else self.suite
        return [name.strip() for name in named]

    @property
    def policy(self) -> str | None:
        """The checkpoint that the engine measures as the policy."""
        return self.models.policy or (None if self.endpoint else self.model)

    @property
    def identity(self) -> str:
        """The model, told from any other: its path, or its name at a server, which may move."""
        if self.endpoint:
            return f"{self.model} (served)"
        return str(Path(self.model or self.models.dpo or self.models.reward or "models").expanduser().resolve())

    @property
    def title(self) -> str:
        """What the report calls the model."""
        return self.name or Path(self.identity.removesuffix(" (served)")).name


def check(config: SuiteConfig) -> None:
    """Raise ConfigError where the settings do not go together."""
    unknown = [name for name in config.suites if name not in SUITES]
    if unknown:
        raise ConfigError(f"there is no suite '{unknown[0]}'; suites: {', '.join(SUITES)}")
    asked = [name for name in config.suites if name in ANSWERED]
    if asked and not config.model:
        raise ConfigError(f"{asked[0]} needs --model, a checkpoint, or --endpoint and --model, its name there")
    if asked and not config.endpoint and not Path(config.model or "").expanduser().exists():
        raise ConfigError(f"there is no checkpoint {config.model}; for a model behind a server give its --endpoint too")
    judged = [name for name in config.suites if name in JUDGED]
    if judged and config.stage in ("all", "verdicts") and not (config.judge.endpoint and config.judge.model):
        raise ConfigError(
            f"{judged[0]} needs --judge.endpoint, an OpenAI-compatible server, and --judge.model, its name there"
        )
    if config.models.policy and not config.endpoint:
        raise ConfigError("--models.policy is --model here; give it only with --endpoint")
    distances = config.models.reference or config.models.dpo or config.models.reverse
    if "policy_shift" in config.suites and distances and not config.policy:
        raise ConfigError("policy_shift with --endpoint needs --models.policy, the checkpoint behind it, to measure KL")
