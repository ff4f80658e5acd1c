"""Predict the time of a step in a layout from FLOPs, the bubble of a pipeline, and bytes between processes.

The prediction ranks layouts; it is not a measurement. The fraction of its peak that a device reaches and the bandwidth
of links are assumptions, each a constant here or a flag of `train.plan`, and printed with the plan.
"""

from dataclasses import dataclass
from itertools import pairwise

from train.engines.pipeline.partition import layer_flops
from train.metrics.flops import count_flops, peak_bandwidth, peak_flops
from train.plan.shapes import DeviceKind, Layout, Shape

GB = 1e9
# Operators of a block in a forward pass (two norms, four matmuls with biases, attention, two sums, GELU) and twice as
# many backward; selective recomputation repeats two norms, two sums and GELU, full recomputation all of them. A GPU
# starts one in about 5 us, a CPU in about as many.
OPERATORS = 3 * 10
UNFUSED_GELU_OPERATORS = 3 * 8  # more, of the baseline
RECOMPUTED_OPERATORS = {"none": 0, "selective": 5, "full": 10}
LAUNCH_SECONDS = 5e-6
OVERLAPPED = 2 / 3  # of the computation is the backward pass, with which communication overlaps
HOST_MEMORY = 100 * GB  # bytes/s at which a CPU updates offloaded parameters
UPDATE_BYTES = 28  # AdamW in fp32 reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Device:
    """The device of one process, and its links to the others and to its host."""

    name: str  # as `devices.device_name` gives it, without "NVIDIA "; "cpu" for a CPU
    link: float  # bytes/s between two processes, one way
    host_link: float  # bytes/s to the host's memory, one way

    @property
    def kind(self) -> DeviceKind:
        return "cpu" if self.name == "cpu" else "gpu"

    @property
    def has_bf16(self) -> bool:
        return peak_flops(self.name, "bf16") is not None

    def flops(self, bf16: bool) -> float:
        """Peak in FLOP/s; a CPU's is assumed, a tenth of a TFLOP/s for each process."""
        return peak_flops(self.name, "bf16" if bf16 else "fp32") or 1e11

    @property
    def bandwidth(self) -> float:
        return peak_bandwidth(self.name) or 20 * GB


# Links by datasheet, one way: NVLink 2, 3 and 4 have 150, 300 and 450 GB/s; PCIe 3, 4 and 5 x16 have 16, 32 and 64.
DEVICES = {
    "V100": Device("V100-SXM2-16GB", 150 * GB, 16 * GB),
    "A100": Device("A100-SXM4-80GB", 300 * GB, 32 * GB),
    "H100": Device("H100 80GB HBM3", 450 * GB, 64 * GB),
    "H200": Device("H200", 450 * GB, 64 * GB),
    "L4": Device("L4", 32 * GB, 32 * GB),
    "L40S": Device("L40S", 32 * GB, 32 * GB),
    "RTX3090": Device("RTX 3090", 32 * GB, 32 * GB),
    "RTX4090": Device("RTX 4090", 32 * GB, 32 * GB),
    "cpu": Device("cpu", 5 * GB, 20 * GB),
}


@dataclass(frozen=True)
class Speed:
    """A step and its parts in seconds, and tokens/s of all processes."""

    arithmetic: float
    bubble: float
    communication: float  # what does not overlap with computation
    seconds: float  # of the step: its parts and the update
    tokens_per_second: float


def predict_speed(shape: Shape, layout: Layout, device: Device, efficiency: float) -> Speed:
    """The speed of a step with `layout.accumulation` micro-batches in each data-parallel process.

    `efficiency` is the fraction of the device's peak that matmuls reach.
    """
    sizes = (shape.n_layer, shape.n_embd, shape.n_inner, shape.vocab_size, shape.block_size)
    flops = count_flops(*sizes, activation_checkpointing=layout.activation_checkpointing, fused_attention=True)
    tokens = layout.micro_batch * layout.accumulation * shape.block_size  # of a data-parallel process
    rate = efficiency * device.flops(layout.bf16)
    largest_stage = 1.0
    if layout.bounds:  # all stages wait for the one with the most FLOPs
        of_layers = layer_flops(*sizes)
        of_stages = [sum(of_layers[start:stop]) for start, stop in pairwise(layout.bounds)]
        largest_stage = max(of_stages) / sum(of_stages)
    arithmetic = largest_stage * tokens * flops.hardware / rate
    checkpointing = layout.activation_checkpointing
    operators = OPERATORS + RECOMPUTED_OPERATORS[checkpointing]
    operators += 0 if layout.kind == "zero" else UNFUSED_GELU_OPERATORS
    arithmetic += largest_stage * layout.accumulation * shape.n_layer * operators * LAUNCH_SECONDS
    if checkpointing != "none":  # other operators than matmuls wait for memory: norms and sums 10 D, GELU 2 I a token
        moved = layout.compute * tokens * shape.n_layer * (10 * shape.n_embd + 2 * shape.n_inner)
        arithmetic += largest_stage * moved / device.bandwidth
    # (p - 1) / (m + p - 1) of the time is idle, which adds (p - 1) / m to the busy time (GPipe, 1F1B).
    bubble = arithmetic * (layout.stages - 1) / layout.accumulation
    overlapping, after = traffic(shape, layout)
    overlapped = OVERLAPPED * arithmetic
    communication = max(0.0, overlapping / device.link - overlapped) + after / device.link
    seconds = arithmetic + bubble + communication + _update(shape, layout, device)
    return Speed(arithmetic, bubble, communication, seconds, tokens * layout.data_parallel / seconds)


def traffic(shape: Shape, layout: Layout) -> tuple[float, float]:
    """Bytes that each process sends in a step: (overlapping with computation, not overlapping).

    In a ring of P processes, all-gather and reduce-scatter send (P - 1) / P of a tensor, and all-reduce twice that.
    DDP all-reduces fp32 gradients once a step. ZeRO-1 reduces gradients once, ZeRO-2 with every micro-batch, and both
    gather the new weights. ZeRO-3 and FSDP2 gather the weights for the forward and again for the backward pass of
    every micro-batch; ZeRO-3 reduces gradients as often, and FSDP2 once, in fp32. A pipeline sends hidden states and
    their gradients for each micro-batch, and its ends all-reduce the gradient of a tied head.
    """
    parameters, width = shape.parameters // layout.stages, layout.compute
    ring = (layout.data_parallel - 1) / layout.data_parallel
    per_micro_batch = layout.accumulation
    match layout.kind, layout.zero_stage:
        case "ddp", _:
            return 2 * ring * 4 * parameters, 0.0
        case "fsdp2", _:
            return ring * (per_micro_batch * 2 * width + 4) * parameters, 0.0
        case "zero", 3:
            return per_micro_batch * ring * 3 * width * parameters, 0.0
        case "zero", 2:
            return per_micro_batch * ring * width * parameters, ring * width * parameters
        case "zero", _:
            after = 2 * ring * width * parameters
            if layout.stages > 1:
                boundaries = layout.accumulation * 2 * width * layout.micro_batch * shape.block_size * shape.n_embd
                after += boundaries + 2 * width * shape.vocabulary
            return 0.0, after
    return 0.0, 0.0


def _update(shape: Shape, layout: Layout, device: Device) -> float:
    """Seconds of AdamW; if offloaded, on the host, with the transfer of gradients there and of weights back."""
    parameters = shape.parameters / layout.stages
    if layout.kind in ("fsdp2", "zero"):
        parameters /= layout.data_parallel
    if not layout.offload:
        return UPDATE_BYTES * parameters / device.bandwidth
    transfers = 2 if layout.zero_stage < 3 else 1 + 3 * layout.accumulation  # weights are fetched for every pass
    return UPDATE_BYTES * parameters / HOST_MEMORY + transfers * layout.compute * parameters / device.host_link
