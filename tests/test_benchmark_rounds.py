"""What the benchmarks that compare sides share: the order of the rounds and the arithmetic of the ratios."""

import pytest

from benchmarks.rounds import Round, alternate, machine, speed_up, spread


def test_the_sides_alternate() -> None:
    called: list[str] = []
    taken = alternate({name: lambda name=name: called.append(name) for name in "ab"}, rounds=3)
    assert called == ["a", "b"] * 3
    assert {name: len(own) for name, own in taken.items()} == {"a": 3, "b": 3}
    assert all(each.wall > 0 for own in taken.values() for each in own)


def test_the_speed_up_is_taken_round_by_round() -> None:
    base = [Round(2.0, 4.0), Round(4.0, 4.0), Round(3.0, 5.0)]
    own = [Round(1.0, 3.0), Round(1.0, 2.0), Round(3.0, 2.0)]
    # 2, 4 and 1 times as fast; the quickest rounds 2 against 1; 4 CPU seconds against 2.
    assert speed_up(base, own) == ["2.00 (1.00 to 4.00)", "2.00", "2.00"]
    assert spread([1000.4, 3000.0, 2000.0], 0) == "2,000 (1,000 to 3,000)"


@pytest.mark.torch_version
def test_the_machine_is_named_with_its_versions() -> None:
    said = machine("cpu")
    assert "threads of" in said
    assert "torch 2." in said
    assert "transformers 5." in said
