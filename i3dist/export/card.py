"""The model card of an export: README.md with the run's own figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from i3dist.checkpoint.format import is_checkpoint, read_state
from i3dist.checkpoint.weights import WEIGHTS, newest_in
from i3dist.config import Settings
from i3dist.files import utf8_path
from i3dist.tracking.metrics_log import METRICS, VALIDATION, read_metrics

TESTED = "transformers 5.0.0 and 5.23.0, both with torch 2.13"
# Sections of the settings that tell what the model is; the others name places and habits of a host.
SECTIONS = ("model", "compression", "optimizer", "train")


@dataclass(frozen=True)
class Figures:
    """What is known of a trained model."""

    parameters: int
    step: int | None
    """None if the weights do not say, as in an export that transformers has saved again."""
    tokens: int | None
    """Tokens read in training; None if no log or checkpoint says."""
    validation: Mapping[str, Any] | None
    """The line of validation.jsonl of this step; None if there is none."""

    @classmethod
    def of(cls, source: Path, parameters: int) -> "Figures":
        """Of a finished run's folder or a checkpoint; the run's logs count if it lies in a run."""
        path = newest_in(source)
        if is_checkpoint(path):
            state = read_state(path)
            step: int | None = state.step
            tokens: int | None = state.tokens_seen
            run = path.resolve().parent.parent
        else:
            with utf8_path(path / WEIGHTS) as name, safe_open(name, "pt") as file:
                text = (file.metadata() or {}).get("step")
            step = None if text is None else int(text)
            tokens, run = None, path
        metrics = _line(run / METRICS, step)
        return cls(
            parameters,
            step,
            metrics["tokens_seen"] if tokens is None and metrics else tokens,
            _line(run / VALIDATION, step),
        )

    def rows(self) -> list[tuple[str, str]]:
        """What a table says of them."""
        rows = [("parameters", f"{self.parameters:,}")]
        if self.step is not None:
            rows.append(("optimizer steps", f"{self.step:,}"))
        if self.tokens is not None:
            rows.append(("tokens trained on", f"{self.tokens:,}"))
        found = self.validation
        if found is None or found.get("loss") is None:
            return [*rows, ("held-out loss", "not measured")]
        loss = f"{found['loss']:.4f} nats per token, on {found['tokens']:,} tokens"
        rows += [
            ("held-out loss", loss),
            ("held-out perplexity", f"{math.exp(found['loss']):.2f}"),
            ("held-out bits per byte", f"{found['bits_per_byte']:.4f}"),
        ]
        if found.get("history_gain") is not None:
            gain = f"{found['history_gain']:+.4f} nats per token"
            rows.append(("gained by history, in chunks that have one", gain))
        return rows


def _line(log: Path, step: int | None) -> dict[str, Any] | None:
    """A log's line of a step, or None."""
    return next((line for line in read_metrics(log) if line["step"] == step), None)


def card(settings: Settings, figures: Figures, name: str) -> str:
    """README.md.

    Args:
        settings: the run's.
        figures: of the model.
        name: of the model, as a title.
    """
    model = settings.model
    rows = "\n".join(f"| {what} | {value} |" for what, value in figures.rows())
    chosen = (
        # Of a path its last name alone: a card that is published tells nothing of a machine.
        f"{key}: {str(value).rpartition('/')[2]}"
        for key, value in settings.flat().items()
        if key.split(".")[0] in SECTIONS
    )
    return CARD.format(
        name=name,
        rows=rows,
        chunk=model.chunk_length,
        chunks=model.history_chunks,
        reach=f"{model.chunk_length * model.history_chunks:,}",
        latents=model.latents,
        layers=model.layers,
        carried=CARRIED if model.state_carry else "Nothing earlier is accessible.",
        settings="\n".join(chosen),
        tested=TESTED,
    )


CARRIED = (
    "RWKV layers carry their state over the ends of chunks, so what is earlier has an influence."
)

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [i3, rwkv, compressed-history]
---
# {name}

A language model of the architecture i3, trained with i3dist. Its layers, from the bottom, are
`{layers}`. It reads a text in chunks of {chunk} tokens, and a compressor turns each
chunk into {latents} latents. The attention layers see the tokens of their own chunk and the latents
of the {chunks} chunks before it, which are {reach} tokens. {carried}
Memory does not grow with the length of a text.

| | |
| --- | --- |
{rows}

## Use
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{name}"  # this folder
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
prompts = tokenizer(["Once upon a time", "The"], return_tensors="pt", padding=True)
tokens = model.generate(**prompts, max_new_tokens=50, do_sample=True)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

The code in this folder needs torch and transformers only. It was tested with
{tested}.

- A document begins with `<BOS>`; the tokenizer adds it. Each later `<BOS>` restarts the model, so
  that documents in one row do not see each other.
- Rows of a batch may be padded on either side: give the `attention_mask`.
- The tokenizer makes special tokens of their names in a text, as is usual in transformers.
  `split_special_tokens=True` reads them as text.
- The cache (`past_key_values`) can be copied and passed back with any number of new tokens. It
  cannot be cropped, so there is no assisted generation. Save it by
  `torch.save(cache.state_dict(), file)`; `model.load_cache(torch.load(file))` makes a cache of it.
- To train on several documents in a row as in pretraining, set the labels of `<BOS>` to -100.
- `tokenizer.apply_chat_template` writes conversations as i3dist does. A model that was not trained
  on conversations does not answer.
- Evaluate it with lm-evaluation-harness:
  ```sh
  lm_eval --model hf --tasks hellaswag --model_args \\
      pretrained={name},trust_remote_code=True,max_length=16384,softmax_dtype=float32
  ```
  `max_length` may be any number; without it contexts end at 2,048 tokens. Without `softmax_dtype`
  probabilities of a model in bf16 are rounded to bf16. Tasks of perplexity need
  `add_bos_token=False` too.

## Settings
```yaml
{settings}
```

## License
The code (`modeling_i3.py`, `configuration_i3.py`) is under Apache-2.0. It does not decide the
license of the weights: who trained them, and the terms of the training data, do. Whoever publishes
this model states it here.
"""
