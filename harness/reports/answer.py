"""The answer: one table of all precisions, a line a case with the winner in bold, and what it adds up to in words."""

from collections import Counter, defaultdict

from harness.reports import verdict
from harness.reports.tables import (
    allowed_decimals,
    heading,
    legend,
    measured_with,
    paragraphs,
    reasons,
    rounded,
    short_name,
    table,
    times_of,
)
from harness.rows import item_order, precision_order

LEAD = "lead"
LEAD_LEGEND = f"{LEAD}: how many times faster the fastest item is than the best other one, by their medians"
LEVEL, UNCLEAR = "level", "unclear"


def answer_tables(comparisons):
    """Returns the answer table of each Comparison, under headings where there are several.

    comparisons: as across("precision", …) returns them.
    """
    if len(comparisons) == 1:
        (comparison,) = comparisons
        return paragraphs(f"{comparison.title}; {measured_with(comparison)}", answer_table(comparison))
    return "\n".join(paragraphs(heading(comparison), answer_table(comparison)) for comparison in comparisons)


def answer_table(comparison):
    """Returns a line a case with the time of every item, the winners in bold, and the winner's lead."""
    names = short_models(comparison.cases)
    lines = []
    for case in comparison.cases:
        line = {"model": names[case.label], "precision": case.precision, "batch size": case.batch_size}
        times = times_of(case)
        line |= {short_name(item): times.get(item, "") for item in comparison.items}
        lines.append(line | {LEAD: lead_text(case)})
    text = table(lines, right=set(lines[0]) - {"model", "precision"})
    return paragraphs(text, "; ".join(filter(None, [LEAD_LEGEND, legend(text)])), reasons(comparison))


def short_models(cases):
    """Returns {label: the label without the model's organisation or directory}; whole where two would be the same."""
    short = {case.label: case.label.removeprefix(case.rows[0]["model_name"].rpartition("/")[0] + "/") for case in cases}
    times = Counter(short.values())
    return {label: name if times[name] == 1 else label for label, name in short.items()}


def lead(case):
    """Returns how many times faster the case's winner is than the best other item, and the spread of that.

    None where nothing was measured beside it, and where others are level with it.
    """
    found = verdict.contenders(case.rows)
    if len(found) < 2 or verdict.choose(found)[1]:
        return None
    rows = {row["test_item"]: row for row in case.rows}
    return verdict.speedup(rows[found[1].item], rows[found[0].item])


def lead_text(case):
    """Returns the lead with the digits that its spread allows, or "level"; nothing where there is no other item."""
    if found := lead(case):
        ratio, spread = found
        return f"{rounded(ratio, allowed_decimals(ratio, spread, 2))}x" if spread < ratio else UNCLEAR
    return LEVEL if case.winners() else ""


def answer_in_short(comparisons):
    """Returns for each device, phase and context length in how many cases which item wins, and by how much.

    comparisons: as across("precision", …) returns them; those of other versions or threads are counted together.
    """
    by_title = {}
    for comparison in comparisons:
        by_title.setdefault(comparison.title, []).extend(comparison.cases)
    return paragraphs(*(count_wins(title, cases) for title, cases in by_title.items()))


def count_wins(title, cases):
    """Returns a sentence on who wins the cases of one device, most wins first, and one on what was not run."""
    of_winners = defaultdict(list)
    for case in cases:
        winners = case.winners()
        of_winners[tuple(row["test_item"] for row in case.rows if row["test_item"] in winners)].append(case)
    won, told = [], []
    for winners, some in sorted(of_winners.items(), key=lambda entry: -len(entry[1])):
        names = [short_name(item) for item in winners]
        if len(names) == 1:
            won.append(f"{names[0]} in {by_precision(some, cases)}{describe_leads(some)}")
        elif names:
            told.append(f"{join(names)} are level in {by_precision(some, cases)}")
        else:
            told.append(f"there is nothing to compare in {by_precision(some, cases)}")
    if won:
        told.insert(0, f"the fastest item is {join(won)}")
    sentence = f"{title}, {len(cases)} case{'s' * (len(cases) > 1)}: {'; '.join(told)}."
    return " ".join([sentence, describe_not_run(cases)]).strip()


def join(parts):
    """Returns texts as a sentence lists them: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def describe_leads(cases):
    """Returns the least and the largest lead in cases that one item has won, as their lines have them."""
    leads = [(lead(case)[0], lead_text(case)) for case in cases if lead_text(case) != UNCLEAR]
    ends = dict.fromkeys(text for _, text in [min(leads), max(leads)]) if leads else ()
    return f" with a lead of {' to '.join(ends)}" if ends else ""


def by_precision(some, cases):
    """Returns how many cases `some` are, and in brackets how many of all the cases of each precision."""
    counts, totals = (Counter(case.precision for case in of) for of in (some, cases))
    names = sorted(counts, key=precision_order)
    shares = ", ".join(f"{name} {counts[name]} of {totals[name]}" for name in names)
    return f"{len(some)} ({shares})"


def describe_not_run(cases):
    """Returns a sentence on the items that have no row in a precision though they have some in another."""
    items = defaultdict(set)
    for case in cases:
        items[case.precision] |= {row["test_item"] for row in case.rows}
    missing = defaultdict(list)
    for precision, there in items.items():
        for item in set().union(*items.values()) - there:
            missing[item].append(precision)
    told = "; ".join(
        f"{short_name(item)} in {', '.join(sorted(missing[item], key=precision_order))}"
        for item in sorted(missing, key=item_order)
    )
    return f"Not run: {told}." if told else ""
