"""The Megatron-Core engine: tensor, pipeline, expert, context and data parallelism, distributed optimizer.

One class for a laptop's CPU and for a cluster; only the communication backend differs (gloo or NCCL).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from moe.config.schema import ParallelSection, RunConfig
from moe.counts.checkpoint import run_checkpoint_bytes
from moe.engine.base import Batch, EvalResult, StepResult, TrainingDivergedError
from moe.engine.megatron_job import MegatronJob, moe_layers_of
from moe.engine.megatron_optimizer import build_optimizer
from moe.engine.megatron_state import count_parameters, load_state, save_state
from moe.engine.mtp_loss import forget_mtp_losses, mean_over_sequence
from moe.engine.token_loss import token_loss
from moe.model.build import build_model, load_weights
from moe.model.context_parallel import positions_of
from moe.model.moe_adapter import node_groups


class MegatronEngine(MegatronJob):
    """Implements moe.engine.base.Engine."""

    def _build(self, config: RunConfig) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.cp_group = groups.cp
        build = partial(
            build_model,
            config,
            groups,
            num_microbatches=self.num_microbatches,
            nodes=node_groups(groups.ep, config),
        )
        self.models = [build(chunk=chunk).to(self.torch_device) for chunk in range(config.parallel.vpp)]
        self.moe_layers = moe_layers_of(self.models)
        self.params_total = count_parameters(self.models)
        self.checkpoint_bytes = run_checkpoint_bytes(config)
        self.ddps = [
            # Buckets are for the first chunk, whose reduction and gathering nothing else could hide.
            DistributedDataParallel(
                model.config, _ddp_config(config.parallel), model, disable_bucketing=chunk > 0
            )
            for chunk, model in enumerate(self.models)
        ]
        for adapter in self.moe_layers.values():
            adapter.layer.experts.adds_to_main_grads = config.model.expert_precision == "wide"
        self.optimizer, self.qk_clip = build_optimizer(config, self.ddps)
        megatron_config = self.models[0].config  # the one that the schedule reads
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [ddp.no_sync for ddp in self.ddps]
        megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        megatron_config.finalize_model_grads_func = finalize_model_grads

    # ---- training -----------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        """See Engine. Raises TrainingDivergedError if the loss or the gradient norm is not finite."""
        for ddp in self.ddps:
            ddp.train()
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for adapter in self.moe_layers.values():
            adapter.reset_step()
            adapter.num_microbatches = self.num_microbatches
        forget_mtp_losses()
        stored = self._run_schedule(batches, self.num_microbatches, forward_only=False)
        loss, mtp_loss, balance, z = self._reduce_losses(stored)
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"loss is {loss}; no update was made. {self._first_router_with_nan()}"
                "Lower optim.lr or resume from a checkpoint"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.config.optim.weight_decay * group["wd_mult"]
        _, grad_norm, _ = self.optimizer.step()
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise TrainingDivergedError(
                f"gradient norm is {grad_norm}, and the update has spread it. "
                "Lower optim.lr and resume from a checkpoint"
            )
        counts_LE = self._reduce_counts()
        norm, logit = float(grad_norm or 0.0), self._max_attention_logit()
        return StepResult(loss, balance, z, norm, counts_LE, mtp_loss, logit)

    def _max_attention_logit(self) -> float | None:
        """Of all layers and heads, wherever they are."""
        if self.qk_clip is None:
            return None
        largest = self.qk_clip.largest.to(self.torch_device, copy=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def _run_schedule(
        self, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        iterators = list(itertools.tee(batches, len(self.ddps)))
        with mean_over_sequence(self.cp_group):
            stored: list[dict[str, Tensor]] = get_forward_backward_func()(
                forward_step_func=self._forward_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.ddps,
                num_microbatches=num_microbatches,
                seq_length=self.config.data.seq_length,
                micro_batch_size=self.config.train.micro_batch_size,
                decoder_seq_length=self.config.data.seq_length,
                forward_only=forward_only,
            )
        return stored

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        whole = {name: tensor.to(self.torch_device) for name, tensor in next(batches).items()}
        num_tokens = whole["loss_mask_BS"].sum()
        batch = {name: self._own_positions(tensor) for name, tensor in whole.items()}
        output = model(
            batch["tokens_BS"],
            batch["position_ids_BS"],
            None,
            labels=batch["labels_BS"],
            loss_mask=batch["loss_mask_BS"],
        )
        return output, partial(token_loss, batch["loss_mask_BS"], batch["labels_BS"], num_tokens=num_tokens)

    def _own_positions(self, whole_BS: Tensor) -> Tensor:
        """Those that this rank holds under context parallelism."""
        cp = self.layout.cp
        if cp == 1:
            return whole_BS
        places = positions_of(self.cp_group.rank(), cp, whole_BS.shape[1] // cp, whole_BS.device)
        return whole_BS.index_select(1, places)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_batches: int, token_bytes_V: Tensor) -> EvalResult:
        """See Engine."""
        for ddp in self.ddps:
            ddp.eval()
        stored = self._run_schedule(batches, num_batches, forward_only=True)
        return self._evaluated(stored, token_bytes_V)

    # ---- checkpoints --------------------------------------------------------------------------------------

    def save_shards(self, directory: Path) -> None:
        """See Engine; Megatron's dist_checkpointing, fully reshardable."""
        if self.config.parallel.overlap_param_gather:
            for ddp in self.ddps:  # updated weights are elsewhere until the next forward pass
                ddp.start_param_sync(force_sync=True)
        save_state(self.models, self.optimizer, directory)

    def load_shards(self, directory: Path, step: int) -> None:
        """See Engine."""
        load_state(self.models, self.optimizer, directory, step)

    def load_weights(self, directory: Path) -> None:
        """See Engine."""
        for model in self.models:
            load_weights(model, directory)
        self.optimizer.reload_model_params()

    def close(self) -> None:
        """See Engine. Afterwards the model's memory is free as soon as nobody holds the engine."""
        for model, ddp in zip(self.models, self.ddps, strict=True):
            # Autograd's hooks hold the model, and the optimizer's views of fp32 weights hold the hooks: a
            # cycle through C++, which Python's collector does not see.
            model.config.grad_scale_func = None
            ddp.grad_accs.clear()
            for parameter in ddp.parameters():
                vars(parameter).pop("main_param", None)
        super().close()


def _ddp_config(parallel: ParallelSection) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
