"""Prompt formats: the markup around the turns of a conversation.

`vicuna_v0` is the format of the published NExT-GPT; `chatml` that of SmolLM2 and many others;
`tokenizer` is derived from the tokenizer's chat template (chat_template.py).
"""

from dataclasses import dataclass


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
