"""The Megatron-Core engine: tensor, pipeline, expert and data parallelism with the distributed optimizer.

One class for a laptop's CPU and for a cluster; only the communication backend differs (gloo or NCCL).
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moe.checkpoint.shard_writer import InProcessShardWriter
from moe.config.schema import RunConfig
from moe.engine.base import Batch, EvalResult, Layout, StepResult, TrainingDivergedError
from moe.engine.device import choose_device
from moe.engine.megatron_optimizer import build_optimizer, create_moments
from moe.engine.token_loss import token_loss
from moe.engine.without_cuda import without_cuda
from moe.layer import updated_bias
from moe.model.build import DTYPES, build_model, load_weights, sharded_state
from moe.model.init import global_sizes
from moe.model.moe_adapter import MoEAdapter

OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


class MegatronEngine:
    """Implements moe.engine.base.Engine."""

    def __init__(self, config: RunConfig) -> None:
        """Join the job, build this rank's part of the model and its optimizer.

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
        self.torch_device = choose_device(config.engine.device)
        self._join(config)
        parallel = config.parallel
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            context_parallel_size=parallel.cp,
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
            # A job of one rank needs no port.
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        self._undo.callback(dist.destroy_process_group)

    def _build(self, config: RunConfig) -> None:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model = build_model(config, groups, num_microbatches=self.num_microbatches).to(self.torch_device)
        # By index, from 0; those of multi-token prediction follow the last layer.
        ahead = (
            [module.transformer_layer for module in self.model.mtp.layers] if self.model.mtp_process else []
        )
        self.moe_layers = {
            layer.layer_number - 1: layer.mlp
            for layer in [*self.model.decoder.layers, *ahead]
            if isinstance(layer.mlp, MoEAdapter)
        }
        self.params_total = self._count_parameters()
        # Each parameter with its fp32 main copy and two fp32 moments.
        self.checkpoint_bytes = self.params_total * (DTYPES[config.train.precision].itemsize + 12)
        megatron_config = self.model.config
        self.ddp = DistributedDataParallel(
            megatron_config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
            self.model,
        )
        self.optimizer = build_optimizer(config, self.ddp)
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        megatron_config.no_sync_func = self.ddp.no_sync
        megatron_config.finalize_model_grads_func = finalize_model_grads

    def _count_parameters(self) -> int:
        """Parameters of the whole model: global shapes of this stage's tensors, each key once."""
        sizes = global_sizes(sharded_state(self.model))
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, sizes)
        return sum({key: size for part in gathered for key, size in part.items()}.values())

    # ---- training -----------------------------------------------------------------------------------------

    def train_step(self, batches: Iterator[Batch], lr: float) -> StepResult:
        """See Engine. Raises TrainingDivergedError if the loss or the gradient norm is not finite."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        for adapter in self.moe_layers.values():
            adapter.reset_step()
        MTPLossLoggingHelper.tracker.clear()  # a global of Megatron, which sums over micro-batches
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
        return StepResult(loss, balance, z, float(grad_norm or 0.0), counts_LE, mtp_loss)

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

    def _run_schedule(
        self, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        stored: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[self.ddp],
            num_microbatches=num_microbatches,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.train.micro_batch_size,
            decoder_seq_length=self.config.data.seq_length,
            forward_only=forward_only,
        )
        return stored

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = {name: tensor.to(self.torch_device) for name, tensor in next(batches).items()}
        output = model(
            batch["tokens_BS"],
            batch["position_ids_BS"],
            None,
            labels=batch["labels_BS"],
            loss_mask=batch["loss_mask_BS"],
        )
        return output, partial(token_loss, batch["loss_mask_BS"], batch["labels_BS"])

    def _reduce_losses(self, stored: list[dict[str, Tensor]]) -> tuple[float, float, float, float]:
        """Means over the global batch, on every rank: losses of tokens live on the last stage, others on all.

        Returns:
            Loss of the next token, of further ones, of balance, z.
        """
        tp, dp = self.layout.tp, self.layout.dp * self.layout.cp
        sums_4 = torch.zeros(4, dtype=torch.float64, device=self.torch_device)
        for microbatch in stored:
            sums_4[0] += microbatch["loss"] / (len(stored) * tp * dp)
        if "values" in MTPLossLoggingHelper.tracker:
            sums_4[1] += MTPLossLoggingHelper.tracker["values"].mean() / (self.num_microbatches * tp * dp)
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
        self.ddp.eval()
        stored = self._run_schedule(batches, num_batches, forward_only=True)
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self.torch_device)
        for microbatch in stored:
            labels, mask = microbatch["labels"], microbatch["mask"]
            text_bytes = (token_bytes_V.to(labels.device)[labels] * mask).sum()
            sums_3 += torch.stack([microbatch["nll"], mask.sum(), text_bytes]).double()
        dist.all_reduce(sums_3)
        nll, tokens, text_bytes = (sums_3 / self.layout.tp).tolist()
        return EvalResult(nll, round(tokens), round(text_bytes))

    # ---- checkpoints --------------------------------------------------------------------------------------

    def _optimizers(self) -> list[Any]:
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        model_state = sharded_state(self.model)
        optimizer_state = {
            str(index): optimizer.sharded_param_state_fully_reshardable(
                model_state, is_loading, metadata=OPTIMIZER_METADATA
            )
            for index, optimizer in enumerate(self._optimizers())
        }
        return {"model": model_state, "optimizer": optimizer_state}

    def save_shards(self, directory: Path) -> None:
        """See Engine; Megatron's dist_checkpointing, fully reshardable."""
        state = self._sharded_state(is_loading=False)
        dist_checkpointing.save(state, str(directory), InProcessShardWriter())

    def shard_files(self, directory: Path) -> list[str]:
        """See Engine; rank 0 also writes the descriptions."""
        shared = [".metadata", "metadata.json", "common.pt"] if self.rank == 0 else []
        return sorted(path.name for path in directory.glob(f"__{self.rank}_*.distcp")) + shared

    def load_shards(self, directory: Path, step: int) -> None:
        """See Engine."""
        moments = [state for optimizer in self._optimizers() for state in create_moments(optimizer)]
        loaded = dist_checkpointing.load(self._sharded_state(is_loading=True), str(directory))
        self.model.load_state_dict(loaded["model"])
        for index, optimizer in enumerate(self._optimizers()):
            # A stage without experts has an empty expert optimizer, of which a checkpoint may hold nothing.
            optimizer.load_parameter_state_from_fully_reshardable(loaded["optimizer"].get(str(index), {}))
        # Updates so far, for Adam's bias correction. torch keeps them beside each parameter, not in the group
        # where Megatron's own state dict looks for them, so they travel in our manifest instead.
        for state in moments:
            state["step"] = torch.tensor(float(step))
        for optimizer in self._optimizers():
            if not isinstance(optimizer.optimizer, torch.optim.AdamW):
                # Apex's and Transformer Engine's FusedAdam, which Megatron prefers, count in the group.
                for group in optimizer.optimizer.param_groups:
                    group["step"] = step

    def load_weights(self, directory: Path) -> None:
        """See Engine."""
        load_weights(self.model, directory)
        self.optimizer.reload_model_params()

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
