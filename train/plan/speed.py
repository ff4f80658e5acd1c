"""How long a step takes in a layout, by arithmetic: FLOPs, a pipeline's bubble, and bytes between processes.

A ranking, not a promise: the share of its peak that a device reaches is assumed, and so is what a link gives. Each
assumption is a constant here or a flag of `train.plan`, and printed with the plan.
"""

from dataclasses import dataclass

from train.engines.pipeline.partition import Partition
from train.metrics.flops import count_flops, peak_bandwidth, peak_flops
from train.plan.shapes import DeviceKind, Layout, Shape

GB = 1e9
# Operators of a block in a forward pass (two norms, four matmuls with biases, attention, two sums, GELU) and twice as
# many backward; selective recomputation repeats two norms, two sums and GELU, full recomputation all of them. A GPU
# starts one in about 5 us, a CPU in about as many.
OPERATORS = 3 * 10
GELU_IN_STEPS = 3 * 8  # more, of the baseline's
RECOMPUTED_OPERATORS = {"none": 0, "selective": 5, "full": 10}
SECONDS_TO_START = 5e-6
HIDDEN = 2 / 3  # of the arithmetic is backward, beside which gradients and parameters travel
HOST_MEMORY = 100 * GB  # bytes/s, at which a CPU updates what is offloaded to it
UPDATE_BYTES = 28  # AdamW in fp32 reads weight, gradient and two moments, and writes all but the gradient


@dataclass(frozen=True)
class Device:
    """What one process computes on, and how it reaches the others and its host."""

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
    """Seconds of a step by what they are spent on, and tokens/s of all processes."""

    arithmetic: float
    bubble: float
    communication: float  # what is not hidden behind arithmetic
    update: float
    tokens_per_second: float


def predict_speed(
    shape: Shape, layout: Layout, device: Device, efficiency: float, cut: Partition | None = None
) -> Speed:
    """Of a step of `layout.accumulation` micro-batches in each data-parallel process.

    Args:
        efficiency: the share of the device's peak that its products reach.
        cut: of a pipeline; the stage with the most FLOPs is the one all others wait for.
    """
    flops = count_flops(
        shape.n_layer,
        shape.n_embd,
        shape.n_inner,
        shape.vocab_size,
        shape.block_size,
        activation_checkpointing=layout.recompute,
        fused_attention=layout.fused_attention,
    )
    tokens = layout.micro_batch * layout.accumulation * shape.block_size  # of a data-parallel process
    rate = efficiency * device.flops(layout.bf16)
    largest_stage = 1.0
    if cut is not None:
        stages = [sum(cut.flops[layer] for layer in cut.layers(stage)) for stage in range(cut.stages)]
        largest_stage = max(stages) / sum(stages)
    arithmetic = largest_stage * tokens * flops.hardware / rate
    operators = OPERATORS + RECOMPUTED_OPERATORS[layout.recompute] + (0 if layout.kind == "zero" else GELU_IN_STEPS)
    arithmetic += largest_stage * layout.accumulation * shape.n_layer * operators * SECONDS_TO_START
    if layout.recompute != "none":  # what is no matmul waits for memory: norms and sums 10 D, GELU 2 I a token
        width = 2 if layout.bf16 else 4
        moved = width * tokens * shape.n_layer * (10 * shape.n_embd + 2 * shape.n_inner)
        arithmetic += largest_stage * moved / device.bandwidth
    # (p - 1) / (m + p - 1) of the time is idle, that is (p - 1) / m of the busy time is added (GPipe, 1F1B).
    bubble = arithmetic * (layout.stages - 1) / layout.accumulation
    beside, after = traffic(shape, layout)
    hidden = HIDDEN * arithmetic
    communication = max(0.0, beside / device.link - hidden) + after / device.link
    update = _update(shape, layout, device)
    seconds = arithmetic + bubble + communication + update
    return Speed(arithmetic, bubble, communication, update, tokens * layout.data_parallel / seconds)


def traffic(shape: Shape, layout: Layout) -> tuple[float, float]:
    """Bytes that each process sends in a step: (beside the arithmetic, when nothing else runs).

    A ring of P processes sends (P - 1) / P of a tensor to gather or to reduce and scatter it, and twice that to sum
    it everywhere. DDP sums fp32 gradients once a step. ZeRO-1 reduces once, ZeRO-2 with every micro-batch, and both
    gather the new weights. ZeRO-3 and FSDP2 gather the weights forward and again backward with every micro-batch;
    gradients ZeRO-3 reduces as often, and FSDP2 once, in fp32. A pipeline sends hidden states on and their gradients
    back, in each micro-batch, and the two ends sum a tied head.
    """
    numbers = shape.parameters // layout.stages
    width = 2 if layout.bf16 else 4
    ring = (layout.data_parallel - 1) / layout.data_parallel
    per_micro_batch = layout.accumulation
    match layout.kind, layout.zero_stage:
        case "ddp", _:
            return 2 * ring * 4 * numbers, 0.0
        case "fsdp2", _:
            return ring * (per_micro_batch * 2 * width + 4) * numbers, 0.0
        case "zero", 3:
            return per_micro_batch * ring * 3 * width * numbers, 0.0
        case "zero", 2:
            return per_micro_batch * ring * width * numbers, ring * width * numbers
        case "zero", _:
            after = 2 * ring * width * numbers
            if layout.stages > 1:
                borders = layout.accumulation * 2 * width * layout.micro_batch * shape.block_size * shape.n_embd
                after += borders + 2 * width * shape.vocabulary
            return 0.0, after
    return 0.0, 0.0


def _update(shape: Shape, layout: Layout, device: Device) -> float:
    """Seconds of AdamW; offloaded, on the host, with gradients on their way there and weights on their way back."""
    numbers = shape.parameters / layout.stages
    if layout.kind in ("fsdp2", "zero"):
        numbers /= layout.data_parallel
    if not layout.offload:
        return UPDATE_BYTES * numbers / device.bandwidth
    width = 2 if layout.bf16 else 4
    trips = 2 if layout.zero_stage < 3 else 1 + 3 * layout.accumulation  # the weights come for every pass
    return UPDATE_BYTES * numbers / HOST_MEMORY + trips * width * numbers / device.host_link
