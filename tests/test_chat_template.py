"""The prompt format of a tokenizer's chat template."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nextgpt.common.errors import UserError
from nextgpt.config.loader import load_config
from nextgpt.conversation.messages import Conversation, Media, Text, Turn
from nextgpt.conversation.prompt import IGNORE_INDEX, PromptBuilder
from nextgpt.conversation.signal_tokens import SignalTokens
from nextgpt.conversation.templates import template_from_tokenizer
from nextgpt.model.loading import resolve_model_path
from parity_tools import PARITY

# The forms of LLaMA 2, LLaMA 3 and Zephyr, and ChatML with a system prompt.
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt "
    "%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHATML = (
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% for m in messages %}{{ '<|im_start|>' + "
    "m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORMS = {"llama_2": LLAMA_2, "llama_3": LLAMA_3, "zephyr": ZEPHYR, "chatml": CHATML}
TEXTS = ("What is a lighthouse?", "A tower with a lamp.", "Thank you!", "You are welcome.")


def tokenizer_of(form: str) -> PreTrainedTokenizerBase:
    path = resolve_model_path(load_config("mini").language_model.path)
    if form == "llama_2":
        path = PARITY / "llama_tiny"
    tokenizer = AutoTokenizer.from_pretrained(path)
    new = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": new if form == "llama_3" else []})
    tokenizer.chat_template = FORMS[form]
    return tokenizer


def encoder_of(form: str) -> PromptBuilder:
    tokenizer = tokenizer_of(form)
    counts = {"image": 4, "video": 4, "audio": 4}
    signals = SignalTokens(counts, first_id=len(tokenizer))
    return PromptBuilder(tokenizer, signals, template_from_tokenizer(tokenizer), media_tokens=1)


def turns(count: int) -> tuple[Turn, ...]:
    roles = ("human", "assistant") * 2
    return tuple(Turn(r, (Text(t),)) for r, t in zip(roles[:count], TEXTS[:count], strict=True))


def rendered_text(tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    roles = ("user", "assistant") * 2
    chat = [{"role": r, "content": t} for r, t in zip(roles[:count], TEXTS[:count], strict=True)]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=count % 2 > 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_template_equals_the_tokenizers(form: str, count: int) -> None:
    encoder = encoder_of(form)
    found = encoder.tokenizer.decode(encoder.encode(Conversation(turns(count))).input_ids)
    # A sentencepiece tokenizer shows where pieces of text begin by a space.
    expected = rendered_text(encoder.tokenizer, count)
    assert "".join(found.split()) == "".join(expected.split())


@pytest.mark.parametrize("form", ["llama_3", "zephyr", "chatml"])
def test_template_gives_the_tokenizers_ids(form: str) -> None:
    encoder = encoder_of(form)
    expected = encoder.tokenizer(rendered_text(encoder.tokenizer, 1), add_special_tokens=False)
    assert encoder.encode(Conversation(turns(1))).input_ids == expected.input_ids


@pytest.mark.parametrize("form", FORMS)
def test_template_labels_are_answers_and_their_stop_tokens(form: str) -> None:
    encoder = encoder_of(form)
    shown = (Media("image", path="a.png"), Text(TEXTS[0]))
    made = (Text(TEXTS[1]), Media("audio", caption="a bell", embedding="a.npy"))
    encoded = encoder.encode(Conversation((Turn("human", shown), Turn("assistant", made))))
    labelled = [i for i in encoded.labels if i != IGNORE_INDEX]
    assert len(encoded.media_positions) == len(encoded.signal_spans) == 1
    assert encoder.decode_answer(labelled) == (Text(TEXTS[1]), Media("audio"))
    assert any(labelled[-len(stop) :] == stop for stop in encoder.stop_sequences)


def test_template_missing_from_tokenizer_raises() -> None:
    tokenizer = AutoTokenizer.from_pretrained(PARITY / "llama_tiny")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; use vicuna_v0 or chatml"):
        template_from_tokenizer(tokenizer)


def test_template_that_refuses_the_chat_is_named() -> None:
    tokenizer = tokenizer_of("zephyr")
    tokenizer.chat_template = "{{ raise_exception('a system prompt is needed') }}"
    with pytest.raises(UserError, match="cannot be rendered: a system prompt is needed"):
        template_from_tokenizer(tokenizer)


def test_template_that_drops_a_turn_is_refused() -> None:
    tokenizer = tokenizer_of("zephyr")
    tokenizer.chat_template = "{{ messages[-1].content + eos_token }}"
    with pytest.raises(UserError, match="changes the turns: 'second answer"):
        template_from_tokenizer(tokenizer)
