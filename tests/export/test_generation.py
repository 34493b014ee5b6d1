"""generate(), pipelines, and the cache. About 10 s."""

import copy
import io
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, pipeline

from i3dist.inference.decoder import Decoder
from i3dist.model.lm import I3LM
from tests.export.conftest import Exported, documents, padded
from tests.export.test_logits import TOLERANCE, far

NEW = 30  # more than two chunks
IDS = documents(4, 10, 300).view(2, 5)
PROMPTS = [documents(s, n, 300) for s, n in ((1, 40), (2, 21), (3, 3))]
# Neither <EOS> nor what is suppressed by default takes part, so that lengths are known.
FREE: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": None, "suppress_tokens": None}


RESUMES = """
import sys
import torch
from transformers import AutoModelForCausalLM
_, export, folder, tolerance = sys.argv
hf = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype="float32")
cache = hf.load_cache(torch.load(f"{folder}/cache"))
rest, logits = torch.load(f"{folder}/rest")
assert (hf(rest, past_key_values=cache).logits - logits).abs().max() < float(tolerance)
"""


def greedy(model: I3LM, prompt: Tensor) -> list[int]:
    """What i3dist itself generates."""
    decoder, found, fed = Decoder(model), [], prompt
    for _ in range(NEW):
        found.append(int(decoder.feed(fed).argmax()))
        fed = torch.tensor(found[-1:])
    return found


def test_greedy_generation_of_unequal_prompts_is_i3dists(each: Exported) -> None:
    ids, mask = padded(PROMPTS, "left")
    found = each.load().generate(ids, attention_mask=mask, do_sample=False, **FREE)
    wanted = [greedy(each.model, prompt) for prompt in PROMPTS]
    assert found[:, ids.shape[1] :].tolist() == wanted


def test_prompts_may_be_padded_on_the_right(hf: Any) -> None:
    found = []
    for side in ("left", "right"):
        ids, mask = padded(PROMPTS, side)
        texts = hf.generate(ids, attention_mask=mask, num_beams=2, **FREE)
        found.append(texts[:, ids.shape[1] :])
    assert found[0].equal(found[1])


@pytest.mark.parametrize(
    "way",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=["beams", "sampling", "several"],
)
def test_generation_with_a_cache_equals_that_without(hf: Any, way: dict[str, Any]) -> None:
    ids, mask = padded(PROMPTS, "left")
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(hf.generate(ids, attention_mask=mask, use_cache=use_cache, **FREE, **way))
    assert found[0].equal(found[1])


def test_beams_of_padded_prompts_are_those_of_each_alone(hf: Any) -> None:
    ids, mask = padded(PROMPTS, "left")
    together = hf.generate(ids, attention_mask=mask, num_beams=3, **FREE)[:, -NEW:]
    alone = [hf.generate(prompt[None], num_beams=3, **FREE)[0, -NEW:] for prompt in PROMPTS]
    assert together.equal(torch.stack(alone))


def test_the_end_of_a_document_ends_the_text_and_other_specials_never_come(hf: Any) -> None:
    with torch.no_grad():
        hf.head.weight[3] = hf.head.weight[4:13].amax(0)
    found = hf.generate(PROMPTS[0][None], max_new_tokens=200, do_sample=True)[0, len(PROMPTS[0]) :]
    text, end = found[:-1], int(found[-1])
    assert (text >= 13).all() and (end in (3, 5) or len(found) == 200)


def test_pipeline(one: Exported) -> None:
    generator = pipeline(
        "text-generation", model=str(one.folder), trust_remote_code=True, device="cpu"
    )
    prompts = ["the cat", "where was the hat of the dog on the mat"]
    found = generator(prompts, batch_size=2, do_sample=False, max_new_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(one.folder, trust_remote_code=True)
    for prompt, (answer,) in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = generator.model.generate(ids, do_sample=False, max_new_tokens=20)[0]
        assert answer["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


def test_the_example_of_the_model_card_runs(
    one: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (one.folder / "README.md").read_text()
    monkeypatch.chdir(one.folder.parent)
    exec(card.split("```python")[1].split("```")[0], {})
    assert "Once upon a time" in capsys.readouterr().out


@given(
    cuts=st.lists(st.integers(1, 70), max_size=5, unique=True).map(sorted),
    side=st.sampled_from(["left", "right", "middle"]),
)
@settings(max_examples=10)
@torch.no_grad()
def test_text_may_be_read_in_any_pieces(one: Exported, cuts: list[int], side: str) -> None:
    hf = one.load()
    rows = [documents(s, n, mean) for s, n, mean in ((1, 70, 400), (2, 31, 9), (3, 4, 400))]
    ids, mask = padded(rows, side)
    whole, cache, found = hf(ids, attention_mask=mask).logits, None, []
    for start, stop in pairwise([0, *cuts, ids.shape[1]]):
        out = hf(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits)
        assert cache.get_seq_length() == stop
    difference = (torch.cat(found, dim=1) - whole).abs()
    assert difference[mask.bool()].max() < TOLERANCE
    if side == "right":  # where a call has padding only, its logits are those from before
        assert difference.max() < TOLERANCE


def saved(cache: Any) -> Any:
    """By torch.save and back."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    saved,
    lambda cache: pickle.loads(pickle.dumps(cache)),
]


@pytest.mark.parametrize("copied", COPIES, ids=["copy", "deepcopy", "torch.save", "pickle"])
@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_as_if_nothing_had_happened(
    each: Exported, copied: Callable[[Any], Any]
) -> None:
    hf, text = each.load(), documents(1, 60, 1000)[None]
    cache = hf(text[:, :31]).past_key_values
    kept = copied(cache)
    hf(documents(2, 50, 20)[None], past_key_values=cache)  # the original goes elsewhere
    found = hf(text[:, 31:], past_key_values=kept).logits
    assert far(found, hf(text).logits[:, 31:]) < TOLERANCE


def test_a_saved_cache_goes_on_in_another_process(one: Exported, tmp_path: Path) -> None:
    """With the export in a folder of another name."""
    hf, text = one.load(), documents(1, 60, 1000)[None]
    moved = shutil.copytree(one.folder, tmp_path / "moved")
    with torch.no_grad():
        torch.save(hf(text[:, :36]).past_key_values.state_dict(), tmp_path / "cache")
        torch.save((text[:, 36:], hf(text).logits[:, 36:]), tmp_path / "rest")
    subprocess.run([sys.executable, "-c", RESUMES, moved, tmp_path, str(TOLERANCE)], check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_state_of_a_cache_is_all_of_it(each: Exported, dtype: torch.dtype) -> None:
    """By safetensors and back; and no tensor is a view, which would be saved with all it views."""
    hf = each.load(dtype=dtype)
    # Longer than history, to a chunk's end: there the model itself keeps views.
    ids, mask = padded([documents(7, 60, 300), *PROMPTS[1:]], "left")
    for cache in (hf(ids, attention_mask=mask).past_key_values, hf(ids[:, :1]).past_key_values):
        state = cache.state_dict()
        kept = hf.load_cache(load(save(state)))
        hf(IDS[:1].expand(3, -1), past_key_values=cache)  # changes neither
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.values())
        assert kept.get_seq_length() == state["columns"]
        assert all(x.equal(state[name]) for name, x in kept.state_dict().items())
        assert all(x.dtype == state[name].dtype for name, x in kept.state_dict().items())


@pytest.mark.parametrize("change", ["rename", "resize"])
def test_a_state_of_another_model_is_refused(hf: Any, change: str) -> None:
    state = hf(IDS).past_key_values.state_dict()
    name = next(name for name in state if name.startswith("past"))
    state[name if change == "resize" else "other"] = state.pop(name)[..., 1:]
    with pytest.raises(ValueError, match="no state of a cache of the model"):
        hf.load_cache(state)


@torch.no_grad()
def test_rows_of_a_cache_can_be_reordered_picked_and_repeated(each: Exported) -> None:
    hf = each.load()
    ids, mask = padded(PROMPTS, "left")
    more = documents(9, 20, 1000)[1:].expand(3, -1)
    whole = hf(torch.cat([ids, more], 1), attention_mask=torch.cat([mask, more > 0], 1)).logits
    cache = hf(ids, attention_mask=mask).past_key_values
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        changed = copy.copy(cache)
        change(changed)
        found = hf(more[:1].expand(len(rows), -1), past_key_values=changed).logits
        assert far(found, whole[rows, ids.shape[1] :]) < TOLERANCE


@torch.no_grad()
def test_generation_goes_on_from_a_cache(hf: Any) -> None:
    prompt = PROMPTS[0][None]
    cache = hf(prompt[:, :25]).past_key_values
    resumed = hf.generate(prompt, past_key_values=cache, do_sample=False, **FREE)
    assert resumed.equal(hf.generate(prompt, do_sample=False, **FREE))


def test_what_a_cache_cannot_do_is_said(hf: Any) -> None:
    cache = hf(PROMPTS[0][None]).past_key_values
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    with pytest.raises(ValueError, match="stateful"):
        hf.generate(PROMPTS[0][None], prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"past_key_values": DynamicCache()}, "i3 model returned, not DynamicCache"),
        ({"input_ids": IDS[:1]}, "past_key_values is of 2 rows and input_ids of 1"),
        ({"input_ids": IDS[0]}, r"not \[5\]"),
        ({"input_ids": IDS[:, :0]}, r"not \[2, 0\]"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 24)}, "takes no inputs_embeds"),
        ({"attention_mask": IDS[:, 1:]}, r"\[2, 4\] should be \[2, 5 or more\]"),
        ({"attention_mask": IDS[:1]}, r"\[1, 5\] should be \[2, 5 or more\]"),
        ({"attention_mask": IDS[:, None, None]}, r"\[2, 1, 1, 5\] should be \[2, 5 or more\]"),
        ({"output_attentions": True}, "returns no attentions"),
        ({"output_hidden_states": True}, "no hidden states"),
    ],
)
@torch.no_grad()
def test_what_the_model_cannot_read_or_return_is_one_line(
    hf: Any, words: dict[str, Any], says: str
) -> None:
    cache = hf(IDS).past_key_values
    with pytest.raises(ValueError, match=says) as error:
        hf(**{"input_ids": IDS, "past_key_values": cache, **words})
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_a_cache_does_not_grow(one: Exported) -> None:
    hf = one.load()

    def size(tokens: int) -> int:
        """Bytes that the cache keeps alive: views keep all of what they are a part of."""
        cache, kept = hf(documents(1, tokens, 10_000)[None]).past_key_values, {}
        cache.change(lambda x: kept.update({x.untyped_storage().data_ptr(): x}) or x)
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    assert size(12 * 10 + 5) == size(12 * 40 + 5)
