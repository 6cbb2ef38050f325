"""What both engines share: a job of Megatron's process groups, and what its ranks add up.

An engine builds its model and says how a step is made; losses, expert loads and evaluation are the same sums.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from moe.config.schema import RunConfig
from moe.engine.base import EvalResult, Layout
from moe.engine.device import choose_device
from moe.engine.fused_dispatcher import require_fused_dispatcher, use_fused_dispatcher
from moe.engine.mtp_loss import summed_mtp_loss
from moe.engine.without_cuda import without_cuda
from moe.layer import updated_bias
from moe.model.moe_adapter import MoEAdapter
from moe.model.spec import MTP_LAYER


class MegatronJob:
    """A rank of a job, from joining to leaving it; an engine adds `_build`, and sets moe_layers in it."""

    # By index from 0; those of multi-token prediction follow the last layer.
    moe_layers: dict[int, MoEAdapter]

    def __init__(self, config: RunConfig) -> None:
        """Join the job and build this rank's part of the model, with what updates it.

        Reads RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without them the job is one rank.

        Raises:
            InputError: if the device or the library that the config names is absent.
            WrongDispatchError: if that library moves rows wrong.
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
        require_fused_dispatcher(config, self.torch_device)
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
        self.layout = Layout(parallel.tp, parallel.pp, parallel.ep, parallel.cp, dp, parallel.etp)
        self.device = torch.cuda.get_device_name() if self.torch_device.type == "cuda" else "cpu"
        self.num_microbatches = config.train.global_batch_size // (config.train.micro_batch_size * dp)
        self._build(config)
        ep_group = parallel_state.get_expert_model_parallel_group()
        use_fused_dispatcher(config, self.moe_layers, ep_group, self.torch_device, self._undo)

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
        raise NotImplementedError

    # ---- sums over the job --------------------------------------------------------------------------------

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

    def _evaluated(self, stored: Sequence[Mapping[str, Tensor]], token_bytes_V: Tensor) -> EvalResult:
        """What the micro-batches of an evaluation add up to, over all ranks."""
        sums_3 = torch.zeros(3, dtype=torch.float64, device=self.torch_device)
        for microbatch in stored:
            labels, mask = microbatch["labels"], microbatch["mask"]
            text_bytes = (token_bytes_V.to(labels.device)[labels] * mask).sum()
            sums_3 += torch.stack([microbatch["nll"], mask.sum(), text_bytes]).double()
        dist.all_reduce(sums_3)
        nll, tokens, text_bytes = (sums_3 / self.layout.tp).tolist()
        return EvalResult(nll, round(tokens), round(text_bytes))

    # ---- state of a rank ----------------------------------------------------------------------------------

    def shard_files(self, directory: Path) -> list[str]:
        """See Engine; rank 0 also writes the descriptions."""
        shared = [".metadata", "metadata.json", "common.pt"] if self.rank == 0 else []
        return sorted(path.name for path in directory.glob(f"__{self.rank}_*.distcp")) + shared

    def rng_state(self) -> dict[str, Tensor]:
        """See Engine."""
        states = {"torch": torch.get_rng_state()}
        if self.torch_device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        states |= {f"megatron.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
        return states

    def set_rng_state(self, state: Mapping[str, Tensor]) -> None:
        """See Engine. Raises ValueError for the states of another kind of device, whose sizes differ."""
        on_cuda = self.torch_device.type == "cuda"
        if ("cuda" in state) != on_cuda:
            raise ValueError(f"random states {sorted(state)} cannot be restored on {self.torch_device.type}")
        torch.set_rng_state(state["torch"])
        if on_cuda:
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


def moe_layers_of(models: Sequence[GPTModel]) -> dict[int, MoEAdapter]:
    """The expert layers of a rank's chunks, as MegatronJob.moe_layers."""
    return {
        index: layer.mlp
        for model in models
        for index, layer in _numbered_layers(model)
        if isinstance(layer.mlp, MoEAdapter)
    }


def _numbered_layers(model: GPTModel) -> Iterator[tuple[int, TransformerLayer]]:
    """Of a chunk, from 0; those of multi-token prediction follow the model's last layer.

    Their own number continues the model's in megatron-core 0.16 and begins anew in 0.19; the number of the
    module around each is its place among the modules in both.
    """
    for layer in model.decoder.layers:
        yield layer.layer_number - 1, layer
    for module in model.mtp.layers if model.mtp_process else ():
        yield model.config.num_layers + module.layer_number - 1, getattr(module, MTP_LAYER)
