"""Perplexity of a language model over a whole corpus, summed from its batches.

`evaluate` copies this file elsewhere before it runs it: it stands alone, one import a line.
"""

import math

import datasets
import evaluate

_DESCRIPTION = """
Perplexity is the exponential of the mean negative log-likelihood of a token. The mean is taken over all tokens of the
corpus: sums of nats and counts of tokens are added up before the one division, so batches of different sizes, and
processes with different shares of the corpus, weigh what they should. A mean of batch means would not.
"""

_KWARGS_DESCRIPTION = """
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

_CITATION = """
@article{jelinek1977perplexity,
  title={Perplexity -- a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal={The Journal of the Acoustical Society of America},
  volume={62},
  year={1977}
}
"""


class Perplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}),
        )

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, float]:
        total = sum(tokens)
        if total == 0:
            raise ValueError("perplexity of no tokens: add at least one batch with tokens before compute")
        val_loss = math.fsum(nll) / total
        try:
            return {"val_loss": val_loss, "perplexity": math.exp(val_loss)}
        except OverflowError:
            return {"val_loss": val_loss, "perplexity": math.inf}
