"""Where models come from: directories, the hub (a small one on this machine), and the built-in architectures."""

import hashlib
import http.server
import json
import os
import threading
import typing

import pytest
import torch

from conftest import TINY_RESNET, make_case, read_csv
from harness.errors import UserError
from harness.models import find_model, find_model_class
from harness.weights import load_model


@pytest.fixture
def checkpoint(write_model):
    """Gives (directory with config.json and model.safetensors, its state dict)."""
    directory = write_model(name="checkpoint")
    config, _ = find_model(str(directory), "random")
    torch.manual_seed(1234)
    model = find_model_class("test", config)(config)
    model.save_pretrained(directory)
    return directory, model.state_dict()


def test_pretrained_weights_from_a_directory(checkpoint):
    directory, state = checkpoint
    config, weights_dir = find_model(str(directory), "auto")
    loaded = load_model(make_case(config, weights_dir)).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class SmallHub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses, over the dict {repository: {file: bytes}}."""

    repositories: typing.ClassVar[dict] = {}
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
    """Gives (repositories to fill, environment variables that make it the hub, with an empty cache)."""
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
    "repository, says",
    [
        pytest.param("nobody/nothing", "not on the hub", marks=pytest.mark.slow),
        ("someone/pickled", "no safetensors weights"),
    ],
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


@pytest.mark.slow
def test_a_cache_that_holds_the_config_alone(command, hub, tmp_path):
    """Without a network the architecture still runs."""
    repositories, environment = hub
    repositories["someone/tiny"] = {"config.json": json.dumps(TINY_RESNET).encode()}
    arguments = ["--model", "someone/tiny", "--test-items", "torch", "--iterations", 3, "--results", "rows.csv"]
    done = command("benchmark.py", *arguments, "--weights", "random", **environment)
    assert done.returncode == 0, done.stderr
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    done = command("benchmark.py", *arguments, **offline)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "has only the config.json" in done.stderr
    assert {row["weights"] for row in read_csv(tmp_path / "rows.csv")} == {"random"}
    done = command("benchmark.py", *arguments, "--weights", "pretrained", **offline)
    assert done.returncode == 2 and "no safetensors weights" in done.stderr


# ---- A local directory is data, and nothing in it leads to the network ----------------------------------------------

# Python runs this before a script of the tests: it writes down every way to the network, and closes it.
NO_NETWORK = """
import os, socket

def refuse(*arguments, **_):
    if arguments[0].__class__ is not socket.socket or arguments[0].family != socket.AF_UNIX:
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(repr(arguments))
        raise OSError("there is no network in this test")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
"""
# A package of transformers' optional ones that downloads compiled code and runs it, as far as its import shows.
KERNELS = """
import os

with open(os.environ["NETWORK_LOG"], "a") as file:
    file.write("kernels")
"""
TINY_VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 10}
TINY_VIT |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8, "architectures": ["ViTForImageClassification"]}


@pytest.fixture
def no_network(tmp_path):
    """Gives (environment variables of a Python without a network, path of what it tried)."""
    shadow, log = tmp_path / "shadow", tmp_path / "network.log"
    for file, text in {
        "sitecustomize.py": NO_NETWORK,
        "kernels/__init__.py": KERNELS,
        "kernels-0.16.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.0\n",
    }.items():
        (shadow / file).parent.mkdir(parents=True, exist_ok=True)
        (shadow / file).write_text(text)
    variables = {"PYTHONPATH": shadow, "NETWORK_LOG": log, "HF_HUB_OFFLINE": "0", "HF_HOME": tmp_path / "hf"}
    return variables, log


@pytest.mark.parametrize(
    "config, says",
    [
        (TINY_VIT, None),
        pytest.param(
            {**TINY_VIT, "tokenizer": "owner/repo", "_name_or_path": "owner/repo", "backbone": "owner/repo"},
            None,
            marks=pytest.mark.slow,
        ),
        ({**TINY_VIT, "attn_implementation": "owner/kernels"}, "never run"),
        pytest.param(
            {**TINY_VIT, "_attn_implementation": "paged|owner/kernels@main:function"},
            "never run",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {**TINY_VIT, "_attn_implementation_internal": "owner/kernels"}, "never run", marks=pytest.mark.slow
        ),
        pytest.param(
            {**TINY_VIT, "attn_implementation": "flash_attention_2"}, "FlashAttention2", marks=pytest.mark.slow
        ),
        pytest.param(
            {"model_type": "clip", "vision_config": {"attn_implementation": "owner/kernels"}},
            "never run",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"model_type": "clip", "attn_implementation": {"vision_config": "owner/kernels"}},
            "never run",
            marks=pytest.mark.slow,
        ),
        ({"model_type": "depth_anything", "backbone": "owner/repo"}, "never fetched"),
        pytest.param({"model_type": "depth_anything", "backbone": "resnet50"}, "never fetched", marks=pytest.mark.slow),
        pytest.param(
            {"model_type": "detr", "backbone": "owner/repo", "use_timm_backbone": False},
            "never fetched",
            marks=pytest.mark.slow,
        ),
        pytest.param({"model_type": "detr", "use_timm_backbone": True}, "timm", marks=pytest.mark.slow),
        pytest.param(
            {"model_type": "timm_wrapper", "architecture": "hf-hub:owner/repo"}, "timm", marks=pytest.mark.slow
        ),
    ],
)
def test_no_network_for_a_local_directory(command, write_model, no_network, tmp_path, config, says):
    variables, log = no_network
    arguments = ["--weights", "random", "--test-items", "torch", "--iterations", 3, "--results", "rows.csv"]
    done = command("benchmark.py", "--model", write_model(config), *arguments, **variables)
    assert not log.exists(), log.read_text()
    assert "Traceback" not in done.stderr
    if says:
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1], done.stderr
        assert not (tmp_path / "rows.csv").exists()
    else:
        assert done.returncode == 0, done.stderr


# ---- Configs that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, says",
    [
        (json.dumps({**TINY_RESNET, "architectures": ["pipeline"]}), "no model class"),
        (json.dumps({**TINY_RESNET, "architectures": ["ResNetConfig"]}), "no model class"),
        (json.dumps({**TINY_RESNET, "architectures": ["models"]}), "no model class"),
        (json.dumps({**TINY_RESNET, "architectures": "ResNetModel"}), "architectures"),
        (json.dumps({**TINY_RESNET, "architectures": [["ResNetModel"]]}), "architectures"),
        (json.dumps({**TINY_RESNET, "model_type": ["resnet"]}), "model_type"),
        (json.dumps({**TINY_RESNET, "model_type": {"resnet": 1}}), "model_type"),
        (json.dumps({**TINY_RESNET, "num_labels": 4 * 10**8}), "MemoryError"),
        (json.dumps([TINY_RESNET]), "model_type"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("\xff", "not JSON"),
        (" " * 2**25, "larger than 16 MiB"),
    ],
)
def test_a_config_that_is_none(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=says) as refusal:
        config, _ = find_model(str(tmp_path), "random")
        find_model_class("test", config)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_class_that_transformers_does_not_have_gives_the_usual_one(write_model):
    config, _ = find_model(str(write_model({**TINY_RESNET, "architectures": ["TheirNet"]})), "random")
    assert find_model_class("test", config).__name__ == "ResNetForImageClassification"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_config_json_that_is_no_file(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"no config\.json"):
        find_model(str(tmp_path), "random")


def test_a_config_json_that_cannot_be_read(write_model, monkeypatch):
    directory = write_model()

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        find_model(str(directory), "random")


@pytest.mark.parametrize(
    "name",
    ["a" * 300, "/" + "a" * 300, "./" + "a/" * 3000, "owner/" + "a" * 300, "a\0b", "/a\0b", "owner/a\0b", "\udcff", ""],
)
def test_a_name_that_can_be_no_path(name, monkeypatch):
    monkeypatch.setattr("harness.models.hub_constants.HF_HUB_OFFLINE", True)
    for weights in ("auto", "random"):
        with pytest.raises(UserError):
            find_model(name, weights)
