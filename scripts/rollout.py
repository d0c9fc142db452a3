"""Put a new version of a model in the place of the old one, or everything back if it is worse."""

import argparse
import signal
import sys
from collections.abc import Sequence

import requests

from handler.errors import SetupError
from service.gateway.settings import PREFIX, GatewaySettings
from service.processes import on_stop
from service.rollout.judgement import Bounds
from service.rollout.options import parse
from service.rollout.record import Record, RecordFile
from service.rollout.replay import find_images
from service.rollout.rollout import Asked, Rollout, describe
from service.rollout.steps import Pace, make_steps


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    on_stop(signal.default_int_handler)  # everything is put back
    try:
        settings = GatewaySettings.load()
        if settings.rollout_file is None:
            raise SetupError(f"{PREFIX}ROLLOUT must name the file that the gateway reads")
        file = RecordFile(settings.rollout_file)
        if args.status:
            record = file.read()
        elif args.abort:
            record = abort(file, settings)
        else:
            record = roll_out(file, settings, asked_by(args))
    except SetupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except requests.RequestException as exc:
        print(f"error: TorchServe or the gateway does not answer: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # nothing was begun
        return 130
    if args.json and record:
        print(file.text())
    else:
        print(describe(record) if record else "there was no rollout")
    return 1 if args.archive and record and record.reason else 0


def asked_by(args: argparse.Namespace) -> Asked:
    return Asked(
        archive=args.archive.resolve(),
        images=find_images(args.images) if args.images else [],
        steps=make_steps(args.steps, args.shadow),
        pace=Pace(seconds=args.step_seconds, requests=args.step_requests, timeout=args.timeout),
        bounds=Bounds(
            max_errors=args.max_errors,
            max_slowdown=args.max_slowdown,
            max_disagreement=args.max_disagreement,
        ),
        allow_new_classes=args.allow_new_classes,
        require_signed=args.require_signed,
        keep_old=args.keep_old,
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def roll_out(file: RecordFile, settings: GatewaySettings, asked: Asked) -> Record:
    with file.held() as free:
        if not free:
            raise SetupError("a rollout is under way: see --status, or end it with --abort")
        return Rollout(file, settings, say).run(asked)


def abort(file: RecordFile, settings: GatewaySettings) -> Record | None:
    """End a rollout, whether another process works on it or that was killed."""
    with file.held() as free:
        record = file.read()
        if record and record.is_unfinished and free:
            Rollout(file, settings, say).abort(record)
    if not free:
        file.interrupt()
        record = file.read()
    return record


if __name__ == "__main__":
    sys.exit(main())
