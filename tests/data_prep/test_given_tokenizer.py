"""Tokenizers of other projects: their ids stay, and special tokens that they lack are added."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as HFTokenizer

from data_prep.given_tokenizer import changed_text, completed, given_tokenizer, typed_tokenizer
from data_prep.tokenizer import train_tokenizer
from data_prep.verify import main as verify
from i3dist.data.manifest import Manifest
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from i3dist.errors import UserError
from tests.conftest import ROOT
from tests.data_prep.corpus import arguments, build, read_documents
from tests.hub_server import DATASET, hub

TEXT = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
HARD = f"{TEXT[:2000]} don't 12345 é界😀\n\n\t <BOS><|endoftext|> <|begin_of_text|>[INST] \u0301"
# The pattern that Llama 3 splits text by.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(model: models.BPE, splitter: pre_tokenizers.PreTokenizer) -> HFTokenizer:
    tokenizer = HFTokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def gpt2() -> HFTokenizer:
    """As GPT-2's: one special token, behind all others."""
    tokenizer = trained(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=True)])
    return tokenizer


def llama3() -> HFTokenizer:
    """As Llama 3's: its own pattern, and tokens that it puts around every text."""
    parts = [
        pre_tokenizers.Split(Regex(LLAMA), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = trained(models.BPE(ignore_merges=True), pre_tokenizers.Sequence(parts))  # type: ignore[arg-type]
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    around = ("<|begin_of_text|>", "<|eot_id|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A <|eot_id|>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
    )
    return tokenizer


KINDS: dict[str, Callable[[], HFTokenizer]] = {"gpt2": gpt2, "llama3": llama3}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_stay_and_special_tokens_come_behind(tmp_path: Path, kind: str) -> None:
    theirs = KINDS[kind]()
    path = tmp_path / "tokenizer.json"
    theirs.save(str(path))
    ours, added = given_tokenizer(path)
    size = theirs.get_vocab_size(with_added_tokens=True)
    assert set(added) == set(SPECIAL_TOKENS) - set(theirs.get_vocab())
    assert [ours.special_ids[token] for token in added] == list(range(size, size + len(added)))
    assert ours.vocab_size == size + len(added)
    theirs.encode_special_tokens = True
    assert ours.encode(HARD) == theirs.encode(HARD, add_special_tokens=False).ids
    assert ours.decode(ours.encode(HARD)) == HARD
    assert not set(ours.encode(HARD)) & set(ours.special_ids.values())
    read = HFTokenizer.from_str(ours.data.decode())
    assert {token: read.token_to_id(token) for token in SPECIAL_TOKENS} == ours.special_ids
    written = {token["content"]: token["id"] for token in json.loads(ours.data)["added_tokens"]}
    assert ours.special_ids.items() <= written.items()
    assert completed(ours.data) == (ours.data, ())
    assert changed_text(ours) is None


@pytest.mark.parametrize("normalizer", ["NFC", "NFKC", "Lowercase", "StripAccents", "Strip"])
def test_one_that_changes_text_is_noticed(normalizer: str) -> None:
    theirs = gpt2()
    theirs.normalizer = getattr(normalizers, normalizer)()
    ours = Tokenizer(completed(theirs.to_str().encode())[0], Path("x"))
    changed = changed_text(ours)
    assert changed and changed[1] == ours.decode(ours.encode(changed[0])) != changed[0]


@pytest.mark.parametrize("kind", KINDS)
def test_data_are_made_with_it(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    lines = "".join(json.dumps({"text": f"{HARD} {number}"}) + "\n" for number in range(9))
    (tmp_path / "a.jsonl").write_text(lines)
    for _ in range(2):
        build(tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", tmp_path)
    said = capsys.readouterr().out
    assert "added to" in said and "<PAD> <BOS> <EOS>" in said and "already complete" in said
    ours = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    manifest = Manifest.load(tmp_path / "out" / "train")
    assert manifest.vocab_size == ours.vocab_size and manifest.bos_id == ours.bos_id
    texts = {text for *_, text in read_documents(tmp_path / "out" / "train", ours)}
    assert texts <= {f"{HARD} {number}" for number in range(9)} and len(texts) > 3
    verify([str(tmp_path / "out")])
    settings = tmp_path / "out" / "shard.json"
    settings.write_text(
        settings.read_text().replace(f"sha256 {ours.sha256[:8]}", "sha256 01234567")
    )
    with pytest.raises(UserError, match="2 damages"):
        verify([str(tmp_path / "out")])
    assert "key tokenizer_sha256: says" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["text", "chat"])
def test_a_text_of_which_a_tokenizer_leaves_nothing_is_skipped(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = gpt2()
    theirs.normalizer = normalizers.Replace("\u200b", "")
    theirs.save(str(tmp_path / "tokenizer.json"))
    texts = [*(f"number {number}" for number in range(40)), "\u200b", "\u200b\u200b"]

    def line(text: str) -> dict[str, object]:
        turns = [("user", text), ("assistant", "yes")]
        messages = [{"role": role, "content": content} for role, content in turns]
        return {"text": text, "messages": messages}

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line(text)) + "\n" for text in texts))
    out = tmp_path / "out"
    build(tmp_path / "a.jsonl", out, "--tokenizer", tmp_path, "--format", form)
    reason = "empty" if form == "text" else "empty message"
    assert f"skipped documents: 2 {reason}" in " ".join(capsys.readouterr().out.split())
    manifests = [Manifest.load(out / split) for split in ("train", "valid")]
    assert sum(manifest.documents for manifest in manifests) == 40
    verify([str(out)])


def test_a_whole_tokenizer_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(train_tokenizer([TEXT], 400))))
    tokenizer, added = given_tokenizer(path)
    assert tokenizer.data == path.read_bytes() and not added


def _ordinary(spec: dict[str, Any]) -> None:
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<PAD>", "special": False})
    spec["added_tokens"][-1]["id"] = spec["added_tokens"][0]["id"] + 1


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_ordinary, r"special ids out of plain text \(<PAD>\)"),
        (lambda spec: spec.update(decoder=None), "not a byte-level tokenizer"),
        (
            lambda spec: spec["model"]["vocab"].pop("!"),
            "lacks some of the 256|not a tokenizer.json",
        ),
        (lambda spec: spec["model"]["vocab"].update(zz=5000), "its ids do not run from 0"),
        (lambda spec: spec.update(model=None), "is not a tokenizer.json"),
        (lambda spec: spec.update(added_tokens=[1]), "is not a tokenizer.json"),
        (lambda spec: spec["model"].update(dropout=0.1), "dropout 0.1, so a text has other ids"),
    ],
)
def test_one_that_does_not_serve_is_one_line(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    spec = json.loads(gpt2().to_str())
    edit(spec)
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=says) as error:
        given_tokenizer(tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_a_name_is_one_of_the_hub_where_there_is_no_such_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "folder").touch()
    for name in ("openai-community/gpt2", "owner/name@v1", "hf://some/folder"):
        assert typed_tokenizer(name) == name
    for name in ("some/folder", "t.json", "a/t.json", "./a/b", "a/b/c", "/a/b", "gpt2", "../b"):
        assert typed_tokenizer(name) == Path(name)


@pytest.mark.parametrize("name", [DATASET, f"hf://{DATASET}", f"{DATASET}@main", "owner/none"])
def test_a_tokenizer_of_the_hub_is_fetched(tmp_path: Path, name: str) -> None:
    (tmp_path / "served").mkdir()
    gpt2().save(str(tmp_path / "served" / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(HARD)
    code = (
        "import sys\nfrom data_prep import shard\n"
        "from i3dist.cli.program import one_line_errors\n"
        "with one_line_errors(): shard.main(sys.argv[1:])"
    )
    words = arguments(tmp_path / "a.txt", tmp_path / "out", "--tokenizer", name)
    words += ["--valid-fraction", "0"]
    with hub(tmp_path / "served") as server:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=ROOT,
            env=os.environ | server.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    if name == "owner/none":
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "there is no such file, and from the hub it cannot be had" in done.stderr
    else:
        made = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
        assert made.data == completed(gpt2().to_str(pretty=True).encode())[0]
