"""Times what PyTorch's documentation tells users to set for inference: which of it pays stands in docs/methodology.md.

    python tests/terms.py [MODEL …]

inference_mode against no_grad, cudnn.benchmark, and channels-last weights and inputs, each for eager PyTorch and
torch.compile(mode="reduce-overhead"), at batch 1 and 16 in fp16 and fp32, on a CUDA device. A line a measurement.
"""

import functools
import itertools
import sys

import torch

from conftest import make_case
from harness.architectures import builtin_config
from harness.case import arithmetic
from harness.weights import load_on_device
from timers import CUDA, median_ms

MODELS = ["microsoft/resnet-50", "facebook/convnext-tiny-224", "google/vit-base-patch16-224"]
# name -> (context of the runs, cudnn.benchmark, memory format)
TERMS = {
    "no_grad": (torch.no_grad, False, torch.contiguous_format),
    "inference_mode": (torch.inference_mode, False, torch.contiguous_format),
    "inference_mode, cudnn.benchmark": (torch.inference_mode, True, torch.contiguous_format),
    "inference_mode, channels_last": (torch.inference_mode, False, torch.channels_last),
}


def time_terms(case, context, cudnn_benchmark, memory_format):
    """Returns the medians in ms of eager PyTorch and of reduce-overhead on these terms."""
    torch._dynamo.reset()
    torch.backends.cudnn.benchmark = cudnn_benchmark
    with arithmetic(case.precision) as dtype:
        with torch.no_grad():
            model, inputs = load_on_device(case, dtype)
        model = model.to(memory_format=memory_format)
        inputs = {name: tensor.to(memory_format=memory_format) for name, tensor in inputs.items()}
        with context():
            eager = median_ms(functools.partial(model, **inputs))
            return eager, median_ms(functools.partial(torch.compile(model, mode="reduce-overhead"), **inputs))


def main(*models):
    for name, precision, batch_size in itertools.product(models or MODELS, ("fp16", "fp32"), (1, 16)):
        case = make_case(builtin_config(name), batch_size=batch_size, precision=precision, device=CUDA)
        for terms, settings in TERMS.items():
            eager, graphs = time_terms(case, *settings)
            print(
                f"{name}, {precision}, {batch_size}, {terms}: eager {eager:.3f}, reduce-overhead {graphs:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
