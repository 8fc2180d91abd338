"""Upsampling and convolution in one, against the two one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kolors_ref.models import unet, vae

SIZE = (10, 14)


def natural(upsample):
    torch.manual_seed(0)
    return upsample(6).double(), torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)


def one_after_the_other(conv, x, size=SIZE):
    return F.conv2d(F.interpolate(x, size=size), conv.weight, conv.bias, padding=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [SIZE, (9, 14), (10, 13), (9, 13)])
def test_unet(size, layout):
    conv, x = natural(unet.Upsample)
    y = conv(x.contiguous(memory_format=layout), size)
    torch.testing.assert_close(y, one_after_the_other(conv, x, size), rtol=0, atol=1e-13)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_vae(layout):
    conv, x = natural(vae.Upsample)
    y = conv(x.contiguous(memory_format=layout))
    torch.testing.assert_close(y, one_after_the_other(conv, x), rtol=0, atol=1e-13)
    assert y.is_contiguous(memory_format=layout)


def test_gradients():
    conv, x = natural(vae.Upsample)
    target, wanted = torch.randn(2, 6, *SIZE, dtype=torch.float64), (x, conv.weight, conv.bias)
    expected = torch.autograd.grad((one_after_the_other(conv, x) * target).sum(), wanted)
    ours = torch.autograd.grad((conv(x) * target).sum(), wanted)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def arithmetic(call, *inputs):
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


def test_four_ninths_of_the_arithmetic_and_a_border():
    conv, x = natural(unet.Upsample)
    height, width = x.shape[2:]
    border = (height + 1) * (width + 1)
    plain = arithmetic(one_after_the_other, conv, x)
    assert 9 * height * width * arithmetic(conv, x, SIZE) == 4 * border * plain


def test_four_ninths_of_the_arithmetic():
    conv, x = natural(vae.Upsample)
    assert 9 * arithmetic(conv, x) == 4 * arithmetic(one_after_the_other, conv, x)
