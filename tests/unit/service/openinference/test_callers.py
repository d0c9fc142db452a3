"""Who calls, and places for those who keep the server waiting."""

import asyncio
import ipaddress

import pytest

from service.openinference.callers import Places, Refused, address_of

PROXIES = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("ipv4:192.0.2.1:1234", "", "192.0.2.1"),
        ("ipv4:192.0.2.1:1234", "192.0.2.9", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:1234", "192.0.2.9", "2001:db8::1"),
        ("ipv6:[::ffff:192.0.2.1]:1234", "", "192.0.2.1"),
        ("ipv4:10.0.0.1:1234", "", "10.0.0.1"),
        ("ipv4:10.0.0.1:1234", "192.0.2.9", "192.0.2.9"),
        ("ipv4:10.0.0.1:1234", "192.0.2.8, 192.0.2.9", "192.0.2.9"),
        ("ipv4:10.0.0.1:1234", "192.0.2.9,10.0.0.2", "192.0.2.9"),
        ("ipv4:10.0.0.1:1234", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("ipv4:10.0.0.1:1234", "192.0.2.9, nonsense", "10.0.0.1"),
        ("ipv6:%5Bfd00::1%5D:1234", "2001:db8::1", "2001:db8::1"),
        ("unix:", "192.0.2.9", "unknown"),
    ],
)
def test_only_proxies_say_who_the_client_is(peer: str, forwarded: str, address: str) -> None:
    assert address_of(peer, forwarded, PROXIES) == address


async def wait_in(places: Places, address: str, left: list[str]) -> None:
    try:
        with places.take(address):
            await asyncio.sleep(3600)
    except Refused:
        left.append(address)


def test_the_address_with_most_places_loses_its_oldest() -> None:
    async def run() -> None:
        left: list[str] = []
        places = Places(4)
        many = [asyncio.create_task(wait_in(places, "many", left)) for _ in range(4)]
        await asyncio.sleep(0)
        few = [asyncio.create_task(wait_in(places, "few", left)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert [task.done() for task in many] == [True, True, False, False]
        assert left == ["many", "many"]
        for name in ("many", "few"):  # nobody has more than one more than they would have
            await wait_in(places, name, left)
        assert left[2:] == ["many", "few"]
        for task in (*many, *few):
            task.cancel()
        await asyncio.gather(*many, *few, return_exceptions=True)
        with places.take("few"):
            assert len(left) == 4

    asyncio.run(run())


def test_a_call_that_is_given_up_stays_given_up() -> None:
    async def run() -> None:
        left: list[str] = []
        task = asyncio.create_task(wait_in(Places(1), "one", left))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not left

    asyncio.run(run())
