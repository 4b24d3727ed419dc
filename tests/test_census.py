"""What README and docs/families.md say of the census is what its rows say."""

import re

import pytest

import census
from conftest import ROOT


def counts_of(text):
    """Returns {test: {status: number of types}} of the table in docs/families.md."""
    lines = text.partition("<!-- counts")[2].partition("<!-- end")[0].strip().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, _, *rows = table
    return {name: dict(zip(header[1:], map(int, numbers))) for name, *numbers in rows}


@pytest.mark.parametrize("test", ["torch", pytest.param("tvm", marks=pytest.mark.slow)])
def test_a_small_instance_goes_through(tvm, test):
    columns = census.run_test(test, "bert", census.SIZES[0])
    assert columns["status"] == "ok" and columns["input_shape"] == "input_ids=1x32 attention_mask=1x32"


def test_rows_name_no_directories_of_a_machine(tmp_path):
    files = 'File "/a/b-1/lib/python3.11/site-packages/torch/x.py", line 57, /tmp/c_1/d.cpp, …b/site-packages/e.py; 1/2'
    census.append(tmp_path / "rows.csv", {"model_type": "x", "test": "tvm", "error": files})
    (row,) = census.read_rows(tmp_path / "rows.csv").values()
    assert row["error"] == 'File "torch/x.py", line 57, d.cpp, …e.py; 1/2'
    assert not re.search(r"(?<![\w.-])/\w+/", census.FAMILIES.read_text(encoding="utf-8"))


def test_superseded_rows_are_moved_once(tmp_path):
    path, history = tmp_path / "rows.csv", tmp_path / "rows.csv.gz"
    of_test = {"model_type": "x", "test": "tvm"}
    for status in ("failed", "wrong", "ok"):
        census.append(path, of_test | {"status": status})
    census.append(path, of_test | {"test": "torch", "status": "ok"})
    kept = census.read_rows(path)
    for _ in range(2):
        census.move_superseded(path, history)
        assert [row["status"] for row in census.read_all_rows(history)] == ["failed", "wrong"]
        assert census.read_rows(path) == kept and len(census.read_all_rows(path)) == 2
    census.append(path, of_test | {"status": "failed"})
    census.move_superseded(path, history)
    assert [row["status"] for row in census.read_all_rows(history)] == ["failed", "wrong", "ok"]
    assert census.read_rows(path)["x", "tvm"]["status"] == "failed"


def test_the_published_page_is_what_the_rows_give(tmp_path):
    page = tmp_path / "families.md"
    published = (census.DOCS / "families.md").read_text(encoding="utf-8")
    page.write_text(published, encoding="utf-8")
    census.publish(census.read_rows(census.FAMILIES), page)
    assert page.read_text(encoding="utf-8") == published


def test_the_readme_says_what_was_counted():
    counts = counts_of((census.DOCS / "families.md").read_text(encoding="utf-8"))
    eager, tvm, inductor = counts["torch"], counts["tvm"], counts["torch_compile"]
    sentence = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    reached = tvm["ok"] + tvm["wrong"] + tvm["failed"]
    for said in (
        f"Of the {sum(eager.values())} that are not parts of others, eager PyTorch runs {eager['ok'] + eager['wrong']} "
        f"({eager['wrong']} of them draw random numbers",
        f"and {eager['no case']} lack a library",
        f"of the {reached} that have gone through `tvm` so far, {tvm['ok']} are right, {tvm['wrong']} wrong",
        f"names, {tvm['failed']} failed",
        f"`torch_compile` has {inductor['ok']} right of {inductor['ok'] + inductor['wrong'] + inductor['failed']}",
    ):
        assert re.sub(r"\s+", " ", said) in sentence
