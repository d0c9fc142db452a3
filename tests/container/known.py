"""What the files in deploy/ may name, as the code knows it."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields

from handler.settings import Settings
from service.gateway.settings import GatewaySettings
from service.torchserve.config import VARIABLES
from tests import ROOT


def dockerfile() -> dict[str, dict[str, str]]:
    """Instruction -> what follows it -> the same as one line; ARG and ENV by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction in ("ARG", "ENV"):
            for word in rest.split():
                name, _, value = word.partition("=")
                found[instruction][name] = value
        elif instruction:
            found[instruction][rest] = rest
    return dict(found)


def words(instruction: str) -> list[str]:
    """The exec form of an instruction that is there once."""
    (text,) = dockerfile()[instruction]
    return list(json.loads(text[text.index("[") :]))


def check_variables(environment: Mapping[str, str]) -> None:
    """Every variable is one that the code reads, with a value that it takes."""
    others = {"PATH", "PYTHONDONTWRITEBYTECODE"}
    handler = {f"CLASSIFIER_{spec.name.upper()}" for spec in fields(Settings)}
    for name in environment:
        assert name.startswith("GATEWAY_") or name in handler | VARIABLES.keys() | others
    Settings.load({}, environment)
    values = {
        name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value)
        for name, value in environment.items()
        if name != "GATEWAY_KEYS"  # a file of the container's
    }
    GatewaySettings.load({"GATEWAY_KEYS": "off"} | values)
