"""What a GPU keeps otherwise than a CPU, on real tensors of a CPU."""

import pytest
import torch
from torch.nn import functional

from peftkit.memory.gpu_kernels import gpu_kernels

SHAPE = (2, 3, 8, 4)
"""Examples, heads, tokens, width of a head."""


def kept_by(function):
    """The result, and what it keeps for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = function()
    return result, kept


def attention(mask, dropout=0.0):
    torch.manual_seed(0)
    heads = [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]
    return functional.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout)


def matrices(kept):
    return [t for t in kept if t.shape == (2, 3, 8, 8)]


def weights(kept):
    """Matrices that were made by softmax."""
    ones = torch.ones(2, 3, 8)
    return [t for t in matrices(kept) if t.is_floating_point() and torch.allclose(t.sum(-1), ones)]


def test_a_mask_that_is_not_contiguous_in_its_last_dimension_has_no_fused_kernel():
    mask = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    expected = attention(mask)
    with gpu_kernels("no", active=True):
        fused, kept_fused = kept_by(lambda: attention(mask.contiguous()))
        stepwise, kept = kept_by(lambda: attention(mask))
        _, kept_with_dropout = kept_by(lambda: attention(mask, 0.1))
    assert torch.allclose(fused, expected, atol=1e-6)
    assert torch.allclose(stepwise, expected, atol=1e-6)
    assert (len(weights(kept_fused)), len(weights(kept))) == (0, 1)
    assert torch.bool in {t.dtype for t in matrices(kept_with_dropout)}


def test_the_attention_without_a_fused_kernel_is_computed_in_float32_and_given_in_16_bits():
    mask = torch.randn(2, 8, 8, 3).permute(0, 3, 1, 2)
    with gpu_kernels("bf16", active=True), torch.autocast("cpu", torch.bfloat16):
        found, kept = kept_by(lambda: attention(mask))
    assert found.dtype == torch.bfloat16
    assert {t.dtype for t in matrices(kept)} == {torch.float32}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.pow(x, 3.0),
        lambda x: x.pow(2),
        lambda x: x**2,
        torch.exp,
        lambda x: x.sum(),
        lambda x: functional.softmax(x, -1),
        lambda x: functional.layer_norm(x, x.shape),
    ],
)
def test_cudas_autocast_computes_in_float32_what_a_cpus_does_not(function):
    values = torch.ones(4, 4, dtype=torch.bfloat16)
    with gpu_kernels("bf16", active=True):
        assert function(values).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert function(values).dtype == torch.float32
            assert torch.ones(3, dtype=torch.int64).sum().dtype == torch.int64
