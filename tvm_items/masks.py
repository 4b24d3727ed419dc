"""Masks of ones, which eager PyTorch leaves out of transformers' attention and a trace keeps: whether that is the same.

Where a mask would hide nothing, or only what follows each token, transformers hands on none with SDPA, and whether
attention is causal is then up to the attention's own `is_causal`. What is traced has the mask, for whatever it may be.
Where both say the same, as they should, so do both outputs; else the trace is of another function than eager PyTorch's.
"""

import contextlib
import unittest.mock


class MaskWatch:
    """Stands between transformers and its SDPA, and notes which masks eager PyTorch would not have made."""

    def __init__(self, make_mask, attend):
        self.make_sdpa_mask, self.sdpa = make_mask, attend
        self.causal_by_mask = {}  # {id: (mask, whether it is causal)}
        self.handed_on = set()  # the ids of those that attention got as they are
        self.changes_meaning = self.has_other_masks = False

    def make_mask(self, *args, **kwargs):
        """Is transformers' sdpa_mask()."""
        mask = self.make_sdpa_mask(*args, **kwargs)
        if mask is not None and kwargs["q_length"] > 1 and is_left_out(**kwargs):
            self.causal_by_mask[id(mask)] = mask, kwargs.get("allow_is_causal_skip", True)
        return mask

    def attend(self, module, query, key, value, attention_mask=None, *args, is_causal=None, **kwargs):
        """Is transformers' sdpa_attention_forward()."""
        _, is_mask_causal = self.causal_by_mask.get(id(attention_mask), (None, None))
        if is_mask_causal is not None:
            is_module_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
            self.handed_on.add(id(attention_mask))
            self.changes_meaning |= bool(is_module_causal) != is_mask_causal
        elif attention_mask is not None:
            self.has_other_masks = True
        return self.sdpa(module, query, key, value, attention_mask, *args, is_causal=is_causal, **kwargs)

    def may_differ(self):
        """Returns whether what was traced may be another function than what eager PyTorch computes.

        A causal mask that became part of another one, as Doge's does, may be missing there as well.
        """
        lost = any(causal and key not in self.handed_on for key, (_, causal) in self.causal_by_mask.items())
        return self.changes_meaning or (lost and self.has_other_masks)


def is_left_out(*, q_length, kv_length, local_size=None, q_offset=0, kv_offset=0, **kwargs):
    """Returns whether transformers makes no mask of these arguments of sdpa_mask() if no token is hidden."""
    from transformers import masking_utils

    with masks_of_ones_left_out():
        if kwargs.get("allow_is_causal_skip", True):
            return masking_utils._ignore_causal_mask_sdpa(None, q_length, kv_length, q_offset, kv_offset, local_size)
        can_be = kwargs.get("allow_is_bidirectional_skip", False)
        return can_be and masking_utils._ignore_bidirectional_mask_sdpa(None, kv_length, local_size)


def masks_of_ones_left_out():
    """Makes transformers leave masks out of a trace too while it lasts; those of ones have to be known."""
    return unittest.mock.patch("transformers.masking_utils.is_tracing", return_value=False)


@contextlib.contextmanager
def watch_masks():
    """Yields a MaskWatch of what is traced while it lasts."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    # The mappings of the classes: some models have an AttentionInterface of their own, which reads the same one.
    masks, attentions = AttentionMaskInterface._global_mapping, AttentionInterface._global_mapping
    watch = MaskWatch(masks["sdpa"], attentions["sdpa"])
    patch = unittest.mock.patch.dict
    with patch(masks, sdpa=watch.make_mask), patch(attentions, sdpa=watch.attend):
        yield watch
