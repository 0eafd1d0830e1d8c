"""MiM against the straightforward form of its network that benchmarks/ compares it with."""

import pytest
import torch

from benchmarks.mim_reference import straightforward
from tests.Pretrain.toy_mim import batch_of, toy


@pytest.mark.parametrize("part", [0, 1, None])
def test_losses_and_gradients_of_the_straightforward_form(part):
    method, batch = toy(depths=(2, 1, 1, 1)), batch_of(64)
    # parameters of zeros and ones hide mistakes
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    reference = straightforward(method, num_mid=3, num_down=2)
    if part == 1:
        method(batch, 0, 0), reference(batch, 0, 0)
    ours, theirs = method(batch, 0, part), reference(batch, 0, part)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
    sum(ours.values()).backward()
    sum(theirs.values()).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in method.named_parameters():
        if parameter.requires_grad and expected[name].grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)
