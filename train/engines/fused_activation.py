"""GPT-2's activation as one kernel."""

from torch import nn
from transformers.activations import NewGELUActivation


def fuse_activations(model: nn.Module) -> None:
    """Put torch's own kernel in place of "gelu_new" (arXiv:1606.08415, section 2), which is eight steps of torch.

    It computes the same but for rounding, several times as fast, and keeps one tensor for the backward pass, not four.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU(approximate="tanh"))
