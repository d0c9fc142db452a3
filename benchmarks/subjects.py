"""What is measured: every server, how it is started and how requests to it look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).parent / "peers"
ENGINES = ("eager", "ours")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for processes that share the cores


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One server. In `command`, {python}, {bin} and {port} are filled in when it starts."""

    name: str
    what: str  # for the report
    kind: str  # "ours", "gateway" (ours behind it), "peer" or "limit"
    precision: str | None = None  # of our engine; None: it has another, or none
    environment: str | None = None  # benchmarks/.envs/NAME; None: our own
    command: Sequence[object]
    path: str = "/predict"
    form: str = "raw"
    part: str = "file"  # of a multipart form
    headers: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    accuracy: bool = True  # whether to classify the labelled images with it
    direct_port: str = ""  # of the same service without its gateway, such as "{port+1}"

    @property
    def is_ours(self) -> bool:
        """Whether it is started with ./scripts/serve."""
        return self.kind in ("ours", "gateway")


def ours(model: str, precision: str, model_options: Sequence[object]) -> Subject:
    ports = ("--port", "{port}", "--management-port", "{port+1}", "--metrics-port", "{port+2}")
    return Subject(
        name=f"ours-{precision}",
        what=f"this service, {precision}",
        kind="ours",
        precision=precision,
        command=["{python}", ROOT / "scripts" / "serve.py", *model_options, *ports],
        path=f"/predictions/{model}",
    )


def gateway(model: str, precision: str, model_options: Sequence[object]) -> Subject:
    """Ours behind its gateway, which may take any number of requests from its one client."""
    return Subject(
        name=f"ours-gateway-{precision}",
        what=f"this service behind its gateway, {precision}",
        kind="gateway",
        precision=precision,
        command=[
            *("{python}", ROOT / "scripts" / "serve.py", *model_options, "--gateway"),
            *("--gateway-port", "{port}", "--port", "{port+1}"),
            *("--management-port", "{port+2}", "--metrics-port", "{port+3}"),
        ],
        path=f"/predictions/{model}",
        environ={"GATEWAY_RATE": "0"},
        direct_port="{port+1}",
    )


def peers(engine: str, precision: str) -> list[Subject]:
    """Every peer with an engine: "eager", or the one of this service ("ours") in a precision."""
    is_eager = engine == "eager"
    job = "PIL, torchvision, eager torch" if is_eager else f"our decoding and engine, {precision}"
    modules = "benchmarks.peers."

    def peer(name: str, what: str, *command: object, **more: Any) -> Subject:
        environ = {"BENCHMARK_ENGINE": engine, **ONE_THREAD, **more.pop("environ", {})}
        return Subject(
            name=f"{name}-{engine}",
            what=f"{what}; {job}",
            kind="peer",
            precision=None if is_eager else precision,
            environment=name,
            command=command,
            environ=environ,
            **more,
        )

    return [
        peer(
            "flask",
            "Flask, gunicorn with sync workers",
            *("{bin}/gunicorn", "--workers", "{workers}", "--bind", "127.0.0.1:{port}"),
            modules + "flask_app:app",
        ),
        peer(
            "fastapi",
            "FastAPI, uvicorn",
            *("{bin}/uvicorn", "--workers", "{workers}", "--port", "{port}"),
            modules + "fastapi_app:app",
        ),
        peer(
            "litserve",
            "LitServe, batching",
            *("{python}", PEERS / "litserve_app.py"),
            form="multipart",
            part="request",
        ),
        peer(
            "bentoml",
            "BentoML",
            *("{bin}/bentoml", "serve", modules + "bentoml_app:ImageClassifier"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        peer("ray", "Ray Serve, batching", *("{python}", PEERS / "ray_app.py"), path="/"),
        peer(
            "triton",
            "Triton through pytriton, batching",
            *("{python}", PEERS / "triton_app.py"),
            path="/v2/models/classifier/infer",
            headers={"Inference-Header-Content-Length": "0"},  # the body is the tensor
            # Triton's Python stub must find this interpreter's own libpython.
            environ={"LD_LIBRARY_PATH": "{libpython}"},
        ),
    ]


def stock(threads: str) -> Subject:
    """TorchServe's image_classifier, "as-is" or with "omp1"."""
    environ = ONE_THREAD if threads == "omp1" else {}
    return Subject(
        name=f"stock-{threads}",
        what="TorchServe's image_classifier, 2 workers, "
        + ("OMP_NUM_THREADS=1" if environ else "as it is"),
        kind="peer",
        environment="stock",
        command=["{python}", PEERS / "stock_torchserve.py"],
        path="/predictions/classifier",
        environ=environ,
        accuracy=threads == "omp1",  # both are the same code, and one of them takes minutes
    )


def empty() -> Subject:
    return Subject(
        name="empty",
        what="TorchServe as we start it, a handler that does nothing",
        kind="limit",
        command=["{python}", PEERS / "empty_torchserve.py"],
        path="/predictions/classifier",
        accuracy=False,
    )


def all_subjects(model: str, model_options: Mapping[str, Sequence[object]]) -> list[Subject]:
    """`model_options`: for each precision of ours, the options of scripts/serve.py.

    The gateway and the peers have the first precision.
    """
    first, options = next(iter(model_options.items()))
    return [
        *(ours(model, precision, options) for precision, options in model_options.items()),
        gateway(model, first, options),
        stock("as-is"),
        stock("omp1"),
        *(subject for engine in ENGINES for subject in peers(engine, first)),
        empty(),
    ]
