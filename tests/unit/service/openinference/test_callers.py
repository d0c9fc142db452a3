"""Places for those who keep the server waiting."""

import asyncio

import pytest

from service.openinference.callers import Places, Refused


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
