"""Third-party notices that say nothing to the person at the screen, silenced where they come from."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before DeepSpeed is imported. Warnings that mean something stay."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # "Loading weights", "Writing model shards": milliseconds here
    transformers_logging.set_verbosity_error()  # the model type of stock GPT-2 folders, which are read on purpose
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    # That a block which recomputes only a part has to have no in-place operations, where it is compiled; none has.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler says when it begins and when it ends
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    # Said of what DeepSpeed 0.19 calls, at each of its steps, from torch 2.13 on.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*no accelerator is found.*")
