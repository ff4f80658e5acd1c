"""The benchmark of writing: the sides are held against each other, and the table's arithmetic."""

import pytest
import torch

from benchmarks.generate import Generated, check_same, make_sides, table_row


def test_a_row_compares_round_by_round() -> None:
    base = [Generated(2.0, 4.0, 0.1), Generated(4.0, 4.0, 0.1), Generated(3.0, 5.0, 0.1)]
    own = [Generated(1.0, 3.0, 0.2), Generated(1.0, 2.0, 0.2), Generated(3.0, 2.0, 0.4)]
    # 8 x 6 tokens: 48, 48 and 16 a second; 2, 4 and 1 times as fast; quickest 2 against 1; 4 CPU seconds against 2.
    assert table_row("ours", 8, 6, base, own) == [
        "ours", "8", "200", "48.0 (16.0 to 48.0)", "2.00 (1.00 to 4.00)", "2.00", "2.00",
    ]  # fmt: skip


def test_sides_that_differ_are_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    ids = torch.arange(8).view(2, 4)
    sides = make_sides(["stock", "ours", "int8"], "tiny", rows=2, new_tokens=3, static=False)
    check_same(sides, ids)
    out = capsys.readouterr().out
    assert "ours: the same tokens" in out
    assert "int8: logits off by" in out
    with torch.no_grad():
        sides["int8"].model.transformer.ln_f.weight.mul_(-1)  # shared with `ours`, before which both are wrong
    with pytest.raises(SystemExit, match="ours does not generate the tokens of stock"):
        check_same(sides, ids)
    del sides["ours"]
    with pytest.raises(SystemExit, match=r"int8's logits are .* off"):
        check_same(sides, ids)
