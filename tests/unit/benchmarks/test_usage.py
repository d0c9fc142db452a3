"""CPU time and memory of a server's processes."""

import sys
import time
from pathlib import Path

import pytest

from benchmarks.usage import Meter, kinds_of, memory
from service.load.measurement import Load, Measurement, Sample, summarise
from service.load.processes import Server, running

BURN = """
import os, time

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

print("up", flush=True)
while not os.path.exists("begin"):
    time.sleep(0.01)
burn(0.2)
if os.fork() == 0:  # ends, and is waited for
    burn(0.1)
    os._exit(0)
os.wait()
if os.fork() == 0:  # goes on
    burn(0.1)
    open("end", "w").close()
time.sleep(60)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def answered(count: int) -> Measurement:
    """A measurement of a second with so many good answers."""
    samples = [Sample(0.0, 0.0, ended=0.5, outcome="ok") for _ in range(count)]
    return summarise(samples, 0.0, 1.0, Load(concurrency=1, seconds=1.0), 0.0)


def started(server: Server) -> None:
    deadline = time.monotonic() + 10
    while "up" not in server.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_cpu_time_of_all_processes_those_that_ended_included(tmp_path: Path) -> None:
    with running([sys.executable, "-c", BURN], {}, tmp_path) as server:
        started(server)
        meter = Meter(server)
        meter.read()
        (tmp_path / "begin").touch()
        wait_for(tmp_path / "end")
        meter.read()
        used = meter.ms_per_request(answered(10))
        assert meter.ms_per_request(answered(0)) == {}
    # 0.4 s for 10 requests, and a hundredth of a second less for each process, as Linux counts
    assert 36 <= sum(used.values()) <= 60


def test_memory_by_process_and_kind(tmp_path: Path) -> None:
    code = "data = bytes(50_000_000); print('up', flush=True); import time; time.sleep(60)"
    with running(
        [sys.executable, "-c", code.replace("bytes(", "b'x' * (")], {}, tmp_path
    ) as server:
        started(server)
        (weighed,) = memory(server)
    assert weighed["process"].startswith("python")
    assert 48 < weighed["pss_mib"] < 100
    assert sum(weighed["kinds_mib"].values()) == pytest.approx(weighed["pss_mib"], abs=1)
    assert weighed["kinds_mib"]["anonymous"] > 47
    assert weighed["kinds_mib"]["other files"] > 1


SMAPS = """\
55d0-55d1 r--p 00000000 00:00 0                          [heap]
Size:                 99 kB
Pss:                   1 kB
Pss_Dirty:            99 kB
55d1-55d2 rw-p 00000000 00:00 0
Pss:                   2 kB
55d2-55d3 r-xp 00000000 fe:00 12     /x/site-packages/torch/lib/libtorch_cpu.so
Pss:                   4 kB
55d3-55d4 r-xp 00000000 fe:00 12     /x/site-packages/openvino/libs/libopenvino.so.2026
Pss:                   8 kB
55d4-55d5 r--s 00000000 fe:00 12     /tmp/models/a b/openvino.bin
Pss:                  16 kB
55d5-55d6 r--s 00000000 fe:00 12     /tmp/models/weights.safetensors (deleted)
Pss:                  32 kB
55d6-55d7 r-xp 00000000 fe:00 12     /usr/lib/libc.so.6
Pss:                  64 kB
"""


def test_kinds_of_memory() -> None:
    expected = {"anonymous": 3, "torch": 4, "OpenVINO": 8, "weights": 48, "other files": 64}
    assert kinds_of(SMAPS) == expected
