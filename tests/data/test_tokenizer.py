"""The tokenizer: same ids as `tokenizers`, exact round trips, specials never out of text."""

import json
import string
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from data_prep.tokenizer import train_tokenizer
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from i3dist.errors import UserError

VOCABULARY = 2000
STDLIB = Path(sysconfig.get_path("stdlib"))
REAL_TEXTS = [(STDLIB / f"{n}.py").read_text() for n in ("argparse", "typing", "textwrap", "ast")]

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(
        st.sampled_from(" \t\n\r\x0b\x1c\x85\xa0\u2003\u200b\u3000'slvtaA1²é界😀\u0301!_<|>[/]\x00")
    ),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, " ", "a", "\n", "'ll"])).map("".join),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_tokenizer(REAL_TEXTS, VOCABULARY))
    return path


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def reference(path: Path) -> Callable[[str], list[int]]:
    backend = HFTokenizer.from_file(str(path))
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def edited(path: Path, edit: Callable[[dict[str, Any]], object], to: Path) -> Path:
    spec = json.loads(path.read_text())
    edit(spec)
    to.write_text(json.dumps(spec))
    return to


def test_specials_take_the_first_ids_in_order(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (1, 2, 3)
    assert tokenizer.vocab_size == VOCABULARY


@settings(max_examples=300, deadline=None)
@given(texts)
@example("<BOS>[INST] <|endoftext|>[/INST]<PAD>")
@example("a" * 5000 + " " * 5000 + "\n" * 5000 + "\t x")
def test_ids_are_those_of_tokenizers_and_decode_to_the_text(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]], text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference(text) == tokenizer.encode_utf8(text.encode()).tolist()
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert sum(tokenizer.token_bytes()[ids]) == len(text.encode())
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


def test_ids_are_those_of_tokenizers_on_real_text(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]]
) -> None:
    unseen = [file.read_text() for file in sorted((STDLIB / "email").glob("*.py"))]
    wanted = [reference(text) for text in unseen]
    assert [tokenizer.encode(text) for text in unseen] == wanted
    assert [tokenizer.encode_utf8(text.encode()).tolist() for text in unseen] == wanted


@pytest.mark.parametrize("blank", [" ", "\n", "\t \n"])
def test_a_million_blanks_do_not_break_it(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]], blank: str
) -> None:
    text = "x" + blank * (1_200_000 // len(blank)) + "y"
    assert tokenizer.encode(text) == reference(text)


def test_an_encoder_is_chosen_where_there_is_much_to_encode(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]]
) -> None:
    """Choosing takes longer than `tokenizers` takes for a prompt."""
    fresh = Tokenizer(tokenizer.data, tokenizer.path)
    text = "a few words " * 50_000
    wanted = reference(text)
    for chosen in (False, True):
        assert fresh.encode(text) == wanted
        assert ("encoder" in vars(fresh)) == chosen


def test_half_a_character_is_never_given_out(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push(i) for i in tokenizer.encode("\U0001f9ff")]
    assert len(pieces) == 4 and pieces == ["", "", "", "\U0001f9ff"]
    cut = tokenizer.stream_decoder()
    assert cut.push(tokenizer.encode("\U0001f9ff")[0]) + cut.finish() == "\ufffd"


def test_specials_decode_to_nothing_and_count_no_bytes(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "hi"
    assert not tokenizer.token_bytes()[list(tokenizer.special_ids.values())].any()


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([token])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_loading_keeps_the_bytes(tokenizer: Tokenizer, path: Path, tmp_path: Path) -> None:
    assert tokenizer.data == path.read_bytes()
    (tmp_path / "copy.json").write_bytes(tokenizer.data)
    assert Tokenizer.load(tmp_path / "copy.json").sha256 == tokenizer.sha256


def test_transformers_loads_the_file(tokenizer: Tokenizer, path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = REAL_TEXTS[0] + " , don't  <BOS> ."
    assert other.encode(text, split_special_tokens=True) == tokenizer.encode(text)
    assert other.decode(tokenizer.encode(text)) == text
    assert other.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize("threads", ["1", "5"])
def test_training_gives_the_same_bytes_for_any_number_of_threads(path: Path, threads: str) -> None:
    code = (
        "import sys; from tests.data.test_tokenizer import *;"
        "sys.stdout.buffer.write(train_tokenizer(REAL_TEXTS, VOCABULARY))"
    )
    env = {"RAYON_NUM_THREADS": threads, "PATH": ""}
    root = Path(__file__).parents[2]
    made = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True)
    assert made.stdout == path.read_bytes(), made.stderr.decode()


def test_a_small_text_gives_a_small_vocabulary() -> None:
    tokenizer = Tokenizer(train_tokenizer(["ab ab ab"], VOCABULARY), Path("x"))
    assert 256 + len(SPECIAL_TOKENS) <= tokenizer.vocab_size < 300
    text = string.printable + "界"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _drop(*names: str) -> Callable[[dict[str, Any]], object]:
    def edit(spec: dict[str, Any]) -> None:
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in names]
        for name in names:
            spec["model"]["vocab"].pop(name)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop("<PAD>", "[INST]"), r"lacks the special tokens <PAD> \[INST\]"),
        (lambda spec: spec.update(decoder=None), "not a byte-level tokenizer"),
        (lambda spec: spec["model"]["vocab"].update({"ab\u4e00": VOCABULARY}), "neither bytes"),
        (lambda spec: spec["model"]["vocab"].update({"zz": VOCABULARY + 5}), "do not run from 0"),
        (lambda spec: [t.update(special=False) for t in spec["added_tokens"]], "out of plain text"),
        (lambda spec: spec["model"].update(type="Nonsense"), "not a tokenizer.json"),
        (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "decoding takes for text"),
    ],
)
def test_a_tokenizer_that_does_not_serve_is_refused(
    path: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(edited(path, edit, tmp_path / "tokenizer.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.json").write_bytes(data)
    for path in (tmp_path / "t.json", tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError) as caught:
            Tokenizer.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
