"""What an export says about a model: the JSON files that transformers reads."""

import json
from typing import Any

from i3dist.checkpoint.exported import MODEL_TYPE
from i3dist.data.chat import ANSWERS, BEGIN, END, ROLES
from i3dist.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from i3dist.errors import UserError
from i3dist.model.layers import adjust_heads
from i3dist.model.lm import I3LM

LAYERS = ("rwkv", "attention", "dual-attention")
COMPRESSORS = ("literal", "records")
# Settings that a configuration has under the same name and with the same value.
SAME = ("d_model", "ff_mult", "chunk_length", "latents", "history_chunks", "state_carry")
NAMED = {"unk_token": "<UNK>", "bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<PAD>"}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    f"{{% if message['role'] not in {list(ROLES)} %}}"
    "{{ raise_exception('unknown role ' + message['role'] + ': use "
    + ", ".join(ROLES)
    + "') }}{% endif %}"
    "{% if message['content'] is not string %}"
    "{{ raise_exception('the content of a message should be text') }}{% endif %}"
    f"{{{{ '{BEGIN}<|' + message['role'] + '|>' }}}}"
    f"{{% if message['role'] == '{ANSWERS}' %}}"
    f"{{% generation %}}{{{{ message['content'] + '{END}' }}}}{{% endgeneration %}}"
    f"{{% else %}}{{{{ message['content'] + '{END}' }}}}{{% endif %}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{BEGIN}{ROLES[ANSWERS]}' }}}}{{% endif %}}"
)
"""`encode_conversation` after <BOS>, in Jinja; what is learned is marked as generated."""


def configuration(model: I3LM, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json.

    Args:
        model: the model.
        tokenizer: the model's.
        dtype: of its parameters, "float32" or "bfloat16".

    Raises:
        UserError: a part of the model is of a kind that the exported code does not have.
    """
    settings, compressor = model.settings, model.compressor
    foreign = [kind for kind in settings.layer_kinds if kind not in LAYERS]
    if foreign or settings.compressor not in COMPRESSORS:
        what = f"layers of kind {foreign[0]}" if foreign else f"compressor {settings.compressor}"
        raise UserError(
            f"the model has {what}, which cannot be exported: i3dist/export/files/modeling_i3.py "
            f"has layers {', '.join(LAYERS)} and compressors {', '.join(COMPRESSORS)}; add it there"
        )
    return {
        "architectures": ["I3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_i3.I3Config",
            "AutoModelForCausalLM": "modeling_i3.I3ForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": settings.vocab,
        "layers": settings.layer_kinds,
        **{name: getattr(settings, name) for name in SAME},
        # The numbers in use: those that were asked for may not divide the width.
        "heads": adjust_heads(settings.d_model, settings.heads),
        "compressor": settings.compressor,
        "sub_latents": compressor.sub_latents,
        "joined": model.joined,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def generation_configuration(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: a text ends with its document or, in a chat, with its message.

    As in `i3dist.inference.generate` no other special token may follow.
    """
    ids = tokenizer.special_ids
    ends = [tokenizer.eos_id, ids[END]]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_id,
        "suppress_tokens": [i for i in ids.values() if i not in ends],
    }


def tokenizer_file(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: the run's, but a text begins with <BOS>, as a document does in training."""
    single, second = (
        [
            {"SpecialToken": {"id": "<BOS>", "type_id": number}},
            {"Sequence": {"id": text, "type_id": number}},
        ]
        for number, text in enumerate("AB")
    )
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {
            "<BOS>": {"id": "<BOS>", "ids": [tokenizer.bos_id], "tokens": ["<BOS>"]}
        },
    }
    file = json.loads(tokenizer.data)
    return {**file, "truncation": None, "padding": None, "post_processor": template}


def tokenizer_configuration() -> dict[str, Any]:
    """tokenizer_config.json: names of special tokens, and the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **NAMED,
        "extra_special_tokens": [t for t in SPECIAL_TOKENS if t not in NAMED.values()],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
