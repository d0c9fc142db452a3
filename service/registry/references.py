"""How `--weights` names weights on another machine. Standard library only, as the options."""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

SCHEMES = ("https", "s3", "gs")
SUFFIXES = (".pth", ".pt", ".safetensors")  # of the files among a model's that are weights
DIGEST = r"[0-9a-f]{64}"
NAME = r"[^/:@\s]{1,250}"  # of a registered model
FORMS = "mlflow:models:/NAME@ALIAS, mlflow:models:/NAME/VERSION or mlflow:runs:/RUN_ID/PATH"


@dataclass(frozen=True)
class RegisteredModel:
    """A version of a model in MLflow's registry, by its number or by an alias."""

    name: str
    version: str  # empty: by the alias
    alias: str


@dataclass(frozen=True)
class RunFile:
    """The artefacts of a run of MLflow."""

    run: str
    path: str  # of a folder, or of one weights file; empty: all that the run has


@dataclass(frozen=True)
class Url:
    """A file that fsspec opens."""

    url: str

    @property
    def shown(self) -> str:
        """The URL without its query, which may be a signature: for messages and the card."""
        return self.url.partition("?")[0]

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0]

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


Reference = RegisteredModel | RunFile | Url


def one_line(exc: BaseException) -> str:
    """An error of a client's for a message, without passwords and signatures in its URLs."""
    text = re.sub(r"//[^/@\s]+@", "//", " ".join(str(exc).split()))
    return re.sub(r"\?\S+", "?…", text)[:300] or type(exc).__name__


def parse_reference(text: str | None) -> Reference | None:
    """What `--weights` names; None for a file and for our own words.

    Raises ValueError, with what is expected, for a reference that is none.
    """
    if text is None or not (text.startswith("mlflow:") or "://" in text):
        return None
    if found := re.fullmatch(rf"mlflow:models:/({NAME})(?:/([1-9][0-9]*)|@([\w-]+))", text):
        return RegisteredModel(found[1], found[2] or "", found[3] or "")
    if found := re.fullmatch(r"mlflow:runs:/(\w+)(?:/(.*))?", text):
        path = PurePosixPath(found[2] or "")
        if ".." not in path.parts and not path.is_absolute():
            return RunFile(found[1], str(path) if path.parts else "")
    if text.startswith("mlflow:"):
        raise ValueError(f"must be {FORMS}, got {text!r}")
    return _parse_url(text)


def _parse_url(text: str) -> Url:
    url, parts = Url(text.partition("#")[0]), urlsplit(text)
    if url.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"must begin with {known} if it is a URL, got {url.scheme}://")
    if "@" in parts.netloc:
        raise ValueError("must have no user and password in its URL: ~/.netrc takes them")
    if not parts.netloc or not re.fullmatch(r"(?!\.+$)[^\0]{1,200}", url.name):
        raise ValueError(f"must be the URL of a file, got {url.shown}")
    return url
