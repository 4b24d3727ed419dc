"""Which rows may stand side by side: read from CSVs and checked, the latest of each, grouped by setting and by case."""

import csv
import gzip
import re
import typing
import zlib
from collections import defaultdict

from harness.errors import UserError
from harness.reports import verdict
from harness.rows import CASE, COLUMNS, KEY, PHASES, SETTING, item_order, number, precision_order

FILLED = "model_name test_item batch_size device_name precision".split()  # columns that no row leaves empty
TIMES = [name for name in COLUMNS if name.endswith(("_time_s", "_ms"))]
RATES = ("tokens_per_s", "bandwidth_share")
DECODE_COLUMNS = ("phase", "context_len", *RATES, "layers")  # that rows of earlier versions lack
# What is measured again with other versions or threads: a row's KEY less those.
CASE_ON_DEVICE = """
device_name precision weights model_name depth sample_shape batch_size phase context_len
""".split()
INFER_TIMES = [name for name in TIMES if name.startswith("infer_time_")]


class CaseRows(typing.NamedTuple):
    """The rows of one model at one batch size in one setting, a row an item, in the items' order."""

    label: str  # the model's name, and what tells it apart from others of that name
    batch_size: int
    rows: list  # dicts of the CSV's columns

    @property
    def precision(self):
        return self.rows[0]["precision"]

    def winners(self):
        """Returns the names of the fastest item and of those level with it; none where there is nothing to compare."""
        found = verdict.contenders(self.rows)
        if len(found) < 2:
            return set()
        chosen, level = verdict.choose(found)
        return {contender.item for contender in [chosen, *level]}


class Comparison(typing.NamedTuple):
    """The cases that were measured in one setting: what a table, a panel or a verdict may hold."""

    setting: dict  # the SETTING columns, which all the rows share; across() leaves one out
    cases: list

    @property
    def rows(self):
        return [row for case in self.cases for row in case.rows]

    @property
    def title(self):
        title = ", ".join(self.setting[name] for name in ("device_name", "precision") if name in self.setting)
        return f"{title}, decode, context length {self.setting['context_len']}" if self.decodes else title

    @property
    def decodes(self):
        return self.setting["phase"] == "decode"

    @property
    def items(self):
        return sorted({row["test_item"] for row in self.rows}, key=item_order)


def read_rows(paths):
    """Returns the latest row of each KEY and item in the CSVs, as find_latest() returns them."""
    return find_latest([row for path in paths for row in read_csv(path)])


def find_latest(rows):
    """Returns the latest row of each KEY and item, with three columns more.

    `depth` says how a model was cut ("4 of 24 layers"), which the CSV has behind the kind of weights, `sample_shape` is
    the inputs' shape without the batch, and `label` the name that the model has in tables. Rows of versions that knew
    no phase are of a forward pass.
    """
    rows = [dict(row) for row in rows]
    for row in rows:
        row["weights"], _, row["depth"] = row["weights"].partition(", ")
        row["phase"] = row["phase"] or "forward"
        row["sample_shape"] = re.sub(r"=\d+(x?)", lambda batch: "=" if batch[1] else "", row["input_shape"])
    rows.sort(key=lambda row: row["timestamp_utc"])
    rows = list({tuple(row[name] for name in [*KEY, "depth", "test_item"]): row for row in rows}.values())
    label_models(rows)
    return rows


def read_csv(path):
    """Returns the rows of a CSV as dicts of text; raises UserError where it is none of benchmark.py's.

    One whose name ends in .gz is decompressed. A last line that a power failure left half written is no row.
    """
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing and missing != list(DECODE_COLUMNS):
                raise UserError(f"{path} is not a CSV of this version's benchmark.py: it has no column {missing[0]}")
            for row in reader:
                rows.append((f"{path}, line {reader.line_num}", row | dict.fromkeys(missing, "")))
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if rows and None in rows[-1][1].values():
        del rows[-1]
    for place, row in rows:
        check_row(place, row)
    return [row for _, row in rows]


def check_row(place, row):
    """Raises UserError, which names the place, unless tables and pictures can be made of the row."""
    if None in row or None in row.values():
        raise UserError(f"{place}: more or fewer cells than the header has")
    if empty := [name for name in FILLED if not row[name].strip()]:
        raise UserError(f"{place}: {empty[0]} is empty")
    if not re.fullmatch("[1-9][0-9]{0,8}", row["batch_size"]):
        raise UserError(f"{place}: batch_size is {row['batch_size']!r:.80}, not a whole number of at least 1")
    if row["phase"] not in ("", *PHASES) or (row["phase"] == "decode") != bool(row["context_len"]):
        raise UserError(f"{place}: phase is {row['phase']!r:.80} with a context_len of {row['context_len']!r:.80}")
    if row["context_len"] and not re.fullmatch("[1-9][0-9]{0,8}", row["context_len"]):
        raise UserError(f"{place}: context_len is {row['context_len']!r:.80}, not a whole number of at least 1")
    if row["status"] not in ("ok", "wrong", "failed"):
        raise UserError(f"{place}: status is {row['status']!r:.80}, not ok, wrong or failed")
    for name in (*TIMES, *RATES):
        try:
            value = number(row, name)
        except ValueError:
            raise UserError(f"{place}: {name} is {row[name]!r:.80}, not a number") from None
        if value is not None and not 0 <= value < 1e12:
            raise UserError(
                f"{place}: {name} is {row[name]!r:.80}, which no {'rate' if name in RATES else 'time'} can be"
            )
        if row["status"] == "ok" and name in INFER_TIMES and not value and name != "infer_time_std_ms":
            raise UserError(f"{place}: {name} is {row[name]!r:.80} in a row that is ok")
        if row["status"] == "ok" and name == "infer_time_std_ms" and value is None:
            raise UserError(f"{place}: {name} is empty in a row that is ok")


def label_models(rows):
    """Gives each row a label: the model's name, and as much as tells it apart from other models of that name.

    A class or a config that was not recorded, as in rows of earlier versions, tells nothing apart.
    """
    extras = {id(row): [row["depth"]] if row["depth"] else [] for row in rows}
    for name in ("sample_shape", "model_class", "config_hash"):
        alike = defaultdict(list)
        for row in rows:
            alike[row["model_name"], *extras[id(row)]].append(row)
        for group in alike.values():
            if len({row[name] for row in group if row[name]}) > 1:
                for row in group:
                    extras[id(row)].append(row[name] or f"{name} not recorded")
    for row in rows:
        extra = ", ".join(extras[id(row)])
        row["label"] = f"{row['model_name']} ({extra})" if extra else row["model_name"]


def compare(rows):
    """Returns a Comparison for each setting, in the order phase, device, precision, weights, versions."""
    settings = defaultdict(lambda: defaultdict(list))
    for row in rows:
        case = row["label"], int(row["batch_size"]), *(row[name] for name in CASE)
        settings[tuple(row[name] for name in SETTING)][case].append(row)

    def order(setting):  # forward passes first; contexts by their length
        return setting[-2] == "decode", *setting[:-2], int(setting[-1] or 0)

    return [
        Comparison(
            dict(zip(SETTING, setting)),
            [
                CaseRows(case[0], case[1], sorted(cases[case], key=lambda row: item_order(row["test_item"])))
                for case in sorted(cases)
            ],
        )
        for setting, cases in sorted(settings.items(), key=lambda item: order(item[0]))
    ]


def across(column, comparisons):
    """Returns Comparisons of which each holds all those that differ in nothing but one column of their setting.

    Their order is that of the first of each; cases are sorted by model, precision and batch size.
    """
    merged = defaultdict(list)
    for comparison in comparisons:
        setting = {name: value for name, value in comparison.setting.items() if name != column}
        merged[tuple(setting.items())] += comparison.cases

    def order(case):
        return case.label, precision_order(case.precision), case.batch_size

    return [Comparison(dict(setting), sorted(cases, key=order)) for setting, cases in merged.items()]


def drop_superseded(rows):
    """Returns the rows less those that were measured again, every item of the case, with other versions or threads.

    And less those of a case that has the same items and more in another setting: half a sweep says nothing of what
    wins. What is published is the newest; the rest goes to the history, and no longer has a say in the models' labels.
    """
    cases = defaultdict(lambda: defaultdict(list))
    for row in rows:
        case = tuple(row[name] for name in CASE_ON_DEVICE)
        cases[case][tuple(row[name] for name in SETTING)].append(row)
    kept = []
    for settings in cases.values():
        measured = set()
        items_of_settings = [{row["test_item"] for row in group} for group in settings.values()]
        for group in sorted(settings.values(), key=lambda group: max(r["timestamp_utc"] for r in group), reverse=True):
            items = {row["test_item"] for row in group}
            if not items <= measured and not any(items < others for others in items_of_settings):
                kept += group
            measured |= items
    label_models(kept)
    return kept
