"""Make what the demonstration starts from: a corpus of stories, a tokenizer, an untrained model's folder, and prompts.

    python examples/demo/corpus.py --out runs/demo/corpus

writes corpus.jsonl ({"text": a story}), init/ (a Hugging Face folder without weights: config.json of a small Llama,
generation_config.json, tokenizer), prompts.jsonl and prompts_eval.jsonl ({"prompt": the opening of a story that is not
in the corpus}).
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from records import write_jsonl
from stories import Story, write_story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

MAX_POSITIONS = 256


def make_stories(
    num_stories: int, num_prompts: int, num_eval_prompts: int, seed: int
) -> tuple[list[Story], list[Story], list[Story]]:
    """Stories for the corpus, for prompts, and for evaluation prompts.

    The stories of the corpus differ from each other. No opening is both in the corpus and a prompt, or a prompt twice.
    """
    rng = random.Random(seed)
    corpus: dict[str, Story] = {}
    while len(corpus) < num_stories:
        story = write_story(rng)
        corpus.setdefault(story.text, story)
    seen = {story.prompt for story in corpus.values()}
    fresh: list[Story] = []
    while len(fresh) < num_prompts + num_eval_prompts:
        story = write_story(rng)
        if story.prompt not in seen:
            seen.add(story.prompt)
            fresh.append(story)
    return list(corpus.values()), fresh[:num_prompts], fresh[num_prompts:]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and punctuation marks that opens every text with <bos>.

    A word's leading space belongs to its token, so decoding gives back the text exactly.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<bos>", "<eos>", "<pad>"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def write_model_folder(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, ffn: int) -> None:
    """A Hugging Face folder of a small Llama that lacks only its weights."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        dtype="float32",
        **ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(do_sample=True, temperature=1.0, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--stories", type=int, default=24_000, help="stories of the corpus (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=3_072, help="prompts to sample pairs from (default: %(default)s)"
    )
    parser.add_argument(
        "--eval-prompts", type=int, default=512, help="prompts of the evaluation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model (default: %(default)s)")
    parser.add_argument("--ffn", type=int, default=344, help="inner size of the feed-forward (default: %(default)s)")
    args = parser.parse_args()
    corpus, prompts, eval_prompts = make_stories(args.stories, args.prompts, args.eval_prompts, args.seed)
    tokenizer = train_tokenizer([story.text for story in corpus])
    write_jsonl(args.out / "corpus.jsonl", ({"text": story.text} for story in corpus))
    write_jsonl(args.out / "prompts.jsonl", ({"prompt": story.prompt} for story in prompts))
    write_jsonl(args.out / "prompts_eval.jsonl", ({"prompt": story.prompt} for story in eval_prompts))
    write_model_folder(args.out / "init", tokenizer, args.hidden, args.layers, args.ffn)
    print(
        f"{len(corpus)} stories, {len(prompts)} prompts, {len(eval_prompts)} evaluation prompts, "
        f"a vocabulary of {len(tokenizer)} tokens"
    )


if __name__ == "__main__":
    main()
