"""Text tables and Markdown tables."""

import pytest

from service.tables import markdown_table, text_line, text_table

HEADINGS = ("name", "p50 ms", "state")
ROWS = [("a", 1.25, "ready"), ("longer", None, "-")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert text_table(HEADINGS, ROWS, left=(0, 2), digits=2) == [
        "name    p50 ms  state",
        "a         1.25  ready",
        "longer       -  -",
    ]


def test_a_line_of_known_widths() -> None:
    assert text_line((8, 12.34, "x"), (4, 8, 3), left=()) == "   8      12.3    x"


def test_markdown() -> None:
    assert markdown_table(HEADINGS, [*ROWS, ("b|c", 10, "")], left=(0, 2)) == [
        "| name | p50 ms | state |",
        "| --- | ---: | --- |",
        "| a | 1.2 | ready |",
        "| longer | - | - |",
        r"| b\|c | 10 |  |",
    ]


def test_a_row_that_lacks_a_cell_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        text_table(HEADINGS, [("a", 1)])
