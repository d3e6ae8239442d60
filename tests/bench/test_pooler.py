from __future__ import annotations

import json

from bench import pooler


def test_both_poolers_are_timed_at_the_size_that_is_asked_for(tmp_path, monkeypatch, capsys):
    file = tmp_path / "pooler.json"
    flags = {"--attributes": 3, "--width": 16, "--batch": 2, "--tokens": 5, "--rounds": 2, "--json": file}
    monkeypatch.setattr("sys.argv", ["pooler", *(str(word) for flag in flags.items() for word in flag)])
    pooler.main()
    found = json.loads(file.read_text())
    paper, ours = found["poolers"]["attention"], found["poolers"]["attributes"]
    assert paper["parameters"] == 16 + 2 * 16 * 16  # query, key projection, linear map
    assert ours["parameters"] == 3 * 16 + 16 * 16 + 3 * (6 * 16 + 6)  # blocks of 6, 5 and 5, all kept as wide as 6
    assert found["ratio"]["forward_ms"] == ours["forward_ms"] / paper["forward_ms"] > 0
    assert "attributes" in capsys.readouterr().out
