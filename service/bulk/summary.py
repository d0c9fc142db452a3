"""What is in the results, in figures."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from service.bulk.results import Record
from service.tables import counted, text_table

MOST = 10  # classes that are listed


@dataclass
class Summary:
    """Counts of all records of an output, and of the run that ends with them."""

    images: int = 0
    classified: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by type of error
    classes: Counter[tuple[str, int]] = field(default_factory=Counter)  # label and index
    models: Counter[str] = field(default_factory=Counter)  # name and version
    new: int = 0  # images of this run
    skipped: int = 0  # those that the output had already, or that came twice
    seconds: float = 0.0  # of this run
    stopped: str | None = None  # why it ended early

    def count(self, records: Iterable[Record]) -> None:
        for record in records:
            self.images += 1
            if record["status"] != "success":
                self.failed[str(record.get("type"))] += 1
                continue
            self.classified += 1
            best, metadata = record["predictions"][0], record["metadata"]
            self.classes[best["class"], best["class_id"]] += 1
            self.models[f"{metadata['model']} {metadata['version']}"] += 1

    def as_json(self) -> dict[str, Any]:
        classes = [
            {"class": label, "class_id": index, "images": images}
            for (label, index), images in self.most_frequent
        ]
        return {
            "images": self.images,
            "classified": self.classified,
            "failed": dict(self.failed.most_common()),
            "classes": classes,
            "models": dict(self.models.most_common()),
            "new": self.new,
            "skipped": self.skipped,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.rate, 1),
            "stopped": self.stopped,
        }

    @property
    def most_frequent(self) -> list[tuple[tuple[str, int], int]]:
        """Classes and their images; those with equally many by index."""
        return sorted(self.classes.items(), key=lambda item: (-item[1], item[0][1]))[:MOST]

    @property
    def rate(self) -> float:
        return self.new / self.seconds if self.seconds else 0.0

    def lines(self) -> list[str]:
        """For a terminal."""
        failed = sum(self.failed.values())
        lines = [
            f"{counted(self.images, 'image')}: {self.classified} classified, {failed} failed",
            f"this run: {self.new} in {self.seconds:.1f} s, {self.rate:.1f} images/s; "
            f"{self.skipped} skipped",
        ]
        if self.failed:
            lines += ["", *text_table(["error", "images"], self.failed.most_common())]
        if self.classes:
            rows = [
                (f"{label} ({index})", images, f"{images / self.classified:.1%}")
                for (label, index), images in self.most_frequent
            ]
            more = len(self.classes) - len(rows)
            heading = f"class, and {more} more" if more > 0 else "class"
            lines += ["", *text_table([heading, "images", "share"], rows)]
        return lines
