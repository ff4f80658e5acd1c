"""Metrics as `evaluate` modules: each folder holds a script that `evaluate.load` takes by its path."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import evaluate


def load_metric(
    name: Literal["perplexity", "bits_per_byte", "token_accuracy"],
    num_process: int = 1,
    process_id: int = 0,
    experiment_id: str | None = None,
    cache_dir: str | None = None,
) -> "evaluate.Metric":
    """One of the repository's metrics, loaded through `evaluate` without a network.

    One process keeps what it adds in memory. With several, each adds its own batches and process 0 alone gets a result
    from `compute` (the others None); they meet in files, so they must share `cache_dir` and `experiment_id`.
    """
    import evaluate  # takes seconds, and most commands never validate

    return evaluate.load(
        str(Path(__file__).parent / name),
        num_process=num_process,
        process_id=process_id,
        experiment_id=experiment_id,
        cache_dir=cache_dir,
        keep_in_memory=num_process == 1,
    )
