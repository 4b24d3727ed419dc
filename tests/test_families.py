"""Small models of many families through eager PyTorch and TVM: inputs and heads come from the config alone."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT, read_csv

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "vocab_size": 99,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
IMAGES, TOKENS = "pixel_values=2x3x32x32", "input_ids=2x16 attention_mask=2x16"

# model_type -> (the config's other fields, further options, the inputs that must be fed)
FAMILIES = {
    "vit": (VISION, [], IMAGES),
    "bert": (TEXT, ["--task", "text-classification"], TOKENS),
    "roberta": ({**TEXT, "max_position_embeddings": 14, "pad_token_id": 1}, [], TOKENS.replace("16", "12")),
    "deberta-v2": ({**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c"]}, [], TOKENS),
    "llama": ({**TEXT, "num_key_value_heads": 1, "eos_token_id": [2, 5]}, [], TOKENS),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "eos_token_id": 98}, [], TOKENS),
    "t5": (
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 99},
        [],
        f"{TOKENS} decoder_input_ids=2x16",
    ),
    "bart": (SEQ2SEQ, [], f"{TOKENS} decoder_input_ids=2x16"),
    "clip": (
        {"text_config": {**TEXT, "max_position_embeddings": 8}, "vision_config": VISION, "projection_dim": 16},
        [],
        f"{TOKENS.replace('16', '8')} {IMAGES}",
    ),
    "siglip": (
        {"text_config": {**TEXT, "max_position_embeddings": 8}, "vision_config": VISION},
        [],
        f"input_ids=2x8 attention_mask=2x8 {IMAGES}",
    ),
    "whisper": (
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 20}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
        [],
        "input_features=2x16x100 decoder_input_ids=2x16",
    ),
    "wav2vec2": (
        {
            **TEXT,
            "conv_dim": [16, 16, 16],
            "conv_stride": [5, 4, 4],
            "conv_kernel": [10, 3, 3],
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
        [],
        "input_values=2x16000",
    ),
}

# One process for many: imports cost more than these models do, and benchmark.py isolates every item by itself.
SCRIPT = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import benchmark
from tvm_items.imports import import_tvm
import_tvm("fp32")  # else every forked item would
for arguments in json.loads(sys.argv[1]):
    try:
        print(arguments, benchmark.main(arguments), flush=True)
    except SystemExit as stop:
        print(arguments, stop.code, flush=True)
"""


def run_families(directory):
    """Returns {(model type, item): row} of a small model of each family."""
    commands = []
    for model_type, (fields, options, _) in FAMILIES.items():
        (directory / model_type).mkdir()
        (directory / model_type / "config.json").write_text(json.dumps({"model_type": model_type, **fields}))
        common = "--weights random --batch-size 2 --seq-len 16 --iterations 3 --test-items torch tvm".split()
        paths = ["--model", str(directory / model_type), "--results", str(directory / "rows.csv")]
        commands.append([*common, *options, *paths])
    halves = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(half)], stdout=subprocess.PIPE, text=True)
        for half in (commands[::2], commands[1::2])
    ]
    for half in halves:
        stdout, _ = half.communicate()
        assert half.returncode == 0, stdout
    return {(row["model_name"].rpartition("/")[2], row["test_item"]): row for row in read_csv(directory / "rows.csv")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return run_families(tmp_path_factory.mktemp("families"))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(model_type, rows):
    for item in ("torch", "tvm"):
        row = rows[model_type, item]
        assert row["status"] == "ok", row["error"]
        assert float(row["rel_error"]) <= 1e-4
        assert row["input_shape"] == FAMILIES[model_type][2]
