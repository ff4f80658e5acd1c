"""Warnings and messages of third-party libraries that do not help the user, silenced at their source."""

import logging
import os
import warnings


def silence_third_party_warnings() -> None:
    """Silence them; call this before DeepSpeed is imported. Warnings that the user can act on stay."""
    from transformers.utils import logging as transformers_logging

    from train.utils.devices import device_type

    transformers_logging.disable_progress_bar()  # "Loading weights", "Writing model shards": milliseconds here
    transformers_logging.set_verbosity_error()  # the model type of stock GPT-2 folders, which are loaded on purpose
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    # Selective activation checkpointing must not contain in-place operations when it is compiled; it contains none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler logs its start and stop otherwise
    if device_type() == "cpu":
        # torch.compile's first use of a C++ extension reports a CUDA toolkit without a GPU.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns that it found no GPU otherwise
    # DeepSpeed 0.19 calls a function at each step that torch has deprecated since 2.13.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
