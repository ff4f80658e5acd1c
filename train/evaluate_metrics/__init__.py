"""Metrics as `evaluate` modules: each folder holds a script that `evaluate.load` takes by its path.

`evaluate` copies a script elsewhere before it runs it, so each stands alone and has one import a line.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import evaluate


def load_metric(
    name: Literal["perplexity", "bits_per_byte", "token_accuracy"], num_process: int = 1, **options: Any
) -> "evaluate.Metric":
    """One of the repository's metrics, loaded through `evaluate` without a network; `options` are for `evaluate.load`.

    One process keeps what it adds in memory. With several (`num_process`, `process_id`), each adds its own batches and
    process 0 alone gets a result from `compute` (the others None). They exchange files, so they must share `cache_dir`
    and `experiment_id`.
    """
    import evaluate  # takes seconds, and most commands never validate

    folder = Path(__file__).parent / name
    return evaluate.load(str(folder), num_process=num_process, keep_in_memory=num_process == 1, **options)
