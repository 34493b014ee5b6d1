"""Encoders: the ids of `tokenizers` on every text, and no encoder that gives others."""

import json
import random
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.normalizers import NFC

from i3dist.data import encoders, long_texts
from i3dist.data.encoders import Gigatoken
from i3dist.data.long_texts import Encode, Ids, InPieces
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.data.test_tokenizer import REAL_TEXTS, edited, texts
from tests.data.test_tokenizer import path as path  # a fixture

Spec = dict[str, Any]
Edit = Callable[[Spec], object]


def shuffle_ids(spec: Spec) -> None:
    """Give all tokens but the special ones other ids: merge rank and id order disagree."""
    vocab = spec["model"]["vocab"]
    names = [name for name in vocab if name not in SPECIAL_TOKENS]
    ids = [vocab[name] for name in names]
    random.Random(0).shuffle(ids)
    vocab.update(zip(names, ids, strict=True))


def shuffle_merges(spec: Spec) -> None:
    """Let merges come in an order in which no training would find them."""
    random.Random(1).shuffle(spec["model"]["merges"])


def drop_merges(spec: Spec) -> None:
    """Leave tokens that no merge makes."""
    del spec["model"]["merges"][100:110]


def specials_last(spec: Spec) -> None:
    vocab, count = spec["model"]["vocab"], len(SPECIAL_TOKENS)
    size = len(vocab)
    vocab.update({name: (number - count) % size for name, number in vocab.items()})
    for token in spec["added_tokens"]:
        token["id"] = vocab[token["content"]]


def word_is_special(spec: Spec) -> None:
    """Make a special token of a word that texts hold."""
    number = spec["model"]["vocab"]["Ġthe"]
    special = {**spec["added_tokens"][0], "id": number, "content": "Ġthe"}
    spec["added_tokens"].append(special)


def add_plain_token(spec: Spec) -> None:
    size = len(spec["model"]["vocab"])
    plain = {**spec["added_tokens"][0], "id": size, "content": "def f", "special": False}
    spec["added_tokens"].append(plain)


VOCABULARIES: dict[str, Edit] = {
    "as trained": lambda spec: None,
    "shuffled ids": shuffle_ids,
    "shuffled merges": shuffle_merges,
    "special tokens last": specials_last,
    "normalized": lambda spec: spec.update(normalizer={"type": "NFC"}),
}
OTHERS: dict[str, Edit] = {
    "dropped merges": drop_merges,
    "a special word": word_is_special,
    "an added token": add_plain_token,
    "ignored merges": lambda spec: spec["model"].update(ignore_merges=True),
    "lower case": lambda spec: spec.update(normalizer={"type": "Lowercase"}),
    "prefix space": lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
    "no pattern": lambda spec: spec["pre_tokenizer"].update(use_regex=False),
    "another pattern": lambda spec: spec.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, spec["pre_tokenizer"]],
        }
    ),
}

_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SLASHED = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
SPLITS = {
    "Llama 3": rf"{_SHORT}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "Qwen2": rf"{_SHORT}|{_FIRST}\p{{L}}+|\p{{N}}|{_REST}",
    "Qwen3.5": rf"{_SHORT}|{_FIRST}[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s+",
    "o200k": rf"{_FIRST}{_UPPER}*{_LOWER}+{_SHORT}?|{_FIRST}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHED}",
    "Tekken": rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"|{_SLASHED}",
}


def split_by(name: str) -> Edit:
    """Split as tokenizers of the ecosystem do: Llama 3 ignores merges, Qwen2 normalizes."""

    def edit(spec: Spec) -> None:
        split: Spec = {"type": "Split", "pattern": {"Regex": SPLITS[name]}}
        inverted = name == "o200k"
        split |= {"behavior": "Removed" if inverted else "Isolated", "invert": inverted}
        parts = [split, {**spec["pre_tokenizer"], "use_regex": False}]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        spec["model"]["ignore_merges"] = name == "Llama 3"
        for pair in (["Â", "ª"], ["Âª", "B"]):  # ª is a letter without case
            spec["model"]["vocab"].setdefault("".join(pair), len(spec["model"]["vocab"]))
            spec["model"]["merges"].append(pair)
        spec["normalizer"] = {"type": "NFC"} if name == "Qwen2" else None

    return edit


ECOSYSTEM: dict[str, Edit] = {name: split_by(name) for name in SPLITS}
KINDS = VOCABULARIES | ECOSYSTEM | OTHERS


class Pair:
    """A tokenizer and the ids that `tokenizers` makes with the same file."""

    def __init__(self, file: Path) -> None:
        self.tokenizer = Tokenizer.load(file)
        self.tokenizer.encoder  # noqa: B018  # chosen before a test makes pieces short
        self._backend = HFTokenizer.from_file(str(file))
        self._backend.encode_special_tokens = True

    def reference(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def check(self, text: str) -> None:
        # Not `==`: pytest would explain the difference of two lists of a million ids.
        found = self.tokenizer.encode_utf8(text.encode())
        assert np.array_equal(found, self.reference(text)), ascii(text[:80])


@pytest.fixture(scope="module")
def pairs(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("vocabularies")
    kinds = enumerate(KINDS.items())
    return {name: Pair(edited(path, edit, folder / f"{n}.json")) for n, (name, edit) in kinds}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_gigatoken_encodes_with_every_vocabulary_of_gpt2s_kind(
    pairs: dict[str, Pair], kind: str
) -> None:
    assert pairs[kind].tokenizer.encoder.name == "gigatoken"
    assert not pairs[kind].tokenizer.encoder.rejected


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizers_with_every_vocabulary(
    pairs: dict[str, Pair], kind: str
) -> None:
    pair = pairs[kind]
    mixed = " ".join(REAL_TEXTS)[:200_000]
    numbers = " ".join("0" * count for count in range(1, 12))
    for text in (*REAL_TEXTS, numbers, mixed.swapcase(), mixed[::-1], mixed.replace("e", "é世")):
        pair.check(text)


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(max_examples=150, deadline=None)
@given(texts)
@example("<BOS>[INST] <|endoftext|>[/INST]<PAD>")
@example("".join(map(chr, range(0x180))))
@example("\x00\x01\x1c\x1f \x85\xa0 \u2028\u200b\ufeff\r\n \n")
@example("Привет мир こんにちは 世界 مرحبا שלום नमस्ते 👩\u200d👩\u200d👧 e\u0301\u0301x" * 9)
def test_ids_are_those_of_tokenizers_on_any_text(
    pairs: dict[str, Pair], kind: str, text: str
) -> None:
    pairs[kind].check(text)


@pytest.mark.parametrize("kind", ["as trained", "normalized"])
@pytest.mark.parametrize("plane", range(17))
def test_every_character_is_split_alike(pairs: dict[str, Pair], plane: int, kind: str) -> None:
    codes = range(plane << 16, (plane + 1) << 16)
    if plane > 3 and plane != 14:  # not assigned or for private use: all are of one class
        codes = codes[::16]
    characters = [chr(code) for code in codes if not 0xD800 <= code < 0xE000]
    pairs[kind].check("".join(f"a{one}1{one} {one}{one}\u0301\n" for one in characters))


@pytest.mark.parametrize(
    "kind", ["abcdefghij", "a", "0123456789", " ", "\n", "!?", "é", "世", "😀"]
)
def test_a_word_of_megabytes_takes_about_linear_time(pairs: dict[str, Pair], kind: str) -> None:
    pair = pairs["as trained"]
    seconds = []
    for size in (250_000, 1_000_000):
        text = "x" + "".join(random.Random(size).choices(kind, k=size // len(kind[0].encode())))
        start = time.process_time()
        ids = pair.tokenizer.encode_utf8(text.encode())
        seconds.append(time.process_time() - start)
        assert np.array_equal(ids, pair.reference(text))
    assert seconds[1] < 8 * seconds[0] + 0.5  # with the square of the length: 16


def wrong(change: Callable[[bytes, np.ndarray], np.ndarray]) -> Callable[[Spec], object]:
    """A maker of encoders whose ids `change` has spoiled."""

    def make(spec: Spec) -> Callable[[bytes], np.ndarray]:
        right = Gigatoken(spec)
        return lambda text: change(text, right(text).copy())

    return make


def one_id(text: bytes, ids: np.ndarray) -> np.ndarray:
    """Mistake one token for its neighbor in the vocabulary."""
    return np.where(ids == 1234, 1235, ids)


def no_long_words(text: bytes, ids: np.ndarray) -> np.ndarray:
    return ids[:-1] if max(map(len, text.split()), default=0) > 3000 else ids


def a_special(text: bytes, ids: np.ndarray) -> np.ndarray:
    return ids[:1] if b"[/INST]" in text else ids


def panic(spec: Spec) -> object:
    raise BaseException("index\nout of bounds")


def not_installed(spec: Spec) -> object:
    raise ModuleNotFoundError("no such library")


class KnowsSpecials(Gigatoken):
    """gigatoken as it comes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._json = json.dumps(spec)
        self._encode, _ = self._build()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (wrong(one_id), "it gives other ids for a text that begins with"),
        (wrong(no_long_words), "it gives other ids for a text that begins with 'xab"),
        (wrong(a_special), "it gives other ids"),
        (KnowsSpecials, "it gives other ids for a text that begins with '<UNK>'"),
        (panic, "index out of bounds"),
        (not_installed, "it is not installed"),
    ],
)
def test_an_encoder_that_does_not_serve_is_passed_over_and_named(
    path: Path, monkeypatch: pytest.MonkeyPatch, make: object, reason: str
) -> None:
    monkeypatch.setattr(encoders, "ENCODERS", {"first": make, "gigatoken": Gigatoken})
    pair = Pair(path)
    assert pair.tokenizer.encoder.name == "gigatoken"
    assert list(pair.tokenizer.encoder.rejected) == ["first"]
    said = str(pair.tokenizer.encoder)
    assert said.startswith("encoding with gigatoken 0.") and "\n" not in said
    assert f"; first is not used: {reason}" in said
    monkeypatch.setattr(encoders, "ENCODERS", {"first": make})
    alone = Pair(path)
    assert alone.tokenizer.encoder.name == "tokenizers"
    alone.check(REAL_TEXTS[0] + "<BOS>")


def test_without_gigatoken_tokenizers_encodes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    pair = Pair(path)
    assert str(pair.tokenizer.encoder).endswith("; gigatoken is not used: it is not installed")
    pair.check(REAL_TEXTS[1])


@settings(max_examples=300, deadline=None)
@given(
    st.integers(500, 520), st.text("ae1 \u0301\u0327\u0344가\u11a8é\u212b\n巴\uf951視", max_size=30)
)
def test_text_is_normalized_in_pieces_as_in_one(
    pairs: dict[str, Pair], before: int, text: str
) -> None:
    """Pieces are of 512 bytes and what follows them up to ASCII or a Chinese character."""
    pairs["normalized"].check(f"{'x' * before}{text}{'y' * 600}")
    pairs["normalized"].check(f"{'x' * before}{text}{'視' * 200}{text}")


def test_no_chinese_character_is_composed_with_what_is_before_it() -> None:
    """As `_PIECE` assumes, by this Python's Unicode and that of `tokenizers`."""
    composed = {unicodedata.normalize("NFD", chr(code))[1:] for code in range(0x110000)}
    assert not {chr(code) for code in range(0x5000, 0x9000)} & set("".join(composed))
    for code in range(0x5000, 0x9000):
        assert NFC().normalize_str(f"e{chr(code)}\u0301") == f"e{chr(code)}\u0301"


LONG_WORDS = ("abcdef", "a", "aab", "selfreturn", "07", "!?-", "é", "世界", "😀", "Ⅷ²a", "{':,1a}")
BETWEEN = ("'", "'s", "'ll", "'ll\u0301", " ", "\n", " \t\n", "\u3000 ", "the end", "\n\n<>")
long_words = st.lists(
    st.tuples(
        st.sampled_from(LONG_WORDS + BETWEEN),
        st.sampled_from([1, 2, 5, 40, 300]),
        st.randoms(use_true_random=False),
    ),
    max_size=6,
).map(lambda runs: "".join("".join(rng.choices(kind, k=count)) for kind, count, rng in runs))

edges = st.text("aB世界、。'sL ²9/.\u0301\n\t\x1c\x85", min_size=1, max_size=12).map(
    lambda text: text * 40
)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of about 100 bytes, so that texts of hundreds are long."""
    monkeypatch.setattr(long_texts, "PIECE_BYTES", 100)
    monkeypatch.setattr(long_texts, "WINDOW_BYTES", 64)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("kind", VOCABULARIES | ECOSYSTEM)
@settings(max_examples=150, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.one_of(long_words, texts.map(lambda text: text * 50), edges))
@example(f"a{'ª' * 200}Bb {'9' * 400}a{'B' * 200}b世" * 4)
@example("x'self" * 90)
@example("".join(f"{before}'LL\u0301s\t9²、" for before in "aB世9! ") * 9)
@example("a b\u3000  c\u2028 \n d\xa0  \n e\u1680  f    g\n\n h" * 30)
def test_a_text_in_pieces_has_the_ids_of_the_whole(
    pairs: dict[str, Pair], kind: str, text: str
) -> None:
    pairs[kind].check(text)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("as trained", kind) for kind in ("abcdefghij", "a", "0123", " ", "\n", "!?", "é", "世")),
        *((name, "abcdefghij") for name in SPLITS),
        *(
            (name, kind)
            for name in ("Llama 3", "Qwen2", "Qwen3.5", "cl100k")
            for kind in ("B", "世")
        ),
        *((name, "0123") for name in ("Qwen2", "Qwen3.5", "Tekken")),
        *(
            (name, kind)
            for name in SPLITS
            for kind in ("9a", "/世 ", "a\n", "A+9", "世界、", "。é ")
        ),
    ],
)
def test_a_text_comes_in_small_pieces(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    pair, sizes = pairs[name], []
    in_pieces = pair.tokenizer.encoder.encode
    if isinstance(in_pieces, encoders.Normalizing):
        in_pieces = in_pieces._encode
    assert isinstance(in_pieces, InPieces)

    def encode(text: bytes, then: Encode = in_pieces.encode) -> Ids:
        sizes.append(len(text))
        return then(text)

    monkeypatch.setattr(in_pieces, "encode", encode)
    pair.check("x" + "".join(random.Random(0).choices(kind, k=3000)))
    assert max(sizes) < 300


@pytest.mark.usefixtures("short_pieces")
def test_where_a_cut_would_change_ids_the_word_stays_whole(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces = pairs["as trained"].tokenizer.encoder.encode
    assert isinstance(in_pieces, InPieces)

    def encode(text: bytes) -> Ids:
        """Ids that a word's end decides."""
        return np.frombuffer(text, np.uint8).astype(np.uint16) + text[-1]

    monkeypatch.setattr(in_pieces, "encode", encode)
    text = bytes(random.Random(0).choices(b"abcdefghij", k=3000))
    assert np.array_equal(in_pieces(text), encode(text))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("kind", ["as trained", "prefix space"])
def test_a_long_text_and_a_new_encoder_change_no_id(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(encoders, "_BYTES_BETWEEN_LOOKS", 5000)
    monkeypatch.setattr(encoders, "_CACHE_BYTES", -(1 << 40))
    pair = Pair(edited(path, (VOCABULARIES | OTHERS)[kind], tmp_path / "t.json"))
    assert pair.tokenizer.encoder.name == "gigatoken"
    built = []

    def build(self: Gigatoken, then: Callable[[Gigatoken], Any] = Gigatoken._build) -> Any:
        built.append(self)
        return then(self)

    monkeypatch.setattr(Gigatoken, "_build", build)
    for text in REAL_TEXTS:
        pair.check(text)
    assert len(built) >= 4


def test_the_memory_of_words_that_were_seen_is_bounded(pairs: dict[str, Pair]) -> None:
    """100 MB of words that never come again would take 700 MB."""
    in_pieces = pairs["as trained"].tokenizer.encoder.encode
    assert isinstance(in_pieces, InPieces)
    gigatoken = in_pieces.encode
    assert isinstance(gigatoken, Gigatoken)
    rng = np.random.default_rng(0)
    before = gigatoken._process.memory_info().rss
    peak = 0
    for _ in range(50):
        letters = rng.integers(97, 123, size=2_000_000, dtype=np.uint8)
        letters[np.cumsum(rng.integers(4, 12, size=160_000))] = 32
        gigatoken(letters.tobytes())
        peak = max(peak, gigatoken._process.memory_info().rss - before)
    assert peak < 400_000_000
