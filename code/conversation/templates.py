"""How turns are written down for the language model.

`vicuna_v0` is the format that NExT-GPT was trained on, as published; `chatml` that of SmolLM2 and
many others; `tokenizer` reads the format off the tokenizer's chat template (chat_template.py). A
template is strings around the turns; a `Special` is one token of the tokenizer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Special:
    """A special token of the language model's tokenizer, by its written form."""

    token: str


Markup = tuple[str | Special, ...]


@dataclass(frozen=True)
class Template:
    """What stands around the turns.

    Attributes:
        begins_with_bos: whether the tokenizer's beginning-of-sequence token comes first.
        first_human: opens the first human turn.
        next_human: opens the others; tokenized together with the text behind it.
        answer_opening: closes a human turn and opens the answer; no loss on it.
        end_after_text, end_after_media: end of an answer; the loss counts them.
        after_answer: between an answer and the next turn; no loss.
        first_apart: whether `first_human` is tokenized apart from the text behind it, as published.
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
