"""A template read off the language model's own chat template, whatever the model is.

Hugging Face tokenizers bring a Jinja program that writes a chat down. A chat of known turns is
written, and what stands around them is the template. What opens an answer is tokenized apart from
it, as it is when the model is to answer.
"""

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nextgpt.common.errors import UserError
from nextgpt.conversation.templates import Markup, Special, Template

_TURNS = ("first question", "first answer", "second question", "second answer")


def template_from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that the tokenizer's chat template amounts to.

    What it says before the first turn (often a system prompt) opens every conversation. An answer
    ends with the first special token behind it, which the loss counts.

    Raises:
        UserError: there is none, or it does not write questions and answers one after the other.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"prompt_format tokenizer: the tokenizer of {name} has no chat template; take "
            "vicuna_v0 or chatml"
        )
    roles = ("user", "assistant") * 2
    turns = [{"role": r, "content": t} for r, t in zip(roles, _TURNS, strict=True)]
    try:
        written = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise UserError(
            f"prompt_format tokenizer: {name}'s chat template refuses a chat: {error}"
        ) from error
    found = re.fullmatch("(.*?)".join(("", *map(re.escape, _TURNS), "")), written, re.DOTALL)
    if not found:
        raise UserError(f"prompt_format tokenizer: {name} writes a chat as {written!r}")
    first, opening, between, again, end = found.groups()
    if not between.startswith(end) or again != opening:
        raise UserError(
            f"prompt_format tokenizer: {name} does not write every round alike: {written!r}"
        )
    ending = _markup(end, tokenizer)
    special = [index for index, part in enumerate(ending) if isinstance(part, Special)]
    if not special:
        raise UserError(f"prompt_format tokenizer: nothing ends an answer of {name}")
    last = special[0] + 1
    return Template(
        begins_with_bos=False,  # where there is one, it is written
        first_human=_markup(first, tokenizer),
        next_human=_markup(between.removeprefix(end), tokenizer),
        answer_opening=_markup(opening, tokenizer),
        end_after_text=ending[:last],
        end_after_media=ending[:last],
        after_answer=ending[last:],
        first_apart=False,
    )


def _markup(text: str, tokenizer: PreTrainedTokenizerBase) -> Markup:
    """The text in pieces: special tokens, and what stands between them."""
    tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    if not tokens:
        return (text,) if text else ()
    pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return tuple(
        Special(piece) if index % 2 else piece for index, piece in enumerate(pieces) if piece
    )
