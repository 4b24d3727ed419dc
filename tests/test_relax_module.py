"""What a module has become before it is tuned: what fuses, and in which order its tensors are in memory."""

import json
import re

import pytest
import torch
import transformers

from conftest import H200, make_case
from products import rounded_to_tf32
from tvm_items.executable import compile_and_bind, passes_after_scheduling
from tvm_items.importer import export_for_tvm, import_to_relax
from tvm_items.relax_module import prepare, tuned_module
from tvm_items.tasks import extract_tasks


def compile_plainly(module, weights, exported, x, target):
    """Returns a tuned_module() without any schedule as a callable, on the CPU."""
    inputs = dict.fromkeys(exported.example_inputs[1], x)
    case = make_case(transformers.BertConfig(), device="cpu")
    return compile_and_bind(module, weights, exported, inputs, target, case, passes_after_scheduling(target), {})


class Block(torch.nn.Module):
    """What follows a Linear layer: a Transformer's residual, and ConvNeXt's layer scale, permutation and residual."""

    def __init__(self):
        super().__init__()
        self.downsampled, self.convolution = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3, padding=1)
        self.norm = torch.nn.LayerNorm(8)
        self.wide, self.narrow = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.scale = torch.nn.Parameter(torch.rand(8))

    def forward(self, x):
        y = self.downsampled(x).permute(0, 2, 3, 1).contiguous()
        y = y + self.narrow(torch.nn.functional.gelu(self.wide(self.norm(y))))
        x = y.permute(0, 3, 1, 2)
        y = self.norm(self.convolution(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(torch.nn.functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


@torch.no_grad()
def test_what_follows_a_matrix_product_fuses_with_it(tvm):
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(2, 3, 6, 6)
    exported = export_for_tvm(model, {"x": x})
    module, _ = tuned_module(exported, tvm.target.Target({"kind": "llvm", "num-cores": 2}))
    torch.testing.assert_close(exported.module()(x=x), model(x))
    names = re.findall(r"call_tir\((\w+),", re.sub(r"\d+", "", module["main"].script()))
    assert sorted(names) == [
        "fused_convd_add",
        "fused_convd_add",
        "fused_matmul_add_add",
        "fused_matmul_add_gelu",
        "fused_matmul_add_gelu",
        "fused_matmul_add_multiply_add",
        "fused_reshape_transpose",
        "layer_norm",
        "layer_norm",
        "transpose",
    ]


class Shared(torch.nn.Module):
    """Projections of the same input, with and without bias, that two layers share, as ALBERT's do."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, bias=False)

    def forward(self, x):
        for _ in range(2):
            x = torch.softmax(self.queries(x) @ self.keys(x).mT, -1) @ x
        return x


@torch.no_grad()
def test_shared_projections_are_one_product_of_weights_that_are_joined_once(tvm):
    torch.manual_seed(0)
    model, x, target = Shared().eval(), torch.randn(2, 5, 8), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    exported = export_for_tvm(model, {"x": x})
    module, weights = tuned_module(exported, target)
    calls = re.findall(r"call_tir\((\w+),", re.sub(r"\d+", "", module["main"].script()))
    assert calls.count("fused_matmul_add") == 2 and not any("concat" in name for name in calls)
    joined = re.findall(r"call_tir\((\w+),", re.sub(r"\d+", "", module["main_transform_params"].script()))
    assert sum("concat" in name for name in joined) == 2  # of the weights and of the biases, for both layers
    found = torch.from_dlpack(compile_plainly(module, weights, exported, x, target)()[0])
    torch.testing.assert_close(found, model(x))


@torch.no_grad()
def test_tasks_know_what_no_kernel_computes(tvm):
    """The image, and what was made of weights, as the transposed ones of Linear layers; a residual is none of it."""
    exported, target = export_for_tvm(Block().eval(), {"x": torch.randn(2, 3, 6, 6)}), tvm.target.Target("llvm")
    tasks = extract_tasks(tuned_module(exported, target)[0], target)
    given = {re.sub(r"\d+", "", task.name): [task.arguments[i][1] for i in task.given] for task in tasks}
    assert given["fused_matmul_add_multiply_add"] == [(32, 8), (8,), (8,)]
    assert given["transpose"] == [(2, 3, 6, 6)] and given["fused_reshape_transpose"] == []
    (norm,) = (task for task in tasks if task.name == "layer_norm")
    assert norm.given_bytes == 2 * 8 * 4


class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.convolution(x).mean((-1, -2), keepdim=True).squeeze(-2)


@torch.no_grad()
def test_convolutions_become_channels_last_before_a_squeeze(tvm):
    """With an axis counted from the end TVM's pass would run out of memory, as it does on Swin."""
    exported = export_for_tvm(Pooled(), {"x": torch.randn(1, 3, 8, 8)})
    module, _ = tuned_module(exported, tvm.target.Target({"kind": "llvm", "num-cores": 2}))
    assert "conv2d_nhwc" in module.script()


class Sounds(torch.nn.Module):
    """Convolutions along time, as models of speech have them: strided, grouped, and a norm over all of a channel.

    With axes counted from the end, of which TVM's pass would make a layout that is none (Mamba 2). transposed: whether
    there is a transposed convolution, too, for which TVM has no channels last (Mimi).
    """

    def __init__(self, transposed):
        super().__init__()
        self.strided, self.norm = torch.nn.Conv1d(6, 16, 10, stride=5), torch.nn.GroupNorm(16, 16)
        self.grouped = torch.nn.Conv1d(16, 16, 4, padding=2, groups=2)
        self.transposed = torch.nn.ConvTranspose1d(16, 16, 3) if transposed else torch.nn.Identity()

    def forward(self, x):
        sounds = torch.nn.functional.gelu(self.norm(self.strided(x)))
        sounds = self.transposed(sounds + self.grouped(sounds)[:, :, :-1])
        return sounds.permute(0, -1, -2).mean(-2), sounds.unsqueeze(-1) * torch.arange(2.0) @ torch.eye(2)


@torch.no_grad()
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_along_time_become_channels_last(tvm, transposed):
    torch.manual_seed(0)
    model, x = Sounds(transposed).eval(), torch.randn(2, 6, 100)
    exported, target = export_for_tvm(model, {"x": x}), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module, weights = tuned_module(exported, target)
    weights_read = [
        tuple(int(size) for size in function.params[1].shape)
        for name, function in module.functions_items()
        if "conv1d" in name.name_hint and "transpose" not in name.name_hint
    ]
    assert sorted(weights_read) == [(4, 8, 16), (10, 6, 16)]
    run = compile_plainly(module, weights, exported, x, target)
    for output, expected in zip(run(), model(x), strict=True):
        torch.testing.assert_close(torch.from_dlpack(output), expected)


@torch.no_grad()
def test_transposed_convolutions_stay_as_they_are(tvm):
    """Between others that become channels last, which TVM has not for them (DPT)."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ConvTranspose2d(8, 8, 4, stride=4), torch.nn.Conv2d(8, 4, 3)
    model, x = torch.nn.Sequential(*layers).eval(), torch.randn(1, 3, 10, 10)
    exported, target = export_for_tvm(model, {"input": x}), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module, weights = tuned_module(exported, target)
    (output,) = compile_plainly(module, weights, exported, x, target)()
    torch.testing.assert_close(torch.from_dlpack(output), model(x))


class Heads(torch.nn.Module):
    """Linear layers with an even number of columns, with an odd one, and with an odd one of terms, too."""

    def __init__(self):
        super().__init__()
        self.even, self.odd, self.both_odd = (torch.nn.Linear(*shape) for shape in ((16, 8), (16, 13), (13, 9)))

    def forward(self, x):
        return self.even(x), self.both_odd(self.odd(x).relu())


@torch.no_grad()
def test_a_weight_with_odd_columns_is_read_along_its_terms(tvm):
    torch.manual_seed(0)
    model, x = Heads().eval().half(), torch.randn(3, 5, 16, dtype=torch.float16)
    exported, target = export_for_tvm(model, {"x": x}), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module, weights = tuned_module(exported, target)
    products = [function for name, function in module.functions_items() if "matmul" in name.name_hint]
    read = {tuple(int(size) for size in function.params[1].shape) for function in products}
    assert read == {(16, 8), (13, 16), (13, 9)}  # the second as it is, the others (terms, columns)
    run = compile_plainly(module, weights, exported, x, target)
    for output, expected in zip(run(), model(x)):
        torch.testing.assert_close(torch.from_dlpack(output), expected, rtol=1e-2, atol=1e-2)


class Step(torch.nn.Module):
    """Products whose weights are (columns, terms), as Linear has them, and (terms, columns), as GPT-2's Conv1D."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv1d = torch.nn.Linear(16, 24), torch.nn.Parameter(torch.randn(24, 8) / 5)

    def forward(self, x):
        return self.linear(x).relu() @ self.conv1d


@pytest.mark.parametrize("rows, read", [(1, {(24, 16), (8, 24)}), (2, {(16, 24), (24, 8)})])
@torch.no_grad()
def test_weights_are_read_along_their_terms_for_a_single_row(tvm, rows, read):
    torch.manual_seed(0)
    model, x = Step().eval().half(), torch.randn(1, rows, 16, dtype=torch.float16)
    exported, cpu = export_for_tvm(model, {"x": x}), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module, weights = tuned_module(exported, tvm.target.Target(json.loads(H200)))
    products = [function for name, function in module.functions_items() if "matmul" in name.name_hint]
    assert {tuple(int(size) for size in function.params[1].shape) for function in products} == read
    (output,) = compile_plainly(module, weights, exported, x, cpu)()
    torch.testing.assert_close(torch.from_dlpack(output), model(x), rtol=1e-2, atol=1e-2)


CONVOLUTIONS = [  # (arguments of Conv2d, (height, width, channels) of its image, (kernel's height, width) by then)
    ((3, 8, 7, 2, 3), (21, 24, 4), (7, 7)),
    ((3, 8, 4, 4), (21, 6, 12), (4, 1)),
    ((6, 8, (3, 2), (1, 2), (1, 0)), (21, 12, 12), (3, 1)),
    ((3, 8, 5, 5), (21, 24, 4), (5, 5)),  # five columns do not divide 24
    ((3, 8, 2, 2, 1), (21, 24, 4), (2, 2)),  # patches that begin in the border
    ((5, 8, 3), (21, 24, 5), (3, 3)),  # three channels of zeros would be too many
    ((8, 8, 2, 2), (21, 24, 8), (2, 2)),
]


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Conv2d(*arguments) for arguments, *_ in CONVOLUTIONS)

    def forward(self, x):
        return tuple(part(x[:, : part.in_channels]) for part in self.parts)


@torch.no_grad()
@pytest.mark.parametrize("allow_tf32", [True, False])
def test_images_get_channels_that_are_copied_as_vectors(tvm, allow_tf32):
    torch.manual_seed(0)
    model, x = Convolutions().eval(), torch.randn(2, 8, 21, 24)
    exported, target = export_for_tvm(model, {"x": x}), tvm.target.Target({"kind": "llvm", "num-cores": 2})
    module, weights = import_to_relax(exported)
    module = prepare(module, target, allow_tf32)
    read = set()
    for name, function in module.functions_items():
        if "conv2d" in name.name_hint:
            image, kernel = (tuple(int(size) for size in parameter.shape) for parameter in function.params[:2])
            if allow_tf32 and not image[3] % 4:  # outputs in front
                kernel = (*kernel[1:], kernel[0])
            assert image[3] == kernel[2]
            read.add((image[1:], kernel[:2]))
    wide = {(image, kernel) for _, image, kernel in CONVOLUTIONS}
    assert read == wide if allow_tf32 else not read & wide - {((21, 24, 5), (3, 3)), ((21, 24, 8), (2, 2))}
    run = compile_plainly(module, weights, exported, x, target)
    images = [x] * len(CONVOLUTIONS)
    if allow_tf32:  # the image of the second one is read as it is by those that have a fourth channel, too
        images = [x if number == 1 else rounded_to_tf32(x) for number in range(len(images))]
        for part in model.parts:
            part.weight.copy_(rounded_to_tf32(part.weight))
    for number, (output, image) in enumerate(zip(run(), images)):
        torch.testing.assert_close(torch.from_dlpack(output), model(image)[number])
