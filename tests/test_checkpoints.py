"""Which files are read as a model's weights, whether they are the model's, and whether the model fits the machine."""

import json
import os
import shutil
import time

import pytest
import safetensors.torch
import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ResNetConfig,
    T5Config,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from conftest import TINY_RESNET, make_case
from harness import checkpoints
from harness.architectures import builtin_config
from harness.checkpoints import check_model, find_safetensors, load_pretrained
from harness.errors import UserError
from harness.models import find_model, find_model_class
from harness.weights import load_model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FAMILIES = {
    "Bert": BertConfig(vocab_size=99, **SMALL),
    "ViT": ViTConfig(image_size=32, patch_size=8, **SMALL),
    "GPT2": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, eos_token_id=98, bos_token_id=98),
    "Llama": LlamaConfig(vocab_size=99, num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
    "T5": T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
    "Bart": BartConfig(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64),
    "Wav2Vec2": Wav2Vec2Config(conv_dim=(32,) * 7, num_conv_pos_embeddings=16, **SMALL),
    "Whisper": WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        pad_token_id=0,
    ),
    "ResNet": ResNetConfig(**{k: v for k, v in TINY_RESNET.items() if k != "model_type"}),
}


def save(class_name, directory, family=None, **fields):
    """Saves a model of a class of transformers as its users do; returns its config and weights."""
    family = family or next(name for name in FAMILIES if class_name.startswith(name))
    config = type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), **fields})
    torch.manual_seed(1)
    model = getattr(transformers, class_name)(config)
    model.save_pretrained(directory)
    return config, model.state_dict()


@pytest.mark.parametrize(
    "saved, loaded, weights",
    [
        ("BertForMaskedLM", "BertForMaskedLM", "pretrained"),  # a decoder that is tied to the embeddings
        ("BertForPreTraining", "BertForMaskedLM", "pretrained"),  # a second head, and a pooler
        ("BertModel", "BertForMaskedLM", "pretrained, random head"),
        ("BertForMaskedLM", "BertModel", "pretrained, random head"),  # the pooler
        ("ViTModel", "ViTForImageClassification", "pretrained, random head"),
        ("ViTForImageClassification", "ViTForImageClassification", "pretrained"),
        ("GPT2Model", "GPT2LMHeadModel", "pretrained"),
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "pretrained, random head"),
        ("LlamaForCausalLM", "LlamaForCausalLM", "pretrained"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration", "pretrained"),
        ("T5ForConditionalGeneration", "T5ForSequenceClassification", "pretrained, random head"),
        ("BartForConditionalGeneration", "BartForConditionalGeneration", "pretrained"),
        ("Wav2Vec2Model", "Wav2Vec2ForCTC", "pretrained, random head"),  # weight normalisation has other names
        ("WhisperForConditionalGeneration", "WhisperForAudioClassification", "pretrained, random head"),
        ("ResNetForImageClassification", "ResNetForImageClassification", "pretrained"),  # statistics and counters
        ("ResNetModel", "ResNetForImageClassification", "pretrained, random head"),
    ],
)
def test_a_checkpoint_of_the_family(saved, loaded, weights, tmp_path, capsys):
    config, state = save(saved, tmp_path)
    model_class = getattr(transformers, loaded)
    assert check_model("test", model_class, config, tmp_path) == weights
    assert ("random" in capsys.readouterr().err) == ("random" in weights)
    model = load_pretrained(model_class, config, tmp_path)
    base = getattr(model, model.base_model_prefix, model).state_dict()
    prefix = f"{model.base_model_prefix}."
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    same = [name for name in base if name in state]
    assert same and all(torch.equal(base[name], state[name]) for name in same)
    assert {name.partition(".")[0] for name in base.keys() - set(same)} <= {"pooler", "classifier", "projector"}


@pytest.mark.parametrize(
    "saved, fields, loaded, says",
    [
        ("BertModel", {}, "ResNetForImageClassification", "are missing"),
        ("ViTModel", {}, "BertModel", "are missing"),
        ("BertForMaskedLM", {"num_hidden_layers": 4}, "BertForMaskedLM", "32 have no place in the model"),
        ("BertModel", {"num_hidden_layers": 4}, "BertForMaskedLM", "have no place in the model"),
        ("BertForMaskedLM", {"num_hidden_layers": 1}, "BertForMaskedLM", "16 are missing"),
        ("BertForMaskedLM", {"intermediate_size": 48}, "BertForMaskedLM", "have another shape"),
        ("ViTForImageClassification", {"num_labels": 5}, "ViTForImageClassification", "have another shape"),
    ],
)
def test_a_checkpoint_of_another_model(saved, fields, loaded, says, tmp_path):
    save(saved, tmp_path, **fields)
    config = FAMILIES[next(name for name in FAMILIES if loaded.startswith(name))]
    model_class = getattr(transformers, loaded)
    with pytest.raises(UserError, match=says):
        check_model("test", model_class, config, tmp_path)
    if "shape" not in says:  # where transformers has words of its own
        with pytest.raises(UserError, match=says):
            load_pretrained(model_class, config, tmp_path)


def test_a_head_that_is_random_is_the_same_every_time(tmp_path):
    save("ViTModel", tmp_path)
    config, weights_dir = find_model(str(tmp_path), "auto")
    case = make_case(config, weights_dir, model_class=transformers.ViTForImageClassification)
    assert torch.equal(load_model(case).classifier.weight, load_model(case).classifier.weight)


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """Returns a directory with a checkpoint of several files and their index."""
    config = FAMILIES["Bert"]
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_a_sharded_checkpoint_and_links_of_the_hubs_cache(sharded):
    assert check_model("test", transformers.BertForMaskedLM, FAMILIES["Bert"], sharded) == "pretrained"
    snapshot, blobs = sharded / "snapshots" / "0", sharded / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate([*sharded.glob("*.safetensors"), *sharded.glob("*.json")]):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert check_model("test", transformers.BertForMaskedLM, FAMILIES["Bert"], snapshot) == "pretrained"


@pytest.mark.parametrize(
    "shard", ["evil.bin", "../../outside.bin", "../outside.safetensors", "sub/x.safetensors", "/x.safetensors"]
    + ["..", "", "a\0.safetensors", "a" * 300 + ".safetensors", "missing.safetensors", 5, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_names_safetensors_of_its_directory_alone(sharded, shard):
    state = {"pooler.dense.bias": torch.zeros(32)}
    for file in ("evil.bin", "../outside.bin"):
        torch.save(state, sharded / file)
    safetensors.torch.save_file(state, sharded.parent / "outside.safetensors")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["bert.embeddings.LayerNorm.bias"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="names"):
        find_safetensors(sharded)
    with pytest.raises(UserError, match="names"):
        find_model(str(sharded), "auto")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "5", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff", "9" * 5000],
)
def test_an_index_of_another_shape(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"index\.json"):
        find_safetensors(tmp_path)


def test_an_index_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match="not a file"):
        find_safetensors(tmp_path)


def test_a_file_that_config_json_names_is_not_read(tmp_path):
    config, state = save("BertModel", tmp_path)
    other = {name: tensor + 1 for name, tensor in state.items() if tensor.is_floating_point()}
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    config.transformers_weights = "other.safetensors"
    model = load_pretrained(transformers.BertModel, config, tmp_path)
    assert torch.equal(model.embeddings.LayerNorm.bias, state["embeddings.LayerNorm.bias"])


# ---- Size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, says",
    [
        (BertConfig(vocab_size=4 * 10**8), r"1,14\d\.\d GiB of memory in fp32"),
        pytest.param(
            LlamaConfig(num_hidden_layers=10**6, hidden_size=64, num_attention_heads=4),
            "more than 100,000 tensors",
            marks=pytest.mark.slow,
        ),
        (BertConfig(hidden_size=10**9), "need|cannot be loaded"),
        (BertConfig(hidden_size=7), "multiple"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before(config, says):
    start = time.monotonic()
    with pytest.raises(UserError, match=says):
        check_model("test", find_model_class("test", config), config, None)
    assert time.monotonic() - start < 60


def test_the_check_takes_no_time_to_speak_of(monkeypatch):
    """Some 0.1 s, of which a loaded machine makes more."""
    config = builtin_config("google-bert/bert-base-uncased")
    model_class = find_model_class("test", config)
    start = time.monotonic()
    assert check_model("test", model_class, config, None) == "random"
    assert time.monotonic() - start < 3
    monkeypatch.setattr(checkpoints, "host_memory_bytes", lambda: 2**28)
    with pytest.raises(UserError, match=r"0\.4 GiB of memory in fp32, and this machine has 0\.2 GiB"):
        check_model("test", model_class, config, None)
