"""Decode: the step against whole forward passes, every item on it, and what must not pass."""

import dataclasses
import functools

import pytest
import torch
from transformers import AutoConfig

import benchmark
from conftest import ROOT, make_case, read_csv
from harness.check import output_arrays, relative_error
from harness.decode import CHAIN_STEPS, cache_arrays, decoder_tokens, run_chain, step_bytes
from harness.inputs import CHANGED_SEED, make_inputs
from harness.recompiling import recompiling_fails
from harness.reference import run_on_changed_inputs
from harness.rows import find_statuses
from harness.weights import load_on_device
from tvm_items import tuning
from tvm_items.importer import export_for_tvm
from tvm_items.relax_module import tuned_module
from tvm_items.relax_rewrites import WRITE, find_calls
from tvm_items.tuning import make_tasks, tuned_name

LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LLAMA,
    "sliding window": {**LLAMA, "model_type": "mistral", "sliding_window": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": 512, "n_layer": 2, "n_head": 4, "n_embd": 64, "bos_token_id": 0}
    | {"eos_token_id": 1},
    "t5": {"model_type": "t5", "vocab_size": 512, "num_layers": 2, "num_heads": 4, "d_model": 64, "d_ff": 128}
    | {"d_kv": 16},
}
CONTEXT, BATCH = 32, 2


def decode_case(name, **fields):
    config = AutoConfig.for_model(**CONFIGS[name])
    return make_case(config, phase="decode", context_len=CONTEXT, batch_size=BATCH, seq_len=24, **fields)


def clone(inputs):
    return {name: tensor.clone() for name, tensor in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_and_a_chain_are_what_a_forward_pass_gives(name):
    """The last logits of a pass over all tokens; and of one whose last eight tokens are the chain's."""
    case = decode_case(name)
    step, inputs = load_on_device(case, torch.float32)
    tokens = decoder_tokens(case, CONTEXT, 0)
    changed = torch.cat([tokens[:, :-CHAIN_STEPS], decoder_tokens(case, CHAIN_STEPS, CHANGED_SEED)], 1)
    encoder, of_tokens = {}, "input_ids"
    if case.config.is_encoder_decoder:
        encoder, of_tokens = {"input_ids": make_inputs(case)["input_ids"]}, "decoder_input_ids"
    last = step.model(**encoder, **{of_tokens: tokens}).logits[:, -1:]
    lasts = step.model(**encoder, **{of_tokens: changed}).logits[:, -CHAIN_STEPS:]
    filled = clone(inputs)
    bound, new_tokens = step.bind(inputs)
    for run in (functools.partial(step, **inputs), functools.partial(bound, **new_tokens)):
        for name, tensor in filled.items():
            inputs[name].copy_(tensor)
        for _ in range(2):  # it can be repeated
            assert relative_error(output_arrays(run()), output_arrays(last)) < 2e-6
        chain = torch.cat(list(run_chain(run, inputs, case)), 1)
        assert relative_error(output_arrays(chain), output_arrays(lasts)) < 2e-6


@torch.no_grad()
def test_bytes_that_a_step_moves():
    """All weights but the table of embeddings, of which a step reads a row; the cache; and the new keys and values."""
    case = decode_case("llama")
    step, inputs = load_on_device(case, torch.float32)
    parameters = sum(parameter.numel() for parameter in step.parameters()) - 512 * 64
    cache = 4 * BATCH * 2 * CONTEXT * 16  # keys and values of two layers, two heads each
    assert step_bytes(step, inputs) == 4 * (parameters + cache + cache // CONTEXT)
    assert not inputs["keys_1"][:, :, -1].any()


@torch.no_grad()
@pytest.mark.usefixtures("tvm")
@pytest.mark.parametrize(
    "item, name",
    [("tvm_tuned", "llama")]
    + [pytest.param(*slow, marks=pytest.mark.slow) for slow in (("tvm_default", "t5"), ("tvm_tuned", "gpt2"))],
)
def test_tvm_writes_the_cache_in_place(monkeypatch, item, name):
    monkeypatch.setattr(tuning, "find_kernels", lambda case: ({}, 0))
    case = decode_case(name)
    step, inputs = load_on_device(case, torch.float32)
    of_tvm = clone(inputs)
    expected = [output_arrays(step(**inputs)) + cache_arrays(inputs)]
    expected.append(run_on_changed_inputs(lambda: output_arrays(step(**inputs)), inputs, case))
    run = getattr(benchmark, item)(step, of_tvm, case)
    for outputs in expected:
        if outputs is expected[0]:
            found = output_arrays(run()) + cache_arrays(of_tvm)
        else:
            found = run_on_changed_inputs(lambda: output_arrays(run()), of_tvm, case)
        assert relative_error(found, outputs) < 1e-5


@torch.no_grad()
def test_a_step_is_compiled_once():
    """Whatever its position is."""
    case = decode_case("llama")
    step, inputs = load_on_device(case, torch.float32)
    bound, tokens = step.bind(inputs)
    run = functools.partial(torch.compile(bound, backend="eager"), **tokens)
    run()
    with recompiling_fails():
        assert len(list(run_chain(run, inputs, case))) == CHAIN_STEPS


@torch.no_grad()
def test_what_is_written_into_the_cache_is_computed_there(tvm):
    """Turned keys and sliced values, of one layer: no other kernel makes them, and none only writes."""
    config = AutoConfig.for_model(**{**LLAMA, "num_hidden_layers": 1})
    case = make_case(config, phase="decode", context_len=CONTEXT)
    model, inputs = load_on_device(case, torch.float32)
    exported = export_for_tvm(model, inputs, whole_attention=True)
    module, _ = tuned_module(exported, tvm.target.Target({"kind": "llvm", "num-cores": 2}))
    writes = find_calls(module["main"], [WRITE]).values()
    names = [write.args[0].name_hint for write in writes]
    assert len(names) == 2 and all(name.endswith("_write_position") and "slice" in name for name in names)


def test_tuned_cases_have_names_of_their_own(tvm):
    """At batch size 1, where a norm's factor has a single element."""
    case = dataclasses.replace(decode_case("llama"), batch_size=1)
    assert tuned_name(case).endswith(".decode-32.layers-2.fp32")
    tasks = {task.name: task for task in make_tasks(case, '{"kind": "llvm"}')}
    assert "write_position" not in tasks  # at made-up positions it would write anywhere
    cache = "float32", (1, 2, CONTEXT, 16)
    assert [task.name for task in tasks.values() if cache in task.arguments] == ["attention"]  # it is never copied


# Items that go wrong where only a step can.
BROKEN_STEPS = f"""
import functools, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import benchmark

def off_by_one(model, inputs, case):
    return lambda: model(**inputs | {{"position": inputs["position"] - 1}})

def leaves_the_cache(model, inputs, case):
    return lambda: model(**{{name: tensor.clone() for name, tensor in inputs.items()}})

def compiles_anew(model, inputs, case):
    model, tokens = model.bind(inputs)
    scaled = lambda tokens, count: model(input_ids=tokens) * (count / count)
    compiled = torch.compile(scaled, backend="eager", dynamic=False)
    count = iter(range(1, 10**9))
    return lambda: compiled(tokens["input_ids"], next(count))

for function in (off_by_one, leaves_the_cache, compiles_anew):
    benchmark.TEST_ITEMS[function.__name__] = benchmark.TestItem(function)

if __name__ == "__main__":
    sys.exit(benchmark.main())
"""


def test_rows_and_what_is_wrong_with_them(command, write_model, tmp_path):
    script = tmp_path / "broken_steps.py"
    script.write_text(BROKEN_STEPS)
    options = ["--phase", "decode", "--context-len", CONTEXT, "--batch-size", BATCH, "--device", "cpu"]
    items = ["torch", "tvm", "off_by_one", "leaves_the_cache", "compiles_anew"]  # threads: as in test_benchmark.py
    arguments = ["--model", write_model(LLAMA), "--weights", "random", "--iterations", 3, "--results", "rows.csv"]
    done = command(script, *arguments, *options, "--test-items", *items, OMP_NUM_THREADS=1, TVM_NUM_THREADS=1)
    assert done.returncode == 1, done.stderr
    rows = {row["test_item"]: row for row in read_csv(tmp_path / "rows.csv")}
    assert [rows[item]["status"] for item in items] == ["ok", "ok", "wrong", "wrong", "failed"], done.stdout
    assert float(rows["tvm"]["warm_start_time_s"]) > 0
    assert "recompile" in rows["compiles_anew"]["error"].lower()
    for item in ("torch", "tvm"):
        row = rows[item]
        assert (row["phase"], row["context_len"], row["layers"]) == ("decode", str(CONTEXT), "2")
        assert row["input_shape"] == f"input_ids={BATCH}x1"
        median_s = float(row["infer_time_median_ms"]) / 1e3
        assert float(row["tokens_per_s"]) == pytest.approx(BATCH / median_s, rel=1e-4)
        assert 0 < float(row["bandwidth_share"]) < 2
    # The same case with another context, or as a forward pass, has not run.
    assert find_statuses(tmp_path / "rows.csv", row)["tvm"] == "ok"
    assert not find_statuses(tmp_path / "rows.csv", row | {"context_len": "16"})
    assert not find_statuses(tmp_path / "rows.csv", row | {"phase": "forward", "context_len": ""})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_torch_compile_decodes(command, write_model, tmp_path, name):
    arguments = ["--model", write_model(CONFIGS[name]), "--weights", "random", "--results", "rows.csv"]
    options = ["--phase", "decode", "--context-len", CONTEXT, "--device", "cpu", "--test-items", "torch_compile"]
    done = command("benchmark.py", *arguments, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = read_csv(tmp_path / "rows.csv")
    assert float(row["warm_start_time_s"]) > 0


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (
            "openai-community/gpt2",
            ["--context-len", 2048],
            "--context-len 2048: openai-community/gpt2 has 1024 positions",
        ),
        ("google-bert/bert-base-uncased", [], "BertForMaskedLM does not decode"),
        ("Qwen/Qwen3-0.6B", ["--layers", 29], "--layers 29: Qwen/Qwen3-0.6B has 28 layers"),
        ("openai-community/gpt2", ["--context-len", 1], "--context-len takes at least 2"),
    ],
)
def test_what_cannot_decode_is_one_line(capsys, tmp_path, model, options, said):
    arguments = ["--model", model, "--weights", "random", "--phase", "decode", "--device", "cpu"]
    code = benchmark.main([*arguments, "--results", str(tmp_path / "rows.csv"), *map(str, options)])
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("benchmark.py")]
    assert said in line and not (tmp_path / "rows.csv").exists()
