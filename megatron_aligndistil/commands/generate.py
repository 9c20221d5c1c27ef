"""``aligndistil generate``: sample responses to prompts with a checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from pydantic import Field

from megatron_aligndistil.commands.options import describe, parse, processes_for, run_on_processes, take, wants_help
from megatron_aligndistil.config import DataConfig, ParallelConfig, PrecisionConfig, Section

_USAGE = """usage: aligndistil generate --model PATH --prompts FILE --out FILE.jsonl [--nproc N] [--KEY VALUE ...]

Writes one JSON object a response: prompt, response, prompt_tokens, response_tokens, logprob (sum, nats), finish (stop
or length), index (number of the prompt) and sample. The same seed gives the same responses at any layout.
"""


class GenerateConfig(Section):
    model: str
    """Checkpoint to sample from: a Hugging Face folder or a Megatron distributed checkpoint."""
    prompts: str | None = None
    """Records with prompts; without it, `num_unprompted` responses to the beginning-of-sequence token alone."""
    out: str
    """JSONL file to write."""
    num_unprompted: int = Field(1, ge=1)
    """How many responses to sample when there are no prompts."""
    samples: int = Field(1, ge=1)
    """Responses a prompt."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longest response in tokens."""
    max_prompt_length: int = Field(1024, ge=1)
    """Longest prompt in tokens; a longer one loses its beginning."""
    max_records: int | None = Field(None, ge=1)
    """Use only the first so many prompts."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 takes the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Draw from so many of the likeliest tokens only; 0 allows all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    stop: list[str] = []
    """Texts that end a response, as in --stop '["\\n\\n"]'."""
    seed: int = Field(0, ge=0)
    """Seed of the samples."""
    batch_size: int = Field(64, ge=1)
    """Responses sampled together on one data parallel rank."""
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    if wants_help(arguments):
        print(_USAGE + "\nkeys:\n" + describe(GenerateConfig))
        return 0
    nproc, rest = take(arguments, "--nproc")
    config = parse(GenerateConfig, rest)
    return run_on_processes(
        "generate", rest, nproc, lambda: processes_for(config.parallel.tp, config.parallel.pp), lambda: generate(config)
    )


def generate(config: GenerateConfig) -> None:
    """Sample and write; the file appears only when every response is there."""
    from megatron_aligndistil.data.dataset import load_dataset
    from megatron_aligndistil.data.tokenizer import load_tokenizer, to_text
    from megatron_aligndistil.data.tokens import stop_ids
    from megatron_aligndistil.engine import checkpoint
    from megatron_aligndistil.engine.completions import Sampling
    from megatron_aligndistil.engine.frozen import load_frozen
    from megatron_aligndistil.engine.generate import MegatronSampler, gather_completions
    from megatron_aligndistil.engine.parallel import parallel_session
    from megatron_aligndistil.engine.reporter import track

    arch = checkpoint.read_architecture(config.model)
    description = checkpoint.description_folder(config.model)
    tokenizer = load_tokenizer(description)
    if config.prompts is None:
        prompts = [[tokenizer.bos_token_id]] * config.num_unprompted
    else:
        limits = DataConfig(
            train=config.prompts, max_prompt_length=config.max_prompt_length, max_records=config.max_records
        )
        dataset, _ = load_dataset(limits, config.prompts, tokenizer, "prompts")
        prompts = [row.tokens.tolist() for (row,) in dataset]
    rows = [prompt for prompt in prompts for _ in range(config.samples)]
    with parallel_session(config.parallel) as parallel:
        model = load_frozen(config.model, arch, parallel, config.precision)
        sampling = Sampling(
            config.max_new_tokens,
            config.seed,
            stop_ids(tokenizer),
            config.temperature,
            config.top_k,
            config.top_p,
            tuple(config.stop),
        )
        as_text = partial(to_text, tokenizer, skip_special_tokens=False)
        sampler = MegatronSampler(model, parallel, config.batch_size, as_text)
        with track("generate", -(-len(rows) // parallel.dp), parallel.is_reporter) as advance:
            mine = sampler.generate(rows, sampling, advance)
        completions = gather_completions(mine, parallel)
        if not parallel.is_reporter:
            return
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".partial")
        with unfinished.open("w", encoding="utf-8") as file:
            for row, (prompt, completion) in enumerate(zip(rows, completions, strict=True)):
                record = {
                    "prompt": to_text(tokenizer, prompt),
                    "response": to_text(tokenizer, completion.tokens),
                    "prompt_tokens": list(prompt),
                    "response_tokens": completion.tokens,
                    "logprob": sum(completion.logprobs),
                    "finish": completion.finish,
                    "index": row // config.samples,
                    "sample": row % config.samples,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        unfinished.rename(out)
        print(f"wrote {len(rows)} responses to {out}", flush=True)
