"""Fine-tuning the export: loss, gradients, Trainer, save_pretrained. About 8 s."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from i3dist.model.lm import I3LM
from tests.conftest import ROOT
from tests.export.conftest import BOS, Exported, documents, padded
from tests.export.test_logits import TOLERANCE, far
from tests.model.streams import depth_of, empty


def training_loss(model: I3LM, tokens: Tensor, labels: Tensor) -> Tensor:
    """i3dist's mean loss of a stream in whole chunks [n], labels [n] as transformers has them."""
    length = model.settings.chunk_length
    chunks = tokens.view(1, -1, length)
    targets = torch.cat([labels[1:], labels.new_tensor([-100])]).view_as(chunks)
    losses, _ = model(chunks, targets, depth_of(chunks), empty(model), torch.tensor(1.0))
    return losses.sum() / (targets != -100).sum()


def test_loss_and_gradients_are_those_of_training(each: Exported) -> None:
    """With the labels that i3dist trains on: <BOS> is not predicted."""
    hf, model = each.load(), each.model
    tokens = documents(1, 12 * 7, 30)
    labels = tokens.masked_fill(tokens == BOS, -100)
    names = [name for name, _ in model.named_parameters()]
    wanted = training_loss(model, tokens, labels)
    found = hf(tokens[None], labels=labels[None]).loss
    assert far(found, wanted) < TOLERANCE
    pairs = zip(
        torch.autograd.grad(found, [hf.get_parameter(name) for name in names]),
        torch.autograd.grad(wanted, list(model.parameters())),
        names,
        strict=True,
    )
    for ours, theirs, name in pairs:
        assert theirs.abs().max() > 0, name
        assert far(ours, theirs) < 1e-3 * theirs.abs().max(), name


class Adapted(nn.Module):
    """A Linear with an adapter of low rank, which has nothing of a Linear but its call."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.down.mT) @ self.up.mT


def adapt(hf: nn.Module, names: Iterable[str]) -> dict[str, Adapted]:
    """Put adapters on Linears."""
    torch.manual_seed(3)
    adapters = {}
    for name in names:
        folder, _, last = name.rpartition(".")
        adapters[name] = Adapted(cast(nn.Linear, hf.get_submodule(name)))
        hf.get_submodule(folder)._modules[last] = adapters[name]
    return adapters


def test_adapters_do_what_the_same_change_of_the_weights_does(each: Exported) -> None:
    """In logits and in gradients, on every Linear but the router, of history too."""
    hf, merged = each.load(), each.load()
    names = [name for name, part in hf.named_modules() if isinstance(part, nn.Linear)]
    adapters = adapt(hf, [name for name in names if name != "compressor.salience"])
    for name, adapter in adapters.items():
        merged.get_submodule(name).weight.data += (adapter.up @ adapter.down).detach()
    tokens = documents(1, 12 * 7, 30)[None]
    ours, theirs = hf(tokens, labels=tokens), merged(tokens, labels=tokens)
    assert far(ours.logits.detach(), theirs.logits.detach()) < TOLERANCE
    ours.loss.backward()
    theirs.loss.backward()
    for name, adapter in adapters.items():
        wanted = merged.get_submodule(name).weight.grad @ adapter.down.mT
        assert far(adapter.up.grad, wanted) < 1e-3 * wanted.abs().max(), name


def test_an_adapter_on_the_router_is_not_read(one: Exported) -> None:
    hf, tokens = one.load(), documents(1, 50, 100)[None]
    before = hf(tokens).logits
    router = hf.compressor.salience
    hf.compressor.salience = Adapted(router)
    hf.compressor.salience.weight = router.weight  # as peft's have
    assert hf(tokens).logits.equal(before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_loss(hf: Any, side: str) -> None:
    rows = [documents(s, n, 300) for s, n in ((1, 40), (2, 21))]
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    found = hf(ids, attention_mask=mask, labels=labels).loss
    sums = [hf(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    assert far(found, sum(sums) / 59) < TOLERANCE


def test_the_trainers_number_of_targets_divides_the_loss(hf: Any) -> None:
    tokens = documents(1, 40, 300)[None]
    mean = hf(tokens, labels=tokens).loss
    summed = hf(tokens, labels=tokens, num_items_in_batch=torch.tensor(100)).loss
    assert far(summed, mean * 39 / 100) < TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(one: Exported, reentrant: bool) -> None:
    hf, tokens = one.load().train(), documents(1, 50, 100)[None]
    found = []
    for on in (False, True):
        if on:
            hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
        hf.zero_grad()
        hf(tokens, labels=tokens).loss.backward()
        found.append([p.grad.clone() for p in hf.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        assert far(plain, checkpointed) < TOLERANCE


def test_autocast_trains_in_bf16_with_parameters_in_fp32(each: Exported) -> None:
    hf, tokens = each.load(), documents(1, 60, 100)[None]
    exact = hf(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = hf(tokens, labels=tokens).loss
    loss.backward()
    assert far(loss, exact) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in hf.parameters())


def example(heading: str) -> str:
    """The first Python example of docs/transformers.md under a heading."""
    text = (ROOT / "docs" / "transformers.md").read_text()
    return text.split(f"## {heading}")[1].split("```python")[1].split("```")[0]


def test_the_documents_example_fine_tunes_with_trainer(
    one: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "mine").symlink_to(one.folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example("Fine-tune"), names)
    losses = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    again = AutoModelForCausalLM.from_pretrained("exports/tuned", trust_remote_code=True).eval()
    ids = names["tokenizer"]("the cat", return_tensors="pt").input_ids
    tuned = names["model"].eval()
    with torch.no_grad():
        assert again(ids).logits.equal(tuned(ids).logits)
        assert not again(ids).logits.equal(one.load()(ids).logits)


def test_what_save_pretrained_writes_loads_and_is_equal(each: Exported, tmp_path: Path) -> None:
    hf = each.load()
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_i3.py").read_bytes() == (
        each.folder / "modeling_i3.py"
    ).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    for name, tensor in hf.state_dict().items():
        assert tensor.equal(again.state_dict()[name]), name
    assert again.config.to_dict() | {"_name_or_path": ""} == hf.config.to_dict() | {
        "_name_or_path": ""
    }
    assert again.generation_config.to_dict() == hf.generation_config.to_dict()
