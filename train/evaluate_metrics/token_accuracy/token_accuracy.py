"""Token accuracy: the fraction of tokens that are the model's most likely next token,

    count(predictions == references and references != -100) / count(references != -100).

It is the multiclass accuracy of next-token prediction. The label -100, which PyTorch's cross-entropy ignores, is not
counted. Tokens are counted over the corpus before the one division, so batches of different sizes, and processes with
different parts of the corpus, have the weight of their tokens.
"""

import datasets
import evaluate
import numpy as np


class TokenAccuracy(evaluate.Metric):
    """
    Args:
        predictions (list of int): the most likely token at each position, flat: logits[:, :-1].argmax(-1).flatten().
        references (list of int): the token that came, flat and as many: labels[:, 1:].flatten(); -100 is not counted.
    Returns:
        token_accuracy (float): between 0 and 1.
    Examples:
        >>> metric = evaluate.load("train/evaluate_metrics/token_accuracy")
        >>> metric.compute(predictions=[464, 3290, 318, 50256], references=[464, 3797, 318, -100])
        {'token_accuracy': 0.6666666666666666}
    """

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://doi.org/10.1016/j.ipm.2009.03.002",  # Sokolova and Lapalme, 2009
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": ids, "references": ids}),
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        labels = references[:]  # the column as an array; without the slice datasets reads it row by row
        counted = labels != -100
        if not counted.any():
            raise ValueError(
                "cannot compute accuracy over zero tokens: add at least one label other than -100 before compute"
            )
        return {"token_accuracy": float((predictions[:] == labels)[counted].mean())}
