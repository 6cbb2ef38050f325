"""The DeepSpeed engine: Megatron's model under ZeRO-1, 2 or 3, with tensor, expert and data parallelism.

Model, routing and process groups are those of the Megatron engine, so both engines walk the same curve. What
differs is who keeps weights, gradients and moments: here ZeRO, dense parameters over the data-parallel ranks
and experts over the ranks that hold the same ones. Pipelines and context parallelism are Megatron's alone
(moe/config/engine_rules.py refuses them here).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor

from moe.checkpoint.shard_writer import InProcessShardWriter
from moe.config.schema import RunConfig
from moe.counts.checkpoint import run_checkpoint_bytes
from moe.engine.base import Batch, EvalResult, StepResult, TrainingDivergedError
from moe.engine.deepspeed_dtypes import sum_in_fp32, two_dtypes
from moe.engine.deepspeed_groups import (
    MegatronGroups,
    WithExperts,
    declare_distant_parameters,
    expert_groups,
    mark_experts,
    sum_over_tensor_parallel_ranks,
)
from moe.engine.deepspeed_names import require_attributes
from moe.engine.deepspeed_optimizer import build_adamw
from moe.engine.deepspeed_settings import nothing_compiled, settings
from moe.engine.deepspeed_state import ZeroState, templates_of
from moe.engine.megatron_job import MegatronJob, moe_layers_of
from moe.engine.megatron_state import count_parameters
from moe.engine.mtp_loss import forget_mtp_losses
from moe.engine.token_loss import token_loss
from moe.model.build import build_model, sharded_state
from moe.model.moe_adapter import node_groups


class DeepSpeedEngine(MegatronJob):
    """Implements moe.engine.base.Engine."""

    def _start(self, config: RunConfig) -> None:
        self._undo.enter_context(nothing_compiled())
        super()._start(config)

    def _join(self, config: RunConfig) -> None:
        super()._join(config)
        if "LOCAL_RANK" not in os.environ:  # DeepSpeed insists on a launcher's variable
            os.environ["LOCAL_RANK"] = "0"
            self._undo.callback(os.environ.pop, "LOCAL_RANK")

    def _build(self, config: RunConfig) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        nodes = node_groups(groups.ep, config)
        self.model = build_model(config, groups, num_microbatches=self.num_microbatches, nodes=nodes)
        self.moe_layers = moe_layers_of([self.model])
        mark_experts(self.model)
        sum_over_tensor_parallel_ranks(self.model, groups.tp)
        whole = sharded_state(self.model)
        self.params_total = count_parameters([self.model])
        self.checkpoint_bytes = run_checkpoint_bytes(config)
        templates = templates_of(whole, dp=groups.dp, expert_dp=groups.expt_dp)
        self.buffers = {name: s for name, s in whole.items() if not isinstance(s.data, torch.nn.Parameter)}
        self._undo.enter_context(expert_groups(groups))
        with two_dtypes():
            self.zero, self.optimizer, _, _ = deepspeed.initialize(
                model=WithExperts(self.model, config.model.num_experts),
                optimizer=build_adamw(config, self.model),
                model_parameters=list(self.model.parameters()),
                config=settings(config, num_microbatches=self.num_microbatches),
                mpu=MegatronGroups(),
                dist_init_required=False,
            )
        self._undo.callback(self.zero.destroy)
        stage = config.engine.zero_stage
        require_attributes(self.optimizer, next(self.model.parameters()), zero_stage=stage)
        if config.train.precision == "bf16":
            sum_in_fp32(self.optimizer, zero_stage=stage)
        if stage == 3:
            declare_distant_parameters(self.model)
        self.state = ZeroState(self.optimizer, templates, zero_stage=stage)

    # ---- training -----------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        """See Engine. Raises TrainingDivergedError if the loss or the gradient norm is not finite."""
        self.zero.train()
        for adapter in self.moe_layers.values():
            adapter.reset_step()
        forget_mtp_losses()
        # The losses of the router and of further tokens ride on the output with gradients of their own, so
        # what divides them must divide the main loss, too, and not DeepSpeed.
        share = torch.ones((), device=self.torch_device) / self.num_microbatches
        MTPLossAutoScaler.set_loss_scale(share)
        stored = []
        for index in range(self.num_microbatches):
            if index > 0:
                self.zero.step()  # no update yet
            nll_mean, microbatch = self._forward(next(batches))
            self.zero.backward(nll_mean * share, scale_wrt_gas=False)
            stored.append(microbatch)
        loss, mtp_loss, balance, z = self._reduce_losses(stored)
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"loss is {loss}; no update was made. {self._first_router_with_nan()}"
                "Lower optim.lr or resume from a checkpoint"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.zero.step()
        grad_norm = float(self.zero.get_global_grad_norm())
        if not math.isfinite(grad_norm):
            raise TrainingDivergedError(
                f"gradient norm is {grad_norm}; no update was made. "
                "Lower optim.lr or resume from a checkpoint"
            )
        return StepResult(loss, balance, z, grad_norm, self._reduce_counts(), mtp_loss)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        here = {name: tensor.to(self.torch_device) for name, tensor in batch.items()}
        nll_BS = self.zero(
            here["tokens_BS"],
            here["position_ids_BS"],
            None,
            labels=here["labels_BS"],
            loss_mask=here["loss_mask_BS"],
        )
        return token_loss(here["loss_mask_BS"], here["labels_BS"], nll_BS)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_batches: int, token_bytes_V: Tensor) -> EvalResult:
        """See Engine."""
        self.zero.eval()
        stored = [self._forward(next(batches))[1] for _ in range(num_batches)]
        return self._evaluated(stored, token_bytes_V)

    # ---- checkpoints --------------------------------------------------------------------------------------

    def save_shards(self, directory: Path) -> None:
        """See Engine; in the format of the Megatron engine."""
        state = self.state.shards() | self._expert_biases()
        dist_checkpointing.save(state, str(directory), InProcessShardWriter())

    def _expert_biases(self) -> dict[str, Any]:
        """Of the routers: no parameters, so not ZeRO's."""
        return {
            name: replace(shard, data=self.model.get_buffer(name)) for name, shard in self.buffers.items()
        }

    @torch.no_grad()
    def _load_expert_biases(self, directory: Path) -> None:
        loaded = dist_checkpointing.load(self._expert_biases(), str(directory))
        for name in self.buffers:
            self.model.get_buffer(name).copy_(loaded[name])

    def load_shards(self, directory: Path, step: int) -> None:
        """See Engine."""
        self.state.load(directory, step)
        self._load_expert_biases(directory)

    def load_weights(self, directory: Path) -> None:
        """See Engine."""
        self.state.load_weights(directory)
        self._load_expert_biases(directory)
