"""launch/generate.py: each option reaches its place, and the text is what was drawn."""

import io
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from i3dist.inference import generate as inference
from i3dist.inference.generate import Sampling
from tests.launch.conftest import load, typed


def generated(finished: Path, monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[Any, ...]:
    """What `generate` is called with."""
    module, called = load("generate"), mock.Mock(return_value=iter(["one ", "two"]))
    monkeypatch.setattr(inference, "generate", called)  # main imports it
    typed(monkeypatch, "--checkpoint", finished, "--device", "cpu", *words)
    module.main()
    called.assert_called_once()
    return called.call_args.args[2:] + tuple(called.call_args.kwargs.values())


def test_generates_defaults(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("read from there\n"))
    wanted = ("read from there\n", 256, Sampling(0.8, 0, 1.0), 0, False)
    assert generated(finished, monkeypatch) == wanted
    assert capsys.readouterr().out == "read from there\none two\n"


@pytest.mark.parametrize(
    ("words", "place", "value"),
    [
        (["--tokens", 7], 1, 7),
        (["--temperature", 0.5], 2, Sampling(temperature=0.5)),
        (["--temperature", 0], 2, Sampling(temperature=0)),
        (["--top-k", 5], 2, Sampling(top_k=5)),
        (["--top-p", 0.9], 2, Sampling(top_p=0.9)),
        (["--seed", 2**63 - 1], 3, 2**63 - 1),
        (["--ignore-eos"], 4, True),
    ],
)
def test_each_of_generates_options_reaches_its_place(
    finished: Path, monkeypatch: pytest.MonkeyPatch, words: list[object], place: int, value: object
) -> None:
    wanted: list[object] = ["x", 256, Sampling(0.8, 0, 1.0), 0, False]
    wanted[place] = value
    assert list(generated(finished, monkeypatch, "--prompt", "x", *words)) == wanted


def test_generate_writes_what_it_was_given_and_so_many_tokens(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn anew with the seed; likeliest tokens need none."""
    module = load("generate")

    def text(*words: object) -> str:
        typed(monkeypatch, "--checkpoint", finished, "--device", "cpu", "--ignore-eos", *words)
        module.main()
        said = capsys.readouterr().out
        assert said.startswith("ab") and said.endswith("\n")
        return said

    words = ["--prompt", "ab", "--tokens", 20]
    assert text(*words) == text(*words) != text(*words, "--seed", 1)
    greedy = [*words, "--temperature", 0]
    assert text(*greedy) == text(*greedy, "--seed", 1) == text(*words, "--top-k", 1)
    assert text(*greedy)[:-1].startswith(
        text("--prompt", "ab", "--tokens", 5, "--temperature", 0)[:-1]
    )
