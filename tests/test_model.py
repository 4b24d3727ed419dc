"""Where models come from: directories, the hub (a small one on this machine), and the built-in architectures."""

import hashlib
import http.server
import json
import threading

import pytest
import torch
from conftest import TINY_RESNET, read_csv

import benchmark


def make_case(config, weights_dir=None, **fields):
    return benchmark.Case(
        **{
            "model_name": "test",
            "model_class": benchmark.find_model_class("test", config),
            "config": config,
            "weights": "pretrained" if weights_dir else "random",
            "weights_dir": weights_dir and str(weights_dir),
            "batch_size": 1,
            "seq_len": 128,
            "image_size": None,
            "precision": "fp32",
            "device": "cpu",
            "device_name": "a CPU",
            "tuning_dir": benchmark.DEFAULT_TUNING,
            "iterations": None,
            **fields,
        }
    )


@pytest.fixture
def checkpoint(write_model):
    """-> (directory with config.json and model.safetensors, its state dict)."""
    directory = write_model(name="checkpoint")
    config, _ = benchmark.find_model(str(directory), "random")
    torch.manual_seed(1234)
    model = benchmark.find_model_class("test", config)(config)
    model.save_pretrained(directory)
    return directory, model.state_dict()


def test_pretrained_weights_from_a_directory(checkpoint):
    directory, state = checkpoint
    config, weights_dir = benchmark.find_model(str(directory), "auto")
    loaded = benchmark.load_model(make_case(config, weights_dir)).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class SmallHub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses, over the dict {repository: {file: bytes}}."""

    repositories: dict = {}
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        commit = "0" * 40
        if path.startswith("api/models/"):
            repository = "/".join(path.split("/")[2:4])
            files = self.repositories.get(repository)
            if files is None:
                return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            info = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        parts = path.split("/")
        content = self.repositories.get("/".join(parts[:2]), {}).get(parts[-1])
        if content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self.answer(200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": commit})

    do_HEAD = do_GET

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """-> (repositories to fill, environment variables that make it the hub, with an empty cache)."""
    SmallHub.repositories = {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield (
        SmallHub.repositories,
        {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": tmp_path / "hf",
            "NO_PROXY": "127.0.0.1",
        },
    )
    server.shutdown()


def test_pretrained_weights_from_the_hub_and_its_cache(command, checkpoint, hub, tmp_path):
    directory, _ = checkpoint
    repositories, environment = hub
    repositories["someone/tiny"] = {
        **{name: (directory / name).read_bytes() for name in ("config.json", "model.safetensors")},
        "pytorch_model.bin": b"must not be fetched",
    }
    arguments = ["--model", "someone/tiny", "--test-items", "torch", "--iterations", 3, "--results", "rows.csv"]
    done = command("benchmark.py", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "hf").rglob("*.bin"))
    done = command("benchmark.py", *arguments, **{**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert [row["weights"] for row in read_csv(tmp_path / "rows.csv")] == ["pretrained"] * 2


@pytest.mark.parametrize(
    "repository, says", [("nobody/nothing", "not on the hub"), ("someone/pickled", "no safetensors weights")]
)
def test_hub_models_that_cannot_be_used(command, hub, repository, says, tmp_path):
    repositories, environment = hub
    repositories["someone/pickled"] = {"config.json": json.dumps(TINY_RESNET).encode(), "pytorch_model.bin": b"x"}
    done = command("benchmark.py", "--model", repository, "--results", "rows.csv", **environment)
    assert done.returncode == 2 and says in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "rows.csv").exists()


def test_unreachable_hub_falls_back_to_the_built_in_architecture(command, tmp_path):
    done = command(
        "benchmark.py",
        "--image-size",
        32,
        "--test-items",
        "torch",
        "--iterations",
        3,
        "--results",
        "rows.csv",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
        HF_HOME=tmp_path / "hf",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "cannot be reached" in done.stderr
    (row,) = read_csv(tmp_path / "rows.csv")
    assert row["model_name"] == "microsoft/resnet-50" and row["weights"] == "random"


# Parameters of the published checkpoints, as their papers and model cards round them, in millions.
@pytest.mark.parametrize(
    "name, millions, pixels",
    [
        ("facebook/convnext-tiny-224", 28.6, 224),
        ("microsoft/resnet-50", 25.6, 224),
        ("google/vit-base-patch16-224", 86.6, 224),
        ("microsoft/swin-tiny-patch4-window7-224", 28.3, 224),
        ("facebook/dinov2-base", 86.6, 518),
    ],
)
def test_built_in_architectures_are_those_of_the_checkpoints(name, millions, pixels):
    config, weights_dir = benchmark.find_model(name, "random")
    case = make_case(config)
    with torch.device("meta"):
        model = case.model_class(config)
    assert weights_dir is None
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert benchmark.input_shapes(case) == {"pixel_values": (1, 3, pixels, pixels)}
    if "dinov2" not in name:
        assert config.num_labels == 1000


def test_negative_positions_are_no_limit():
    case = make_case(benchmark.CONFIG_MAPPING["xlnet"](n_layer=1))
    assert case.config.max_position_embeddings == -1
    assert benchmark.input_shapes(case)["input_ids"] == (1, case.seq_len)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 10,
}


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("resnet", {**TINY_RESNET, "depths": [3, 3]}),
        ("convnext", {"hidden_sizes": [16, 16, 16, 16], "depths": [2, 2, 4, 2], "num_labels": 10, "image_size": 64}),
        ("vit", SMALL),
        (
            "swin",
            {
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [1, 2],
                "window_size": 4,
                "image_size": 32,
                "num_labels": 10,
            },
        ),
        ("dinov2", {**SMALL, "architectures": ["Dinov2Model"]}),
        ("dinov3_vit", SMALL),  # has a parameter without elements
        ("mobilenet_v2", {"image_size": 64, "depth_multiplier": 0.35, "num_labels": 10}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 98}),
        ("t5", {"d_model": 64, "d_kv": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 99}),
    ],
)
def test_random_weights_keep_the_signal(model_type, fields, tmp_path):
    """The output has a size, and noise of 20 % on any one layer's weights shows in it well above fp32's tolerance."""
    made_weights = tmp_path / "weights"
    made_weights.touch()
    config = benchmark.CONFIG_MAPPING[model_type](**{k: v for k, v in fields.items() if k != "model_type"})
    case = make_case(config, made_weights=str(made_weights))
    model, inputs = benchmark.load_model(case), benchmark.make_inputs(case)
    reference = benchmark.output_arrays(model(**inputs))
    for again in (benchmark.load_model(case), benchmark.load_model(make_case(config))):  # kept, and made anew
        assert benchmark.relative_error(benchmark.output_arrays(again(**inputs)), reference) == 0
    assert 0.1 < reference[0].std() < 10
    assert benchmark.growth_of_a_change(model, inputs) <= benchmark.STEADY
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            weight = layer.weight.clone()
            layer.weight.mul_(1 + 0.2 * torch.randn_like(weight))
            error = benchmark.relative_error(benchmark.output_arrays(model(**inputs)), reference)
            layer.weight.copy_(weight)
            assert error > 2e-4, layer


def test_builtin_architectures():
    """Each is a family of its own, has a head and inputs, and says where it was cut in depth."""
    configs = {name: benchmark.builtin_config(name) for name in benchmark.BUILTIN_ARCHITECTURES}
    assert len({config.model_type for config in configs.values()}) == len(configs) >= 40
    for name, config in configs.items():
        case = make_case(config, model_name=name)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in case.model_class(config).parameters())
        assert 1e6 < parameters < 2e9, name
        assert all(min(shape) > 0 for shape in benchmark.input_shapes(case).values())
        assert benchmark.describe_weights(name, config, "pretrained") == "pretrained"
    of_llama = benchmark.describe_weights("meta-llama/Llama-3.2-1B", configs["meta-llama/Llama-3.2-1B"], "random")
    assert of_llama == "random, 4 of 16 layers"
    assert benchmark.describe_weights("microsoft/resnet-50", configs["microsoft/resnet-50"], "random") == "random"


@torch.no_grad()
def test_making_random_weights_leaves_nothing_behind_in_fp32():
    """LeViT keeps its attention biases from the first run in evaluation mode."""
    fields = {"hidden_sizes": [16, 24, 32], "depths": [1, 1, 1], "num_attention_heads": [2, 2, 2], "image_size": 64}
    fields |= {"key_dim": [8, 8, 8], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]}
    case = make_case(benchmark.CONFIG_MAPPING["levit"](**fields))
    model, inputs = benchmark.load_on_device(case, torch.float16)
    assert model(**inputs).logits.dtype == torch.float16
