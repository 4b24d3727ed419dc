"""Where models come from: directories, the hub (a small one on this machine), and the built-in architectures."""

import hashlib
import http.server
import json
import threading
import typing

import pytest
import torch

from conftest import TINY_RESNET, make_case, read_csv
from harness.models import find_model, find_model_class
from harness.weights import load_model


@pytest.fixture
def checkpoint(write_model):
    """-> (directory with config.json and model.safetensors, its state dict)."""
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
