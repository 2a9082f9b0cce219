"""Ten times more than a server can do, for seconds (`make chaos ARGS=overload`: a minute)."""

from pathlib import Path

from chaos.overload import overload


def test_an_overloaded_server_keeps_its_bound_and_refuses_politely(tmp_path: Path) -> None:
    found = overload(tmp_path, seconds=5.0)
    assert found["most_open"] <= found["max_queue"]
    assert set(found["answers"]) == {"200", "429"}, "neither errors nor silence"
    assert found["refused_without_retry_after"] == 0
    assert min(found["done_by_key"].values()) > 0, "one key starved"
