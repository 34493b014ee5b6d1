"""lm-evaluation-harness on an export: local tasks whose answers i3dist knows. About 15 s."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError
from i3dist.export.harness import _harness_model, run_tasks
from i3dist.inference.generate import Sampling, generate
from tests.conftest import error_line, program
from tests.export.conftest import BOS, WORDS, Exported
from tests.export.test_logits import trained

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}}}]
"""
GENERATING = "generation_kwargs: {until: [], max_gen_toks: 20, do_sample: false}\n"
CHOOSING = "doc_to_choice: ['cat', 'dog', ' hat']\n"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No task comes from the hub, and nothing stays in the user's cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def tokenizer(one: Exported) -> Tokenizer:
    return Tokenizer.load(one.folder / "tokenizer.json")


def score(one: Exported, ids: list[int], answer: int) -> float:
    """Log-likelihood of the last `answer` tokens, by i3dist's training forward."""
    found = trained(one.model, torch.tensor(ids)).log_softmax(-1)[:-1]
    each = found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float(each[-answer:].sum())


def add_task(folder: Path, name: str, kind: str, metric: str, docs: list[Any], more: str) -> None:
    """Write a task and its examples."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    text = TASK.format(name=name, file=file, kind=kind, metric=metric) + more
    (folder / f"{name}.yaml").write_text(text)


def test_tasks_find_what_i3dist_finds(one: Exported, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Contexts of more than all history: choices, generated text, and the likelihood of texts."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    texts = [WORDS[n:] * 3 + "the " * n for n in (0, 3, 40)]
    reach = one.model.settings.chunk_length * (one.model.settings.history_chunks + 1)
    assert min(len(tokenizer.encode(text)) for text in texts) > reach
    chosen, continued, nats, size = [], [], 0.0, 0
    for n, text in enumerate(texts):
        prompt = [BOS, *tokenizer.encode(text)]
        scores = [
            score(one, [BOS, *tokenizer.encode(text + word)], len(tokenizer.encode(word)))
            for word in ("cat", "dog", " hat")
        ]
        # The first is answered wrongly, so that a harness that is always right is not enough.
        best = max(range(3), key=scores.__getitem__)
        chosen.append({"text": text, "answer": (best + 1) % 3 if n == 0 else best})
        said = generate(one.model, tokenizer, text, 20, Sampling(temperature=0), 0)
        continued.append({"text": text, "answer": "".join(said)})
        nats -= score(one, prompt, len(prompt) - 1)
        size += len(text.encode())
    add_task(tmp_path, "choose", "multiple_choice", "acc", chosen, CHOOSING)
    add_task(tmp_path, "continue", "generate_until", "exact_match", continued, GENERATING)
    whole = [{"text": "", "answer": text} for text in texts]
    add_task(tmp_path, "likelihood", "loglikelihood_rolling", "byte_perplexity", whole, "")
    words = ["--checkpoint", one.folder, "--task-folder", tmp_path, "--batch-size", 2]
    words += ["--json", tmp_path / "found.json", "--device", "cpu"]
    result = program("launch/evaluate.py", "--tasks", "choose,continue,likelihood", *words)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["choose"]["acc,none"] == pytest.approx(2 / 3)
    assert found["continue"]["exact_match,none"] == 1.0
    bytewise = torch.tensor(nats / size).exp().item()
    assert found["likelihood"]["byte_perplexity,none"] == pytest.approx(bytewise, rel=1e-5)
    assert "|choose" in result.stdout


def test_probabilities_of_a_model_in_bf16_are_computed_in_fp32(one: Exported) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance

    harness = _harness_model(one.folder, torch.device("cpu"), 1, one.folder)
    harness.model.bfloat16()
    request = Instance("loglikelihood_rolling", {}, (WORDS,), 0)
    (found,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    ids = torch.tensor([[BOS, *harness.tok_encode(WORDS, add_special_tokens=False)]])
    with torch.no_grad():
        scores = harness.model(ids).logits[0, :-1].float().log_softmax(-1)
    assert found == pytest.approx(float(scores.gather(1, ids[0, 1:, None]).sum()), rel=1e-6)


def test_an_unknown_task_is_one_line(one: Exported) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    result = program("launch/evaluate.py", "--checkpoint", one.folder, "--tasks", "no-such")
    assert "--tasks no-such" in error_line(result)


def test_a_task_that_cannot_be_loaded_is_one_line(one: Exported, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    task = {"task": "wrong", "output_type": "nonsense", "dataset_path": "json", "test_split": "a"}
    (tmp_path / "wrong.yaml").write_text(json.dumps(task))
    with pytest.raises(UserError, match=r"--tasks wrong: .* cannot load them: .*nonsense"):
        run_tasks(one.folder, ["wrong"], torch.device("cpu"), folder=tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", {"joined": "x"}, "config.json: joined='x' should be from 0 to 1"),
        ("model.safetensors", None, "lm-evaluation-harness cannot load the model: "),
        ("tokenizer.json", None, "lm-evaluation-harness cannot load the model: "),
    ],
)
def test_an_export_that_is_broken_is_one_line(
    one: Exported, tmp_path: Path, file: str, content: dict[str, Any] | None, says: str
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    broken = shutil.copytree(one.folder, tmp_path / "broken")
    former = (broken / file).read_bytes()
    change = former[:50] if content is None else json.dumps(json.loads(former) | content).encode()
    (broken / file).write_bytes(change)
    add_task(tmp_path, "a", "multiple_choice", "acc", [{"text": "a", "answer": 0}], CHOOSING)
    with pytest.raises(UserError, match=says):
        run_tasks(broken, ["a"], torch.device("cpu"), folder=tmp_path)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), ImportError("no such")])
def test_what_is_no_fault_of_the_model_is_not_said_to_be_one(
    one: Exported, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="it is not installed")
    monkeypatch.setattr(huggingface.HFLM, "__init__", Mock(side_effect=error))
    with pytest.raises(type(error), match=str(error)):
        _harness_model(one.folder, torch.device("cpu"), 1, one.folder)


def test_the_message_names_the_model_that_the_user_typed(
    one: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the export that was made of it and is removed afterwards."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="it is not installed")
    monkeypatch.setattr(huggingface.HFLM, "__init__", Mock(side_effect=ValueError("wrong")))
    with pytest.raises(UserError, match=r"^RUN: .*: wrong; restore it$"):
        _harness_model(one.folder, torch.device("cpu"), 1, Path("RUN"))


def test_tasks_from_a_folder_that_is_not_there_are_one_line(one: Exported, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder: name one with tasks"):
        run_tasks(one.folder, ["choose"], torch.device("cpu"), folder=tmp_path / "no-such")


def test_without_the_harness_one_line_says_how_to_get_it(
    one: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'i3dist\[eval\]'"):
        run_tasks(one.folder, ["choose"], torch.device("cpu"))
