import torch

from formix.training import peak_step_memory


def test_memory_grows_with_the_batch_and_holds_at_least_weights_gradients_and_states(digits, make_model):
    model = make_model()
    small = peak_step_memory(model, digits, digits.train.__getitems__(range(8)))
    large = peak_step_memory(model, digits, digits.train.__getitems__(range(64)))
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert small > 4 * weights  # weights, gradients and AdamW's two moments
    assert large > small + 50 * digits.train[0]["pixel_values"].numel() * 4


def test_memory_is_repeatable_and_leaves_the_model_alone(digits, make_model):
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    batch = digits.train.__getitems__(range(8))
    assert peak_step_memory(model, digits, batch) == peak_step_memory(model, digits, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_deeper_model_needs_more(digits, make_model):
    batch = digits.train.__getitems__(range(8))
    shallow, deep = make_model(depth=2), make_model(depth=4)
    assert peak_step_memory(deep, digits, batch) > 1.5 * peak_step_memory(shallow, digits, batch)
