"""What one process holds while it trains, by arithmetic: a step is gone through once, tensor by tensor, on paper.

Every number below was read off a tracked step (`train.metrics.memory_tracker`) and is held to it by
tests/test_plan_memory.py. Bytes are those of tensors, without an allocator's gaps or what libraries take. Not
compiled: torch.compile keeps fewer of a block's activations, so that a compiled run needs less than is said here.

Shapes: B sequences of a micro-batch, T positions, D width, I width of the MLP, H heads, V vocabulary, L blocks, N
parameters of the process's share of the model, P processes that share the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from modeling_gpt2flash.loss import ALIGNMENT, CPU_PIECE_ROWS
from train.metrics.memory_profile import CATEGORIES
from train.plan.shapes import Layout, Shape

FP32, BF16, INT64 = 4, 2, 8


@dataclass(frozen=True)
class Memory:
    """The most that a process holds at one time, and of what it consists."""

    peak: int
    at_peak: Mapping[str, int]


def predict(shape: Shape, layout: Layout) -> Memory:
    """Of the process with the most."""
    return max((predict_stage(shape, layout, stage) for stage in range(layout.stages)), key=lambda found: found.peak)


def predict_stage(shape: Shape, layout: Layout, stage: int) -> Memory:
    return _Step(shape, layout, stage).run()


class _Step:
    """The tensors of one process over a step."""

    def __init__(self, shape: Shape, layout: Layout, stage: int) -> None:
        self.shape, self.layout = shape, layout
        last_layer = shape.n_layer + 2
        bounds = layout.bounds or (0, last_layer + 1)
        own = range(bounds[stage], bounds[stage + 1])
        self.stage = stage
        self.blocks = sum(1 <= layer <= shape.n_layer for layer in own)
        self.first, self.has_norm, self.last = 0 in own, last_layer - 1 in own, last_layer in own

        tokens = layout.micro_batch * shape.block_size
        self.tokens = tokens
        pure = layout.bf16 and not layout.autocast
        self.compute = BF16 if layout.bf16 else FP32  # what products read and write
        self.residual = (BF16 if pure else FP32) * tokens * shape.n_embd
        self.hidden = self.compute * tokens * shape.n_embd
        self.inner = self.compute * tokens * shape.n_inner
        self.scores = layout.micro_batch * shape.n_head * shape.block_size**2
        self.weight = BF16 if pure else FP32  # of the model's own parameters, and their gradients
        self.held = dict.fromkeys(CATEGORIES, 0)
        self.peak = Memory(0, self.held)

    def run(self) -> Memory:
        self._hold_state()
        at_once = min(self.layout.stages - self.stage, self.layout.accumulation)
        # The first backward pass comes with all micro-batches in flight, and a later one with gradients as well.
        later = at_once if self.layout.accumulation > at_once else at_once - 1
        for number, in_flight in enumerate((at_once, later)):
            if in_flight:
                waiting = (in_flight - 1) * self._kept_by_forward()
                self._hold(activations=waiting)
                self._forward()
                self._backward(has_gradients=number > 0)
                self._free(activations=waiting)
        self._update()
        return self.peak

    def _hold(self, **bytes_: int) -> None:
        for category, amount in bytes_.items():
            self.held[category] += amount
        self._moment()

    def _free(self, **bytes_: int) -> None:
        for category, amount in bytes_.items():
            self.held[category] -= amount

    def _moment(self, **passing: int) -> None:
        """What is held, and for a moment more."""
        now = {category: amount + passing.get(category, 0) for category, amount in self.held.items()}
        if sum(now.values()) > self.peak.peak:
            self.peak = Memory(sum(now.values()), now)

    # The state that stays

    @property
    def numbers(self) -> int:
        """Parameters of this process's stage, whole; a tied head is held by the first stage and the last."""
        shape = self.shape
        head = shape.vocabulary if self.last and not self.first else 0
        return self.first * shape.embeddings + self.blocks * shape.block + self.has_norm * 2 * shape.n_embd + head

    @property
    def largest(self) -> int:
        """The largest parameter."""
        return self.shape.vocabulary if self.first or self.last else self.shape.n_embd * self.shape.n_inner

    def _hold_state(self) -> None:
        """Bytes for each parameter, before any gradient.

        plain: 4 weight + 8 AdamW's two moments. DDP: and 4 for the buckets in which gradients travel. FSDP2: plain's
        over P. ZeRO-1 and 2: the weight (2 in bf16) + (4 fp32 master, in fp32 as well, + 8) / P. ZeRO-3: (weight + 4
        + 8 + gradient) / P, and its bucket. Offloaded state is the host's. A stage behind the first has buffers for
        the hidden states that come, their copy that autograd begins with, and the gradient that goes back.
        """
        layout, numbers = self.layout, self.numbers
        share = -(-numbers // layout.data_parallel)
        on_device = not layout.offload or layout.device == "cpu"
        tokens = 2 * INT64 * self.tokens  # inputs and labels
        match layout.kind, layout.zero_stage:
            case "single", _:
                self._hold(parameters=FP32 * numbers, optimizer=2 * FP32 * numbers, workspace=tokens)
            case "ddp", _:
                self._hold(parameters=FP32 * numbers, optimizer=2 * FP32 * numbers, workspace=tokens + FP32 * numbers)
            case "fsdp2", _:
                self._hold(parameters=FP32 * share, optimizer=2 * FP32 * share, workspace=tokens)
            case "zero", 3:
                self._hold(
                    parameters=on_device * self.weight * share,
                    gradients=on_device * self.weight * share,
                    optimizer=on_device * 3 * FP32 * share,
                    workspace=tokens + self.weight * layout.buckets.reduce,
                )
            case "zero", _:
                passed = 3 * self.residual if self.stage else 0
                self._hold(
                    parameters=self.weight * numbers,
                    optimizer=on_device * 3 * FP32 * share,
                    workspace=tokens + passed,
                )

    @property
    def gathered(self) -> int:
        """Bytes of whole parameters that come from other processes while a layer computes.

        FSDP2: the embeddings throughout (and, in `_backward`, a block and the one fetched ahead). ZeRO-3 lets go of a
        parameter only if it is needed again after more than `reuse` numbers; from the forward to the backward pass
        that is twice what lies behind it.
        """
        shape, layout, width = self.shape, self.layout, self.compute
        if layout.kind == "fsdp2":
            return width * shape.embeddings
        if layout.kind == "zero" and layout.zero_stage == 3:
            buckets = layout.buckets
            return width * min(shape.parameters, buckets.reuse // 2 + buckets.prefetch + shape.vocabulary)
        return 0

    # Forward

    @property
    def inner_kept(self) -> int:
        """Tensors of B T I that the MLP keeps: GELU's input and output; of its tanh form in steps, as the baseline has
        it, three of those as well."""
        return 2 if self.layout.kind == "zero" else 5

    @property
    def block_activations(self) -> int:
        """What a block keeps for its backward pass, its input included.

        In products' precision: both norms' outputs 2 B T D, q, k, v and attention's output 4 B T D, and what the MLP
        keeps (`inner_kept`). In the residual stream's: its two sums 2 B T D. Norms keep mean and deviation. Attention:
        eager its probabilities, in fp32 and as they are multiplied; fused kernels a number for each row and head.
        Autocast keeps the cast matrices.
        """
        shape, layout = self.shape, self.layout
        kept = 2 * self.residual + 6 * self.hidden + self.inner_kept * self.inner
        kept += 4 * FP32 * self.tokens
        if layout.fused_attention:
            kept += FP32 * self.tokens * shape.n_head
        else:
            kept += self.scores * (FP32 + (BF16 if layout.bf16 else 0))
        return kept + (BF16 * shape.matrices if layout.autocast else 0)

    @property
    def block_kept(self) -> int:
        """What a block keeps until its backward pass begins: all, its input alone, or that and the outputs of
        attention and of its four matmuls."""
        if self.layout.recompute == "none":
            return self.block_activations
        saved = 6 * self.hidden + self.inner + FP32 * self.tokens * self.shape.n_head
        return self.residual + (saved if self.layout.recompute == "selective" else 0)

    def _kept_by_forward(self) -> int:
        """By a stage for one micro-batch: its blocks and the last sum, which the next stage or the norm reads."""
        return self.blocks * self.block_kept + self.residual

    @property
    def mask(self) -> int:
        """Eager attention's mask, which recomputed blocks and the stages of a pipeline keep for their next run."""
        layout = self.layout
        kept = not layout.fused_attention and self.blocks and (layout.recompute != "none" or layout.stages > 1)
        return FP32 * layout.micro_batch * self.shape.block_size**2 if kept else 0

    def _forward(self) -> None:
        shape, layout = self.shape, self.layout
        self._hold(parameters=self.gathered, activations=self.mask)
        self._hold(activations=self._kept_by_forward())
        if not self.last:
            return
        cast = BF16 * self.blocks * shape.matrices if layout.autocast and layout.recompute != "none" else 0
        self._hold(workspace=cast)  # autocast's copies, until the forward pass is over
        if layout.loss_chunk_size:
            self._chunked_loss()
        else:
            logits = shape.vocab_size * self.tokens
            scored = FP32 * logits  # log_softmax, kept
            self._hold(activations=self.hidden + (BF16 * shape.vocabulary if layout.autocast else 0))
            widened = FP32 * logits if layout.bf16 else 0
            outputs = self.residual if layout.autocast else 0
            self._hold(logits=scored)
            self._moment(logits=self.compute * logits + widened, workspace=outputs)
        self._free(workspace=cast)

    def _chunked_loss(self) -> None:
        """A chunk's logits, and the gradients of rows (kept) and vocabulary (summed in fp32, kept in the weight's)."""
        shape, layout = self.shape, self.layout
        columns = -(-shape.vocab_size // ALIGNMENT) * ALIGNMENT
        rows = min(layout.loss_chunk_size, self.tokens)
        on_cpu = layout.device == "cpu"
        vocabulary = (shape.vocab_size if on_cpu else columns) * shape.n_embd
        logits = self.compute * rows * columns
        passing = self.residual + self.compute * rows * shape.n_embd  # the final norm's output, a chunk's gradient
        if layout.bf16:
            logits += FP32 * shape.vocab_size * (min(CPU_PIECE_ROWS, rows) if on_cpu else rows)  # scored in fp32
            passing += BF16 * vocabulary  # a chunk's gradient of the vocabulary
            if self.weight == BF16:
                passing += FP32 * vocabulary  # the sum, before it is rounded
        if layout.autocast or vocabulary != shape.vocabulary:
            passing += self.compute * vocabulary + self.compute * rows * shape.n_embd  # weight and rows cast
        self._hold(activations=self.residual + self.weight * vocabulary)
        self._moment(logits=logits, workspace=passing)

    # Backward

    def _backward(self, has_gradients: bool) -> None:
        shape, layout = self.shape, self.layout
        vocabulary = self.weight * shape.vocabulary
        gradient = self.residual  # of the residual stream
        if self.last:
            self._backward_of_loss()
            # The head's share waits for the embeddings', to which it is added.
            self._hold(workspace=vocabulary if self.first else 0)
        self._hold(workspace=gradient)
        share = self.weight * self.numbers // layout.data_parallel
        added = share if layout.zero_stage == 2 and has_gradients else 0  # this micro-batch's, before it is added
        if layout.kind == "zero":
            self._hold(workspace=self.buckets, gradients=added)
        sink = 0 if has_gradients else self._gradient_bytes
        if self.last and not self.first:
            self._gradients(shape.vocabulary, sink)
        ahead = 2 * self.compute * shape.block if layout.kind == "fsdp2" else 0
        self._hold(parameters=ahead)
        for _ in range(self.blocks):
            self._free(activations=self.block_kept)
            self._block_backward()
            self._gradients(shape.block, sink)
        self._free(parameters=ahead)
        if self.first:
            # Embedding's own gradient, the head's, and their sum.
            self._moment(workspace=vocabulary * (2 if self.last else 1))
            self._gradients(shape.embeddings, sink)
        self._gradients(2 * shape.n_embd * self.has_norm, sink)
        self._free(workspace=gradient, activations=self.residual)
        if self.last and self.first:
            self._free(workspace=vocabulary)
        if layout.kind == "zero":
            if layout.zero_stage == 1:  # the share is copied out of the buckets
                self._moment(gradients=share)
            self._free(workspace=self.buckets, gradients=added)
        self._free(parameters=self.gathered, activations=self.mask)

    @property
    def buckets(self) -> int:
        """ZeRO-1 sends gradients through one bucket of its full size, ZeRO-2 through two by turns."""
        return self.weight * self.layout.buckets.reduce * {1: 1, 2: 2, 3: 0}[self.layout.zero_stage]

    @property
    def _gradient_bytes(self) -> float:
        """Held for each parameter until the update."""
        layout = self.layout
        match layout.kind, layout.zero_stage:
            case "fsdp2", _:  # while they are added up, whole and in fp32
                return FP32 / (1 if layout.accumulation > 1 else layout.data_parallel)
            case "zero", 2:
                return self.weight / layout.data_parallel
            case "zero", 3:
                return 0
        return self.weight

    def _gradients(self, numbers: int, bytes_each: float) -> None:
        whole = self.weight * numbers
        if self.layout.kind == "fsdp2":
            whole = (self.compute + 2 * FP32) * numbers  # as computed, to be summed, and those of the block before
        self._moment(workspace=whole)
        self._hold(gradients=int(bytes_each * numbers))

    def _backward_of_loss(self) -> None:
        shape, layout = self.shape, self.layout
        if layout.loss_chunk_size:  # its gradients are there, and scaled where they are
            vocabulary = shape.vocabulary
            if layout.device == "gpu":
                vocabulary = -(-shape.vocab_size // ALIGNMENT) * ALIGNMENT * shape.n_embd
            self._free(activations=self.residual + self.weight * vocabulary)
            return
        logits = shape.vocab_size * self.tokens
        self._moment(logits=2 * FP32 * logits)  # of the log-softmax, and of the logits
        self._free(logits=FP32 * logits)
        self._moment(logits=(FP32 + (BF16 if layout.bf16 else 0)) * logits, workspace=self.hidden)
        self._moment(logits=self.compute * logits, workspace=self.hidden + (FP32 + BF16) * shape.vocabulary)
        self._free(activations=self.hidden + (BF16 * shape.vocabulary if layout.autocast else 0))

    def _block_backward(self) -> None:
        """At its largest: at GELU, whose output is gone, and which has two gradients of B T I at hand, in steps three;
        or, eager, at the softmax, when the MLP's activations are gone, with two gradients of the scores."""
        shape = self.shape
        kept = self.block_activations
        matrix = self.weight * shape.n_embd * shape.n_inner  # the gradient of the MLP's second
        gradients = 2 if self.inner_kept == 2 else 3
        self._moment(activations=kept - self.inner, workspace=gradients * self.inner + matrix)
        if not self.layout.fused_attention:
            of_mlp = self.inner_kept * self.inner + self.hidden + self.residual
            more = 2 * FP32 * self.scores - (BF16 * self.scores if self.layout.bf16 else 0)
            self._moment(activations=kept - of_mlp, workspace=more + 2 * self.hidden + matrix)

    # The update

    def _update(self) -> None:
        """What AdamW takes beside its state.

        The baseline's, one parameter after the other on a CPU: two of its size; all at once on a GPU: one of all. The
        optimized run's fused one nothing; but ZeRO joins the gradients of a share, and widens them to fp32.
        """
        layout, numbers = self.layout, self.numbers
        share = -(-numbers // layout.data_parallel)
        if layout.kind == "zero":
            joined = self.weight * share if self.weight == BF16 or layout.zero_stage < 3 else 0
            held = self.weight * share if layout.zero_stage < 3 else 0
            self._free(gradients=self.held["gradients"] if layout.zero_stage < 3 else 0)
            on_device = not layout.offload or layout.device == "cpu"
            self._moment(gradients=held, workspace=joined + (FP32 * share if self.weight == BF16 else 0) * on_device)
        elif layout.device == "gpu":
            self._moment(workspace=FP32 * (share if layout.kind == "fsdp2" else numbers))
        else:
            self._moment(workspace=2 * FP32 * self.largest // (layout.data_parallel if layout.kind == "fsdp2" else 1))
