"""Duties are done by one of all processes, and go on when a clock is set."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine

from redux_server.database.migration import open_database
from redux_server.dispatch.celery import Turns
from server.in_process import Clock


def test_a_duty_is_given_out_once_in_its_time(either_database: Engine, clock: Clock) -> None:
    one, other = (Turns(either_database, clock=clock) for _ in range(2))
    assert one.take("sweep", every_s=10)
    assert not one.take("sweep", every_s=10)
    assert not other.take("sweep", every_s=10)
    assert other.take("count", every_s=10)
    clock.now += 9.9
    assert not other.take("sweep", every_s=10)
    clock.now += 0.2
    assert other.take("sweep", every_s=10)
    assert not one.take("sweep", every_s=10)


def test_a_clock_set_back_by_an_hour_stops_no_duty(either_database: Engine, clock: Clock) -> None:
    duties = Turns(either_database, clock=clock)
    assert duties.take("sweep", every_s=10)
    clock.now -= 3600
    assert duties.take("sweep", every_s=10)


@pytest.mark.parametrize("is_known", [False, True])
def test_processes_that_ask_at_once_get_it_once(
    either_database: Engine, clock: Clock, is_known: bool
) -> None:
    if is_known:
        Turns(either_database, clock=clock).take("sweep", every_s=10)
        clock.now += 11
    url = either_database.url.render_as_string(hide_password=False)
    engines = [open_database(url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        given = list(
            pool.map(lambda engine: Turns(engine, clock=clock).take("sweep", every_s=10), engines)
        )
    assert sorted(given) == [False, False, False, True]
    for engine in engines:
        engine.dispose()
