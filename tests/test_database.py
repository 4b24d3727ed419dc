"""What tuning keeps on the disk."""

import pytest

from tvm_items.database import DatabaseError, Journal, journal_path, read_journal


def test_a_journal_survives_its_writer(tmp_path):
    path = tmp_path / "device" / "case"
    journal = Journal(path, "here")
    journal.append({"task": "a", "seconds": 1.5})
    with pytest.raises(DatabaseError, match="another process"):
        Journal(path, "here")
    journal.file.close()
    with journal_path(path).open("a") as file:
        file.write('{"task": "b", "sec')  # what a power failure leaves
    again = Journal(path, "here")
    assert again.trials == [{"task": "a", "seconds": 1.5}]
    again.append({"task": "c"})
    assert read_journal(path, "here") == [{"task": "a", "seconds": 1.5}, {"task": "c"}]
    with pytest.raises(DatabaseError, match="is of here"):
        read_journal(path, "there")
    journal_path(path).write_text("not JSON\n")
    with pytest.raises(DatabaseError, match="damaged"):
        read_journal(path, "here")
