"""GPUs and the systems around them: peaks, and one set of sustained efficiencies for each kind.

Peaks are the vendor's dense figures. GB200 and GB300 are given 2.5 PFLOP/s in BF16 where the same chips on
HGX boards have 2.25, so `peak_flops` is the basis of every fraction here and of no comparison elsewhere.

Efficiencies are physical and hold for every model: what a large GEMM, a streaming kernel or a link sustains
under the power limit. Measured by others: B200 (SimuMax v1.2, configs/system/b200_bf16_ceperm.json) and links
(DeepEP). Fitted to the published step times of validate.py: `gemm_*` and `attention_*` of H100, B300, GB200
and GB300, starting from the B200's in proportion to the power limits, and `ep_hidden` of H100, where 37 % was
measured. Nothing here knows about a model or a run, and a test forbids it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of peak that are sustained in training, under the power limit.

    Attributes:
        gemm_bf16: Large GEMMs in BF16.
        gemm_fp8: Large GEMMs in FP8 or MXFP8, quantisation not included.
        attention_fwd: Fused attention forward, of the BF16 peak, counting the causal half.
        attention_bwd: Backward, with its second query-key product counted.
        hbm: Streaming kernels.
        nvlink: Collectives inside an NVLink domain.
        nic: Collectives between domains.
        ep_hidden: Share of expert communication that runs beside compute when asked to.
        ep_sms: Share of the GPU that hidden communication takes from compute.
    """

    gemm_bf16: float
    gemm_fp8: float
    attention_fwd: float
    attention_bwd: float
    hbm: float
    nvlink: float = 0.80  # NCCL all-gather and DeepEP within a node, 640-740 of 900 GB/s (DeepEP README)
    nic: float = 0.90  # DeepEP README: 43-47 of 50 GB/s
    ep_hidden: float = 0.60
    ep_sms: float = 0.18  # DeepEP: 24 of 132 SMs; HybridEP: 32 of 148


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A kind of GPU in its usual system.

    Attributes:
        name: As --gpu takes it.
        memory_bytes: What a process can allocate.
        host_bytes: Memory of the host, for each GPU.
        node_gpus: GPUs of a host.
        hbm_bytes_per_s: Peak memory bandwidth.
        peak_flops: Dense peaks by precision, FLOP/s.
        sm_flops: Dense BF16 FLOPs of an SM's tensor cores in a clock: peak over SMs and boost clock.
        sm_exps: Exponentials of an SM in a clock (CUDA programming guide); Blackwell Ultra has twice as many
            (NVIDIA, Making Softmax More Efficient with Blackwell Ultra).
        nvlink_bytes_per_s: One direction.
        nvlink_domain: GPUs that reach each other over NVLink.
        nic_bytes_per_s: One direction, for each GPU.
        tdp_w: Board power limit.
        idle_w: Board, clocks up, no kernel.
        host_w: CPU, memory, NICs, fans and power supplies, for each GPU, while training.
        fabric_w: Switches and optics, for each GPU.
        launch_s: CPU time of an op forward in Python, launch included: tens of microseconds for a module of
            Transformer Engine on an x86 host, more on Grace. An estimate of ours; it binds
            small shapes and, of the published runs, some with many unfused experts on a rank.
        kernel_s: Time on the GPU between two kernels, and for the ramps of one.
        efficiency: What is sustained.
    """

    name: str
    memory_bytes: int
    host_bytes: float
    node_gpus: int
    hbm_bytes_per_s: float
    peak_flops: MappingProxyType[str, float]
    sm_flops: int
    sm_exps: int
    nvlink_bytes_per_s: float
    nvlink_domain: int
    nic_bytes_per_s: float
    tdp_w: float
    idle_w: float
    host_w: float
    fabric_w: float
    launch_s: float
    kernel_s: float
    efficiency: Efficiency


def _peaks(
    fp32_tflops: float, bf16_tflops: float, fp8_tflops: float, *, mx: bool
) -> MappingProxyType[str, float]:
    """Dense peaks in FLOP/s; in fp32 without tensor cores, as torch does unless asked for TF32."""
    peaks = {"fp32": fp32_tflops, "bf16": bf16_tflops, "fp8": fp8_tflops}
    if mx:
        peaks["mxfp8"] = fp8_tflops
    return MappingProxyType({precision: tflops * 1e12 for precision, tflops in peaks.items()})


# Sources of the table. Peaks, bandwidths, links and TDP: vendor data sheets; those in fp32 are 67 TFLOP/s of
# H100 and H200 SXM, 600 of an HGX board with 8 B200 or B300, 5,760 of an NVL72 rack with GB200 or GB300.
# Memory: what torch reports where that is known, else the lower of two published figures. Memory of hosts: 2
# TB for 8 GPUs (DGX), 480 GB for 2 (Grace). Power of hosts: an H100 node draws at most 8.4 kW, of which its
# GPUs 5.6 (arXiv 2412.08602); a GB300 rack 132 kW less its GPUs. Fabric: 2.01 kW a node of 8, which an MLPerf
# submitter derives from data sheets, taken for all. Idle: estimates of ours. H100 efficiencies: GEMMs of 650
# to 700 TFLOP/s, FlashAttention-3 (arXiv 2407.08608) for attention.
_H100 = Gpu(
    name="h100",
    memory_bytes=int(79.1 * _GIB),
    host_bytes=256e9,
    node_gpus=8,
    hbm_bytes_per_s=3.35e12,
    peak_flops=_peaks(67, 989, 1979, mx=False),
    sm_flops=4096,
    sm_exps=16,
    nvlink_bytes_per_s=450e9,
    nvlink_domain=8,
    nic_bytes_per_s=50e9,
    tdp_w=700,
    idle_w=120,
    host_w=350,
    fabric_w=250,
    launch_s=40e-6,
    kernel_s=3e-6,
    efficiency=Efficiency(
        gemm_bf16=0.68, gemm_fp8=0.62, attention_fwd=0.52, attention_bwd=0.43, hbm=0.80, ep_hidden=0.42
    ),
)
_H200 = Gpu(
    name="h200",
    memory_bytes=int(139.8 * _GIB),
    host_bytes=256e9,
    node_gpus=8,
    hbm_bytes_per_s=4.8e12,
    peak_flops=_H100.peak_flops,
    sm_flops=4096,
    sm_exps=16,
    nvlink_bytes_per_s=450e9,
    nvlink_domain=8,
    nic_bytes_per_s=50e9,
    tdp_w=700,
    idle_w=125,
    host_w=350,
    fabric_w=250,
    launch_s=40e-6,
    kernel_s=3e-6,
    efficiency=_H100.efficiency,
)
_B200 = Gpu(
    name="b200",
    memory_bytes=int(178.3 * _GIB),
    host_bytes=256e9,
    node_gpus=8,
    hbm_bytes_per_s=8e12,
    peak_flops=_peaks(75, 2250, 4500, mx=True),
    sm_flops=8192,
    sm_exps=16,
    nvlink_bytes_per_s=900e9,
    nvlink_domain=8,
    nic_bytes_per_s=50e9,
    tdp_w=1000,
    idle_w=180,
    host_w=450,
    fabric_w=250,
    launch_s=40e-6,
    kernel_s=3e-6,
    efficiency=Efficiency(gemm_bf16=0.52, gemm_fp8=0.52, attention_fwd=0.42, attention_bwd=0.33, hbm=0.66),
)
_B300 = Gpu(
    name="b300",
    memory_bytes=int(267.0 * _GIB),
    host_bytes=256e9,
    node_gpus=8,
    hbm_bytes_per_s=8e12,
    peak_flops=_peaks(75, 2250, 4500, mx=True),
    sm_flops=8192,
    sm_exps=32,
    nvlink_bytes_per_s=900e9,
    nvlink_domain=8,
    nic_bytes_per_s=100e9,
    tdp_w=1100,
    idle_w=190,
    host_w=450,
    fabric_w=250,
    launch_s=40e-6,
    kernel_s=3e-6,
    efficiency=Efficiency(gemm_bf16=0.52, gemm_fp8=0.52, attention_fwd=0.45, attention_bwd=0.36, hbm=0.66),
)
_GB200 = Gpu(
    name="gb200",
    memory_bytes=int(184.0 * _GIB),
    host_bytes=240e9,
    node_gpus=4,
    hbm_bytes_per_s=8e12,
    peak_flops=_peaks(80, 2500, 5000, mx=True),
    sm_flops=8192,
    sm_exps=16,
    nvlink_bytes_per_s=900e9,
    nvlink_domain=72,
    nic_bytes_per_s=50e9,
    tdp_w=1200,
    idle_w=200,
    host_w=430,
    fabric_w=250,
    launch_s=60e-6,
    kernel_s=3e-6,
    efficiency=Efficiency(gemm_bf16=0.56, gemm_fp8=0.56, attention_fwd=0.44, attention_bwd=0.35, hbm=0.70),
)
_GB300 = Gpu(
    name="gb300",
    memory_bytes=int(276.0 * _GIB),
    host_bytes=240e9,
    node_gpus=4,
    hbm_bytes_per_s=8e12,
    peak_flops=_peaks(80, 2500, 5000, mx=True),
    sm_flops=8192,
    sm_exps=32,
    nvlink_bytes_per_s=900e9,
    nvlink_domain=72,
    nic_bytes_per_s=100e9,
    tdp_w=1400,
    idle_w=220,
    host_w=430,
    fabric_w=250,
    launch_s=60e-6,
    kernel_s=3e-6,
    efficiency=Efficiency(gemm_bf16=0.68, gemm_fp8=0.68, attention_fwd=0.50, attention_bwd=0.40, hbm=0.72),
)
GPUS = MappingProxyType({gpu.name: gpu for gpu in (_H100, _H200, _B200, _B300, _GB200, _GB300)})
