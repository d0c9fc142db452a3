"""./scripts/serve in production with archives that somebody has, or has not, signed."""

import shutil
from pathlib import Path

import requests

from service.archive.mar import sign
from service.archive.signing import read_private_key
from tests.keys import make_keys, public_of
from tests.processes import free_ports
from tests.server.colours import encoded
from tests.server.serving import copy_changed, port_options, run_script, serving

PRODUCTION = {"CLASSIFIER_ENV": "production"}


def refused(folder: Path, *options: str) -> str:
    """The one line that ./scripts/serve says in production, and ends with 2."""
    ports = port_options(free_ports())
    done = run_script("serve", folder, *ports, *options, env=PRODUCTION)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    [line] = done.stderr.splitlines()
    return line


def test_a_signed_archive_is_served_in_production(tmp_path: Path, store: Path) -> None:
    private = make_keys(tmp_path)
    shutil.copytree(store, tmp_path / "store")
    (archive,) = (tmp_path / "store").glob("*.mar")
    options = ["--archive", str(archive), "--device", "cpu", "--workers", "1"]
    assert "give --require-signed PUBLIC.pem" in refused(tmp_path, *options)
    options += ["--require-signed", str(public_of(private))]
    assert refused(tmp_path, *options).endswith(
        f"{archive}: it is not signed (./scripts/package --sign signs it)"
    )
    sign(archive, read_private_key(private))
    with serving(tmp_path, *options, env=PRODUCTION) as server:
        answer = requests.post(server.predictions, data=encoded("red"), timeout=60)
        assert answer.json()["predictions"][0]["class"] == "red"


def test_code_that_somebody_adds_does_not_run(tmp_path: Path, store: Path) -> None:
    """Whoever can write the archive can make its card fit, and not its signature."""
    private, proof = make_keys(tmp_path), tmp_path / "proof"
    copy_changed(store, tmp_path, {"image_classifier.py": f"\nopen({str(proof)!r}, 'w')\n"})
    (archive,) = (tmp_path / "store").glob("*.mar")
    options = ["--archive", str(archive), "--device", "cpu", "--workers", "1"]
    sign(archive, read_private_key(make_keys(tmp_path, "other")))
    line = refused(tmp_path, *options, "--require-signed", str(public_of(private)))
    assert "model.json.sig is no signature of model.json by the key of --require-signed" in line
    assert not proof.exists()
    with serving(tmp_path, *options, "--require-signed", "off", env=PRODUCTION):
        assert proof.exists()  # so it would have run
