"""Sizes of the tensors of one pipeline stage (the full model without a pipeline) in one process, in bytes.

Shapes: B sequences of a micro-batch, T positions, D hidden width, I width of the MLP, H heads, V vocabulary, P
data-parallel processes.
"""

from modeling_gpt2flash.loss import ALIGNMENT
from train.plan.shapes import Layout, Shape

FP32, BF16, INT64 = 4, 2, 8


class StageSizes:
    """What a stage consists of, and the sizes of its tensors."""

    def __init__(self, shape: Shape, layout: Layout, stage: int) -> None:
        self.shape, self.layout, self.stage = shape, layout, stage
        last_layer = shape.n_layer + 2
        bounds = layout.bounds or (0, last_layer + 1)
        self.own = own = range(bounds[stage], bounds[stage + 1])  # its layers
        self.blocks = sum(1 <= layer <= shape.n_layer for layer in own)
        self.has_embeddings, self.has_norm, self.has_head = 0 in own, last_layer - 1 in own, last_layer in own

        self.tokens = layout.micro_batch * shape.block_size  # B T
        pure_bf16 = layout.bf16 and not layout.autocast
        self.compute = layout.compute
        self.weight = BF16 if pure_bf16 else FP32  # of an element of the model's own parameters and their gradients
        self.residual = self.weight * self.tokens * shape.n_embd  # of the residual stream
        self.hidden = self.compute * self.tokens * shape.n_embd
        self.inner = self.compute * self.tokens * shape.n_inner
        self.scores = layout.micro_batch * shape.n_head * shape.block_size**2  # elements

    # Parameters and gradients

    @property
    def parameter_count(self) -> int:
        """Of this stage, before sharding; the first and the last stage have a copy each of a tied head."""
        tied = self.shape.vocabulary if self.has_embeddings and self.has_head else 0
        return sum(self.shape.layers[layer] for layer in self.own) - tied

    @property
    def shard(self) -> int:
        """Elements of a data-parallel process's share of the parameters."""
        return -(-self.parameter_count // self.layout.data_parallel)

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest parameter."""
        ends = self.has_embeddings or self.has_head
        return self.shape.vocabulary if ends else self.shape.n_embd * self.shape.n_inner

    @property
    def state_on_device(self) -> bool:
        return not self.layout.offload or self.layout.device == "cpu"

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
        if layout.kind == "zero" and layout.zero_stage == 3:
            buckets = layout.buckets
            return self.compute * min(shape.parameters, buckets.reuse // 2 + buckets.prefetch + shape.vocabulary)
        return 0

    @property
    def buckets(self) -> int:
        """ZeRO-1 reduces gradients in one bucket of its full size, ZeRO-2 in two by turns."""
        return self.weight * self.layout.buckets.reduce * {1: 1, 2: 2, 3: 0}[self.layout.zero_stage]

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
    def head_gradient(self) -> int:
        """Elements of the head's gradient in a chunked loss, which a GPU computes for a padded vocabulary."""
        return (self.shape.vocab_size if self.layout.device == "cpu" else self.padded_vocabulary) * self.shape.n_embd

    @property
    def padded_vocabulary(self) -> int:
        return -(-self.shape.vocab_size // ALIGNMENT) * ALIGNMENT

    # Activations

    @property
    def saved_by_mlp(self) -> int:
        """Tensors of B T I that the MLP saves: the input and output of GELU; of the baseline's GELU, which is several
        operators, three more."""
        return 2 if self.layout.kind == "zero" else 5

    @property
    def block_activations(self) -> int:
        """What a block saves for its backward pass without activation checkpointing, including its input.

        In the precision of matmuls: the outputs of both norms 2 B T D, q, k, v and attention's output 4 B T D, and
        `saved_by_mlp`. In that of the residual stream: its two sums 2 B T D. Norms save mean and deviation. Eager
        attention saves its probabilities, in fp32 and as they are multiplied; fused kernels one number for each row
        and head. Autocast saves the cast matrices.
        """
        shape, layout = self.shape, self.layout
        saved = 2 * self.residual + 6 * self.hidden + self.saved_by_mlp * self.inner
        saved += 4 * FP32 * self.tokens
        if layout.fused_attention:
            saved += FP32 * self.tokens * shape.n_head
        else:
            saved += self.scores * (FP32 + (BF16 if layout.bf16 else 0))
        return saved + (BF16 * shape.matrices if layout.autocast else 0)

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
    def mask(self) -> int:
        """Eager attention's mask, which checkpointed blocks and the stages of a pipeline hold for their next run."""
        layout = self.layout
        checkpoints = layout.activation_checkpointing != "none"
        held = not layout.fused_attention and self.blocks and (checkpoints or layout.stages > 1)
        return FP32 * layout.micro_batch * self.shape.block_size**2 if held else 0
