"""Masks of ones: a model is exported as eager PyTorch runs it, also where that leaves out what a mask would say."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tvm_items.importer import export_for_tvm


class Causal(torch.nn.Module):
    """Attention of every token to those before it, as transformers writes it."""

    is_causal = True

    def __init__(self, mask_bias=None):
        super().__init__()
        self.mask_bias = mask_bias

    def forward(self, inputs_embeds, attention_mask):
        config = LlamaConfig(attn_implementation="sdpa")
        mask = create_causal_mask(config, inputs_embeds, attention_mask, past_key_values=None)
        if self.mask_bias is not None:
            mask = self.mask_bias if mask is None else torch.where(mask, self.mask_bias, -torch.inf)
        heads = inputs_embeds[:, None]
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, heads, heads, heads, mask)
        return output[:, :, 0]


class NotCausal(Causal):
    """As in PaliGemma and UMT5: eager PyTorch gets no mask, and attention is then to all tokens."""

    is_causal = False


# As in Doge: with a bias that is always there, nothing says that attention is causal.
BIASED = Causal(torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6))


@pytest.mark.parametrize(("model", "keeps_mask"), [(Causal(), True), (NotCausal(), False), (BIASED, False)])
def test_the_mask_is_left_out_where_eager_pytorch_means_something_else_by_none(model, keeps_mask):
    inputs = {"inputs_embeds": torch.randn(1, 6, 8), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    exported = export_for_tvm(model, inputs)
    assert ("attention_mask" in exported.graph_signature.user_inputs) == keeps_mask
    fed = {name: inputs[name] for name in exported.graph_signature.user_inputs}
    torch.testing.assert_close(exported.module()(**fed), model(**inputs))


def test_a_mask_that_hides_a_token_stays():
    inputs = {"inputs_embeds": torch.randn(1, 6, 8), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    exported, model = export_for_tvm(NotCausal(), inputs), NotCausal()
    torch.testing.assert_close(exported.module()(**inputs)[:, 1:], model(**inputs)[:, 1:])
