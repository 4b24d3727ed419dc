#!/usr/bin/env python3
"""Turns benchmark.py's rows into markdown tables and one picture per model.

    python plot.py               your own rows (results/local/benchmark.csv), the published ones where there are none
    python plot.py A.csv B.csv   the rows of all of them
    python plot.py --publish     results/*.csv -> the tables in README.md and docs/, and the pictures in docs/; rows of
                                 benchmark.csv that have been measured again since go to history.csv.gz

The first two print tables and save pictures beside the (first) CSV, unless that is a published one; nothing that git
tracks changes. Only rows of the same device, weights, CPU threads, versions and phase share a table or a panel of a
picture, and of steps that decode only those of the same context length; precisions share a panel and README.md's table,
all other tables have one. Of several rows of one case and item the latest counts. Exit code: 0, or 2 on bad input.
"""

import argparse
import os
import sys
from pathlib import Path

from harness.arguments import OneLineParser
from harness.errors import UserError, print_error
from harness.reports.answer import answer_in_short, answer_tables
from harness.reports.comparison import across, compare, drop_superseded, read_rows
from harness.reports.history import move_superseded
from harness.reports.overview import save_overview
from harness.reports.pictures import save_pictures
from harness.reports.tables import (
    CAPTION,
    bandwidth_table,
    compact_table,
    heading,
    long_table,
    totals_table,
    verdict_table,
)
from harness.rows import LOCAL_RESULTS, PUBLISHED_COVERAGE, PUBLISHED_DECODE, PUBLISHED_HISTORY, PUBLISHED_RESULTS
from harness.streams import protect_standard_streams

DOCS = Path(__file__).resolve().parent / "docs"
README, RESULTS_PAGE = DOCS.parent / "README.md", DOCS / "results.md"
COVERAGE_PAGE, COVERAGE_PICTURE = DOCS / "coverage.md", DOCS / "coverage.png"
DECODE_PAGE = DOCS / "decode.md"
SHORT_TABLES = (compact_table, bandwidth_table, verdict_table)


def parse_arguments(arguments):
    parser = OneLineParser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV", help="rows to show instead of your own")
    parser.add_argument(
        "--long", action="store_true", help="a line a row: model_name, test_item, batch_size, compile and mean time"
    )
    parser.add_argument("--publish", action="store_true", help="write what is published, from results/*.csv")
    options = parser.parse_args(arguments)
    if options.publish and (options.files or options.long):
        parser.error("--publish takes nothing else: what is published comes from results/ only")
    return options


def tables_under_headings(comparisons, *tables):
    """Returns the tables of each setting, one after another, under a heading that says what it was measured with."""
    return "\n".join(
        "\n".join(text for text in [f"{heading(comparison)}\n", *(table(comparison) for table in tables)] if text)
        for comparison in comparisons
    )


def show(paths, as_long_table):
    """Prints the tables of the CSVs' rows."""
    comparisons = compare(read_rows(paths))
    if not comparisons:
        raise UserError(f"{', '.join(map(str, paths))}: no rows yet; run benchmark.py or benchmark_all.sh first")
    if as_long_table:
        print(tables_under_headings(comparisons, long_table))
    else:
        print(f"{CAPTION}\n{tables_under_headings(comparisons, *SHORT_TABLES)}")
    sys.stdout.flush()
    published = (PUBLISHED_RESULTS, PUBLISHED_COVERAGE, PUBLISHED_DECODE, PUBLISHED_HISTORY)
    if paths[0].resolve() not in [path.resolve() for path in published]:
        save_pictures(comparisons, paths[0].parent)


def find_rows_to_show():
    """Returns the user's own CSV where it has rows, else the published one."""
    if LOCAL_RESULTS.exists() and read_rows([LOCAL_RESULTS]):
        return LOCAL_RESULTS
    print(f"plot.py: no rows in {os.path.relpath(LOCAL_RESULTS)} yet; these are the published ones", file=sys.stderr)
    return PUBLISHED_RESULTS


def read_published(path):
    """Returns the Comparisons of a published CSV's rows, less those that have been measured again since."""
    comparisons = compare(drop_superseded(read_rows([path])))
    if not comparisons:
        raise UserError(f"{path} has no rows to publish")
    return comparisons


def make_pages(comparisons, covered, decoded):
    """Returns {page: its text}, with the tables of the published comparisons in their places."""
    answers = across("precision", comparisons)
    in_readme = {"answer": answer_tables(answers), "short": answer_in_short(answers)}
    parts = {
        README: in_readme | {"totals": totals_table([most_families(covered)])},
        RESULTS_PAGE: {"tables": tables_under_headings(comparisons, *SHORT_TABLES, long_table)},
        COVERAGE_PAGE: {
            "totals": totals_table(across("harness_version", covered)),
            "coverage": answer_tables(across("precision", covered)),
        },
        DECODE_PAGE: {"decode": tables_under_headings(decoded, *SHORT_TABLES)},
    }
    return {page: replace_parts(page, of_page) for page, of_page in parts.items()}


def publish():
    """Writes the tables in README.md and docs/, and the pictures in docs/, from the published rows.

    Superseded rows leave the published CSV first; tables and pictures are the same before and after.
    """
    comparisons, covered, decoded = map(read_published, (PUBLISHED_RESULTS, PUBLISHED_COVERAGE, PUBLISHED_DECODE))
    pages = make_pages(comparisons, covered, decoded)
    move_superseded(PUBLISHED_RESULTS, PUBLISHED_HISTORY)
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    save_pictures(comparisons, DOCS)
    save_overview(most_families(covered), COVERAGE_PICTURE)


def most_families(comparisons):
    """Returns a Comparison with the most items, and of those the most cases; half precision is deployed.

    Families are measured in parts, each with all its items by one version of this harness: the versions are together.
    """
    together = across("harness_version", comparisons)
    return max(together, key=lambda c: (len(c.items), len(c.cases), c.setting["precision"] == "fp16"))


def replace_parts(page, parts):
    """Returns the page's text with other text between the two lines that name each part."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name}: plot.py writes this part -->", f"<!-- end of {name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise UserError(f"{page} lacks the lines {begin!r} and {end!r} that the table goes between")
        text = f"{before}{begin}\n\n{part}\n{end}{after}"
    return text


def stop(error):
    """Raises the error: tables that cannot be printed are no result."""
    raise error


def main(arguments=None):
    protect_standard_streams(on_loss=stop)
    options = parse_arguments(arguments)
    try:
        if options.publish:
            publish()
        else:
            show(options.files or [find_rows_to_show()], options.long)
    except (UserError, OSError) as error:  # OSError: a directory that cannot be written, say
        print_error(error, "plot.py")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
