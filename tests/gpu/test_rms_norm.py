"""The kernel of RMSNorm's gradients against its formula, at odd sizes and strides."""

import pytest
import torch

from preftree.kernels import kernels_of
from preftree.models import heads, rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SINGLE, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 7, 2, 48), (1, 1301, 2048), (5, 100), (2, 3, 5, 3584), (1, 1, 10000)])
@pytest.mark.parametrize(
    ("of_x", "of_scale", "inner"),
    [(SINGLE, SINGLE, SINGLE), (HALF, HALF, HALF), (HALF, SINGLE, HALF), (HALF, HALF, SINGLE)],
)
def test_gradients(of_x, of_scale, inner, shape, readers, beside, strided):
    kernels = kernels_of("preftree.models.rms_norm_triton")
    generator = torch.Generator("cuda").manual_seed(0)

    def random(dtype):
        wide = torch.randn(*shape[:-2], shape[-2] + 3 * strided, shape[-1], device="cuda", generator=generator)
        return wide[..., strided : shape[-2] + strided, :].to(dtype)

    outer = torch.promote_types(of_scale, inner)
    grads, x = [random(outer) for _ in range(readers)], random(of_x)
    given = (
        grads,
        random(of_x) if beside else None,
        x,
        torch.randn(shape[-1], device="cuda").to(of_scale),
        1e-6,
        inner,
    )
    expected, got = rms_norm.gradients(*given, True), kernels.gradients(*given, True)
    for one, other in zip(got, expected, strict=True):
        error = float((one - other).float().abs().max() / other.float().abs().max())
        assert one.dtype == other.dtype
        assert error < (1e-5 if {of_x, inner} == {SINGLE} else 0.02)
    alone, nothing = kernels.gradients(*given, False)
    assert torch.equal(alone, got[0])
    assert nothing is None


@pytest.mark.parametrize("layout", ["whole", "heads of a wider projection"])
@pytest.mark.parametrize("shape", [(1, 7, 2, 48), (1, 1301, 16, 128), (2, 33, 3, 64), (1, 5, 4, 6)])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_gradients_of_rotated_heads(dtype, shape, layout):
    kernels = kernels_of("preftree.models.rms_norm_triton")
    generator = torch.Generator("cuda").manual_seed(0)
    batch, tokens, heads, size = shape

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    x = random(*shape) if layout == "whole" else random(batch, tokens, heads + 3, size)[:, :, 1 : heads + 1]
    angles = torch.randn(batch, 1, tokens, size, device="cuda", generator=generator)
    rotation = angles.cos().to(dtype), angles.sin().to(dtype)
    for grad in (random(*shape), random(batch, heads, tokens, size).transpose(1, 2)):
        given = ([grad], None, x, random(size), 1e-6, dtype, True, rotation)
        for one, other in zip(kernels.gradients(*given), rms_norm.gradients(*given), strict=True):
            error = float((one - other).float().norm() / other.float().norm())
            assert one.dtype == other.dtype
            assert error < (1e-5 if dtype == SINGLE else 0.01)


@pytest.mark.parametrize("wants_scales", [True, False])
@pytest.mark.parametrize(
    ("batch", "tokens", "q_heads", "groups", "size", "value_size"),
    [(1, 1301, 16, 8, 128, 128), (2, 33, 3, 1, 64, 40), (1, 5, 4, 2, 6, 10)],
)
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_gradients_of_projected_heads(dtype, batch, tokens, q_heads, groups, size, value_size, wants_scales):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    counts_and_sizes = (q_heads, size), (groups, size), (groups, value_size)
    grads = [random(batch, tokens, count, width) for count, width in counts_and_sizes]
    projected = random(batch, tokens, sum(count * width for count, width in counts_and_sizes))
    angles = random(batch, 1, tokens, size)
    given = (*grads, projected, random(size), random(size), 1e-6, dtype, angles.cos(), angles.sin(), wants_scales)
    kernels = kernels_of("preftree.models.rms_norm_triton")
    for one, other in zip(kernels.heads_gradients(*given), heads.gradients(*given), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if one.numel():
            error = float((one - other).float().norm() / other.float().norm())
            assert error < (1e-5 if dtype == SINGLE else 0.01)


@pytest.mark.parametrize(
    ("batch", "tokens", "q_heads", "groups", "size", "values"),
    [(1, 1301, 16, 8, 128, 1024), (2, 33, 3, 1, 64, 40), (1, 5, 4, 2, 6, 0)],
)
@pytest.mark.parametrize(("dtype", "of_scale"), [(SINGLE, SINGLE), (HALF, HALF), (HALF, SINGLE)])
def test_rotated_heads(dtype, of_scale, batch, tokens, q_heads, groups, size, values):
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    projected = random(batch, tokens, (q_heads + groups) * size + values).to(dtype)
    scales, angles = [random(size).to(of_scale) for _ in range(2)], random(batch, 1, tokens, size)
    given = (projected, [q_heads, groups], *scales, 1e-6, dtype, angles.cos().to(dtype), angles.sin().to(dtype))
    kernels = kernels_of("preftree.models.rms_norm_triton")
    double = (each.double() if isinstance(each, torch.Tensor) else each for each in given)
    exact = heads.rotated(*(torch.float64 if each is dtype else each for each in double))
    for one, other, true in zip(kernels.rotated_heads(*given), heads.rotated(*given), exact, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        # Where a product is added to another at once, it is not rounded before.
        errors = [float((each - true).norm() / true.norm()) for each in (one, other)]
        assert errors[0] < max(1.05 * errors[1], 1e-6)
