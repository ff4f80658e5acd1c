import torch

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.optim.parameter_groups import build_optimizer


def small() -> GPT2FlashForCausalLM:
    torch.manual_seed(0)
    return GPT2FlashForCausalLM(GPT2FlashConfig(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8))


def test_matrices_decay_and_vectors_do_not_and_ties_count_once() -> None:
    model = small()
    decayed, spared = build_optimizer(
        model, "adamw", learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=False
    ).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[1] for p in spared["params"]} == {"bias", "weight"}
    assert all(p.ndim == 1 for p in spared["params"])
    assert all(p.ndim == 2 for p in decayed["params"])
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    everything = decayed["params"] + spared["params"]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))


def test_fused_and_plain_take_the_same_step() -> None:
    plain, fused = small(), small()
    for model, flag in ((plain, False), (fused, True)):
        optimizer = build_optimizer(
            model, "adamw", learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=flag
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
