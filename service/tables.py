"""The one table, as lines of text: for a terminal, and in Markdown for a document.

A cell is any value: None is shown as "-", and a float with a fixed number of digits. The columns
whose positions are in `left` are text and aligned to the left; the others are figures.
"""

from collections.abc import Collection, Iterable, Sequence

Row = Sequence[object]


def text_table(
    headings: Row, rows: Iterable[Row], *, left: Collection[int] = (0,), digits: int = 1
) -> list[str]:
    """A line for the headings and one for each row; columns are as wide as their widest cell."""
    cells = [[cell_text(cell, digits) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [text_line(row, widths, left=left) for row in cells]


def text_line(
    row: Row, widths: Sequence[int], *, left: Collection[int] = (0,), digits: int = 1
) -> str:
    """One line of a table whose widths are known, so that it can be printed as soon as it is."""
    cells = [cell_text(cell, digits) for cell in row]
    aligned = [
        cell.ljust(width) if position in left else cell.rjust(width)
        for position, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def markdown_table(
    headings: Row, rows: Iterable[Row], *, left: Collection[int] = (0,), digits: int = 1
) -> list[str]:
    """The lines of a Markdown table; a pipe in a cell is escaped."""
    ruler = ["---" if position in left else "---:" for position in range(len(headings))]
    cells = [
        [cell_text(cell, digits).replace("|", r"\|") for cell in row]
        for row in (headings, ruler, *rows)
    ]
    return [f"| {' | '.join(row)} |" for row in cells]


def cell_text(cell: object, digits: int = 1) -> str:
    """One cell as text."""
    if cell is None:
        return "-"
    return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def counted(number: int, noun: str) -> str:
    """A number and what it counts, as in 1 image and 2 images; the plural has an s more."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
