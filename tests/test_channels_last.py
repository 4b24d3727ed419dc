"""Channels last: what stands between convolutions fuses with them, and nothing is permuted that lies as it should."""

import torch
from test_relax_module import compile_plainly
from torch.nn import functional as F

from tvm_items.importer import export_for_tvm
from tvm_items.relax_module import tuned_module
from tvm_items.tasks import extract_tasks


class Padded(torch.nn.Module):
    """Convolutions behind zeros on some sides, as TensorFlow's padding gives, and bounded or leaky activations."""

    def __init__(self):
        super().__init__()
        self.strided, self.depthwise = torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.Conv2d(16, 16, 3, groups=16)
        self.pointwise, self.along_time = torch.nn.Conv2d(16, 8, 1), torch.nn.Conv1d(8, 8, 3)

    def forward(self, x):
        y = self.strided(F.pad(x, (0, 1, 2, 3))).clamp(0, 6)
        y = F.leaky_relu(self.depthwise(F.pad(y, (1, 1, 0, 1))), 0.2).clamp(min=-1)
        y = self.pointwise(F.pad(y, (0, 0, 0, 0))).clamp(max=2)
        return self.along_time(F.pad(y.flatten(2), (2, 1)))


class Kept(torch.nn.Module):
    """What is no padding of a convolution: another value, a mirror, more channels, fewer columns."""

    def __init__(self):
        super().__init__()
        self.convolution, self.wider = torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(10, 8, 3)

    def forward(self, x):
        padded = F.pad(x, (1, 1, 1, 1), value=1.0), F.pad(x, (1, 1, 1, 1), mode="reflect"), F.pad(x, (-1, 1, 0, 0))
        wider = F.pad(x, (1, 1, 1, 1, 1, 1))
        return [self.convolution(image) for image in padded] + [self.wider(wider), F.leaky_relu(x, 1.5)]


class Tokens(torch.nn.Module):
    """SegFormer's feed-forward part: tokens become an image for a depthwise convolution, and tokens again."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        self.depthwise = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)

    def forward(self, x):
        tokens = self.wide(x.flatten(2).transpose(1, 2))
        image = tokens.transpose(1, 2).reshape(2, 16, *x.shape[2:])
        return self.narrow(F.gelu(self.depthwise(image).flatten(2).transpose(1, 2)))


class SqueezedInVain(torch.nn.Module):
    """Parakeet's joint network squeezes an axis that has more than one place, by which PyTorch does nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, (3, 4))

    def forward(self, x):
        return self.second(self.first(x).squeeze(2)).squeeze([2, 3])


@torch.no_grad()
def run_tuned(tvm, model, x):
    """Returns what the graph that is tuned gives, and the names of its tasks."""
    target = tvm.target.Target({"kind": "llvm", "num-cores": 2})
    exported = export_for_tvm(model, {"x": x})
    module, weights = tuned_module(exported, target)
    names = [task.name for task in extract_tasks(module, target)]
    outputs = compile_plainly(module, weights, exported, x, target)()
    return [torch.from_dlpack(output) for output in outputs], names


def test_padding_and_bounds_fuse_with_convolutions(tvm):
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 8, 12, 14)
    (output,), names = run_tuned(tvm, model, x)
    assert sum("conv" in name for name in names) == 4 and sum("transpose" in name for name in names) == len(names) - 4
    assert len(names) == 6 and "pad" not in "".join(names)  # one permutation at each end
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


def test_what_is_no_padding_of_zeros_stays(tvm):
    torch.manual_seed(0)
    model, x = Kept().eval(), torch.randn(2, 8, 12, 14)
    outputs, names = run_tuned(tvm, model, x)
    assert sum("pad" in name for name in names) == 3 and "leaky_relu" in names  # a mirror is no pad by name
    for output, expected in zip(outputs, model(x), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_tokens_of_an_image_are_not_moved(tvm):
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 8, 12, 14)
    (output,), names = run_tuned(tvm, model, x)
    assert len(names) == 4 and any("conv2d" in name and "gelu" in name for name in names)  # one permutes what comes in
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)


def test_an_axis_with_more_than_one_place_stays(tvm):
    torch.manual_seed(0)
    model, x = SqueezedInVain().eval(), torch.randn(2, 8, 6, 6)
    (output,), _ = run_tuned(tvm, model, x)
    assert output.shape == (2, 8, 2)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-4)
