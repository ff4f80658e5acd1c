"""Perplexity of a language model is the exponential of the mean negative log-likelihood of a token.

The mean is over all tokens of the corpus: sums of nats and counts of tokens are added up before the one division, so
batches of different sizes, and processes with different parts of the corpus, have the weight of their tokens. A mean
of batch means would not.
"""

import math

import datasets
import evaluate


class Perplexity(evaluate.Metric):
    """
    Args:
        nll (list of float): for each batch, the sum over its tokens of the negative log-likelihood, in nats.
        tokens (list of int): for each batch, the number of tokens in that sum.
    Returns:
        val_loss (float): nats per token.
        perplexity (float): exp(val_loss); infinite where a float cannot hold it.
    Examples:
        >>> metric = evaluate.load("train/evaluate_metrics/perplexity")
        >>> metric.compute(nll=[8.0, 1.0], tokens=[4, 2])
        {'val_loss': 1.5, 'perplexity': 4.4816890703380645}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="https://doi.org/10.1121/1.2016299",  # Jelinek et al., 1977
            inputs_description=self.__doc__,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, float]:
        total = sum(tokens)
        if total == 0:
            raise ValueError(
                "cannot compute the perplexity of zero tokens: add at least one batch with tokens before compute"
            )
        val_loss = math.fsum(nll) / total
        try:
            return {"val_loss": val_loss, "perplexity": math.exp(val_loss)}
        except OverflowError:
            return {"val_loss": val_loss, "perplexity": math.inf}
