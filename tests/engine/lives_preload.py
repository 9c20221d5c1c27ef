"""What the server that lives are forked from imports: all that a run does."""

from __future__ import annotations

import os

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import datasets  # noqa: F401
import torch
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
import transformers

from megatron_aligndistil.backends import select

torch.set_num_threads(1)
_ = transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # imported where they are asked for
select()

import megatron_aligndistil.algorithms.aligndistil  # noqa: E402
import megatron_aligndistil.algorithms.dpo  # noqa: E402, F401
import megatron_aligndistil.engine.trainer  # noqa: E402, F401
