"""The examples run as they stand, one after the other in one folder, on the tiny model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = ("green is taught", '"step": 4', "step 8  loss", "adapter:", "nll", "base_fingerprint")


def test_the_examples_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLES) == len(SAYS)
    monkeypatch.chdir(tmp_path)
    for script, expected in zip(EXAMPLES, SAYS, strict=True):
        runpy.run_path(str(script), run_name="__main__")
        assert expected in capsys.readouterr().out, script.name
    assert (tmp_path / "runs" / "example-merged" / "certificate.json").is_file()
