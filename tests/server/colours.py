"""The model of three colours that campaigns use, too: see service/chaos/colours.py."""

from service.chaos.colours import LABELS, encoded, make_weights, picture

__all__ = ["LABELS", "encoded", "make_weights", "picture"]
