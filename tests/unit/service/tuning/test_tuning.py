"""How a search runs and ends, and what is written then."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from handler.machine import available_cores, cpu_model
from service.options import parse_package
from service.tuning.bench import Bench, TuningOptions
from service.tuning.search import Configuration, Trial
from service.tuning.space import SearchSpace, make_axes
from service.tuning.tuned import Facts, read_tuned
from service.tuning.tuning import Ending, conclude, run_search
from tests.unit.service.tuning.trials import ENGINES, SLO_MS, START, surface, trial

MODEL = "squeezenet1_1"
FILE = f"tuned-{MODEL}.yaml"
SPACE = SearchSpace(START, ENGINES, make_axes(ENGINES, 4, 0, {}))
OPTIONS = TuningOptions(
    slo_p99_ms=SLO_MS,
    budget_minutes=1,
    seconds=1,
    concurrency=(1,),
    images=None,
    out="auto",
    plot=None,
)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1, (1, "out of time")), (100, (3, "out of time")), (1e9, (None, "finished"))],
)
def test_search_keeps_within_its_budget(budget: float, expected: tuple[int | None, Ending]) -> None:
    """Time passes by measuring alone, 30 s each; one configuration at least is measured."""
    trials: list[Trial] = []
    ending = run_search(SPACE, surface, SLO_MS, budget, trials, clock=lambda: 30.0 * len(trials))
    assert ending == expected[1]
    assert expected[0] in (None, len(trials))


@pytest.mark.parametrize("before", [0, 2])
def test_an_interrupted_search_keeps_what_it_found(before: int) -> None:
    def measure(configuration: Configuration) -> Trial:
        if len(trials) == before:
            raise KeyboardInterrupt
        return surface(configuration)

    trials: list[Trial] = []
    if before:
        assert run_search(SPACE, measure, SLO_MS, 1e9, trials) == "interrupted"
    else:
        with pytest.raises(KeyboardInterrupt):
            run_search(SPACE, measure, SLO_MS, 1e9, trials)
    assert len(trials) == before


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(
        options=OPTIONS,
        model_options=parse_package(
            ["--model", MODEL, "--weights", "untrained", "--device", "cpu"]
        ),
        facts=Facts(
            slo_p99_ms=SLO_MS,
            date="2026-11-23T05:33:12+00:00",
            cpu=cpu_model(),
            cores=available_cores(),
            versions={"torch": "2"},
        ),
        device="cpu",
        folder=tmp_path,
        images=[],
    )


def test_the_winner_is_written_and_drawn(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [trial(30.0, 60.0), trial(40.0, 50.0, precision="bf16", workers=2), trial(90.0, 200.0)]
    assert conclude(trials, bench, tmp_path / FILE, "finished") == 0
    content = read_tuned(tmp_path / FILE, MODEL)
    assert (content.options.precision, content.options.workers) == ("bf16", 2)
    assert (content.facts.throughput_rps, content.facts.p99_ms) == (40, 50)
    assert (tmp_path / f"tuned-{MODEL}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Best: openvino bf16, 2 x 1 threads, batch 8, 1 ms, forward 4: 40.0 req/s" in printed
    assert f"./scripts/serve --model={MODEL} --weights=untrained" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["facts"]["cores"] == available_cores()
    assert last["trials"][1]["configuration"]["workers"] == 2
    assert [point["p99_ms"] for one in last["trials"] for point in one["points"]] == [60, 50, 200]


def test_an_int8_model_is_made_only_for_who_serves_it(bench: Bench) -> None:
    options = parse_package(["--model", MODEL, "--calibration", "photos", "--workers", "3"])
    bench = replace(bench, model_options=options)
    assert "--calibration=photos" in bench.model_argv(replace(START, precision="int8"))
    words = bench.model_argv(START)
    assert not any(word.startswith(("--calibration", "--workers=3")) for word in words)


MISSED = "No configuration meets p99 100 ms; nothing is written. Closest: openvino"


@pytest.mark.parametrize(
    ("found", "ending", "status", "words"),
    [
        (trial(10, 101), "out of time", 1, ["The time was up", MISSED]),
        (Trial(START, failure="no such engine"), "finished", 1, [f"{START}: no such engine"]),
        (surface(START), "interrupted", 130, ["Interrupted", "Best: openvino fp32"]),
    ],
)
def test_nothing_is_written_without_a_winner_or_if_it_is_interrupted(
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    found: Trial,
    ending: Ending,
    status: int,
    words: list[str],
) -> None:
    assert conclude([found], bench, tmp_path / FILE, ending) == status
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)
    assert list(tmp_path.iterdir()) == []
