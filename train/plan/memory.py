"""Predict the peak memory of a process in a training step, by allocating and freeing tensors on paper.

Every size was read off a tracked step (`train.metrics.memory_tracker`), and tests/test_plan_memory.py compares the
predictions with tracked steps. Bytes are those of tensors, without an allocator's gaps or the memory of libraries, in
a run with fused attention and a chunked loss. In FSDP2 the loss is not chunked: Accelerate wraps the head, which must
then be called. torch.compile saves fewer of a block's activations, so that a compiled run needs less.

Shapes: B sequences of a micro-batch, T positions, D hidden width, I width of the MLP, H heads, V vocabulary, P
data-parallel processes.
"""

from collections import Counter

from modeling_gpt2flash.loss import ALIGNMENT, CPU_PIECE_ROWS
from train.metrics.memory_profile import CATEGORIES
from train.plan.shapes import Layout, Shape

FP32, BF16, INT64 = 4, 2, 8


class Ledger:
    """Bytes that are allocated now, and at the peak so far, by category."""

    def __init__(self) -> None:
        self.held = Counter(dict.fromkeys(CATEGORIES, 0))
        self.at_peak = self.held
        self.peak = 0

    def hold(self, **bytes_: int) -> None:
        """Allocate until freed."""
        self.held.update(bytes_)
        self.pass_through()

    def free(self, **bytes_: int) -> None:
        self.held.subtract(bytes_)

    def pass_through(self, **temporary: int) -> None:
        """Allocate these in addition to what is held, and free them at once."""
        now = self.held.copy()
        now.update(temporary)
        if now.total() > self.peak:
            self.peak, self.at_peak = now.total(), now


class StageSizes:
    """What a pipeline stage (the full model without a pipeline) consists of, and the sizes of its tensors in bytes."""

    def __init__(self, shape: Shape, layout: Layout, stage: int) -> None:
        self.shape, self.layout, self.stage = shape, layout, stage
        last_layer = shape.n_layer + 2
        bounds = layout.bounds or (0, last_layer + 1)
        own = range(bounds[stage], bounds[stage + 1])  # its layers
        self.blocks = sum(1 <= layer <= shape.n_layer for layer in own)
        self.has_embeddings, self.has_norm, self.has_head = 0 in own, last_layer - 1 in own, last_layer in own
        # Before sharding; the first and the last stage have a copy each of a tied head.
        tied = shape.vocabulary if self.has_embeddings and self.has_head else 0
        self.parameter_count = sum(shape.layers[layer] for layer in own) - tied
        self.shard = -(-self.parameter_count // layout.data_parallel)
        self.state_on_device = not layout.offload or layout.device == "cpu"

        self.tokens = layout.micro_batch * shape.block_size  # B T
        pure_bf16 = layout.bf16 and not layout.autocast
        self.compute = layout.compute
        self.weight = BF16 if pure_bf16 else FP32  # of an element of the model's own parameters and their gradients
        self.residual = self.weight * self.tokens * shape.n_embd  # of the residual stream
        self.hidden = self.compute * self.tokens * shape.n_embd
        self.inner = self.compute * self.tokens * shape.n_inner
        # Tensors of B T I that the MLP saves: the input and output of GELU; of the baseline's GELU, which is several
        # operators, three more.
        self.saved_by_mlp = 2 if layout.kind == "zero" else 5
        # GPUs compute the chunked loss with a padded vocabulary.
        self.padded_vocabulary = -(-shape.vocab_size // ALIGNMENT) * ALIGNMENT
        columns = shape.vocab_size if layout.device == "cpu" else self.padded_vocabulary
        self.head_gradient = columns * shape.n_embd  # elements

    @property
    def gathered(self) -> int:
        """Full parameters that are gathered from other processes while a layer computes.

        FSDP2: the embeddings all the time (a block and the prefetched one are added in the backward pass). ZeRO-3
        releases a parameter only if it is needed again after more than `reuse` elements; between the forward and the
        backward pass that is twice the number of elements in later layers.
        """
        shape, layout = self.shape, self.layout
        if layout.kind == "fsdp2":
            return self.compute * shape.layers[0]
        if layout.zero_stage == 3:
            buckets = layout.buckets
            return self.compute * min(shape.parameters, buckets.reuse // 2 + buckets.prefetch + shape.vocabulary)
        return 0

    @property
    def gradient_bytes(self) -> float:
        """Bytes held for each parameter until the update."""
        layout = self.layout
        match layout.kind, layout.zero_stage:
            case "fsdp2", _:  # unsharded and in fp32 while they are accumulated
                return FP32 / (1 if layout.accumulation > 1 else layout.data_parallel)
            case "zero", 2:
                return self.weight / layout.data_parallel
            case "zero", 3:
                return 0
        return self.weight

    @property
    def block_activations(self) -> int:
        """What a block saves for its backward pass without activation checkpointing, including its input.

        In the precision of matmuls: the outputs of both norms 2 B T D, q, k, v and attention's output 4 B T D, and
        `saved_by_mlp`. In that of the residual stream: its two sums 2 B T D. Norms save mean and deviation, attention
        one number for each row and head. Autocast saves the cast matrices.
        """
        saved = 2 * self.residual + 6 * self.hidden + self.saved_by_mlp * self.inner
        saved += FP32 * self.tokens * (4 + self.shape.n_head)
        return saved + (BF16 * self.shape.matrices if self.layout.autocast else 0)

    @property
    def saved_by_block(self) -> int:
        """What a block saves until its backward pass: everything; its input ("full"); or that and the outputs of
        attention and of its four matmuls ("selective")."""
        match self.layout.activation_checkpointing:
            case "none":
                return self.block_activations
            case "full":
                return self.residual
        return self.residual + 6 * self.hidden + self.inner + FP32 * self.tokens * self.shape.n_head

    @property
    def saved_by_forward(self) -> int:
        """What the blocks save for one micro-batch, and the last sum, which the next stage or the norm reads."""
        return self.blocks * self.saved_by_block + self.residual

    @property
    def saved_by_loss(self) -> int:
        """The gradients of hidden states and head, in the precision of the weight, which the forward pass computes."""
        return self.residual + self.weight * self.head_gradient


def predict(shape: Shape, layout: Layout) -> Ledger:
    """The step of the process with the highest peak."""
    return max((predict_stage(shape, layout, stage) for stage in range(layout.stages)), key=lambda found: found.peak)


def predict_stage(shape: Shape, layout: Layout, stage: int) -> Ledger:
    """A step of a process of one pipeline stage."""
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
    return ledger


def _allocate_state(sizes: StageSizes, ledger: Ledger) -> None:
    """Bytes for each parameter, before any gradient.

    Plain: 4 weight + 8 AdamW's two moments. DDP: 4 more for its buckets of gradients. FSDP2: plain / P. ZeRO-1 and 2:
    the weight (2 in bf16) + (4 fp32 master weight, also in fp32, + 8) / P. ZeRO-3: (weight + 4 + 8 + gradient) / P,
    and its bucket. Offloaded state is in the host's memory. A stage after the first has buffers for the received
    hidden states, their copy that autograd starts from, and the gradient that is sent back.
    """
    layout, count, shard = sizes.layout, sizes.parameter_count, sizes.shard
    ledger.hold(workspace=2 * INT64 * sizes.tokens)  # inputs and labels
    if layout.kind != "zero":
        own = shard if layout.kind == "fsdp2" else count
        ledger.hold(parameters=FP32 * own, optimizer=2 * FP32 * own)
        ledger.hold(workspace=FP32 * count if layout.kind == "ddp" else 0)
        return
    ledger.hold(optimizer=sizes.state_on_device * 3 * FP32 * shard)
    if layout.zero_stage == 3:
        sharded = sizes.state_on_device * sizes.weight * shard
        ledger.hold(parameters=sharded, gradients=sharded, workspace=sizes.weight * layout.buckets.reduce)
    else:
        ledger.hold(parameters=sizes.weight * count, workspace=3 * sizes.residual if sizes.stage else 0)


def _forward(sizes: StageSizes, ledger: Ledger) -> None:
    """The blocks' activations; then the logits of a chunk of the loss, and the loss's gradients, summed in fp32."""
    shape, layout = sizes.shape, sizes.layout
    ledger.hold(parameters=sizes.gathered, activations=sizes.saved_by_forward)
    if not sizes.has_head:
        return
    if layout.kind == "fsdp2":
        logits = shape.vocab_size * sizes.tokens
        ledger.hold(activations=sizes.hidden, logits=FP32 * logits)  # the head's input, and log_softmax
        ledger.pass_through(logits=sizes.compute * logits + (FP32 * logits if layout.bf16 else 0))
        return
    rows, head = min(layout.loss_chunk_size, sizes.tokens), sizes.head_gradient
    logits = sizes.compute * rows * sizes.padded_vocabulary
    temporary = sizes.residual + sizes.compute * rows * shape.n_embd  # the final norm's output, a chunk's gradient
    if layout.bf16:
        softmax_rows = min(CPU_PIECE_ROWS, rows) if layout.device == "cpu" else rows
        logits += FP32 * shape.vocab_size * softmax_rows  # the softmax in fp32
        temporary += BF16 * head  # a chunk's gradient of the head
        if sizes.weight == BF16:
            temporary += FP32 * head  # the sum, before it is rounded
    if layout.autocast or head != shape.vocabulary:
        temporary += sizes.compute * head + sizes.compute * rows * shape.n_embd  # weight and rows cast
    if layout.autocast and layout.activation_checkpointing != "none":
        temporary += BF16 * sizes.blocks * shape.matrices  # autocast's copies, until the forward pass is over
    ledger.hold(activations=sizes.saved_by_loss)
    ledger.pass_through(logits=logits, workspace=temporary)


def _backward(sizes: StageSizes, ledger: Ledger, has_gradients: bool) -> None:
    """`has_gradients`: whether an earlier micro-batch has allocated them."""
    shape, layout = sizes.shape, sizes.layout
    vocabulary = sizes.weight * shape.vocabulary
    # The head's gradient of a tied weight waits for the embeddings', to which it is added.
    waiting = vocabulary if sizes.has_head and sizes.has_embeddings else 0
    if layout.kind == "fsdp2":
        logits = shape.vocab_size * sizes.tokens
        ledger.pass_through(logits=2 * FP32 * logits)  # of the log-softmax, and of the logits
        ledger.free(logits=FP32 * logits)
        ledger.pass_through(logits=(FP32 + (BF16 if layout.bf16 else 0)) * logits, workspace=sizes.hidden)
        ledger.pass_through(logits=sizes.compute * logits, workspace=sizes.hidden + (FP32 + BF16) * shape.vocabulary)
        ledger.free(activations=sizes.hidden)
    elif sizes.has_head:  # the gradients of the loss exist already, and are scaled in place
        ledger.free(activations=sizes.saved_by_loss)
    ledger.hold(workspace=waiting + sizes.residual)  # the gradient of the residual stream
    # ZeRO-1 reduces gradients in one bucket of its full size, ZeRO-2 in two by turns.
    buckets = sizes.weight * layout.buckets.reduce * {1: 1, 2: 2}.get(layout.zero_stage, 0)
    shard = sizes.weight * sizes.parameter_count // layout.data_parallel
    added = shard if layout.zero_stage == 2 and has_gradients else 0  # of this micro-batch, before it is added
    ledger.hold(workspace=buckets, gradients=added)
    bytes_each = 0 if has_gradients else sizes.gradient_bytes
    if sizes.has_head and not sizes.has_embeddings:
        _gradients(sizes, ledger, shape.vocabulary, bytes_each)
    prefetched = 2 * sizes.compute * shape.block if layout.kind == "fsdp2" else 0
    ledger.hold(parameters=prefetched)
    # A block's peak is at GELU, whose output is freed, with two gradients of B T I (three if it is several operators)
    # and that of the MLP's second matrix.
    at_gelu = (2 if sizes.saved_by_mlp == 2 else 3) * sizes.inner + sizes.weight * shape.n_embd * shape.n_inner
    for _ in range(sizes.blocks):
        ledger.free(activations=sizes.saved_by_block)
        ledger.pass_through(activations=sizes.block_activations - sizes.inner, workspace=at_gelu)
        _gradients(sizes, ledger, shape.block, bytes_each)
    ledger.free(parameters=prefetched)
    if sizes.has_embeddings:
        # The gradient of the embeddings, the head's, and their sum.
        ledger.pass_through(workspace=vocabulary * (2 if sizes.has_head else 1))
        _gradients(sizes, ledger, shape.layers[0], bytes_each)
    _gradients(sizes, ledger, 2 * shape.n_embd * sizes.has_norm, bytes_each)
    ledger.free(workspace=waiting + sizes.residual, activations=sizes.residual)
    if layout.zero_stage == 1:  # the shard is copied out of the buckets
        ledger.pass_through(gradients=shard)
    ledger.free(workspace=buckets, gradients=added, parameters=sizes.gathered)


def _gradients(sizes: StageSizes, ledger: Ledger, count: int, bytes_each: float) -> None:
    """The gradients of `count` parameters are computed, of which `bytes_each` remain."""
    computed = sizes.weight * count
    if sizes.layout.kind == "fsdp2":
        computed = (sizes.compute + 2 * FP32) * count  # as computed, to be reduced, and those of the block before
    ledger.pass_through(workspace=computed)
    ledger.hold(gradients=int(bytes_each * count))


def _update(sizes: StageSizes, ledger: Ledger) -> None:
    """The temporary tensors of AdamW.

    The baseline's: two of the size of the largest parameter on a CPU, which updates one parameter after the other; one
    of the size of all on a GPU, which updates all at once. The optimized run's fused AdamW needs none; but ZeRO
    concatenates the gradients of a shard, and casts them to fp32.
    """
    shape, layout = sizes.shape, sizes.layout
    own = sizes.shard if layout.kind == "fsdp2" else sizes.parameter_count
    if layout.kind == "zero":
        shard = sizes.weight * sizes.shard
        from_buckets = layout.zero_stage < 3
        concatenated = shard if sizes.weight == BF16 or from_buckets else 0
        ledger.free(gradients=ledger.held["gradients"] if from_buckets else 0)
        cast = FP32 * sizes.shard if sizes.weight == BF16 and sizes.state_on_device else 0
        ledger.pass_through(gradients=shard if from_buckets else 0, workspace=concatenated + cast)
    elif layout.device != "cpu":
        ledger.pass_through(workspace=FP32 * own)
    else:
        ends = sizes.has_embeddings or sizes.has_head
        largest = shape.vocabulary if ends else shape.n_embd * shape.n_inner
        sharded_by = layout.data_parallel if layout.kind == "fsdp2" else 1
        ledger.pass_through(workspace=2 * FP32 * largest // sharded_by)
