"""A rollout from the check of the archive to its end, or until everything is as it was before."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from handler.errors import InvalidModel, SetupError
from handler.model_card import CARD_FILE, ModelCard
from service.archive.mar import member_sha256, read_target
from service.gateway.rollout import Share
from service.gateway.settings import GatewaySettings
from service.processes import wait_until
from service.rollout.gateway import Page, read_page
from service.rollout.judgement import FALSE_ALARMS, QUANTILES, Bounds, Counts, judge
from service.rollout.record import FINISHING, RUNNING, Record, RecordFile, counts_of
from service.rollout.replay import replay
from service.rollout.replicas import Replica, Unusable, plan_archive
from service.rollout.steps import Pace, Step
from service.torchserve.management import Management, UnknownModel

LOOK_SECONDS = 1.0
TAKE_UP_SECONDS = 15.0  # for the gateway, from the file to its page
DRAIN_SECONDS = 60.0
MANAGEMENT_SECONDS = 60.0  # for an answer: of a busy machine, or when workers end
SILENT_LOOKS = 10  # in a row without the gateway's page, until the new version is taken back
Say = Callable[[str], None]


class TakenBack(Exception):
    """The new version is not good enough, or cannot be judged; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options say."""

    archive: Path
    images: Sequence[Path]
    steps: Sequence[Step]
    pace: Pace
    bounds: Bounds
    allow_new_classes: bool
    require_signed: str | None
    keep_old: bool


class Rollout:
    """Works on the record in `file`, which this process must hold."""

    def __init__(self, file: RecordFile, settings: GatewaySettings, say: Say) -> None:
        """`settings` are the gateway's, which also say where the replicas are."""
        self._file = file
        self._url = settings.url
        self._replicas = [
            Replica(Management(f"http://{a}", MANAGEMENT_SECONDS))
            for a in settings.addresses("management")
        ]
        self._predictions = f"http://{settings.addresses('upstreams')[0]}/predictions"
        self._say = say
        self._share: Share | None = None  # what the gateway shall do now

    def run(self, asked: Asked) -> Record:
        """Go through all steps, or take the new version back; the record says which.

        An unfinished rollout of the same archive is continued. Whatever ends it early, Ctrl-C
        included, everything is put back. Raises SetupError if nothing was changed.
        """
        if (page := read_page(self._url)).step is None:
            raise SetupError("the gateway was started without GATEWAY_ROLLOUT")
        record = self._begin(asked, page)
        self._write(record)
        try:
            if record.status == RUNNING:
                self._register(record, asked)
                self._go_through(record, asked)
                record.status = FINISHING
                self._write(record)
            self._make_default(record)
        except (TakenBack, Unusable, SetupError) as exc:
            self.take_back(record, str(exc))
        except (requests.RequestException, UnknownModel) as exc:
            self.take_back(record, f"TorchServe or the gateway failed: {exc}")
        except KeyboardInterrupt:
            self.take_back(record, "it was aborted")
        else:
            self._finish(record)
        return record

    def abort(self, record: Record) -> None:
        """Put everything back; once the old version is gone somewhere, go through with it."""
        if record.status == FINISHING and not all(
            replica.has(record.model, record.old) for replica in self._replicas
        ):
            self._say(f"{record.old} is unregistered already: {record.new} takes over")
            self._make_default(record)
            self._finish(record)
        else:
            self.take_back(record, "it was aborted")

    # --- Before the first step

    def _begin(self, asked: Asked, page: Page) -> Record:
        """The record to work on. Raises SetupError, before anything is changed."""
        model, new = read_target(asked.archive)
        sha256 = member_sha256(asked.archive, CARD_FILE)
        steps = [str(step) for step in asked.steps]
        before = self._file.read()
        if before and before.is_unfinished:
            if (before.model, before.new, before.sha256) == (model, new, sha256):
                if before.steps != steps:
                    raise SetupError(f"it was begun with other steps: {', '.join(before.steps)}")
                self._say(f"goes on with {model} {new} at step {max(1, before.step)}")
                return before
            raise SetupError(
                f"a rollout of {before.archive} is not finished: ./scripts/rollout --abort first"
            )
        if page.step:
            raise SetupError("the gateway works on another rollout")
        olds = {replica.default(model).version for replica in self._replicas}
        if len(olds) > 1:
            raise SetupError(f"the replicas have different default versions: {', '.join(olds)}")
        if any(replica.has(model, new) for replica in self._replicas):
            raise SetupError(
                f"{model} {new} is registered: a rollout needs a version that is new "
                "(./scripts/package --version)"
            )
        card = self._replicas[0].card(model)
        plan, _ = plan_archive(asked.archive, asked.require_signed, 1)
        if plan.card and not asked.allow_new_classes:
            _check_classes(card, plan.card)
        return Record(
            model=model,
            old=olds.pop(),
            new=new,
            archive=str(asked.archive),
            sha256=sha256,
            steps=steps,
            keep_old=asked.keep_old,
            started=time.time(),
        )

    def _register(self, record: Record, asked: Asked) -> None:
        """Have the new version ready on every replica, with as many workers as the old one."""
        self._say(f"registers {record.model} {record.new} beside {record.old}")
        for replica in self._replicas:
            workers = max(1, replica.default(record.model).min_workers)
            plan, key = plan_archive(asked.archive, asked.require_signed, workers)
            replica.register(plan, key, workers)
        for replica in self._replicas:
            replica.wait_until_ready(record.model, record.new)
        if asked.images and not record.is_replayed:
            url = f"{self._predictions}/{record.model}"
            old, new = replay(asked.images, url, record.old, record.new)
            slow = [old.quantile(share) for share in QUANTILES]
            self._judge(record, None, new, old, slow, asked)
            record.is_replayed = True

    # --- The steps

    def _go_through(self, record: Record, asked: Asked) -> None:
        """Raises TakenBack."""
        alone = record.alone()  # of a rollout that is continued
        for step in asked.steps[max(0, record.step - 1) :]:
            record.step = step.number
            old = self._watch(record, step, asked, alone)
            if step.is_baseline:
                record.slow = [old.quantile(share) for share in QUANTILES]
            if not step.percent:
                alone = old

    def _watch(self, record: Record, step: Step, asked: Asked, alone: Counts | None) -> Counts:
        """One step, until enough is seen; what the old version did. Raises TakenBack."""
        self._share = Share(
            model=record.model,
            old=record.old,
            new=record.new,
            percent=step.percent,
            shadow=step.shadow,
            step=step.number,
        )
        self._say(f"step {step.number} of {len(asked.steps)}: {step}")
        self._write(record)
        self._wait_for_gateway(step.number)
        since = time.monotonic()
        record.seen.append({})
        silent = 0
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                page = read_page(self._url)
                silent = 0
            except requests.RequestException:
                silent += 1
                if silent == SILENT_LOOKS:
                    raise
                continue
            if page.step != step.number:
                raise TakenBack(f"the gateway is at step {page.step} and not {step.number}")
            new, old = page.of(record.new), page.of(record.old)
            record.seen.pop()
            against = alone if step.is_last and alone else old
            self._judge(record, step, new, old, record.slow, asked, against)
            self._write(record)
            passed = time.monotonic() - since
            if asked.pace.is_over(step, new, old, passed):
                return old
            if asked.pace.is_late(passed):
                judged = old if step.is_baseline else new
                raise TakenBack(
                    f"too few requests to judge: {judged.requests} of {asked.pace.requests} within "
                    f"{passed:.0f} s"
                )

    def _judge(
        self,
        record: Record,
        step: Step | None,
        new: Counts,
        old: Counts,
        slow: Sequence[float],
        asked: Asked,
        against: Counts | None = None,
    ) -> None:
        """Add to the record what was seen, in the replay without a step.

        Raises TakenBack if the new version is worse than `against`, or else than `old`.
        """
        alpha = FALSE_ALARMS / (len(asked.steps) + 1)  # the replay is one more
        findings = judge(new, against or old, slow, asked.bounds, alpha)
        record.seen.append(
            {
                "step": str(step or "replay"),
                "percent": step.percent if step else None,
                "old": asdict(old),
                "new": asdict(new),
                "findings": [str(finding) for finding in findings],
            }
        )
        if broken := [str(finding) for finding in findings if finding.is_broken]:
            raise TakenBack("; ".join(broken))

    def _wait_for_gateway(self, step: int) -> None:
        if not wait_until(lambda: read_page(self._url).step == step, TAKE_UP_SECONDS):
            raise TakenBack(
                "the gateway does not follow: is its GATEWAY_ROLLOUT the same file as here?"
            )

    def _write(self, record: Record) -> None:
        self._file.write(record, self._share)

    def _try_to_write(self, record: Record) -> None:
        """A full disk must not keep anybody from putting things back."""
        try:
            self._write(record)
        except SetupError as exc:
            self._say(str(exc))

    # --- The end

    def _make_default(self, record: Record) -> None:
        for replica in self._replicas:
            replica.set_default(record.model, record.new)

    def _finish(self, record: Record) -> None:
        """Everybody gets the new version; the old one ends when nobody has a request there."""
        _hold_signals()
        self._let_go(record)
        if not record.keep_old:
            self._remove(record, record.old)
        record.status = "finished"
        self._write(record)

    def take_back(self, record: Record, reason: str) -> None:
        """Put everything back: no client gets the new version, and it is unregistered."""
        self._say(f"takes {record.new} back: {reason}")
        record.reason, self._share = record.reason or reason, None
        _hold_signals()
        self._try_to_write(record)
        left = []
        for replica in self._replicas:
            try:
                replica.set_default(record.model, record.old)
            except UnknownModel:
                continue
            except requests.RequestException as exc:
                left.append(f"{replica.management.url} ({type(exc).__name__})")
        self._let_go(record)
        self._remove(record, record.new)
        if left:  # so that --abort tries again
            self._say(f"the default may still be {record.new} at {', '.join(left)}: --abort again")
        else:
            record.status = "taken back"
        self._write(record)

    def _let_go(self, record: Record) -> None:
        """Have the gateway forget the rollout, and wait for its requests."""
        self._share = None
        self._try_to_write(record)

        def is_done() -> bool:
            try:
                page = read_page(self._url)
            except requests.ConnectionError:  # no gateway, no clients
                return True
            except (requests.RequestException, SetupError):
                return False
            return page.step == 0 and not any(page.in_flight.values())

        wait_until(is_done, DRAIN_SECONDS)

    def _remove(self, record: Record, version: str) -> None:
        for replica in self._replicas:
            try:
                if set(replica.management.versions(record.model)) - {version}:  # never the last
                    replica.remove(record.model, version)
            except UnknownModel:
                continue
            except requests.RequestException as exc:
                address = replica.management.url
                self._say(f"{version} may be left registered at {address}: {type(exc).__name__}")


def _hold_signals() -> None:
    """From here on a Ctrl-C would leave things half done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _check_classes(old: ModelCard, new: ModelCard) -> None:
    if old.labels != new.labels:
        gone, more = (
            sorted(set(old.labels) - set(new.labels)),
            sorted(set(new.labels) - set(old.labels)),
        )
        words = [f"without {', '.join(gone[:3])}"] if gone else []
        words += [f"with {', '.join(more[:3])}"] if more else []
        raise InvalidModel(
            f"the new version has other classes ({' and '.join(words) or 'in another order'}): "
            "give --allow-new-classes if that is meant"
        )


def describe(record: Record) -> str:
    """A record for people."""
    lines = [f"{record.model}: {record.old} -> {record.new}, {record.status}"]
    if record.reason:
        lines.append(f"  because {record.reason}")
    for seen in record.seen:
        if seen:
            new, old = counts_of(seen, "new"), counts_of(seen, "old")
            lines.append(
                f"  {seen['step']}: requests {old.requests} old, {new.requests} new "
                f"({new.live} of clients); {'; '.join(seen['findings'])}"
            )
    live = sum(seen["new"]["live"] for seen in record.seen if seen)
    rescued = sum(seen["new"]["rescued"] for seen in record.seen if seen)
    total = live + sum(seen["old"]["live"] for seen in record.seen if seen)
    lines.append(
        f"  clients: {live} of {total} requests went to {record.new}, {rescued} of them on to"
    )
    lines[-1] += f" {record.old} after an error"
    return "\n".join(lines)
