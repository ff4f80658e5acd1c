"""The stages together are the full model, names map to layers and back, and layers are partitioned evenly."""

import copy
import itertools
import random

import pytest
import torch
from torch import nn

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from modeling_gpt2flash import pipeline as pp
from tests.tiny_gpt2 import gradients, make_ours, tokens
from train.engines.pipeline import partition as partitioning
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks

GPT2 = GPT2FlashConfig()


def packed_positions(batch: int, length: int) -> torch.Tensor:
    """Two documents a row, each counted from 0."""
    first = length // 3
    return torch.cat([torch.arange(first), torch.arange(length - first)]).expand(batch, -1)


def staged_step(
    model: GPT2FlashForCausalLM, bounds: tuple[int, ...], inputs: pp.Passed, shift_labels: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients from stages that share nothing: only what passes goes from one to the next."""
    stages = [
        nn.ModuleList(copy.deepcopy(pp.model_layers(model)[start:stop])) for start, stop in itertools.pairwise(bounds)
    ]
    received, sent = [], []
    passed = inputs
    for stage in stages:
        if sent:
            hidden, positions = sent[-1] if isinstance(sent[-1], tuple) else (sent[-1], None)
            hidden = hidden.detach().requires_grad_()
            received.append(hidden)
            passed = hidden if positions is None else (hidden, positions)
        for layer in stage:
            passed = layer.loss(passed, shift_labels) if isinstance(layer, pp.HeadLayer) else layer(passed)
        sent.append(passed)
    loss = sent[-1]
    loss.backward()
    for output, gradient in zip(reversed(sent[:-1]), reversed(received), strict=True):
        (output[0] if isinstance(output, tuple) else output).backward(gradient.grad)

    n_layer = model.config.n_layer
    summed: dict[str, torch.Tensor] = {}
    for stage, first in zip(stages, bounds[:-1], strict=True):
        counted = set()  # a stage with both ends holds the tied weight once
        for index, layer in enumerate(stage, first):
            for local, parameter in layer.named_parameters():
                if parameter in counted:
                    continue
                counted.add(parameter)
                name = pp.full_name(index, local, n_layer)
                if name == "lm_head.weight" and pp.is_tied(model):
                    name = "transformer.wte.weight"
                summed[name] = summed.get(name, 0) + parameter.grad
    return loss.detach(), summed


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bounds", [(0, 5), (0, 1, 5), (0, 2, 4, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-7), (torch.float64, 1e-15)])
def test_stages_compute_the_full_models_loss_and_gradients(
    bounds: tuple[int, ...], packed: bool, attention: str, dtype: torch.dtype, atol: float
) -> None:
    model = make_ours(loss_chunk_size=5).to(dtype)
    model.set_attn_implementation(attention)
    input_ids, shift_labels = tokens(), tokens(seed=2)
    shift_labels[0, 3:6] = -100
    positions = packed_positions(*input_ids.shape) if packed else None

    full = model(input_ids, position_ids=positions, shift_labels=shift_labels, use_cache=False, skip_logits=True)
    full.loss.backward()
    inputs = (input_ids, positions) if packed else input_ids
    loss, staged = staged_step(model, bounds, inputs, shift_labels)

    torch.testing.assert_close(loss, full.loss.detach(), rtol=0, atol=atol)
    expected = gradients(model)
    assert staged.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(staged[name], gradient, rtol=0, atol=4 * atol, msg=name)


def test_the_tied_weights_gradient_is_the_sum_of_both_ends() -> None:
    model = make_ours()
    input_ids = tokens()
    model(input_ids, shift_labels=input_ids, use_cache=False).loss.backward()
    ends = [copy.deepcopy(layer) for layer in (pp.model_layers(model)[0], pp.model_layers(model)[-1])]
    for end in ends:
        end.zero_grad()
    layers = [ends[0], *pp.model_layers(model)[1:-1], ends[1]]
    passed = input_ids
    for layer in layers[:-1]:
        passed = layer(passed)
    layers[-1].loss(passed, input_ids).backward()
    parts = [ends[0].wte.weight.grad, ends[1].lm_head.weight.grad]
    assert all(part.abs().max() > 1e-3 for part in parts)
    torch.testing.assert_close(sum(parts), model.transformer.wte.weight.grad)


def test_checkpointed_blocks_are_computed_twice_and_nothing_else() -> None:
    model = make_ours()
    checkpoint_blocks(model, checkpoint_arguments("full"))
    model.train()
    calls = dict.fromkeys(["wte", "attn", "ln_f"], 0)
    for name, module in model.named_modules():
        if (short := name.split(".")[-1]) in calls:
            module.register_forward_pre_hook(lambda *_, short=short: calls.update({short: calls[short] + 1}))
    passed = tokens()
    for layer in pp.model_layers(model)[:-1]:
        passed = layer(passed)
    pp.model_layers(model)[-1].loss(passed, tokens()).backward()
    assert calls == {"wte": 1, "attn": 2 * model.config.n_layer, "ln_f": 1}


def test_logits_are_the_full_models() -> None:
    model, passed = make_ours(), tokens()
    expected = model(passed).logits
    for layer in pp.model_layers(model):
        passed = layer(passed)
    torch.testing.assert_close(passed, expected)


def test_packed_documents_do_not_see_each_other_across_stages() -> None:
    model, ids = make_ours(), tokens(batch=1)
    packed = (ids, packed_positions(*ids.shape))
    for layer in pp.model_layers(model):
        packed = layer(packed)
    alone = ids[:, ids.shape[1] // 3 :]
    for layer in pp.model_layers(model):
        alone = layer(alone)
    torch.testing.assert_close(packed[:, ids.shape[1] // 3 :], alone)


def test_tokens_beyond_the_last_position_are_refused() -> None:
    layer = pp.model_layers(make_ours())[0]
    with pytest.raises(ValueError, match="33 tokens long"):
        layer(tokens(length=33))
    with pytest.raises(ValueError, match="go up to 40"):
        layer((tokens(length=4), torch.tensor([[0, 1, 2, 40]])))


def test_names_lead_to_layers_and_back() -> None:
    model = make_ours()
    n_layer = model.config.n_layer
    layers = pp.model_layers(model)
    seen = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        index, local = pp.locate(name, n_layer)
        assert layers[index].get_parameter(local) is parameter
        assert pp.full_name(index, local, n_layer) == name
        seen.add((index, local))
    assert seen == {(index, local) for index, layer in enumerate(layers) for local, _ in layer.named_parameters()}
    assert pp.locate("transformer.h.1.attn.c_attn.weight", n_layer) == (2, "block.attn.c_attn.weight")
    assert len(pp.layer_names(n_layer)) == len(layers)


@pytest.mark.parametrize("name", ["transformer.h.2.ln_1.weight", "transformer.h.x.ln_1.weight", "wte.weight", ""])
def test_names_of_another_model_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a parameter of a GPT-2 of 2 blocks"):
        pp.locate(name, 2)
    with pytest.raises(ValueError, match="no layer 5"):
        pp.full_name(5, "x", 2)


@pytest.mark.parametrize("n_inner", [None, 40])
def test_counted_parameters_are_the_layers_own(n_inner: int | None) -> None:
    model = make_ours(n_inner=n_inner)
    counts = [sum(p.numel() for p in layer.parameters()) for layer in pp.model_layers(model)]
    config = model.config
    sizes = (config.n_layer, config.n_embd, config.n_inner, config.vocab_size, config.n_positions)
    assert partitioning.parameter_counts(*sizes) == counts


def test_flops_are_twice_the_products_numbers_and_attention() -> None:
    flops = partitioning.layer_flops(12, 768, None, 50257, 1024)
    assert flops[1] == 24 * 768**2 + 4 * 1024 * 768
    assert flops[-1] == 2 * 50257 * 768
    assert 4 < flops[-1] / flops[1] < 5  # GPT-2's head is worth several blocks


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_balance_finds_the_smallest_largest_part(parts: int) -> None:
    numbers = random.Random(parts)
    for _ in range(40):
        sizes = [numbers.randint(0, 20) for _ in range(numbers.randint(parts, 8))]
        every = [(0, *cuts, len(sizes)) for cuts in itertools.combinations(range(1, len(sizes)), parts - 1)]

        def judge(bounds: tuple[int, ...], sizes: list[int] = sizes) -> list[int]:
            return sorted((sum(sizes[start:stop]) for start, stop in itertools.pairwise(bounds)), reverse=True)

        assert judge(partitioning.balance(sizes, parts)) == min(map(judge, every))


def test_methods_differ_where_they_should() -> None:
    uniform, parameters, cost = (
        partitioning.partition(GPT2, 4, method) for method in ("uniform", "parameters", "cost")
    )
    assert sorted(len(uniform.layers(stage)) for stage in range(4)) == [3, 4, 4, 4]
    assert sorted(parameters.bounds) == list(parameters.bounds)
    # Of 12 + 4.6 blocks' worth the head has 4.6, so it gets a stage for itself.
    assert [*cost.layers(3)] in ([14], [13, 14])

    def largest(partition: partitioning.Partition, sizes: tuple[int, ...]) -> int:
        return max(sum(sizes[layer] for layer in partition.layers(stage)) for stage in range(4))

    assert largest(cost, cost.flops) < largest(uniform, cost.flops)
    assert largest(parameters, cost.parameters) < largest(uniform, cost.parameters)


@pytest.mark.parametrize("method", ["uniform", "parameters", "cost"])
@pytest.mark.parametrize("stages", [1, 2, 5, 15])
def test_every_layer_is_in_one_stage(method: str, stages: int) -> None:
    shared = partitioning.partition(GPT2, stages, method)
    assert shared.stages == stages
    assert [layer for stage in range(stages) for layer in shared.layers(stage)] == list(range(15))
    assert all(layer in shared.layers(shared.stage_of(layer)) for layer in range(15))
    assert all(len(shared.layers(stage)) > 0 for stage in range(stages))


def test_an_explicit_list_is_taken_as_it_is() -> None:
    shared = partitioning.partition(GPT2, 3, [5, 7, 3])
    assert (shared.bounds, shared.method) == ((0, 5, 12, 15), "[5, 7, 3]")


@pytest.mark.parametrize(
    ("stages", "method", "names"),
    [
        (16, "cost", ["16 pipeline stages", "15 layers", "12 blocks", "15 stages or fewer"]),
        (2, "best", ["'best'", "uniform, parameters, cost"]),
        (2, [7, 7], ["[7, 7]", "sums to 14", "15 layers"]),
        (2, [7, 4, 4], ["lists 3 stages", "there are 2"]),
        (2, [15, 0], ["[15, 0]", "at least 1"]),
        (2, [7.5, 7.5], ["whole number"]),
    ],
)
def test_an_impossible_partition_is_refused_with_numbers(stages: int, method: str | list, names: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is checked below
        partitioning.partition(GPT2, stages, method)
    assert all(name in str(error.value) for name in names), str(error.value)


def test_the_table_has_a_line_a_stage() -> None:
    title, header, rule, *lines = partitioning.partition(GPT2, 3, [5, 9, 1]).table().splitlines()
    assert title == "pipeline of 3 stages, partition [5, 9, 1]"
    assert header.replace("|", "").split() == ["stage", "layers", "parameters", "FLOPs"]
    assert [line.split()[1] for line in lines] == ["0", "1", "2"]
    assert "embeddings ... block 3" in lines[0]
    assert "block 4 ... final norm" in lines[1]
    assert lines[2].replace("|", "").split()[1:3] == ["head", "38,597,376"]
    assert len({len(line) for line in [header, rule, *lines]}) == 1
