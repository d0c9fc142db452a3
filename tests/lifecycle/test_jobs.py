"""Jobs through the real gateway, with a real Redis and a stand-in for TorchServe."""

import base64
import hashlib
import hmac
import io
import json
import shutil
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import skip
from tests.gateway.clients import check_error
from tests.lifecycle.conftest import RedisServer
from tests.lifecycle.jobs import (
    KEYS,
    TIMEOUT,
    Other,
    Served,
    answer_to,
    body_at,
    form,
    numbered,
    other,
    serving_jobs,
)
from tests.processes import wait_for

SECRET = b"s" * 32


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def outside() -> Iterator[Other]:
    with other() as server:
        yield server


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, outside: Other
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    secret = folder / "secret"
    secret.write_text("whsec_" + base64.b64encode(SECRET).decode())
    address = f"http://127.0.0.1:{outside.port}"
    with serving_jobs(
        folder,
        redis,
        jobs_max_images="50",
        jobs_max_bytes="200000",
        max_body_bytes="50000",
        jobs_max_open_per_client="2",
        jobs_sources=f"{address}/images/",
        jobs_webhooks=f"{address}/hooks/",
        jobs_webhook_secret=str(secret),
        jobs_private_addresses="true",
    ) as served:
        yield served


def zipped(images: list[bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        archive.writestr("__MACOSX/._0.jpg", b"noise")
        for i, image in enumerate(images):
            archive.writestr(f"folder/{i}.jpg", image)
    return file.getvalue()


def tarred(images: list[bytes], mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for i, image in enumerate(images):
            member = tarfile.TarInfo(f"folder/{i}.jpg")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
        link = tarfile.TarInfo("folder/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return file.getvalue()


IMAGES = numbered(5)
MIXED = (
    b"".join(b"--x\r\nContent-Type: image/jpeg\r\n\r\n" + image + b"\r\n" for image in IMAGES)
    + b"--x--\r\n"
)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"files": form(*IMAGES)}, "{}.jpg"),
        (
            {"data": MIXED, "headers": {"Content-Type": "multipart/mixed; boundary=x"}},
            "image {1}",
        ),
        ({"data": zipped(IMAGES)}, "folder/{}.jpg"),
        ({"data": tarred(IMAGES, "w")}, "folder/{}.jpg"),
        ({"data": tarred(IMAGES, "w:gz")}, "folder/{}.jpg"),
    ],
    ids=["form", "mixed", "zip", "tar", "tar.gz"],
)
def test_every_image_is_answered_in_order(
    served: Served, options: dict[str, Any], name: str
) -> None:
    job = served.alice.post(params={"top_k": "3"}, **options)
    assert job["images"] == 5
    ended = served.alice.wait(job)
    assert (ended["state"], ended["done"], ended["failed"]) == ("done", 5, 0)
    assert served.alice.results(job) == [
        {
            "index": i,
            "name": name.format(i, i + 1),
            "code": 200,
            "answer": json.loads(answer_to(image)),
        }
        for i, image in enumerate(IMAGES)
    ]
    asked = served.torchserve.headers[-1]
    assert asked["x-top-k"] == "3"
    assert "authorization" not in asked


def test_a_job_belongs_to_the_key_that_made_it(served: Served) -> None:
    job = served.alice.post(b"one")
    for method, path in [("GET", ""), ("GET", "/events"), ("GET", "/results"), ("DELETE", "")]:
        check_error(served.bob.ask(method, f"/jobs/{job['id']}{path}"), 404)
    check_error(requests.get(f"{served.gateway.url}/jobs/{job['id']}", timeout=TIMEOUT), 401)
    assert served.alice.wait(job)["state"] == "done"


def test_an_error_of_an_image_is_its_result(served: Served) -> None:
    served.torchserve.statuses[:] = [200, 415]
    job = served.alice.post(b"good", b"bad")
    assert served.alice.wait(job)["failed"] == 1
    # Two are asked for at the same time, so either may get the error.
    assert sorted(line["code"] for line in served.alice.results(job)) == [200, 415]


def test_a_full_service_is_asked_again(served: Served) -> None:
    served.torchserve.statuses[:] = [503, 200]
    job = served.alice.post(b"patient")
    assert served.alice.wait(job)["failed"] == 0


def test_the_same_key_makes_the_same_job(served: Served) -> None:
    def post(*images: bytes) -> requests.Response:
        return served.alice.ask("POST", files=form(*images), headers={"Idempotency-Key": "k-1"})

    with ThreadPoolExecutor(4) as pool:
        ids = {answer.json().get("id") for answer in pool.map(post, [b"same"] * 4)}
    assert len(ids - {None}) == 1  # one that is just being made is a 503 for the others
    again = post(b"same")
    assert (again.status_code, {again.json()["id"]}) == (202, ids - {None})
    check_error(post(b"other"), 422, "IdempotencyKeyReused")
    other_client = served.bob.post(b"same", headers={"Idempotency-Key": "k-1"})
    assert other_client["id"] not in ids
    served.bob.wait(other_client)
    served.alice.wait(again.json())


def test_events_tell_the_progress_and_end(served: Served) -> None:
    job = served.alice.post(*numbered(30))
    answer = served.alice.ask("GET", f"/jobs/{job['id']}/events", stream=True)
    assert answer.headers["Content-Type"] == "text/event-stream"
    lines = [line for line in answer.iter_lines(decode_unicode=True) if line]
    kinds, told = lines[::2], [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert kinds == ["event: progress"] * (len(kinds) - 1) + ["event: end"]
    done = [each["done"] for each in told]
    assert done == sorted(done)
    assert (told[-1]["state"], done[-1]) == ("done", 30)


def test_nobody_asks_for_the_headers_of_a_stream(served: Served) -> None:
    """Its body would follow, and be taken for the next answer of the connection."""
    job = served.alice.post(b"one")
    for path in ("", "/events", "/results"):
        assert served.alice.ask("HEAD", f"/jobs/{job['id']}{path}").status_code == 405
    assert served.alice.wait(job)["state"] == "done"


def test_a_cancelled_job_ends(served: Served) -> None:
    served.torchserve.seconds = 0.1
    job = served.alice.post(*numbered(50))
    wait_for(lambda: served.alice.get(job)["done"] >= 2, TIMEOUT)
    cancelled = served.alice.ask("DELETE", f"/jobs/{job['id']}").json()
    assert cancelled["state"] == "cancelled"
    served.torchserve.seconds = 0.0
    seen = len(served.torchserve.bodies)
    time.sleep(0.5)
    assert len(served.torchserve.bodies) <= seen + 1
    assert served.alice.get(job)["done"] == len(served.alice.results(job)) < 50


def test_urls(served: Served, outside: Other) -> None:
    outside.statuses[:] = [200, 302, 404]
    address = f"http://127.0.0.1:{outside.port}/images"
    urls = [f"{address}/{i}.jpg?size=1" for i in range(3)]
    job = served.alice.post(json={"urls": urls, "top_k": 2})
    served.alice.wait(job)
    good, *bad = served.alice.results(job)
    assert good["answer"] == json.loads(answer_to(body_at("/images/0.jpg?size=1")))
    assert good["name"] == urls[0]
    assert [line["answer"]["type"] for line in bad] == ["NotFetched"] * 2
    assert outside.paths[-3:] == [f"/images/{i}.jpg?size=1" for i in range(3)]  # no redirect


def test_urls_outside_the_list(served: Served, outside: Other) -> None:
    address = f"http://127.0.0.1:{outside.port}"
    for url in [f"{address}/images/../hooks/x", f"{address}0/hooks/x", "http://localhost/hooks/x"]:
        check_error(served.alice.ask("POST", json={"urls": [url]}), 403)
        check_error(served.alice.ask("POST", files=form(b"x"), params={"webhook": url}), 403)


def test_a_private_address_is_not_reached(tmp_path: Path, redis: RedisServer) -> None:
    with other() as outside:
        source = f"http://localhost:{outside.port}/images/"
        url = redis.url.removesuffix("/0") + "/1"
        with serving_jobs(tmp_path, redis, jobs_sources=source, jobs_url=url) as served:
            job = served.alice.post(json={"urls": [f"{source}x.jpg"]})
            served.alice.wait(job)
            [line] = served.alice.results(job)
        assert (line["code"], line["answer"]["type"]) == (502, "NotFetched")
        assert not outside.paths


def test_a_webhook_is_signed_and_called_again(served: Served, outside: Other) -> None:
    before = len(outside.paths)
    outside.statuses[:] = [500]
    url = f"http://127.0.0.1:{outside.port}/hooks/done?token=1"
    job = served.alice.post(b"one", params={"webhook": url})
    wait_for(lambda: len(served.alice.get(job)["webhook"]["attempts"]) == 2, TIMEOUT)
    attempts = served.alice.get(job)["webhook"]["attempts"]
    assert [each["error"] for each in attempts] == ["status 500", None]
    assert outside.paths[before:] == ["/hooks/done?token=1"] * 2
    head, body = outside.headers[-1], outside.bodies[-1]
    assert json.loads(body)["state"] == "done"
    assert abs(int(head["webhook-timestamp"]) - time.time()) < 60
    assert head["webhook-id"] == outside.headers[-2]["webhook-id"] == f"job_{job['id']}"
    signed = f"{head['webhook-id']}.{head['webhook-timestamp']}.".encode() + body
    digest = base64.b64encode(hmac.digest(SECRET, signed, hashlib.sha256)).decode()
    assert head["webhook-signature"] == f"v1,{digest}"


def test_jobs_wait_while_others_ask(served: Served) -> None:
    held = served.torchserve.held
    headers = {"X-API-Key": KEYS["bob"]}
    threads = [
        threading.Thread(
            target=requests.post,
            args=(f"{served.gateway.url}/predict", b"held"),
            kwargs={"headers": headers, "timeout": TIMEOUT},
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: served.torchserve.bodies.count(b"held") == 4, TIMEOUT)
        job = served.alice.post(b"behind the others")
        time.sleep(1.5)
        assert b"behind the others" not in served.torchserve.bodies
        assert served.alice.get(job)["done"] == 0
    finally:
        held.set()
    assert served.alice.wait(job)["state"] == "done"
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("options", "status", "type_name"),
    [
        ({"files": form(*numbered(51))}, 413, "TooManyImages"),
        ({"files": form(bytes(50_001))}, 413, "RequestTooLarge"),
        ({"data": bytes(200_001)}, 413, "RequestTooLarge"),
        ({"data": zipped([bytes(49_000)] * 5)}, 413, "RequestTooLarge"),  # small as it comes
        ({"data": zipped([bytes(50_001)])}, 413, "RequestTooLarge"),
        ({"data": tarred(numbered(51), "w:gz")}, 413, "TooManyImages"),
        ({"data": b"PK no zip"}, 400, "UnreadableArchive"),
        ({"data": tarred([bytes(range(256)) * 9], "w")[:2000]}, 400, "UnreadableArchive"),
        ({"data": zipped([])}, 400, "NoImage"),
        ({"json": {"urls": "x"}}, 400, "MalformedRequest"),
        ({"json": []}, 400, "MalformedRequest"),
        ({"json": {"urls": [], "odd": 1}}, 400, "InvalidOption"),
        ({"files": form(b"x"), "params": {"top_k": "0"}}, 400, "InvalidOption"),
        ({"files": form(b"x"), "params": {"model": "../x"}}, 400, "InvalidOption"),
        (
            {"data": b"no parts", "headers": {"Content-Type": "multipart/mixed; boundary=x"}},
            400,
            "MalformedRequest",
        ),
    ],
)
def test_what_is_no_job_is_refused(
    served: Served, options: dict[str, Any], status: int, type_name: str
) -> None:
    check_error(served.alice.ask("POST", **options), status, type_name)


def test_a_client_has_so_many_unfinished_jobs(served: Served) -> None:
    served.torchserve.seconds = 0.2
    jobs = [served.alice.post(*numbered(50)) for _ in range(2)]
    check_error(served.alice.ask("POST", files=form(b"third")), 429, "TooManyJobs")
    bobs = served.bob.post(b"one")  # comes in between
    assert served.bob.wait(bobs)["state"] == "done"
    assert not any(served.alice.get(job)["finished"] for job in jobs)
    for job in jobs:
        served.alice.ask("DELETE", f"/jobs/{job['id']}")
    served.torchserve.seconds = 0.0


def test_what_redis_has_forgotten_is_put_back(served: Served, redis: RedisServer) -> None:
    served.torchserve.seconds = 0.1
    job = served.alice.post(*numbered(30))
    wait_for(lambda: served.alice.get(job)["done"] >= 2, TIMEOUT)
    redis.client.flushdb()
    served.torchserve.seconds = 0.0
    assert served.alice.wait(job)["state"] == "done"
    assert [line["index"] for line in served.alice.results(job)] == list(range(30))


def test_what_has_ended_does_not_begin_again(served: Served, redis: RedisServer) -> None:
    job = served.alice.post(b"one")
    folder = served.folder / job["id"]
    assert served.alice.wait(job)["state"] == "done"
    wait_for((folder / "ended").exists, TIMEOUT)
    redis.client.flushdb()
    wait_for(lambda: not folder.exists(), TIMEOUT)
    check_error(served.alice.ask("GET", f"/jobs/{job['id']}"), 404)


def test_what_was_cancelled_does_not_begin_again(served: Served, redis: RedisServer) -> None:
    served.torchserve.seconds = 0.2
    job = served.alice.post(*numbered(50))
    assert served.alice.ask("DELETE", f"/jobs/{job['id']}").json()["state"] == "cancelled"
    redis.client.flushdb()  # at once
    served.torchserve.seconds = 0.0
    wait_for(lambda: not (served.folder / job["id"]).exists(), TIMEOUT)
    check_error(served.alice.ask("GET", f"/jobs/{job['id']}"), 404)


def test_nothing_secret_is_in_the_log(served: Served) -> None:
    log = served.gateway.stdout.read_text()
    assert "(jobs)" in log
    assert not [key for key in [*KEYS.values(), "whsec_", "token=1"] if key in log]
