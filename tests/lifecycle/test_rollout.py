"""./scripts/rollout with a real TorchServe, gateway and light load: good and bad versions."""

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import ZipFile

import pytest
import requests

from handler.errors import SetupError
from handler.model_card import CARD_FILE, ModelCard
from service.archive.mar import seal
from service.gateway.process import find_nginx
from service.rollout.record import Record, RecordFile
from tests import ROOT, skip
from tests.gateway.conftest import Served, serving_with_gateway
from tests.processes import wait_for
from tests.server.colours import LABELS, encoded
from tests.server.serving import environment, package

MODEL = "mobilenet_v2"
PACE = ["--step-seconds=1", "--step-requests=15", "--timeout=30", "--steps=5,50,100"]

ENGINES = "handler/engines.py"
PLAYED = """

import os as _os, time as _time
_load_engine = load_engine


def load_engine(*args, **kwargs):
    engine = _load_engine(*args, **kwargs)
    launch = engine.launch

    def played(images):  # not of the warm-up
        {change}
        return launch(images)

    engine.launch = played
    return engine
"""


@dataclass
class Running:
    """The service, and where ./scripts/rollout has its record."""

    served: Served
    folder: Path
    file: Path

    def command(self, *argv: str) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / "rollout.py"), *argv]

    @property
    def env(self) -> dict[str, str]:
        ports = self.served.server.ports
        return environment(
            self.folder,
            {
                "GATEWAY_PORT": str(self.served.port),
                "GATEWAY_UPSTREAMS": f"127.0.0.1:{ports['port']}",
                "GATEWAY_MANAGEMENT": f"127.0.0.1:{ports['management-port']}",
                "GATEWAY_ROLLOUT": str(self.file),
            },
        )

    def roll_out(self, *argv: str, expected: int) -> Record:
        done = subprocess.run(
            self.command(*argv),
            env=self.env,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == expected, done.stdout + done.stderr
        print(done.stderr + done.stdout)
        record = RecordFile(self.file).read()
        assert record
        return record

    def versions(self) -> dict[str, bool]:
        """Each that is registered, and whether it is the default."""
        url = f"{self.served.server.management}/models/{MODEL}"
        default = requests.get(url, timeout=10).json()[0]["modelVersion"]
        found = requests.get(f"{url}/all", timeout=10).json()
        return {facts["modelVersion"]: facts["modelVersion"] == default for facts in found}


@dataclass
class Light:
    """One client's requests, one after the other: what was answered, and by which version."""

    url: str
    answers: Counter[tuple[int, str, str]] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        number = 0
        while not self.ended.wait(0.02):
            number += 1
            colour = LABELS[number % len(LABELS)]
            answer = requests.post(f"{self.url}/predict", data=encoded(colour), timeout=60)
            seen = answer.json()
            right = seen["predictions"][0]["class"] == colour if answer.ok else False
            version = answer.headers.get("X-Model-Version", "")
            self.answers[answer.status_code, version, "right" if right else "wrong"] += 1

    def of_version(self, version: str) -> int:
        return sum(n for (_, answered, _), n in self.answers.items() if answered == version)


@contextmanager
def light_load(service: Running) -> Iterator[Light]:
    light = Light(service.served.url)
    thread = threading.Thread(target=light.run)
    thread.start()
    try:
        yield light
    finally:
        light.ended.set()
        thread.join()


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, colour_model: list[str], store: Path
) -> Iterator[Running]:
    try:
        find_nginx()
    except SetupError as exc:
        skip(str(exc))
    folder = tmp_path_factory.mktemp("service")
    file = folder / "rollout.json"
    env = {"TS_ENABLE_MODEL_API": "true", "GATEWAY_ROLLOUT": str(file)}
    options = [*colour_model, "--device", "cpu", "--workers", "1"]
    with serving_with_gateway(folder, options, store, **env) as served:
        yield Running(served, folder, file)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, colour_model: list[str]) -> Path:
    """A second version that is as good as the first."""
    folder = tmp_path_factory.mktemp("packaging")
    package(folder, *colour_model, "--device", "cpu", "--workers", "1", "--version", "2.0")
    return folder / "store" / f"{MODEL}-2.0.mar"


def altered(good: Path, folder: Path, change: str) -> str:
    """A copy of an archive, with a line of code before each forward pass of a request."""
    archive = folder / good.name
    with ZipFile(good) as old, ZipFile(archive, "w") as new:
        for item in old.infolist():
            if item.filename != CARD_FILE:
                added = PLAYED.format(change=change) if item.filename == ENGINES else ""
                new.writestr(item, old.read(item) + added.encode())
        card = ModelCard.from_json(old.read(CARD_FILE))
    seal(archive, card)
    return str(archive)


def check_taken_back(service: Running, light: Light, record: Record, why: str) -> None:
    assert (record.status, why in record.reason) == ("taken back", True), record.reason
    assert service.versions() == {"1.0": True}
    # None got a wrong answer, and those that were sent to it waited longer at most.
    assert {(status, right) for status, _, right in light.answers} == {(200, "right")}
    assert light.of_version("2.0") == 0


def check_untouched(light: Light, record: Record) -> None:
    """Under 1 % of the requests of clients were sent to the new version."""
    sent, total = sum(seen["new"]["live"] for seen in record.seen), sum(light.answers.values())
    print(f"{sent} of {total} requests of clients were sent to 2.0")
    assert sent < 0.01 * total


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("images = [image.flip(0) for image in images]", "another best class"),  # red is blue
        ("_os._exit(1)", "failed"),
    ],
    ids=["wrong recipe", "crashing"],
)
def test_a_bad_version_is_taken_back_in_the_shadow(
    service: Running, good: Path, tmp_path: Path, fault: str, words: str
) -> None:
    archive = altered(good, tmp_path, fault)
    with light_load(service) as light:
        record = service.roll_out(archive, *PACE, "--shadow=100", expected=1)
    check_taken_back(service, light, record, words)
    check_untouched(light, record)


def test_a_slow_version_is_taken_back_by_the_replay(
    service: Running, good: Path, tmp_path: Path
) -> None:
    archive = altered(good, tmp_path, "_time.sleep(0.3)")
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        (images / f"{number}.jpg").write_bytes(encoded(LABELS[number % len(LABELS)]))
    with light_load(service) as light:
        record = service.roll_out(archive, *PACE, f"--images={images}", expected=1)
    check_taken_back(service, light, record, "slower than")
    check_untouched(light, record)


def test_clients_of_a_crashing_version_get_the_old_ones_answers(
    service: Running, good: Path, tmp_path: Path
) -> None:
    """Without a shadow, so that requests of clients are the first to meet it."""
    archive = altered(good, tmp_path, "_os._exit(1)")
    with light_load(service) as light:
        record = service.roll_out(archive, *PACE, "--shadow=0", expected=1)
    assert sum(seen["new"]["rescued"] for seen in record.seen) > 0
    check_taken_back(service, light, record, "failed")


def test_a_rollout_that_was_killed_gets_no_requests_and_can_be_aborted(
    service: Running, good: Path
) -> None:
    with light_load(service) as light:
        process = subprocess.Popen(
            service.command(str(good), *PACE, "--steps=50,100"), env=service.env
        )
        wait_for(lambda: light.of_version("2.0") > 0)
        process.kill()
        process.wait()
        service.roll_out(str(good), *PACE, expected=2)  # other steps than it was begun with
        record = service.roll_out("--abort", expected=0)
        assert (record.status, record.reason) == ("taken back", "it was aborted")
        assert service.versions() == {"1.0": True}
    assert {status for status, _, _ in light.answers} == {200}


def test_a_good_version_takes_over(service: Running, good: Path) -> None:
    with light_load(service) as light:
        record = service.roll_out(str(good), *PACE, "--max-slowdown=4", expected=0)
        assert record.status == "finished"
        assert service.versions() == {"2.0": True}
        before = light.answers.copy()
        wait_for(lambda: light.of_version("2.0") > before[200, "2.0", "right"] + 5)
        assert light.answers[200, "1.0", "right"] == before[200, "1.0", "right"]
    assert {(status, right) for status, _, right in light.answers} == {(200, "right")}
    assert requests.get(f"{service.served.url}/health", timeout=10).ok


def test_a_version_that_is_not_new_is_refused(service: Running, good: Path) -> None:
    done = subprocess.run(
        service.command(str(good)), env=service.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {MODEL} 2.0 is registered: a rollout needs a version")
