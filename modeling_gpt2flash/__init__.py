"""GPT-2 with transformers' attention kernels and a loss that never stores all logits.

Importing the package registers the model type "gpt2flash" with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .attention import ATTENTION_NAMES, choose_attention
from .configuration_gpt2flash import GPT2FlashConfig
from .loss import causal_lm_loss
from .modeling_gpt2flash import GPT2FlashForCausalLM, GPT2FlashModel, GPT2FlashPreTrainedModel

AutoConfig.register(GPT2FlashConfig.model_type, GPT2FlashConfig, exist_ok=True)
AutoModel.register(GPT2FlashConfig, GPT2FlashModel, exist_ok=True)
AutoModelForCausalLM.register(GPT2FlashConfig, GPT2FlashForCausalLM, exist_ok=True)

__all__ = [
    "ATTENTION_NAMES",
    "GPT2FlashConfig",
    "GPT2FlashForCausalLM",
    "GPT2FlashModel",
    "GPT2FlashPreTrainedModel",
    "causal_lm_loss",
    "choose_attention",
]
