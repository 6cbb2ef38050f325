"""The Megatron-Core engine: tensor, pipeline, expert, context and data parallelism, distributed optimizer.

One class for a laptop's CPU and for a cluster; only the communication backend differs (gloo or NCCL).
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moe.config.schema import RunConfig
from moe.engine.base import Batch, EvalResult, Layout, StepResult, TrainingDivergedError
from moe.engine.device import choose_device
from moe.engine.megatron_optimizer import build_optimizer
from moe.engine.megatron_state import count_parameters, load_state, save_state
from moe.engine.mtp_loss import forget_mtp_losses, mean_over_sequence, summed_mtp_loss
from moe.engine.token_loss import token_loss
from moe.engine.without_cuda import without_cuda
from moe.layer import updated_bias
from moe.model.build import DTYPES, build_model, load_weights
from moe.model.context_parallel import positions_of
from moe.model.moe_adapter import MoEAdapter
from moe.model.spec import MTP_LAYER


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
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
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
        self.cp_group = groups.cp
        self.models = [
            build_model(config, groups, num_microbatches=self.num_microbatches, chunk=chunk).to(
                self.torch_device
            )
            for chunk in range(config.parallel.vpp)
        ]
        self.moe_layers = {
            layer.layer_number - 1: layer.mlp
            for model in self.models
            for layer in _layers_of(model)
            if isinstance(layer.mlp, MoEAdapter)
        }
        self.params_total = count_parameters(self.models)
        # Each parameter with its fp32 main copy and two fp32 moments.
        self.checkpoint_bytes = self.params_total * (DTYPES[config.train.precision].itemsize + 12)
        self.ddps = [
            # Buckets are for the first chunk, whose reduction and gathering nothing else could hide.
            DistributedDataParallel(model.config, self._ddp_config(), model, disable_bucketing=chunk > 0)
            for chunk, model in enumerate(self.models)
        ]
        self.optimizer = build_optimizer(config, self.ddps)
        megatron_config = self.models[0].config  # the one that the schedule reads
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [ddp.no_sync for ddp in self.ddps]
        megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        megatron_config.finalize_model_grads_func = finalize_model_grads

    def _ddp_config(self) -> DistributedDataParallelConfig:
        parallel = self.config.parallel
        return DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )

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

    def _reduce_losses(self, stored: list[dict[str, Tensor]]) -> tuple[float, float, float, float]:
        """Means over the global batch, on every rank: losses of tokens live on the last stage, others on all.

        Returns:
            Loss of the next token, of further ones, of balance, z.
        """
        tp, dp, cp = self.layout.tp, self.layout.dp, self.layout.cp
        sums_4 = torch.zeros(4, dtype=torch.float64, device=self.torch_device)
        for microbatch in stored:  # each rank of cp has its part of a sum, those of tp the same one
            sums_4[0] += microbatch["loss"] / (len(stored) * tp * dp)
        mtp_loss = summed_mtp_loss()
        if mtp_loss is not None:  # a mean on each rank
            sums_4[1] += mtp_loss / (self.num_microbatches * tp * dp * cp)
        for adapter in self.moe_layers.values():  # each rank of tp and cp has its part
            sums_4[2:] += adapter.losses_2 / dp
        dist.all_reduce(sums_4)
        loss, further, balance, z = sums_4.tolist()
        return loss, further, balance, z

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
        for ddp in self.ddps:
            ddp.eval()
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

    def save_shards(self, directory: Path) -> None:
        """See Engine; Megatron's dist_checkpointing, fully reshardable."""
        if self.config.parallel.overlap_param_gather:
            for ddp in self.ddps:  # updated weights are elsewhere until the next forward pass
                ddp.start_param_sync(force_sync=True)
        save_state(self.models, self.optimizer, directory)

    def shard_files(self, directory: Path) -> list[str]:
        """See Engine; rank 0 also writes the descriptions."""
        shared = [".metadata", "metadata.json", "common.pt"] if self.rank == 0 else []
        return sorted(path.name for path in directory.glob(f"__{self.rank}_*.distcp")) + shared

    def load_shards(self, directory: Path, step: int) -> None:
        """See Engine."""
        load_state(self.models, self.optimizer, directory, step)

    def load_weights(self, directory: Path) -> None:
        """See Engine."""
        for model in self.models:
            load_weights(model, directory)
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
        """See Engine. Afterwards the model's memory is free as soon as nobody holds the engine."""
        for model, ddp in zip(self.models, self.ddps, strict=True):
            # Autograd's hooks hold the model, and the optimizer's views of fp32 weights hold the hooks: a
            # cycle through C++, which Python's collector does not see.
            model.config.grad_scale_func = None
            ddp.grad_accs.clear()
            for parameter in ddp.parameters():
                vars(parameter).pop("main_param", None)
        self._undo.close()


def _layers_of(model: GPTModel) -> list[TransformerLayer]:
    """Of a chunk; those of multi-token prediction, which follow the last layer, are numbered after it."""
    ahead = [getattr(module, MTP_LAYER) for module in model.mtp.layers] if model.mtp_process else []
    return [*model.decoder.layers, *ahead]
