"""What makes two runs the same case: names, classes, configs and the version of this harness."""

import re
import subprocess

import pytest
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from conftest import ROOT, TINY_RESNET, make_case
from harness import version
from harness.cases import config_hash, describe_case, find_models
from harness.rows import COLUMNS, KEY


def test_an_edited_config_is_another_case(write_model):
    one = find_models([str(write_model())], "random", None)[0]
    same = find_models([str(write_model(name="copy"))], "random", None)[0]
    edited = find_models([str(write_model({**TINY_RESNET, "hidden_act": "gelu"}, name="edited"))], "random", None)[0]
    assert config_hash(one.config) == config_hash(same.config) != config_hash(edited.config)
    assert one.name != same.name


def test_a_task_is_another_case(write_model):
    config = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    directory = str(write_model(config))
    tasks = (None, "text-classification", "token-classification")
    classes = {find_models([directory], "random", task)[0].model_class.__name__ for task in tasks}
    assert len(classes) == 3


def test_two_directories_of_the_same_name_do_not_meet(write_model, tmp_path, monkeypatch):
    names = []
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        write_model(name=f"{parent}/model")
        monkeypatch.chdir(tmp_path / parent)
        names.append(find_models(["model"], "random", None)[0].name)
    assert names == [str(tmp_path / "one" / "model"), str(tmp_path / "two" / "model")]


def test_all_of_the_key_is_known_before_a_case_runs():
    columns = describe_case(make_case(CONFIG_MAPPING["resnet"]()))
    of_device = {"device_name", "cpu_threads"}
    assert set(KEY) == (set(columns) & set(KEY)) | of_device and set(columns) <= set(COLUMNS)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Gives (a function that runs git in a new checkout, its directory, a function that says the version there)."""

    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@y", *arguments],
            check=True,
            capture_output=True,
        )

    def version_there():
        monkeypatch.setattr(version, "ROOT", tmp_path)
        monkeypatch.setattr(version, "VERSION_FILE", tmp_path / "harness" / "version.txt")
        return version.harness_version.__wrapped__()

    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "version.txt").write_text((ROOT / "harness" / "version.txt").read_text())
    return git, tmp_path, version_there


def test_the_version_is_the_commit_that_changed_the_code(checkout):
    git, directory, version_there = checkout
    (directory / "benchmark.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "code")
    commit = version_there()
    assert re.fullmatch(re.escape(version.VERSION) + r"\+[0-9a-f]{12}", commit)
    (directory / "README.md").write_text("words")
    git("add", ".")
    git("commit", "-m", "words")
    assert version_there() == commit
    (directory / "benchmark.py").write_text("2")
    assert version_there() == f"{commit}.changes"
    assert Version(version_there())  # of PEP 440; it raises an exception else
    git("commit", "-am", "code")
    assert version_there() not in (commit, f"{commit}.changes")


def test_without_git_the_version_file_says_it(checkout, monkeypatch):
    _, directory, version_there = checkout
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(directory.parent))
    assert version_there() == version.VERSION  # as the file stands in a checkout
    (directory / "harness" / "version.txt").write_text("0123456789ab\n")  # as git archive writes it
    assert version_there() == f"{version.VERSION}+0123456789ab"
