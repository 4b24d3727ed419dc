"""Loops over the places that a mask names, such as the experts that were hit, traced as loops over all of its places.

A pass over a place that the mask does not name must change nothing then. So each pass may only add to what is there
before the loop, in rows that another mask selects; in a pass over such a place, that mask is made to select none.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

SELECTING = {torch.nonzero, torch.Tensor.nonzero, torch.where, torch.Tensor.where}
NOT_IN_PLACE = {"__index__", "__int__", "__invert__", "__iter__"}


@contextlib.contextmanager
def loops_over_all_places(model):
    """Makes torch.export trace such loops of a model while it lasts.

    NotImplementedError comes out of the trace where a pass of the loop does anything else.
    """
    with LoopTracer() as tracer:
        hook = model.register_forward_hook(lambda module, arguments, outputs: tracer.check((outputs,)))
        try:
            yield
        finally:
            hook.remove()


class LoopTracer(TorchFunctionMode):
    """Follows a model's calls of PyTorch, and which pass of which loop has made a tensor."""

    def __init__(self):
        super().__init__()
        self.masks = {}  # id of what nonzero() gave -> (it, the mask)
        self.made = {}  # id of a tensor -> (it, the pass that has made it)
        self.places = set()  # ids of what a pass has selected
        self.current = self.allowed = None  # the pass, and whether the mask allows it: a tensor
        self.stopped = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_walked = function in (torch.unbind, torch.Tensor.unbind) and id(args[0]) in self.masks
        if is_walked and args[0].shape[1] == 1:
            return self.passes(*self.masks[id(args[0])])
        self.check((args, kwargs))
        selects = function in SELECTING and len(args) == 1
        if selects and self.current:
            args = ((args[0] != 0) & self.allowed,)
        if self.current and is_in_place(function, kwargs):
            if function is not torch.Tensor.index_add_ or id(args[2]) not in self.places:
                raise NotImplementedError(f"a loop over the places of a mask that calls {function.__name__}()")
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if self.current:
            self.made |= {id(tensor): (tensor, self.current) for tensor in tensors}
            if selects:
                self.places |= set(map(id, tensors))
        elif selects and isinstance(result, torch.Tensor) and isinstance(result.shape[0], torch.SymInt):
            self.masks[id(result)] = result, args[0]
        return result

    def passes(self, places, mask):
        """Yields every place of a mask in turn, (1,) of int64, in the place of those that it names."""
        if self.current:
            raise NotImplementedError("a loop over the places of a mask in another one")
        loop = object()
        try:
            for number in range(mask.shape[0]):
                self.allowed = mask[number] != 0
                place = torch.tensor([number])
                self.current = loop, number
                yield place
                self.current = None
        except GeneratorExit:
            self.stopped = True
            raise
        finally:
            self.current = None

    def check(self, values):
        """Raises NotImplementedError if one of some values is of a pass that has ended, or a loop has stopped early."""
        if self.stopped:
            raise NotImplementedError("a loop over the places of a mask that stops early")
        for leaf in tree_leaves(values):
            if id(leaf) in self.made and self.made[id(leaf)][1] != self.current:
                raise NotImplementedError("a loop over the places of a mask that hands on what a pass has computed")


def is_in_place(function, kwargs):
    """Returns whether a function of PyTorch changes one of its arguments."""
    name = function.__name__
    if "out" in kwargs or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return True
    return name.startswith("__i") and name not in NOT_IN_PLACE
