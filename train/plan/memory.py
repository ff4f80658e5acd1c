"""Predict the peak memory of a process in a training step, by allocating and freeing tensors on paper.

Every size was read off a tracked step (`train.metrics.memory_tracker`), and tests/test_plan_memory.py compares the
predictions with tracked steps. Bytes are those of tensors, without an allocator's gaps or the memory of libraries.
Without torch.compile, which saves fewer of a block's activations, so that a compiled run needs less.

Shapes: see `train.plan.sizes`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from modeling_gpt2flash.loss import CPU_PIECE_ROWS
from train.metrics.memory_profile import CATEGORIES
from train.plan.shapes import Layout, Shape
from train.plan.sizes import BF16, FP32, INT64, StageSizes


@dataclass(frozen=True)
class Memory:
    """Peak memory in bytes, and its categories at the peak."""

    peak: int
    at_peak: Mapping[str, int]


class Ledger:
    """Bytes that are allocated now, by category, and their peak."""

    def __init__(self) -> None:
        self.held = dict.fromkeys(CATEGORIES, 0)
        self.peak = Memory(0, self.held)

    def hold(self, **bytes_: int) -> None:
        """Allocate until freed."""
        for category, amount in bytes_.items():
            self.held[category] += amount
        self.pass_through()

    def free(self, **bytes_: int) -> None:
        for category, amount in bytes_.items():
            self.held[category] -= amount

    def pass_through(self, **temporary: int) -> None:
        """Allocate these beside what is held, and free them at once."""
        now = {category: amount + temporary.get(category, 0) for category, amount in self.held.items()}
        if sum(now.values()) > self.peak.peak:
            self.peak = Memory(sum(now.values()), now)


def predict(shape: Shape, layout: Layout) -> Memory:
    """The peak of the process with the most."""
    return max((predict_stage(shape, layout, stage) for stage in range(layout.stages)), key=lambda found: found.peak)


def predict_stage(shape: Shape, layout: Layout, stage: int) -> Memory:
    """The peak of a process of one pipeline stage over a step."""
    sizes, ledger = StageSizes(shape, layout, stage), Ledger()
    _allocate_state(sizes, ledger)
    at_once = min(layout.stages - stage, layout.accumulation)
    # The first backward pass runs with all micro-batches in flight, and a later one with gradients as well.
    later = at_once if layout.accumulation > at_once else at_once - 1
    for number, in_flight in enumerate((at_once, later)):
        if in_flight:
            waiting = (in_flight - 1) * sizes.saved_by_forward
            ledger.hold(activations=waiting)
            _forward(sizes, ledger)
            _backward(sizes, ledger, has_gradients=number > 0)
            ledger.free(activations=waiting)
    _update(sizes, ledger)
    return ledger.peak


def _allocate_state(sizes: StageSizes, ledger: Ledger) -> None:
    """Bytes for each parameter, before any gradient.

    Plain: 4 weight + 8 AdamW's two moments. DDP: 4 more for its buckets of gradients. FSDP2: plain / P. ZeRO-1 and 2:
    the weight (2 in bf16) + (4 fp32 master weight, also in fp32, + 8) / P. ZeRO-3: (weight + 4 + 8 + gradient) / P,
    and its bucket. Offloaded state is in the host's memory. A stage after the first has buffers for the received
    hidden states, their copy that autograd starts from, and the gradient that is sent back.
    """
    layout, count, shard = sizes.layout, sizes.parameter_count, sizes.shard
    on_device = sizes.state_on_device
    tokens = 2 * INT64 * sizes.tokens  # inputs and labels
    match layout.kind, layout.zero_stage:
        case "single", _:
            ledger.hold(parameters=FP32 * count, optimizer=2 * FP32 * count, workspace=tokens)
        case "ddp", _:
            ledger.hold(parameters=FP32 * count, optimizer=2 * FP32 * count, workspace=tokens + FP32 * count)
        case "fsdp2", _:
            ledger.hold(parameters=FP32 * shard, optimizer=2 * FP32 * shard, workspace=tokens)
        case "zero", 3:
            ledger.hold(
                parameters=on_device * sizes.weight * shard,
                gradients=on_device * sizes.weight * shard,
                optimizer=on_device * 3 * FP32 * shard,
                workspace=tokens + sizes.weight * layout.buckets.reduce,
            )
        case "zero", _:
            received = 3 * sizes.residual if sizes.stage else 0
            ledger.hold(
                parameters=sizes.weight * count, optimizer=on_device * 3 * FP32 * shard, workspace=tokens + received
            )


# Forward


def _forward(sizes: StageSizes, ledger: Ledger) -> None:
    shape, layout = sizes.shape, sizes.layout
    ledger.hold(parameters=sizes.gathered, activations=sizes.mask)
    ledger.hold(activations=sizes.saved_by_forward)
    if not sizes.has_head:
        return
    checkpoints = layout.activation_checkpointing != "none"
    cast = BF16 * sizes.blocks * shape.matrices if layout.autocast and checkpoints else 0
    ledger.hold(workspace=cast)  # autocast's copies, until the forward pass is over
    if layout.loss_chunk_size:
        _chunked_loss(sizes, ledger)
    else:
        logits = shape.vocab_size * sizes.tokens
        ledger.hold(activations=sizes.hidden + (BF16 * shape.vocabulary if layout.autocast else 0))
        ledger.hold(logits=FP32 * logits)  # log_softmax, saved
        ledger.pass_through(
            logits=sizes.compute * logits + (FP32 * logits if layout.bf16 else 0),
            workspace=sizes.residual if layout.autocast else 0,
        )
    ledger.free(workspace=cast)


def _chunked_loss(sizes: StageSizes, ledger: Ledger) -> None:
    """The logits of a chunk, and the gradients of hidden states and head, which the forward pass computes and saves.

    The head's is summed in fp32 and saved in the precision of the weight.
    """
    shape, layout = sizes.shape, sizes.layout
    rows, head = min(layout.loss_chunk_size, sizes.tokens), sizes.head_gradient
    logits = sizes.compute * rows * sizes.padded_vocabulary
    temporary = sizes.residual + sizes.compute * rows * shape.n_embd  # the final norm's output, a chunk's gradient
    if layout.bf16:
        logits += (
            FP32 * shape.vocab_size * (min(CPU_PIECE_ROWS, rows) if layout.device == "cpu" else rows)
        )  # the softmax in fp32
        temporary += BF16 * head  # a chunk's gradient of the head
        if sizes.weight == BF16:
            temporary += FP32 * head  # the sum, before it is rounded
    if layout.autocast or head != shape.vocabulary:
        temporary += sizes.compute * head + sizes.compute * rows * shape.n_embd  # weight and rows cast
    ledger.hold(activations=sizes.residual + sizes.weight * head)
    ledger.pass_through(logits=logits, workspace=temporary)


# Backward


def _backward(sizes: StageSizes, ledger: Ledger, has_gradients: bool) -> None:
    """`has_gradients`: whether an earlier micro-batch has allocated them."""
    shape, layout = sizes.shape, sizes.layout
    vocabulary = sizes.weight * shape.vocabulary
    if sizes.has_head:
        _backward_of_loss(sizes, ledger)
        # The head's gradient of a tied weight waits for the embeddings', to which it is added.
        ledger.hold(workspace=vocabulary if sizes.has_embeddings else 0)
    ledger.hold(workspace=sizes.residual)  # the gradient of the residual stream
    shard = sizes.weight * sizes.parameter_count // layout.data_parallel
    added = shard if layout.zero_stage == 2 and has_gradients else 0  # of this micro-batch, before it is added
    if layout.kind == "zero":
        ledger.hold(workspace=sizes.buckets, gradients=added)
    bytes_each = 0 if has_gradients else sizes.gradient_bytes
    if sizes.has_head and not sizes.has_embeddings:
        _gradients(sizes, ledger, shape.vocabulary, bytes_each)
    prefetched = 2 * sizes.compute * shape.block if layout.kind == "fsdp2" else 0
    ledger.hold(parameters=prefetched)
    for _ in range(sizes.blocks):
        ledger.free(activations=sizes.saved_by_block)
        _backward_of_block(sizes, ledger)
        _gradients(sizes, ledger, shape.block, bytes_each)
    ledger.free(parameters=prefetched)
    if sizes.has_embeddings:
        # The gradient of the embeddings, the head's, and their sum.
        ledger.pass_through(workspace=vocabulary * (2 if sizes.has_head else 1))
        _gradients(sizes, ledger, shape.layers[0], bytes_each)
    _gradients(sizes, ledger, 2 * shape.n_embd * sizes.has_norm, bytes_each)
    ledger.free(workspace=sizes.residual, activations=sizes.residual)
    if sizes.has_head and sizes.has_embeddings:
        ledger.free(workspace=vocabulary)
    if layout.kind == "zero":
        if layout.zero_stage == 1:  # the shard is copied out of the buckets
            ledger.pass_through(gradients=shard)
        ledger.free(workspace=sizes.buckets, gradients=added)
    ledger.free(parameters=sizes.gathered, activations=sizes.mask)


def _gradients(sizes: StageSizes, ledger: Ledger, count: int, bytes_each: float) -> None:
    """The gradients of `count` parameters are computed, of which `bytes_each` remain."""
    computed = sizes.weight * count
    if sizes.layout.kind == "fsdp2":
        computed = (sizes.compute + 2 * FP32) * count  # as computed, to be reduced, and those of the block before
    ledger.pass_through(workspace=computed)
    ledger.hold(gradients=int(bytes_each * count))


def _backward_of_loss(sizes: StageSizes, ledger: Ledger) -> None:
    shape, layout = sizes.shape, sizes.layout
    if layout.loss_chunk_size:  # the gradients exist already, and are scaled in place
        ledger.free(activations=sizes.residual + sizes.weight * sizes.head_gradient)
        return
    logits = shape.vocab_size * sizes.tokens
    ledger.pass_through(logits=2 * FP32 * logits)  # of the log-softmax, and of the logits
    ledger.free(logits=FP32 * logits)
    ledger.pass_through(logits=(FP32 + (BF16 if layout.bf16 else 0)) * logits, workspace=sizes.hidden)
    ledger.pass_through(logits=sizes.compute * logits, workspace=sizes.hidden + (FP32 + BF16) * shape.vocabulary)
    ledger.free(activations=sizes.hidden + (BF16 * shape.vocabulary if layout.autocast else 0))


def _backward_of_block(sizes: StageSizes, ledger: Ledger) -> None:
    """The peak is at GELU, whose output is freed, with two gradients of B T I (three if it is several operators); or
    at eager attention's softmax, after the MLP's activations are freed, with two gradients of the scores."""
    activations = sizes.block_activations
    matrix = sizes.weight * sizes.shape.n_embd * sizes.shape.n_inner  # the gradient of the MLP's second matrix
    gradients = 2 if sizes.saved_by_mlp == 2 else 3
    ledger.pass_through(activations=activations - sizes.inner, workspace=gradients * sizes.inner + matrix)
    if not sizes.layout.fused_attention:
        of_mlp = sizes.saved_by_mlp * sizes.inner + sizes.hidden + sizes.residual
        of_scores = 2 * FP32 * sizes.scores - (BF16 * sizes.scores if sizes.layout.bf16 else 0)
        ledger.pass_through(activations=activations - of_mlp, workspace=of_scores + 2 * sizes.hidden + matrix)


# The update


def _update(sizes: StageSizes, ledger: Ledger) -> None:
    """The temporary tensors of AdamW.

    The baseline's: two of the size of the largest parameter on a CPU, which updates one parameter after the other; one
    of the size of all on a GPU, which updates all at once. The optimized run's fused AdamW needs none; but ZeRO
    concatenates the gradients of a shard, and casts them to fp32.
    """
    layout, shard = sizes.layout, sizes.shard
    if layout.kind == "zero":
        from_buckets = layout.zero_stage < 3
        concatenated = sizes.weight * shard if sizes.weight == BF16 or from_buckets else 0
        ledger.free(gradients=ledger.held["gradients"] if from_buckets else 0)
        cast = (FP32 * shard if sizes.weight == BF16 else 0) * sizes.state_on_device
        ledger.pass_through(gradients=sizes.weight * shard if from_buckets else 0, workspace=concatenated + cast)
    elif layout.device != "cpu":
        ledger.pass_through(workspace=FP32 * (shard if layout.kind == "fsdp2" else sizes.parameter_count))
    else:
        sharded_by = layout.data_parallel if layout.kind == "fsdp2" else 1
        ledger.pass_through(workspace=2 * FP32 * sizes.largest_parameter // sharded_by)
