"""Settings from files and variables: of the handler, the gateway, a tuned file, a configuration.

The first byte says which; each is refused with InvalidSettings, or holds to its own rules.
"""

from typing import Any

import yaml

from handler.errors import InvalidSettings
from handler.rules import check as check_rules
from handler.settings import PREFIX, Settings
from service import plan
from service.gateway.settings import PREFIX as GATEWAY_PREFIX
from service.gateway.settings import GatewaySettings
from service.tuning.tuned import COMMENT, read_tuned
from tests.fuzz.target import Target, as_file


def check(data: bytes) -> None:
    kind, rest = (data[0] % 4, data[1:]) if data else (0, b"")
    try:
        if kind == 0:
            section = loaded(rest)
            check_rules(Settings.load(section, {}))
        elif kind == 1:
            check_rules(Settings.load({}, variables(rest, PREFIX)))
        elif kind == 2:
            settings = GatewaySettings.load(variables(rest, GATEWAY_PREFIX))
            check_rules(settings)
            assert sum(settings.weights().values()) in (0, 100)
            settings.networks("metrics_allow")
        else:
            check_rules(read_tuned(as_file(rest, ".yaml"), "m").options)
    except InvalidSettings as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 20_000


def loaded(data: bytes) -> Any:
    """The `handler:` section as ./scripts/package and TorchServe read it, which refuse the rest."""
    return plan._read_yaml(as_file(data, ".yaml"))


def variables(data: bytes, prefix: str) -> dict[str, str]:
    lines = [line.partition(b"=") for line in data.replace(b"\0", b"").split(b"\n")]
    return {
        prefix + name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, _, value in lines
        if name
    }


def seeds() -> list[bytes]:
    texts = [
        b"env: production\ntop_k: 3\nallow_untrained: yes\n",
        b"[" * 600,
        b"a: &a [1, 2]\ntop_k: *a\n",
        b"top_k: 0x" + b"f" * 4000,
        b"top_k: 2001-02-30\n",
        b"env: !!python/none\n? [a]: b\n",
    ]
    pairs = [
        b"TOP_K=3\nENV=staging\nLOG_REQUESTS=false",
        b"PORT=tcp://1.2.3.4:80\nTOP_K=\xd9\xa3",
        b"TOP_K=" + b"9" * 3900,
    ]
    gateway = [
        b"HOST=127.0.0.1\nPORT=8000\nSPLIT=1.0=90,2.0=10\nMODELS=a,b\nKEYS=off",
        b"HOST=::1\nMETRICS_ALLOW=10.0.0.0/8,::1\nUPSTREAMS=a:80,b:81",
        b"HOST=fe80::1%0\nRATE=0",
    ]
    tuned = COMMENT.encode() + (
        b"model: m\noptions: {device: cpu, precision: fp32, workers: 1, batch_size: 2, "
        b"max_batch_delay_ms: 0}\nhandler: {engine: torch, threads: 1, max_forward: 4}\n"
        b"facts: {slo_p99_ms: 20, date: x, cpu: y, cores: 2, versions: {torch: '2'}}\n"
    )
    assert yaml.safe_load(tuned)
    return [
        *(b"\0" + text for text in texts),
        *(b"\1" + text for text in pairs),
        *(b"\2" + text for text in gateway),
        *(b"\3" + text for text in (tuned, *texts)),
    ]


TOKENS = tuple(
    b"TOP_K= ENV= HOST= PORT= SPLIT= MODELS= KEYS= METRICS_ALLOW= UPSTREAMS= MANAGEMENT= RATE= "
    b"production true null ~ 0x 0b_ 1e400 .inf .nan 1_000 1:30 2001-02-30 !!int !!float !!binary "
    b"!!set !!timestamp & * << ? | > %YAML --- %0a ::1 /33 100 =50,".split()
)
TARGET = Target(check=check, seeds=seeds, tokens=TOKENS)
