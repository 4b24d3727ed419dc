"""Which templates a task has: hand-written kernels, which the tuner searches beside MetaSchedule's design spaces."""

from tvm_items.target import compute_capability, is_ampere_or_later, max_shared_bytes
from tvm_items.templates.attention_kernels import attention_templates
from tvm_items.templates.attention_task import read_attention
from tvm_items.templates.depthwise import DepthwiseTemplate, find_depthwise_task
from tvm_items.templates.fma import FmaTemplate
from tvm_items.templates.gemv import gemv_templates
from tvm_items.templates.mma import MmaTemplate
from tvm_items.templates.product_task import ALLOW_TF32, find_product_task, find_sums
from tvm_items.templates.row_reduction import RowReductionTemplate
from tvm_items.templates.row_task import find_row_task
from tvm_items.templates.wgmma import WgmmaTemplate, takes_operands

FIRST_TEMPLATE = 100
MIN_MMA_ROWS, MIN_WGMMA_ROWS = 2, 8  # with fewer, nearly all that tensor cores do is padding: 16 rows, or 64
HOPPER = "90"  # no other compute capability has wgmma; clusters are used there only, too


def find_templates(module, target):
    """Returns the list of templates for a task's IRModule before scheduling, on a tvm.target.Target."""
    if not is_ampere_or_later(target):
        return []
    limit, is_hopper = max_shared_bytes(target), compute_capability(target) == HOPPER
    attention = read_attention(module)
    if attention is not None:
        return attention_templates(attention, limit, is_hopper)
    sums = find_sums(module)
    task = sums and find_product_task(sums)
    if task is None:
        depthwise = sums and sums.second is None and find_depthwise_task(sums)
        if depthwise:
            return [DepthwiseTemplate(depthwise)]
        rows = find_row_task(module)
        return [] if rows is None else [RowReductionTemplate(rows)]
    templates = gemv_templates(task, limit)
    if task.rows.extent < MIN_MMA_ROWS:
        return templates
    if task.dtype == "float32" and ALLOW_TF32 not in module["main"].attrs:
        return [*templates, FmaTemplate(task, limit, is_hopper)]
    templates.append(MmaTemplate(task, limit, is_hopper))
    if is_hopper and task.rows.extent >= MIN_WGMMA_ROWS and takes_operands(task):
        templates.append(WgmmaTemplate(task, limit, is_hopper))
    return templates
