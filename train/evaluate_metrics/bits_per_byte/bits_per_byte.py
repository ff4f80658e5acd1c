"""Bits per byte: the negative log-likelihood of a text's tokens in bits, divided by its length in UTF-8,

    sum(nll) / (ln(2) * sum(bytes)).

Nats per token and perplexity depend on how long a tokenizer's tokens are; this does not, so it compares models with
different vocabularies. The formula is that of the Pile's paper, (tokens / bytes) * loss / ln(2), with the sum in place
of loss * tokens. Sums are added up before the one division, so batches of different sizes, and processes with
different parts of the corpus, have the weight of their bytes.
"""

import math

import datasets
import evaluate


class BitsPerByte(evaluate.Metric):
    """
    Args:
        nll (list of float): for each batch, the sum over its predicted tokens of the negative log-likelihood, in nats.
        bytes (list of int): for each batch, the number of UTF-8 bytes of those tokens. If the first token of a text is
            not predicted, its bytes do not count; after an end of text it is predicted.
    Returns:
        bits_per_byte (float): bits per byte.
    Examples:
        >>> metric = evaluate.load("train/evaluate_metrics/bits_per_byte")
        >>> metric.compute(nll=[8.0, 1.0], bytes=[20, 6])
        {'bits_per_byte': 0.4993944372307951}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://arxiv.org/abs/2101.00027",  # Gao et al., 2020
            inputs_description=self.__doc__,
            features=datasets.Features({"nll": datasets.Value("float64"), "bytes": datasets.Value("int64")}),
        )

    def _compute(self, nll: list[float], bytes: list[int]) -> dict[str, float]:
        total = sum(bytes)
        if total == 0:
            raise ValueError(
                "cannot compute bits per byte of zero bytes: add at least one batch with bytes before compute"
            )
        return {"bits_per_byte": math.fsum(nll) / (math.log(2) * total)}
