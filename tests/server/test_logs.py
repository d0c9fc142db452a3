"""The log for people, and the banner in it; the other tests read the log for machines."""

import json
import re
import subprocess
from pathlib import Path

import requests

from tests.processes import wait_for
from tests.server.colours import encoded
from tests.server.serving import Server, serving

BAD_FORM, AS_FORM = b"a=\x1b[31mPWNED%zz", {"Content-Type": "application/x-www-form-urlencoded"}


def test_text_for_people(tmp_path: Path, colours: list[str], store: Path) -> None:
    """The lines of the banner are run as printed, and what comes of them is in the log."""
    env = {"TS_MODEL_STORE": str(store)}
    with serving(tmp_path, *colours, "--log-format", "text", env=env) as server:
        lines = re.findall("^  (?:predict|top 3|info|scale|metrics) +(.*)", server.text(), re.M)
        assert len(lines) == 5
        assert "getCallerClass" not in server.text()  # which log4j prints at each start
        for line in lines:
            options = " --silent --show-error --fail" if line.startswith("curl ") else ""
            command = line + options
            done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
            assert done.returncode == 0, (line, done.stderr)
            assert done.stdout
            if "/predictions/" in line:
                assert json.loads(done.stdout)["status"] == "success"
        answer = requests.post(server.predictions, data=encoded("blue"), timeout=30)
        requests.post(server.predictions, data=b"no image", timeout=30)
        requests.post(server.predictions, data=BAD_FORM, headers=AS_FORM, timeout=30)
    log = server.text().split("Ready after")[1].splitlines()[1:]
    good = [line for line in log if answer.headers["x-request-id"] in line]
    clock = r"\d\d:\d\d:\d\d\.\d{3}"
    assert re.fullmatch(rf"{clock} INFO    200 mobilenet_v2 1\.0 .* ms \(.*\) .* blue .*", good[0])
    assert any(" 400 mobilenet_v2 1.0 " in line and "UnreadableImage" in line for line in log)
    last_words = [line.split()[-1] for line in log if line]
    assert "stopping" in last_words  # TorchServe may have something to say after it
    assert last_words[-1] == "stopped"
    assert not any("{" in line for line in log)
    (position,) = [number for number, line in enumerate(log) if "HttpRequestHandler" in line]
    assert log[position + 1].endswith("$ErrorDataDecoderException")
    assert re.match(clock, log[position + 2])
    assert "PWNED" not in server.text()


def test_a_form_that_netty_cannot_read_is_not_quoted(server: Server) -> None:
    answer = requests.post(server.predictions, data=BAD_FORM, headers=AS_FORM, timeout=30)
    assert (answer.status_code, answer.json()["type"]) == (500, "ErrorDataDecoderException")

    def causes() -> list[str]:
        lines = [line["cause"] for line in server.log("torchserve")]
        return [cause for cause in lines if "ErrorDataDecoderException" in cause]

    wait_for(causes, 10)
    assert all(cause.endswith("$ErrorDataDecoderException") for cause in causes())
    assert "PWNED" not in server.text()


def test_variables_of_kubernetes_are_named_once(server: Server) -> None:
    """It starts all the same, and its two workers say nothing of them."""
    (line,) = server.log("ignored")
    assert line["message"].startswith("CLASSIFIER_PORT: ")
    assert server.text().count("CLASSIFIER_PORT") == 1
