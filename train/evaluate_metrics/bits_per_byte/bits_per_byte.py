"""Bits per byte of a language model over a whole corpus, summed from its batches.

`evaluate` copies this file elsewhere before it runs it: it stands alone, one import a line.
"""

import math

import datasets
import evaluate

_DESCRIPTION = """
Bits per byte is what a model needs to write down a text, over the length of the text in UTF-8: the negative
log-likelihood of the tokens in bits, divided by bytes,

    sum(nll) / (ln(2) * sum(bytes)).

Nats per token and perplexity depend on how long a tokenizer's tokens are; this does not, so it compares models with
different vocabularies. The formula is that of the Pile's paper (Gao et al., 2020), (tokens / bytes) * loss / ln(2),
with loss * tokens written as the sum that it is. Sums are added up before the one division, so batches of different
sizes, and processes with different shares of the corpus, weigh what they should.
"""

_KWARGS_DESCRIPTION = """
Args:
    nll (list of float): for each batch, the sum over its predicted tokens of the negative log-likelihood, in nats.
    bytes (list of int): for each batch, the number of UTF-8 bytes that those tokens stand for. Where the first token
        of a text is not predicted, its bytes do not count; an end of text in front makes it predicted.
Returns:
    bits_per_byte (float): bits per byte.
Examples:
    >>> metric = evaluate.load("train/evaluate_metrics/bits_per_byte")
    >>> metric.compute(nll=[8.0, 1.0], bytes=[20, 6])
    {'bits_per_byte': 0.4993944372307951}
"""

_CITATION = """
@article{gao2020pile,
  title={The Pile: An 800GB Dataset of Diverse Text for Language Modeling},
  author={Gao, Leo and Biderman, Stella and Black, Sid and Golding, Laurence and Hoppe, Travis and Foster, Charles and
          Phang, Jason and He, Horace and Thite, Anish and Nabeshima, Noa and Presser, Shawn and Leahy, Connor},
  journal={arXiv preprint arXiv:2101.00027},
  year={2020}
}
"""


class BitsPerByte(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"nll": datasets.Value("float64"), "bytes": datasets.Value("int64")}),
        )

    def _compute(self, nll: list[float], bytes: list[int]) -> dict[str, float]:
        total = sum(bytes)
        if total == 0:
            raise ValueError("bits per byte of no text: add at least one batch with bytes before compute")
        return {"bits_per_byte": math.fsum(nll) / (math.log(2) * total)}
