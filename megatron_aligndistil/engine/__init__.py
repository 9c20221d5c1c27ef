"""Megatron-Core as the engine: set-up, models, schedules, optimiser, checkpoints, and the training loop over them."""

import warnings

from megatron_aligndistil.backends import import_megatron

# What is not installed and what that costs is for `aligndistil doctor` to say, not for every process at each start.
for category in (DeprecationWarning, FutureWarning, UserWarning):
    warnings.filterwarnings("ignore", category=category, module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
import_megatron()
