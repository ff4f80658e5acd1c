"""The chunked loss against the plain one: values, gradients, and every way of asking for them."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_gpt2flash import causal_lm_loss
from modeling_gpt2flash import loss as loss_module
from tests.tiny_gpt2 import make_ours, tokens

BATCH, LENGTH, WIDTH, WORDS = 3, 7, 8, 29


@pytest.fixture(autouse=True, params=[1, 128], ids=["as it is", "padded"])
def multiple(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything holds with the vocabulary as it is, as CPUs take it, and padded, as GPUs do."""
    monkeypatch.setitem(loss_module.VOCABULARY_MULTIPLES, "cpu", request.param)
    return request.param


def make(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
    labels[0, :3] = -100
    labels[2, 4] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, num_items: int | None = None) -> Tensor:
    logits = F.linear(hidden, weight)[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.reshape(-1, WORDS), labels[:, 1:].reshape(-1), reduction=reduction)
    return loss if num_items is None else loss / num_items


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# 21 rows: chunks that divide them and that do not, of one row, of exactly all and of more than there are.
@pytest.mark.parametrize("chunk_size", [0, 1, 4, 7, 20, 21, 512])
@pytest.mark.parametrize("num_items", [None, 5])
def test_value_and_gradients(chunk_size: int, num_items: int | None) -> None:
    hidden, weight, labels = make()
    ours = causal_lm_loss(hidden, weight, labels, num_items_in_batch=num_items, chunk_size=chunk_size)
    expected = plain(hidden, weight, labels, num_items)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grads(ours, hidden, weight), grads(expected, hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [127, 128, 129, 300])
def test_padding_is_nobodys_word(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, words: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Logits far below 0: the padding's zeros would be the likeliest words by far.
    hidden = -torch.rand(1, 21, WIDTH, generator=generator).to(dtype).mul(8).requires_grad_()
    weight = torch.rand(words, WIDTH, generator=generator).to(dtype).mul(8).requires_grad_()
    labels = torch.randint(words, (1, 21), generator=generator)
    found = {}
    for multiple in (1, 128):
        monkeypatch.setitem(loss_module.VOCABULARY_MULTIPLES, "cpu", multiple)
        loss = causal_lm_loss(hidden, weight, labels, chunk_size=8)
        found[multiple] = (loss, *grads(loss, hidden, weight))
    assert found[128][2].shape == weight.shape
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found[128], found[1], **close)


@pytest.mark.parametrize("chunk_size", [0, 5])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_it_is_transformers_loss(chunk_size: int, num_items: int | Tensor | None) -> None:
    hidden, weight, labels = make(torch.float32)
    expected = ForCausalLMLoss(F.linear(hidden, weight), labels, WORDS, num_items_in_batch=num_items)
    ours = causal_lm_loss(hidden, weight, labels, num_items_in_batch=num_items, chunk_size=chunk_size)
    torch.testing.assert_close(ours, expected)


def test_shifted_labels_are_not_shifted_again() -> None:
    hidden, weight, labels = make()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    ours = causal_lm_loss(hidden, weight, None, shift_labels=shifted, chunk_size=4)
    torch.testing.assert_close(ours, plain(hidden, weight, labels))
    both = causal_lm_loss(hidden, weight, torch.zeros_like(labels), shift_labels=shifted, chunk_size=4)
    assert both == ours


def test_another_ignore_index() -> None:
    hidden, weight, labels = make()
    other = labels.masked_fill(labels == -100, 3)
    expected = plain(hidden, weight, other.masked_fill(other == 3, -100))
    torch.testing.assert_close(causal_lm_loss(hidden, weight, other, ignore_index=3, chunk_size=4), expected)


def test_gradcheck() -> None:
    hidden, weight, labels = make()
    assert torch.autograd.gradcheck(lambda h, w: causal_lm_loss(h, w, labels, chunk_size=4), (hidden, weight))
    assert torch.autograd.gradcheck(
        lambda h, w: causal_lm_loss(h, w, labels, num_items_in_batch=11, chunk_size=8), (hidden, weight)
    )


@pytest.mark.parametrize("which", ["hidden", "weight", "neither"])
def test_only_what_needs_a_gradient_gets_one(which: str) -> None:
    hidden, weight, labels = make()
    expected = grads(plain(hidden, weight, labels), hidden, weight)
    hidden.requires_grad_(which == "hidden")
    weight.requires_grad_(which == "weight")
    loss = causal_lm_loss(hidden, weight, labels, chunk_size=4)
    assert loss.requires_grad == (which != "neither")
    if loss.requires_grad:
        loss.backward()
    for tensor, gradient, name in ((hidden, expected[0], "hidden"), (weight, expected[1], "weight")):
        if which == name:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_without_grad_mode() -> None:
    hidden, weight, labels = make()
    with torch.no_grad():
        loss = causal_lm_loss(hidden, weight, labels, chunk_size=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())
    with torch.inference_mode():
        torch.testing.assert_close(causal_lm_loss(hidden, weight, labels, chunk_size=4), loss)


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_nothing_to_predict(chunk_size: int) -> None:
    hidden, weight, labels = make()
    nothing = torch.full_like(labels, -100)
    loss = causal_lm_loss(hidden, weight, nothing, num_items_in_batch=5, chunk_size=chunk_size)
    assert loss == 0.0
    assert all(gradient.abs().max() == 0 for gradient in grads(loss, hidden, weight))
    assert causal_lm_loss(hidden, weight, nothing, chunk_size=chunk_size).isnan()  # the mean of nothing, as in torch


@pytest.mark.parametrize("chunk_size", [1, 4, 512])
def test_bf16_is_no_worse_than_the_plain_loss_in_bf16(chunk_size: int) -> None:
    hidden, weight, labels = make(torch.bfloat16)
    ours = causal_lm_loss(hidden, weight, labels, chunk_size=chunk_size)
    assert ours.dtype == torch.float32  # a loss in bf16 has two or three digits
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = plain(*exact_inputs, labels)
    low = plain(hidden, weight, labels)
    assert abs(ours.item() - exact.item()) <= 2 * abs(low.item() - exact.item()) + 1e-3
    for our_grad, low_grad, true_grad in zip(
        grads(ours, hidden, weight), grads(low, hidden, weight), grads(exact, *exact_inputs), strict=True
    ):
        assert our_grad.dtype == torch.bfloat16
        assert (our_grad - true_grad).abs().max() <= 2 * (low_grad - true_grad).abs().max() + 1e-4


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_under_autocast(chunk_size: int) -> None:
    hidden, weight, labels = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = causal_lm_loss(hidden, weight, labels, chunk_size=chunk_size)
        expected = plain(hidden, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for ours_grad, expected_grad in zip(grads(ours, hidden, weight), grads(expected, hidden, weight), strict=True):
        assert ours_grad.dtype == torch.float32
        torch.testing.assert_close(ours_grad, expected_grad, rtol=2e-2, atol=2e-3)


def test_hidden_states_in_another_dtype_than_the_weight() -> None:
    hidden, weight, labels = make(torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # what a model under autocast hands over
        loss = causal_lm_loss(low, weight, labels, chunk_size=4)
    d_low, d_weight = grads(loss, low, weight)
    assert (d_low.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)


def test_tied_weights_and_scaled_accumulation() -> None:
    hidden, weight, labels = make()
    tokens = labels.clamp(min=0)

    def tied(loss_of) -> Tensor:
        return loss_of(hidden + F.embedding(tokens, weight), weight, labels)

    (expected,) = grads(tied(plain) + tied(plain) / 4, weight)
    for scale in (1, 4):
        (tied(lambda h, w, y: causal_lm_loss(h, w, y, chunk_size=4)) / scale).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_kept_graph_gives_the_same_again() -> None:
    hidden, weight, labels = make()
    loss = causal_lm_loss(hidden, weight, labels, chunk_size=4)
    first = torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True)
    first = tuple(gradient.clone() for gradient in first)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, (hidden, weight)), first)


def test_the_gradient_is_not_copied() -> None:
    hidden, weight, labels = make()
    loss = causal_lm_loss(hidden, weight, labels, chunk_size=4)
    taken = loss.grad_fn.next_functions[0][0].saved_tensors[1].data_ptr()  # below the division
    loss.backward()
    assert weight.grad.data_ptr() == taken


def test_the_embeddings_share_is_added_in_place(multiple: int) -> None:
    hidden, weight, labels = make()
    loss = causal_lm_loss(hidden + F.embedding(labels.clamp(min=0), weight), weight, labels, chunk_size=21)
    with profile(record_shapes=True) as profiler:
        loss.backward()
    shapes = [list(weight.shape)] * 2
    added = [event.name for event in profiler.events() if event.input_shapes[:2] == shapes and "add" in event.name]
    assert added == ["aten::add_" if multiple == 1 else "aten::add"]


def test_no_rows_at_all() -> None:
    hidden, weight, labels = make()
    loss = causal_lm_loss(hidden[:0], weight, labels[:0], num_items_in_batch=5, chunk_size=4)
    d_hidden, d_weight = grads(loss, hidden, weight)
    assert (loss, d_hidden.abs().sum(), d_weight.abs().sum()) == (0, 0, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_after_checkpointed_layers(reentrant: bool) -> None:
    hidden, weight, labels = make()
    layer = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
    ours = causal_lm_loss(checkpoint(layer, hidden, use_reentrant=reentrant), weight, labels, chunk_size=4)
    expected = plain(layer(hidden), weight, labels)
    ours.backward()
    got = (hidden.grad, weight.grad, layer.weight.grad)
    torch.testing.assert_close(got, grads(expected, hidden, weight, layer.weight))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_stay_finite(scale: float) -> None:
    hidden, weight, labels = make(torch.float32)
    loss = causal_lm_loss(hidden * scale, weight, labels, chunk_size=4)
    torch.testing.assert_close(loss, plain(hidden * scale, weight, labels))
    assert all(gradient.isfinite().all() for gradient in grads(loss, hidden, weight))


def test_the_logits_are_never_all_in_memory(multiple: int) -> None:
    hidden, weight, labels = make()
    largest, columns = 0, max(WORDS, multiple)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape[-1:] == (columns,):
                largest = max(largest, result.numel() // columns)
            return result

    with Watch():
        causal_lm_loss(hidden, weight, labels, chunk_size=9).backward()
    assert largest == 9  # and not all 21 rows


def test_compiled_without_a_graph_break() -> None:
    hidden, weight, labels = make(torch.float32)
    compiled = torch.compile(causal_lm_loss, backend="aot_eager", fullgraph=True)
    ours = compiled(hidden, weight, labels, chunk_size=4)
    expected = causal_lm_loss(hidden, weight, labels, chunk_size=4)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grads(ours, hidden, weight), grads(expected, hidden, weight))


def test_wrong_calls_get_a_sentence() -> None:
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match="chunk_size is -1"):
        causal_lm_loss(hidden, weight, labels, chunk_size=-1)
    with pytest.raises(ValueError, match="needs labels"):
        causal_lm_loss(hidden, weight, None, chunk_size=4)
    with pytest.raises(ValueError, match=r"shape \(3, 6\)"):
        causal_lm_loss(hidden, weight, labels[:, 1:], chunk_size=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_on_a_gpu(dtype: torch.dtype) -> None:
    ours, ids = make_ours(vocab_size=50257, n_embd=96).cuda().train(), tokens(4, 32).cuda()
    found = []
    for chunk_size in (0, 40):
        ours.config.loss_chunk_size = chunk_size
        ours.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = ours(ids, labels=ids).loss
        loss.backward()
        found.append((loss, ours.lm_head.weight.grad.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-3)
    scale = found[0][1].abs().max().item()
    torch.testing.assert_close(
        found[0][1], found[1][1], rtol=0, atol=scale * (1e-4 if dtype == torch.float32 else 3e-2)
    )
