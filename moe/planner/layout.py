"""Ranks along each axis, and which of them are neighbours.

Ranks are numbered as in Megatron-Core: tensor parallelism fastest, then context, data, pipeline. Experts have
their own order over the same ranks of a stage: expert-tensor, expert, expert-data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks share what.

    Attributes:
        gpus: All ranks.
        tp: Ranks that split the dense layers and the sequence outside of attention.
        pp: Pipeline stages.
        vpp: Model chunks of a stage.
        ep: Ranks that share out the experts.
        etp: Ranks that split each expert.
        cp: Ranks that split a sequence inside attention.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1

    @property
    def dp(self) -> int:
        """Ranks that read different sequences."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def edp(self) -> int:
        """Ranks that hold the same part of the same experts."""
        return self.gpus // (self.pp * self.expert_ranks)

    @property
    def expert_ranks(self) -> int:
        """Ranks that together hold the experts of a layer."""
        return self.ep * self.etp

    @property
    def dense_replicas(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.dp * self.cp

    def problems(self, num_experts: int) -> list[str]:
        """Why these numbers do not fit together, one sentence for each reason."""
        found = []
        if self.gpus % (self.tp * self.pp * self.cp):
            found.append(
                f"{self.gpus} GPUs are no multiple of tp*pp*cp = {self.tp}*{self.pp}*{self.cp}; "
                "change --gpus or the layout"
            )
        elif self.gpus // self.pp % self.expert_ranks:
            found.append(
                f"the {self.gpus // self.pp} GPUs of a stage are no multiple of ep*etp = "
                f"{self.ep}*{self.etp}; change parallel.ep or --gpus"
            )
        if num_experts % self.ep:
            found.append(f"parallel.ep={self.ep} does not divide the {num_experts} experts")
        return found


def neighbours(size: int, stride: int, domain: int) -> int:
    """How many ranks of a group lie in one NVLink domain.

    Args:
        size: Ranks of the group.
        stride: Distance of its neighbouring ranks.
        domain: GPUs of a domain.
    """
    return max(1, min(size, domain // stride))
