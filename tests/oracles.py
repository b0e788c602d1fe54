"""Routed models held against the masked oracle."""

import torch
from torch import Tensor
from torch.testing import assert_close

from moeify.routed.split_model import SplitModel


def gradients(model: SplitModel, inputs: Tensor, categories: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter that has one, for a sum in which every output counts differently."""
    model.zero_grad()
    outputs = model(inputs, categories)
    (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_the_masked_oracle(model: SplitModel, inputs: Tensor, categories: Tensor) -> dict[str, Tensor]:
    """Compare outputs and gradients, and return the gradients."""
    routed, routed_grads = model(inputs, categories), gradients(model, inputs, categories)
    with model.masked():
        masked, masked_grads = model(inputs, categories), gradients(model, inputs, categories)
    with torch.no_grad():
        assert torch.equal(model(inputs, categories), routed)
    assert_close(routed, masked, rtol=1e-9, atol=1e-12)
    assert_close(routed_grads, masked_grads, rtol=1e-9, atol=1e-12)
    return routed_grads
