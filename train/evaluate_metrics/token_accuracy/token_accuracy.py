"""Token accuracy of a language model over a whole corpus.

`evaluate` copies this file elsewhere before it runs it: it stands alone, one import a line.
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Token accuracy is the share of tokens that a model foretells, its likeliest token being the one that comes next:

    count(predictions == references and references != -100) / count(references != -100).

It is the multiclass accuracy (Sokolova and Lapalme, 2009) of next-token prediction. The label -100, which PyTorch's
cross-entropy ignores, counts nowhere. Tokens are counted over the whole corpus before the one division, so batches of
different sizes, and processes with different shares of the corpus, weigh what they should.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of int): the likeliest token at each place, flat: logits[:, :-1].argmax(-1).flatten().
    references (list of int): the token that came, flat and as many: labels[:, 1:].flatten(); -100 is not counted.
Returns:
    token_accuracy (float): between 0 and 1.
Examples:
    >>> metric = evaluate.load("train/evaluate_metrics/token_accuracy")
    >>> metric.compute(predictions=[464, 3290, 318, 50256], references=[464, 3797, 318, -100])
    {'token_accuracy': 0.6666666666666666}
"""

_CITATION = """
@article{sokolova2009systematic,
  title={A systematic analysis of performance measures for classification tasks},
  author={Sokolova, Marina and Lapalme, Guy},
  journal={Information Processing & Management},
  volume={45},
  number={4},
  year={2009}
}
"""


class TokenAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        labels = references[:]  # the column as an array; without the slice datasets reads it row by row
        counted = labels != -100
        if not counted.any():
            raise ValueError("accuracy over no tokens: add at least one label other than -100 before compute")
        return {"token_accuracy": float((predictions[:] == labels)[counted].mean())}
