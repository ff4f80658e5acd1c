"""PyTorch GPT2Flash model: GPT-2's weight names and Conv1D layout, any attention kernel, and a chunked loss.

Shapes: B batch, T positions of this call, S positions including cached ones, H heads, K head dimension, D = H * K
hidden width, V vocabulary.
"""

# ruff: noqa: RUF012  # transformers declares the mutable class attributes below as instance attributes

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import (
    check_attention_arguments,
    check_attention_name,
    check_flash_dtype,
    choose_attention,
    eager_attention_forward,
    expected_device_type,
)
from .configuration_gpt2flash import GPT2FlashConfig, refuse_unsupported
from .documents import CACHE, attention_arguments
from .loss import causal_lm_loss
from .positions import check_generated_length, check_length, check_positions, count_positions, keep_positions
from .projection import Projection, ResidualProjection, is_quantized

logger = logging.get_logger(__name__)


class GPT2FlashMLP(nn.Module):
    """Two projections, up and down, with the activation between them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Projection(inner, config.n_embd)
        self.c_proj = ResidualProjection(config.n_embd, inner)
        self.act = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2FlashAttention(nn.Module):
    """Causal multi-head self-attention by the kernel that `config._attn_implementation` names."""

    is_causal = True  # read by the kernels: without a mask, they apply causality themselves

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        # Not `layer_idx`, which transformers reads for its flash kernels: torch.compile would guard on its value and
        # recompile for each block.
        self.index = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

        self.c_attn = Projection(3 * config.n_embd, config.n_embd)
        self.c_proj = ResidualProjection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the attention weights (B, H, T, S) if the kernel returns them."""
        batch, length, width = hidden_states.shape
        # Three views of one matmul's output without a copy, each (B, T, D) -> (B, H, T, K).
        query, key, value = (
            part.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for part in self.c_attn(hidden_states).split(width, dim=-1)
        )
        cache = kwargs.pop(CACHE, None)
        if isinstance(cache, Cache):
            key, value = cache.update(key, value, self.index)
        elif cache is not None:  # of continuous batching, which also changes the arguments of the kernel
            key, value = cache.update(key, value, self.index, kwargs=kwargs)
        elif "cache" in kwargs:  # the same in transformers before 5.24, whose kernels fill it
            self.layer_idx = self.index

        implementation = self.config._attn_implementation
        if "flash" in implementation:
            check_flash_dtype(query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output_BTHK, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        output = self.c_proj(output_BTHK.reshape(batch, length, width))
        return self.resid_dropout(output), weights


class GPT2FlashBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block: attention and MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2FlashAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2FlashMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        attn_output, _ = self.attn(self.ln_1(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2FlashPreTrainedModel(PreTrainedModel):
    """Base class: weight initialization, and what transformers needs in order to load, shard and compile the model."""

    config: GPT2FlashConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2FlashBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPT2FlashBlock,
        "attentions": GPT2FlashAttention,
    }
    # Causal masks, which old checkpoints have as buffers.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        # Checked again here: the configuration may be a `GPT2Config`, or modified since it was created.
        refuse_unsupported(vars(config))
        super().__init__(config, *inputs, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projection):
            std = self.config.initializer_range
            if isinstance(module, ResidualProjection):
                # 2 * n_layer of these are added to the residual stream: this keeps the variance of their sum constant.
                std /= math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        if attn_implementation is not None:
            check_attention_name(attn_implementation)
        if attn_implementation == "auto":
            config = self.config
            if is_init_check:  # no weights yet
                device_type = expected_device_type()
                dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.get_default_dtype()
            else:
                device_type, dtype = self.device.type, self.dtype
            attn_implementation, reason = choose_attention(
                "auto", device_type, dtype, config.n_embd // config.n_head, dropout=config.attn_pdrop
            )
            logger.info(f"Attention: {reason}")
        return super()._check_and_adjust_attn_implementation(attn_implementation, is_init_check, allow_all_kernels)


class GPT2FlashModel(GPT2FlashPreTrainedModel):
    """The transformer without a head: embeddings, blocks, final LayerNorm."""

    _auto_class = "AutoModel"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([GPT2FlashBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, T), the tokens that are not in the cache yet; or pass `inputs_embeds`.
            past_key_values: a cache of any kind; without one, `use_cache` creates a dynamic one.
            cache: the same, by its name in transformers 5.24; or the cache of continuous batching.
            attention_mask: (B, S), 0 for padding, on either side; or (B, 1, T, S), passed to the kernel unchanged.
            token_type_ids: (B, T), embedded by the token embeddings and added, as in GPT-2.
            position_ids: (B, T) or (1, T). None to count them from the mask and the cache. Where they do not count up
                one by one, another document starts, which does not attend to the previous ones.
            inputs_embeds: (B, T, D), instead of `input_ids`.
            use_cache: whether to return the cache.
            kwargs: for the attention function. With packed documents, `cu_seq_lens_q` saves flash kernels from
                detecting them.

        Returns:
            `last_hidden_state`, (B, T, D), and the cache.

        Raises:
            TypeError: for an argument that neither the model nor transformers knows.
        """
        check_attention_arguments(self.config._attn_implementation, kwargs)
        if isinstance(cache, Cache):
            if past_key_values is not None:
                raise ValueError("Pass either cache or past_key_values, which are two names of one argument.")
            past_key_values, cache = cache, None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        passed = {key: value for key, value in {**kwargs, "cache": cache}.items() if value is not None}
        computed = attention_arguments(  # from the caller's positions: those counted below never mark documents
            self.config, inputs_embeds, position_ids, attention_mask, past_key_values, passed.get("cu_seq_lens_q")
        )
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            check_length(past_length, inputs_embeds.shape[1], self.config.n_positions)
            position_ids = count_positions(inputs_embeds.shape[1], past_length, attention_mask, inputs_embeds.device)
        else:
            check_positions(position_ids, self.config.n_positions)

        hidden_states = inputs_embeds + self.wpe(position_ids)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        arguments = {CACHE: past_key_values, "use_cache": use_cache} | computed | passed
        for block in self.h:
            hidden_states = block(hidden_states, **arguments)
        hidden_states = self.ln_f(hidden_states)
        cached: dict[str, Any] = {CACHE: past_key_values if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **cached)


class GPT2FlashForCausalLM(GPT2FlashPreTrainedModel, GenerationMixin):
    """The model with a language-modeling head: logits of the next token; while training, the loss without logits."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    accepts_loss_kwargs = True  # Trainer: forward divides the loss by num_items_in_batch itself

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.transformer = GPT2FlashModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args beyond those of `GPT2FlashModel`:
            labels: (B, T), usually the input tokens; -100 is ignored by the loss. They are shifted here.
            shift_labels: (B, T), instead of `labels`, already shifted. In `kwargs`: Trainer evaluates the loss only if
                the batches have every argument with "label" in its name.
            num_items_in_batch: divisor of the summed loss; None for the mean over this batch.
            logits_to_keep: number of positions from the end that get logits, or the positions, (n,); 0 for all. The
                loss always includes all positions.
            skip_logits: compute the loss `loss_chunk_size` rows at a time and return no logits. None to do so while
                training.

        Returns:
            `loss` if there are labels, `logits` (B, T, V) unless skipped, and the cache.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if skip_logits is None:
            skip_logits = self.training and has_labels and self._chunk_size() > 0
        elif skip_logits and not has_labels:
            raise ValueError("skip_logits leaves nothing to return without labels or shift_labels.")
        if use_cache is None and self.training and has_labels:
            use_cache = False  # a training step does not read it, and filling it would copy all keys and values

        outputs = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state

        logits = None if skip_logits else self.lm_head(keep_positions(hidden_states, logits_to_keep))
        loss = None
        if has_labels:
            covers_all = logits is not None and isinstance(logits_to_keep, int) and logits_to_keep == 0
            loss = self._loss(
                hidden_states,
                logits if covers_all else None,
                labels,
                shift_labels=shift_labels if shift_labels is None else shift_labels.contiguous(),
                num_items_in_batch=num_items_in_batch,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _loss(self, hidden_states: Tensor, logits: Tensor | None, labels: Tensor | None, **kwargs: Any) -> Tensor:
        """The loss from the logits if all of them are computed, otherwise from the hidden states in chunks."""
        # The head may be replaced, by an adapter for instance, so that its weight does not define its output; and its
        # weight may be quantized, or a device map may have put it on another device or on disk.
        head = self.lm_head
        uses_weight = type(head) is nn.Linear and not is_quantized(head.weight)
        if logits is None and uses_weight and head.weight.device == hidden_states.device:
            return causal_lm_loss(hidden_states, head.weight, labels, chunk_size=self._chunk_size(), **kwargs)
        if logits is None:
            logits = self.lm_head(hidden_states)
        return self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)

    def _chunk_size(self) -> int:
        # `GPT2Config`, which is accepted as well, does not have the field.
        return getattr(self.config, "loss_chunk_size", GPT2FlashConfig.loss_chunk_size)

    def _validate_generated_length(  # called by generate() once it knows the length
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        super()._validate_generated_length(  # type: ignore[misc]  # declared for a protocol that mypy does not see
            generation_config, input_ids_length, has_default_max_length
        )
        check_generated_length(generation_config.max_length, input_ids_length, self.config.n_positions)


# For label smoothing, Trainer shifts the labels only for classes that are listed here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GPT2FlashConfig.model_type] = GPT2FlashForCausalLM.__name__

__all__ = ["GPT2FlashForCausalLM", "GPT2FlashModel", "GPT2FlashPreTrainedModel"]
