"""The DeepSpeed engine: Megatron's model under ZeRO-1, 2 or 3, with tensor, expert and data parallelism.

Model, routing and process groups are those of the Megatron engine, so both engines walk the same curve. What
differs is who keeps weights, gradients and moments: here ZeRO, dense parameters over the data-parallel ranks
and experts over the ranks that hold the same ones. Pipelines and context parallelism are Megatron's alone
(moe/config/engine_rules.py refuses them here).
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moe.checkpoint.shard_writer import InProcessShardWriter
from moe.config.schema import RunConfig
from moe.engine.base import Batch, EvalResult, Layout, StepResult, TrainingDivergedError
from moe.engine.deepspeed_dtypes import two_dtypes
from moe.engine.deepspeed_groups import (
    MegatronGroups,
    WithExperts,
    declare_distant_parameters,
    expert_groups,
    mark_experts,
    sum_over_tensor_parallel_ranks,
)
from moe.engine.deepspeed_optimizer import build_adamw
from moe.engine.deepspeed_settings import nothing_compiled, settings
from moe.engine.deepspeed_state import ZeroState, templates_of
from moe.engine.device import choose_device
from moe.engine.mtp_loss import forget_mtp_losses, summed_mtp_loss
from moe.engine.token_loss import token_loss
from moe.engine.without_cuda import without_cuda
from moe.layer import updated_bias
from moe.model.build import DTYPES, build_model, sharded_state
from moe.model.init import global_sizes
from moe.model.moe_adapter import MoEAdapter


class DeepSpeedEngine:
    """Implements moe.engine.base.Engine."""

    def __init__(self, config: RunConfig) -> None:
        """Join the job, build this rank's part of the model and hand it to ZeRO.

        Reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without them the job is one rank.

        Raises:
            InputError: if the device that the config names is absent.
        """
        self.config = config
        self._undo = contextlib.ExitStack()
        with contextlib.ExitStack() as undo_on_error:
            undo_on_error.push(self._undo)
            self._start(config)
            undo_on_error.pop_all()

    def _start(self, config: RunConfig) -> None:
        self._undo.enter_context(without_cuda())
        self._undo.enter_context(nothing_compiled())
        self.torch_device = choose_device(config.engine.device)
        self._join(config)
        parallel = config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=config.engine.timeout_s / 60,
        )
        self._undo.callback(parallel_state.destroy_model_parallel)
        model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        dp = parallel_state.get_data_parallel_world_size()
        self.layout = Layout(parallel.tp, parallel.pp, parallel.ep, parallel.cp, dp)
        self.device = torch.cuda.get_device_name() if self.torch_device.type == "cuda" else "cpu"
        self.num_microbatches = config.train.global_batch_size // (config.train.micro_batch_size * dp)
        self._build(config)

    def _join(self, config: RunConfig) -> None:
        backend = "nccl" if self.torch_device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=config.engine.timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            # A job of one rank needs no port; DeepSpeed insists on a launcher's variable.
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
            if "LOCAL_RANK" not in os.environ:
                os.environ["LOCAL_RANK"] = "0"
                self._undo.callback(os.environ.pop, "LOCAL_RANK")
        self._undo.callback(dist.destroy_process_group)

    def _build(self, config: RunConfig) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model = build_model(config, groups, num_microbatches=self.num_microbatches)
        ahead = (
            [module.transformer_layer for module in self.model.mtp.layers] if self.model.mtp_process else []
        )
        self.moe_layers = {
            layer.layer_number - 1: layer.mlp
            for layer in [*self.model.decoder.layers, *ahead]
            if isinstance(layer.mlp, MoEAdapter)
        }
        mark_experts(self.model)
        sum_over_tensor_parallel_ranks(self.model, groups.tp)
        whole = sharded_state(self.model)
        self.params_total = self._count_parameters(whole)
        # Each parameter with its fp32 main copy and two fp32 moments.
        self.checkpoint_bytes = self.params_total * (DTYPES[config.train.precision].itemsize + 12)
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
        if config.engine.zero_stage == 3:
            declare_distant_parameters(self.model)
        self.state = ZeroState(self.optimizer, templates, zero_stage=config.engine.zero_stage)

    def _count_parameters(self, whole: dict[str, Any]) -> int:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, global_sizes(whole))
        return sum({key: size for part in gathered for key, size in part.items()}.values())

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

    def _first_router_with_nan(self) -> str:
        """Its layer and ranks in words; collective. Later layers only pass on what it met."""
        found = [i for i, adapter in self.moe_layers.items() if not bool(adapter.weight_sum.isfinite())]
        gathered: list[list[int]] = [[]] * self.world_size
        dist.all_gather_object(gathered, found)
        layers = [min(indices, default=None) for indices in gathered]
        first = min((layer for layer in layers if layer is not None), default=None)
        if first is None:
            return ""
        ranks = ", ".join(str(rank) for rank, layer in enumerate(layers) if layer == first)
        return f"The first router with NaN logits is that of layer {first}, on rank {ranks}. "

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

    def _reduce_losses(self, stored: list[dict[str, Tensor]]) -> tuple[float, float, float, float]:
        tp, dp = self.layout.tp, self.layout.dp
        sums_4 = torch.zeros(4, dtype=torch.float64, device=self.torch_device)
        for microbatch in stored:
            sums_4[0] += microbatch["loss"] / (len(stored) * tp * dp)
        further = summed_mtp_loss()
        if further is not None:
            sums_4[1] += further / (self.num_microbatches * tp * dp)
        for adapter in self.moe_layers.values():
            sums_4[2:] += adapter.losses_2 / dp
        dist.all_reduce(sums_4)
        loss, mtp_loss, balance, z = sums_4.tolist()
        return loss, mtp_loss, balance, z

    def _reduce_counts(self) -> Tensor:
        """Expert loads over the global batch; moves the expert biases by them."""
        model = self.config.model
        counts_LE = torch.zeros(
            model.num_layers + model.mtp_layers,
            model.num_experts,
            dtype=torch.int64,
            device=self.torch_device,
        )
        for index, adapter in self.moe_layers.items():
            counts_LE[index] = adapter.tokens_per_expert_E
        # A (token, layer) pair is counted on exactly one rank: the sum over the world is the global batch.
        dist.all_reduce(counts_LE)
        rate = model.router.bias_update_rate
        if rate > 0:
            for index, adapter in self.moe_layers.items():
                bias_E = adapter.layer.router.bias_E
                bias_E.copy_(updated_bias(bias_E, counts_LE[index], rate))
        return counts_LE[model.num_dense_layers : model.num_layers].cpu()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], num_batches: int, token_bytes_V: Tensor) -> EvalResult:
        """See Engine."""
        self.zero.eval()
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self.torch_device)
        for _ in range(num_batches):
            _, microbatch = self._forward(next(batches))
            labels, mask = microbatch["labels"], microbatch["mask"]
            text_bytes = (token_bytes_V.to(labels.device)[labels] * mask).sum()
            sums_3 += torch.stack([microbatch["nll"], mask.sum(), text_bytes]).double()
        dist.all_reduce(sums_3)
        nll, tokens, text_bytes = (sums_3 / self.layout.tp).tolist()
        return EvalResult(nll, round(tokens), round(text_bytes))

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

    def shard_files(self, directory: Path) -> list[str]:
        """See Engine; rank 0 also writes the descriptions."""
        shared = [".metadata", "metadata.json", "common.pt"] if self.rank == 0 else []
        return sorted(path.name for path in directory.glob(f"__{self.rank}_*.distcp")) + shared

    def load_shards(self, directory: Path, step: int) -> None:
        """See Engine."""
        self.state.load(directory, step)
        self._load_expert_biases(directory)

    def load_weights(self, directory: Path) -> None:
        """See Engine."""
        self.state.load_weights(directory)
        self._load_expert_biases(directory)

    def rng_state(self) -> dict[str, Tensor]:
        """See Engine."""
        states = {"torch": torch.get_rng_state()}
        if self.torch_device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        states |= {f"megatron.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
        return states

    def set_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """See Engine."""
        torch.set_rng_state(state["torch"])
        if self.torch_device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])
        tracker = {
            name.removeprefix("megatron."): value
            for name, value in state.items()
            if name.startswith("megatron.")
        }
        get_cuda_rng_tracker().set_states(tracker)

    def close(self) -> None:
        """See Engine."""
        self._undo.close()
