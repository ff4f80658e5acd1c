"""The options of `generate()`: each field with a help text is a flag of the command."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from train.utils.errors import UserError


def option(
    default: float, help: str, *, at_least: float, at_most: float | None = None, only_sampling: bool = False
) -> Any:
    """Field that is a flag. An `only_sampling` option is not passed to `generate()` at temperature 0."""
    metadata = {"help": help, "at_least": at_least, "at_most": at_most, "only_sampling": only_sampling}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and how keys and values are cached meanwhile."""

    max_new_tokens: int = option(100, "tokens to generate after each prompt", at_least=1)
    num_return_sequences: int = option(1, "texts to generate for each prompt", at_least=1)
    temperature: float = option(
        0.8,
        "divides the logits before sampling; 0: the most likely token at each step",
        at_least=0,
        only_sampling=True,
    )
    top_k: int = option(50, "sample from the k most likely tokens; 0: from all", at_least=0, only_sampling=True)
    top_p: float = option(
        1.0, "sample from the most likely tokens whose probabilities add up to p; 1: from all",
        at_least=0, at_most=1, only_sampling=True,
    )  # fmt: skip
    growing_cache: bool = True  # False: transformers' dynamic cache, which is copied at each token
    static_cache: bool = False
    compiled: bool = False  # compile the step of a static cache

    @property
    def samples(self) -> bool:
        return self.temperature > 0

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for one call of `generate()`, which fills the cache among them."""
        arguments: dict[str, Any] = {"do_sample": self.samples}
        for each in _options():
            if self.samples or not each.metadata["only_sampling"]:
                arguments[each.name] = getattr(self, each.name)
        if self.static_cache:
            arguments |= {"cache_implementation": "static", "disable_compile": not self.compiled}
        elif self.growing_cache:
            from train.generate.growing_cache import growing_cache

            arguments["past_key_values"] = growing_cache()
        if self.compiled:
            arguments |= _compile_arguments()
        return arguments


def _options() -> list[dataclasses.Field]:
    return [each for each in dataclasses.fields(Decoding) if each.metadata]


def _compile_arguments() -> dict[str, Any]:
    """What makes `generate()` compile on a CPU; on an accelerator it does so by itself."""
    from transformers import CompileConfig

    from train.utils.devices import device_type

    if device_type() != "cpu":
        return {}
    config = CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]  # declared without a type
    return {"compile_config": config}


def add_flags(group: argparse._ArgumentGroup) -> None:
    for each in _options():
        group.add_argument(
            f"--{each.name}", type=each.type, default=each.default, help=f"{each.metadata['help']} (%(default)s)"
        )


def from_flags(args: argparse.Namespace, **fields: Any) -> Decoding:
    """Decoding of a parsed command line; `fields` are those that are not flags.

    Raises:
        UserError: if a value is out of range.
    """
    values = {each.name: getattr(args, each.name) for each in _options()}
    for each in _options():
        value, least, most = values[each.name], each.metadata["at_least"], each.metadata["at_most"]
        if not value >= least:
            raise UserError(f"--{each.name} {value}: must be at least {least}")
        if most is not None and not value <= most:
            raise UserError(f"--{each.name} {value}: must be at most {most}")
    return Decoding(**values, **fields)
