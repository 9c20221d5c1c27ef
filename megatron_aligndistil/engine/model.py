"""Megatron-Core GPT models from an architecture description."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_aligndistil.backends import Backend
from megatron_aligndistil.config import PrecisionConfig
from megatron_aligndistil.engine.packed import RowAttention, fused_row_attention
from megatron_aligndistil.engine.parallel import Parallel, dtype_of
from megatron_aligndistil.errors import ConfigError
from megatron_aligndistil.models.architecture import Architecture
from megatron_aligndistil.ops.head import LMHead, ScalarHead


class HiddenStateGPT(GPTModel):
    """A GPT whose last stage returns final hidden states [S, B, H] instead of logits.

    Losses form logits themselves, at response positions only, from this and the output layer's shard.
    """

    def _postprocess(self, hidden_states: Tensor, *_, **__) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer, padding rows included: [v_padded, H]; [1, H] of a scalar model."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class ScalarOutput(torch.nn.Module):
    """An output layer of one row, whole on every tensor parallel rank.

    Each rank sees all hidden states, so its gradient is complete and the same on all of them. Megatron's marks for
    split weights and for sums under sequence parallelism are missing for that reason: the gradient is reduced over data
    parallel ranks only, and one tensor parallel rank counts it in the norm.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size))


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's mark for weights whose gradients sequence parallelism must sum."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def check_fits(arch: Architecture, parallel: Parallel) -> None:
    """Raise ConfigError when the architecture cannot be split as the layout asks."""
    stages = parallel.pp * parallel.vpp
    for value, what, size, key in (
        (arch.num_heads, "attention heads", parallel.tp, "parallel.tp"),
        (arch.num_kv_heads, "key-value heads", parallel.tp, "parallel.tp"),
        (arch.ffn_hidden_size, "feed-forward channels", parallel.tp, "parallel.tp"),
        (arch.num_layers, "layers", stages, "parallel.pp x parallel.vpp"),
    ):
        if value % size:
            raise ConfigError(
                f"the model's {value} {what} cannot be split over {key} = {size}; choose a divisor of {value}"
            )


def has_transformer_engine(backend: Backend) -> bool:
    """Whether layers are Transformer Engine's: there is a GPU, and Megatron-Core could import the library."""
    return backend.is_cuda and HAVE_TE


@cache
def _say_local_layers() -> None:
    print("Transformer Engine is not there: Megatron-Core's own layers are used, which are slower", flush=True)


def _leave(weight: Tensor) -> Tensor:
    return weight


def transformer_config(
    arch: Architecture, parallel: Parallel, precision: PrecisionConfig, recompute: str = "none"
) -> TransformerConfig:
    """Megatron's configuration for one architecture, layout and precision.

    Raises ConfigError when FP8 is asked for without a GPU, or without Transformer Engine.
    """
    cuda = parallel.backend.is_cuda
    transformer_engine = has_transformer_engine(parallel.backend)
    dtype = dtype_of(precision.dtype, parallel.backend)
    if precision.fp8 and not cuda:
        raise ConfigError("precision.fp8 needs a GPU with Transformer Engine, and this machine has none; leave fp8 out")
    if precision.fp8 and not transformer_engine:
        raise ConfigError(
            "precision.fp8 needs Transformer Engine, which Megatron-Core cannot import here; install the extra `gpu` "
            "(`aligndistil doctor` says what is wrong), or leave fp8 out"
        )
    interleaved = parallel.vpp > 1
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp8=precision.fp8,
        fp8_recipe=precision.fp8_recipe if precision.fp8 else "delayed",
        # A loss function returns (sum, count, metrics); Megatron divides once, by the count of the global batch.
        calculate_per_token_loss=True,
        # Weights are read or drawn after building (engine/hf.py). Megatron's initialisation still has to run, doing
        # nothing: it also marks which weights are split, and without those marks gradient norms under tensor
        # parallelism are wrong.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        persist_layer_norm=transformer_engine,
        masked_softmax_fusion=False,
        apply_rope_fusion=transformer_engine,
        gradient_accumulation_fusion=False,
        # Interleaved stages whose two neighbours are one rank mix up batched messages, without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Megatron frees an output when its message is under way; nccl's streams keep it alive till then, gloo does not.
        deallocate_pipeline_outputs=cuda,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )


def _block_spec(config: TransformerConfig, arch: Architecture, transformer_engine: bool, vp_stage: int | None):
    """Transformer Engine's layers where it is present; Megatron's local layers with torch's RMSNorm elsewhere.

    Both with a core attention that takes packed rows as well.
    """
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=arch.qk_norm)
        layer.submodules.self_attention.submodules.core_attention = fused_row_attention()
        return layer
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention: ModuleSpec = layer.submodules.self_attention
    attention.submodules.core_attention = RowAttention
    if arch.qk_norm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


def build_model(
    arch: Architecture,
    parallel: Parallel,
    precision: PrecisionConfig,
    recompute: str = "none",
    groups: ProcessGroupCollection | None = None,
) -> list[HiddenStateGPT]:
    """This rank's chunks of the model (one, or `vpp` under the interleaved schedule), on its device, weights undefined.

    `groups` are Megatron's own where None. Raises ConfigError when the layout does not fit the architecture.
    """
    check_fits(arch, parallel)
    config = transformer_config(arch, parallel, precision, recompute)
    transformer_engine = has_transformer_engine(parallel.backend)
    if parallel.backend.is_cuda and not transformer_engine and parallel.is_reporter:
        _say_local_layers()
    chunks = []
    for chunk in range(parallel.vpp):
        vp_stage = chunk if parallel.vpp > 1 else None
        model = HiddenStateGPT(
            config=config,
            transformer_layer_spec=_block_spec(config, arch, transformer_engine, vp_stage),
            vocab_size=arch.padded_vocab_size(parallel.tp),
            max_sequence_length=arch.max_positions,
            pre_process=parallel.pp_rank == 0 and chunk == 0,
            post_process=parallel.is_last_stage and chunk == parallel.vpp - 1,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            vp_stage=vp_stage,
            pg_collection=groups,
        )
        if arch.head == "scalar" and model.post_process:
            model.output_layer = ScalarOutput(arch.hidden_size)
        model = model.to(device=parallel.backend.device, dtype=config.params_dtype)
        # Megatron knows one RoPE scaling, with its constants built in; ours comes from the checkpoint's configuration.
        model.rotary_pos_emb.inv_freq = arch.inverse_frequencies().to(parallel.backend.device)
        chunks.append(model)
    return chunks


def lm_head(
    chunk: torch.nn.Module, hidden: Tensor, positions_T: Tensor, arch: Architecture, parallel: Parallel
) -> LMHead:
    """The distributions at `positions_T` (indices into B·S) of a last stage's output `hidden` [S, B, H].

    Under sequence parallelism the rows are gathered first (one all-gather over the tensor parallel group; its backward
    keeps this rank's slice of a gradient that is already the same on every rank).
    """
    shard = parallel.vocab_shard(arch.vocab_size, arch.padded_vocab_size(parallel.tp))
    weight = unwrap_model(chunk).output_weight()
    # Megatron's buffer of gradients, where the model is being trained.
    main_grad = getattr(weight, "main_grad", None)
    hidden_TH = _states_at(positions_T, hidden, parallel)
    return LMHead(hidden_TH, weight[: shard.size], shard, None if main_grad is None else main_grad[: shard.size])


def scalar_head(chunk: torch.nn.Module, hidden: Tensor, positions_T: Tensor, parallel: Parallel) -> ScalarHead:
    """The numbers of a scalar model at `positions_T`, otherwise as :func:`lm_head`."""
    return ScalarHead(_states_at(positions_T, hidden, parallel), unwrap_model(chunk).output_weight())


def _states_at(positions_T: Tensor, hidden: Tensor, parallel: Parallel) -> Tensor:
    if parallel.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=parallel.tp_group
        )
    return hidden.transpose(0, 1).reshape(-1, hidden.shape[-1]).index_select(0, positions_T)


def freeze(chunks: Sequence[torch.nn.Module]) -> None:
    """Mark a model as never trained."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
