"""Prompt formats: the markup around the turns of a conversation.

`vicuna_v0` is the format of the published NExT-GPT; `chatml` that of SmolLM2 and many others;
`template_from_tokenizer` derives one from the tokenizer's Jinja chat template.
"""

import re
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nextgpt.common.errors import UserError


@dataclass(frozen=True)
class Special:
    """A special token of the tokenizer, by its written form."""

    token: str


Markup = tuple[str | Special, ...]


@dataclass(frozen=True)
class Template:
    """Markup around the turns.

    Attributes:
        begins_with_bos: whether the tokenizer's BOS token comes first.
        first_human: before the first human turn.
        next_human: before the other human turns; tokenized together with their text.
        answer_opening: between a human turn and its answer; no loss.
        end_after_text, end_after_media: end of an answer; with loss.
        after_answer: between an answer and the next turn; no loss.
        first_apart: whether `first_human` is tokenized separately from the text after it.
    """

    begins_with_bos: bool
    first_human: Markup
    next_human: Markup
    answer_opening: Markup
    end_after_text: Markup
    end_after_media: Markup
    after_answer: Markup = ()
    first_apart: bool = True


_IM_START, _IM_END = Special("<|im_start|>"), Special("<|im_end|>")

TEMPLATES = {
    "vicuna_v0": Template(
        begins_with_bos=True,
        first_human=("### Human: ",),
        next_human=("Human: ",),
        answer_opening=("\n### Assistant: ",),
        end_after_text=("\n###",),
        end_after_media=("###",),
    ),
    "chatml": Template(
        begins_with_bos=False,
        first_human=(_IM_START, "user\n"),
        next_human=(_IM_START, "user\n"),
        answer_opening=(_IM_END, "\n", _IM_START, "assistant\n"),
        end_after_text=(_IM_END,),
        end_after_media=(_IM_END,),
        after_answer=("\n",),
    ),
}


def template_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Render a chat of known turns and take the strings around them as the template.

    A default system prompt becomes part of the first human turn's opening. An answer ends with the
    first special token after it.

    Raises:
        UserError: no chat template, or one that does not alternate questions and answers.
    """
    name = f"prompt_format tokenizer: {tokenizer.name_or_path}"
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; use vicuna_v0 or chatml")
    texts = ("first question", "first answer", "second question", "second answer")
    roles = ("user", "assistant") * 2
    try:
        turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise UserError(f"{name}: its chat template cannot be rendered: {error}") from error
    found = re.fullmatch("(.*?)".join(("", *map(re.escape, texts), "")), rendered, re.DOTALL)
    if not found:
        raise UserError(f"{name}: its chat template changes the turns: {rendered!r}")
    first, opening, between, second_opening, end = found.groups()
    if not between.startswith(end) or second_opening != opening:
        raise UserError(f"{name}: its chat template treats rounds differently: {rendered!r}")
    ending = _to_markup(end, tokenizer)
    special = next((i for i, part in enumerate(ending) if isinstance(part, Special)), None)
    if special is None:
        raise UserError(f"{name}: its chat template has no special token after an answer")
    return Template(
        begins_with_bos=False,  # if the format has a BOS token, it was rendered
        first_human=_to_markup(first, tokenizer),
        next_human=_to_markup(between.removeprefix(end), tokenizer),
        answer_opening=_to_markup(opening, tokenizer),
        end_after_text=ending[: special + 1],
        end_after_media=ending[: special + 1],
        after_answer=ending[special + 1 :],
        first_apart=False,
    )


def _to_markup(text: str, tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Split `text` at special tokens, longest first."""
    tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not tokens:
        return (text,) if text else ()
    strings = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return tuple(Special(string) if i % 2 else string for i, string in enumerate(strings) if string)
