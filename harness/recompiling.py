"""Where torch.compile compiles a second time: a part of what compiling costs at first, an error in the timed runs."""

import contextlib
import sys
import time

from harness.device import synchronize

MOST_RECOMPILES = 3  # a model that has not settled by then compiles again in the timed runs, and fails there


def dynamo():
    """Returns torch.compile's module, None where nothing has imported it: other items need not wait for that."""
    return sys.modules.get("torch._dynamo")


def recompiling_fails():
    """Returns a context in which an inference fails, with the reason, for which torch.compile would compile anew."""
    return dynamo().config.patch(error_on_recompile=True) if dynamo() else contextlib.nullcontext()


def finish_compiling(run, device):
    """Returns the wall seconds of the inferences in which torch.compile compiles anew; none does so afterwards.

    The first inference may leave something in the model that the second finds (LeViT keeps its attention biases).
    """
    seconds = 0.0
    # TVM's export imports torch.compile's module, too, and compiles nothing by it: its inferences may take seconds.
    compiles = dynamo() and dynamo().utils.counters["frames"]
    for _ in range(MOST_RECOMPILES if compiles else 0):
        try:
            with recompiling_fails():
                run()
            break
        except dynamo().exc.RecompileError:
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds += time.perf_counter() - start
    return seconds
