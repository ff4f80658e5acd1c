"""The options of `generate()`: each field made by `flag` is a flag of the command, and an argument of `generate()`."""

from dataclasses import dataclass
from typing import Any

from train.config.arguments import flag, flags_of

SAMPLING = "sampling"  # tag of the flags that are not passed to `generate()` at temperature 0


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and how keys and values are cached meanwhile."""

    max_new_tokens: int = flag(100, "tokens to generate after each prompt", at_least=1)
    num_return_sequences: int = flag(1, "texts to generate for each prompt", at_least=1)
    temperature: float = flag(
        0.8, "divides the logits before sampling; 0: the most likely token at each step", at_least=0, tag=SAMPLING
    )
    top_k: int = flag(50, "sample from the k most likely tokens; 0: from all", at_least=0, tag=SAMPLING)
    top_p: float = flag(
        1.0,
        "sample from the most likely tokens whose probabilities add up to p; 1: from all",
        at_least=0,
        at_most=1,
        tag=SAMPLING,
    )
    growing_cache: bool = True  # False: transformers' dynamic cache, which is copied at each token
    static_cache: bool = False
    compiled: bool = False  # compile the step of a static cache

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for one call of `generate()`, which fills the cache among them."""
        samples = self.temperature > 0
        names = [each.name for each in flags_of(Decoding) if samples or each.metadata.get("tag") != SAMPLING]
        arguments: dict[str, Any] = {"do_sample": samples} | {name: getattr(self, name) for name in names}
        if self.static_cache:
            arguments |= {"cache_implementation": "static", "disable_compile": not self.compiled}
        elif self.growing_cache:
            from train.generate.growing_cache import growing_cache

            arguments["past_key_values"] = growing_cache()
        if self.compiled:
            arguments |= _compile_arguments()
        return arguments


def _compile_arguments() -> dict[str, Any]:
    """What makes `generate()` compile on every device; by itself it does so only on CUDA, XPU, Neuron and TPU."""
    from transformers import CompileConfig

    from train.utils.devices import device_type

    config = CompileConfig(mode="default") if device_type() == "cpu" else CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]  # declared without a type
    return {"compile_config": config}
