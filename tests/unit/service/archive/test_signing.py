"""Archives with hashes and signatures: what is served, and what is refused by which words."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from handler.errors import InvalidModel, InvalidSettings, SetupError
from handler.model_card import ModelCard
from scripts.package import main
from service import serving
from service.archive.mar import CONFIG_FILE, SIGNATURE_FILE, configure, read_card, sign, unpack
from service.archive.signing import read_private_key, read_public_key
from service.logs import Log
from service.options import parse_serve
from service.plan import plan_service
from tests import skip
from tests.keys import make_keys, public_of
from tests.processes import free_ports
from tests.unit.service.planning import MODEL

Contents = dict[str, bytes]


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A private key, with its public one beside it."""
    return make_keys(tmp_path)


@pytest.fixture
def signed(archive: Path, private: Path) -> Path:
    sign(archive, read_private_key(private))
    return archive


def contents_of(archive: Path) -> Contents:
    with zipfile.ZipFile(archive) as content:
        return {name: content.read(name) for name in content.namelist() if not name.endswith("/")}


def rewrite(archive: Path, contents: Contents) -> None:
    with zipfile.ZipFile(archive, "w") as content:
        for name, data in contents.items():
            content.writestr(name, data)


def served(archive: Path, public: Path | None, folder: Path) -> Path:
    """The archive laid out for TorchServe, as a start does it."""
    key = read_public_key(public) if public else None
    card = read_card(archive)
    assert card is not None
    return unpack(archive, None, folder / "served", card, key)


def test_what_is_signed_is_served(signed: Path, private: Path, tmp_path: Path) -> None:
    folder = served(signed, public_of(private), tmp_path)
    card = ModelCard.read(folder)
    listed = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert listed - card.files.keys() == {"model.json", SIGNATURE_FILE, CONFIG_FILE}
    assert not card.files.keys() - listed


def test_another_configuration_needs_no_other_signature(
    signed: Path, private: Path, tmp_path: Path
) -> None:
    configure(signed, {"batchSize": 3})
    assert (served(signed, public_of(private), tmp_path) / CONFIG_FILE).read_text() == (
        "batchSize: 3\n"
    )


def test_another_key_is_refused(signed: Path, tmp_path: Path) -> None:
    other = public_of(make_keys(tmp_path, "other"))
    with pytest.raises(InvalidModel, match=r"mar: model\.json\.sig is no signature of model\.json"):
        served(signed, other, tmp_path)


def change_weights(contents: Contents) -> None:
    data = bytearray(contents["weights.safetensors"])
    data[-1] ^= 1
    contents["weights.safetensors"] = bytes(data)


def change_weights_and_card(contents: Contents) -> None:
    """As whoever can write an archive and has no key would do it."""
    change_weights(contents)
    card = json.loads(contents["model.json"])
    card["files"]["weights.safetensors"] = sha256(contents["weights.safetensors"]).hexdigest()
    contents["model.json"] = json.dumps(card).encode()


def change_labels(contents: Contents) -> None:
    card = json.loads(contents["model.json"])
    card["labels"].reverse()
    contents["model.json"] = json.dumps(card).encode()


def serve_as_another(contents: Contents) -> None:
    manifest = json.loads(contents["MAR-INF/MANIFEST.json"])
    manifest["model"]["modelName"] = "another"
    contents["MAR-INF/MANIFEST.json"] = json.dumps(manifest).encode()


OF_A_FILE = r"mar: {} of the archive is not as it was packaged: its sha256 is [0-9a-f]{{64}}, "
CHANGES: dict[str, tuple[Callable[[Contents], object], str]] = {
    "weights": (change_weights, OF_A_FILE.format(r"weights\.safetensors")),
    "code": (
        lambda contents: contents.update({"handler/engines.py": b"import os\n"}),
        OF_A_FILE.format(r"handler/engines\.py"),
    ),
    "name": (serve_as_another, OF_A_FILE.format(r"MAR-INF/MANIFEST\.json")),
    "a module more": (
        lambda contents: contents.update({"orjson.py": b"import os\n"}),
        r"mar: orjson\.py was not packaged with it",
    ),
    "bytecode": (
        lambda contents: contents.update({"handler/__pycache__/base.cpython-311.pyc": b""}),
        r"mar: handler/__pycache__/base\.cpython-311\.pyc was not packaged with it",
    ),
    "a file less": (
        lambda contents: contents.pop("golden.safetensors"),
        r"mar: golden\.safetensors of the archive cannot be read: No such file",
    ),
}
FORGERIES: dict[str, tuple[Callable[[Contents], object], str]] = {
    "no signature": (lambda contents: contents.pop(SIGNATURE_FILE), "mar: it is not signed"),
    "an empty one": (lambda contents: contents.update({SIGNATURE_FILE: b""}), "is no signature"),
    "zeros": (lambda contents: contents.update({SIGNATURE_FILE: bytes(64)}), "is no signature"),
    "weights and card": (change_weights_and_card, "is no signature"),
    "labels": (change_labels, "is no signature"),
}


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_named(
    signed: Path, private: Path, tmp_path: Path, change: str, required: bool
) -> None:
    contents = contents_of(signed)
    how, words = CHANGES[change]
    how(contents)
    rewrite(signed, contents)
    with pytest.raises(InvalidModel, match=words):
        served(signed, public_of(private) if required else None, tmp_path)


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_archive_is_refused(
    signed: Path, private: Path, tmp_path: Path, forgery: str
) -> None:
    contents = contents_of(signed)
    how, words = FORGERIES[forgery]
    how(contents)
    rewrite(signed, contents)
    served(signed, None, tmp_path / "unsigned")  # its hashes are right
    with pytest.raises(InvalidModel, match=words):
        served(signed, public_of(private), tmp_path)


def test_the_signature_of_another_archive_is_refused(
    signed: Path, private: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.mar"
    contents = contents_of(signed)
    change_labels(contents)
    rewrite(other, contents)
    sign(other, read_private_key(private))
    contents = contents_of(signed) | {SIGNATURE_FILE: contents_of(other)[SIGNATURE_FILE]}
    rewrite(signed, contents)
    with pytest.raises(InvalidModel, match="is no signature"):
        served(signed, public_of(private), tmp_path)


def test_openssl_makes_the_keys_and_finds_the_signature_right(
    archive: Path, tmp_path: Path
) -> None:
    """As docs/security.md says."""
    if not shutil.which("openssl"):
        skip("openssl is not installed")

    def openssl(*argv: str) -> str:
        done = subprocess.run(
            ["openssl", *argv], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "public.pem")
    sign(archive, read_private_key(tmp_path / "key.pem"))
    folder = served(archive, tmp_path / "public.pem", tmp_path)
    check = "pkeyutl -verify -pubin -inkey public.pem -rawin -in".split()
    card = str(folder / "model.json")
    said = openssl(*check, card, "-sigfile", str(folder / SIGNATURE_FILE))
    assert "Signature Verified Successfully" in said


# --- Keys


def test_keys_of_other_kinds_are_refused(private: Path, tmp_path: Path) -> None:
    other = X25519PrivateKey.generate()
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "x.pem").write_bytes(pem)
    public = other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "x-public.pem").write_bytes(public)
    encrypted = read_private_key(private).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    (tmp_path / "encrypted.pem").write_bytes(encrypted)
    (tmp_path / "text.pem").write_text("no key")
    refused_private = {
        "x.pem": "must be a key for Ed25519",
        "encrypted.pem": "is no private key in PEM, unencrypted",
        "text.pem": "is no private key in PEM",
        "key-public.pem": "is no private key in PEM",
        "none.pem": "cannot be read: No such file",
    }
    for name, words in refused_private.items():
        with pytest.raises(InvalidSettings, match=f"^--sign .*{re.escape(name)} {words}"):
            read_private_key(tmp_path / name)
    refused_public = {
        "x-public.pem": "must be a key for Ed25519",
        "text.pem": "is no public key in PEM",
        "key.pem": "is no public key in PEM",
        "none.pem": "cannot be read: No such file",
    }
    for name, words in refused_public.items():
        with pytest.raises(InvalidSettings, match=f"^--require-signed .*{re.escape(name)} {words}"):
            read_public_key(tmp_path / name)


def test_a_server_that_needs_no_signature_does_not_load_the_library() -> None:
    code = "import sys, scripts.serve, scripts.package; assert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- The commands


@pytest.fixture
def store(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive's folder as the model store."""
    monkeypatch.setenv("TS_MODEL_STORE", str(archive.parent))
    return archive.parent


UNTRAINED = ["--model", MODEL, "--weights", "untrained", "--workers", "1"]


def test_package_signs_what_is_there_already(store: Path, private: Path, tmp_path: Path) -> None:
    archive = store / f"{MODEL}.mar"
    before = contents_of(archive)
    assert main([*UNTRAINED, "--sign", str(private)]) == 0
    after = contents_of(archive)
    assert after.keys() - before.keys() == {SIGNATURE_FILE}
    assert {name: after[name] for name in before} == before
    assert main([*UNTRAINED, "--batch-size", "7"]) == 0  # without a key: it stays signed
    served(archive, public_of(private), tmp_path)
    other = make_keys(tmp_path, "other")
    assert main([*UNTRAINED, "--sign", str(other)]) == 0
    served(archive, public_of(other), tmp_path / "again")


def test_package_looks_at_the_key_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", str(tmp_path / "store"))
    assert main([*UNTRAINED, "--sign", str(tmp_path / "none.pem")]) == 2
    assert capsys.readouterr().err.startswith("error: --sign")
    assert not (tmp_path / "store").exists()


def test_nothing_is_made_without_a_signature_if_one_is_required(
    store: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would overwrite the archive that is signed."""
    archive = store / f"{MODEL}.mar"
    before = archive.read_bytes()
    ports = [f"--{name}={port}" for name, port in free_ports().items()]
    argv = [*UNTRAINED, *ports, "--require-signed", str(public_of(private))]
    monkeypatch.setattr(serving, "is_current", lambda plan: False)
    with pytest.raises(InvalidModel, match=r"would be made without a signature: .*--sign"):
        serving.prepare(plan_service(parse_serve(argv)), Log("json"))
    assert archive.read_bytes() == before


@pytest.mark.parametrize("kind", ["--archive", "--model"])
def test_production_has_to_say_something_about_signatures(
    store: Path, private: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("CLASSIFIER_ENV", "production")
    monkeypatch.setenv("CLASSIFIER_ALLOW_UNTRAINED", "true")
    model = UNTRAINED if kind == "--model" else ["--archive", str(store)]
    with pytest.raises(InvalidSettings, match=r"give --require-signed PUBLIC\.pem, or"):
        plan_service(parse_serve(model))
    assert plan_service(parse_serve([*model, "--require-signed", "off"])).public_key is None
    public = str(public_of(private))
    assert plan_service(parse_serve([*model, "--require-signed", public])).public_key is not None


def test_without_production_nothing_has_to_be_signed(store: Path) -> None:
    assert plan_service(parse_serve(["--archive", str(store)])).public_key is None


def test_the_library_that_is_missing_is_named(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    for read in (read_private_key, read_public_key):
        with pytest.raises(SetupError, match=r"requirements-signing\.txt"):
            read(private)
