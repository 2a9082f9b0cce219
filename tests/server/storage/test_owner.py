"""A store of pictures belongs to one database, which what deletes by age looks at first."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import Engine

from redux_server.database.migration import open_database
from redux_server.storage.blobs import MARKER, Blobs, StorageError
from redux_server.storage.owner import StoreOwner, database_id, marked_as


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "blobs")


def owner(blobs: Blobs, own_id: str, *known: str) -> StoreOwner:
    def knows_any(ids: Sequence[str]) -> bool:
        assert len(ids) <= 500
        return bool(set(ids) & set(known))

    return StoreOwner(blobs, own_id, knows_any=knows_any, where="the blobs")


def test_a_database_has_one_id_and_another_one_another(database: Engine, tmp_path: Path) -> None:
    other = open_database(f"sqlite:///{tmp_path / 'other.db'}")
    first = database_id(database)
    assert len(first) == 32
    assert database_id(database) == first
    assert database_id(other) != first
    other.dispose()


def test_an_empty_store_belongs_to_who_looks_first(blobs: Blobs) -> None:
    first, second = owner(blobs, "a" * 32), owner(blobs, "b" * 32)
    assert first.look(list)
    assert marked_as(blobs) == "a" * 32
    assert not second.look(list)
    assert (first.is_foreign, second.is_foreign) == (False, True)
    assert first.look(lambda: pytest.fail("is marked: nothing else needs to be looked at"))


def test_a_store_from_before_belongs_to_the_database_that_knows_its_tasks(blobs: Blobs) -> None:
    tasks = [f"{number:032x}" for number in range(1200)]
    assert not owner(blobs, "a" * 32).look(lambda: tasks)  # none of them
    assert marked_as(blobs) is None
    assert owner(blobs, "b" * 32, tasks[1100]).look(lambda: tasks)
    assert marked_as(blobs) == "b" * 32


def test_a_store_can_be_given_to_another_database(blobs: Blobs) -> None:
    second = owner(blobs, "b" * 32)
    assert owner(blobs, "a" * 32).look(list)
    assert not second.look(list)
    blobs.put(MARKER, b"b" * 32 + b"\n")  # as an editor leaves it
    assert second.look(list)
    assert not second.is_foreign


def test_a_full_store_is_ours_though_it_cannot_be_marked(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("No space left")

    monkeypatch.setattr(blobs, "create", full)
    assert owner(blobs, "a" * 32).look(list)  # what is deleted then makes room


def test_a_store_that_is_away_is_nobodys(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path / "blobs")
    (tmp_path / "blobs").rmdir()
    with pytest.raises(StorageError, match="away"):
        owner(blobs, "a" * 32).look(list)
