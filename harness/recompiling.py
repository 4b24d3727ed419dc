"""Where torch.compile compiles a second time: a part of what compiling costs at first, an error in the timed runs."""

import contextlib
import re
import sys
import time

from harness.device import synchronize

MOST_RECOMPILES = 3  # a model that has not settled by then compiles again in the timed runs, and fails there
QUIET_INFERENCES = 3  # so many in a row without compiling, and it has settled


def dynamo():
    """Returns torch.compile's module, None where nothing has imported it: other items need not wait for that."""
    return sys.modules.get("torch._dynamo")


@contextlib.contextmanager
def recompiling_fails():
    """Makes an inference fail, with the reasons, for which torch.compile would compile anew, while it lasts."""
    if not dynamo():
        yield
        return
    try:
        with dynamo().config.patch(error_on_recompile=True):
            yield
    except dynamo().exc.RecompileError as error:
        # A line for each of the function's compiled forms, with the condition that it is no longer used for, and where
        # in the code that comes from; around them half a page of a stack trace.
        reasons = re.findall(r"- (\d+/\d+: .*?)\s*(?:#|$)", str(error), re.MULTILINE)
        error.args = (f"torch.compile compiles anew; {'; '.join(reasons)}",)
        raise


def would_recompile(run):
    """Returns whether torch.compile would have compiled anew in an inference, which has failed then."""
    try:
        with recompiling_fails():
            run()
    except dynamo().exc.RecompileError:
        return True
    return False


def finish_compiling(run, device):
    """Returns the wall seconds of the inferences in which torch.compile compiles anew; none does so afterwards.

    The first inference may leave something in the model that a later one finds (LeViT keeps its attention biases). From
    Python 3.12 on that is the third one: the second takes it for granted that the model is what it was.
    """
    seconds, recompiles, quiet = 0.0, 0, 0
    # TVM's export imports torch.compile's module, too, and compiles nothing by it: its inferences may take seconds.
    compiles = dynamo() and dynamo().utils.counters["frames"]
    while compiles and recompiles < MOST_RECOMPILES and quiet < QUIET_INFERENCES:
        if not would_recompile(run):
            quiet += 1
            continue
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds += time.perf_counter() - start
        recompiles, quiet = recompiles + 1, 0
    return seconds
