"""One renderer of chats for training and decoding: messages -> token ids, the audio token expanded, the labels by spans."""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from asrllm.collator.template_trial import TemplateTooSlowError, try_template
from asrllm.errors import UserError
from asrllm.text_files import first_words

Messages = Sequence[dict[str, Any]]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# put before a template that writes today's date: a model would be trained on other prompts than it decodes from
CONSTANT_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
NO_LABEL = -100
MAX_WRITTEN = 200_000  # characters that a template may write around the messages
REPLACE = "Correct the template, or set model.llm.chat_template=chatml."
KEPT = 1000  # rendered chats
_PROBE = "asrllm probe"
_MARK = "\ufdd0{}\ufdd1"  # of noncharacters, which no text holds


class ChatRenderer:
    """Renders with the tokenizer's own chat template, or with ChatML where it has none.

    A message's content is a string that holds the audio token, or a list of {"type": "audio"} and {"type": "text", "text": ...}, which
    are joined by spaces. What looks like another special token in a content is text like any other, so that no prompt can end a turn.
    tokenizer: a transformers tokenizer that knows `audio_token` as one special token; it is not changed.
    """

    def __init__(self, tokenizer: Any, audio_token: str) -> None:
        self.tokenizer, self.audio_token = tokenizer, audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self._rendered: dict[str, list[int]] = {}
        self._special = self._special_tokens()
        self._first_ids = self._ids_before_text()
        self.end_of_turn = self._find_end_of_turn()
        self.end_ids = self._ids(self.end_of_turn)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        stops = {self.end_ids[0], self.tokenizer.eos_token_id}
        return sorted(i for i in stops if i is not None)

    def user_messages(self, prompt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{self.audio_token} {prompt}".strip()}]

    def count_audios(self, messages: Messages) -> int:
        """How many audio tokens the rendered chat holds."""
        return self._prompt_ids(messages).count(self.audio_token_id)

    def encode_prompt(self, messages: Messages, audio_tokens: Sequence[int]) -> list[int]:
        """Ids up to where the assistant begins to speak; the i-th audio token stands `audio_tokens[i]` times.

        Raises UserError for messages of another form, for roles that the template refuses and for a wrong number of audio tokens.
        """
        ids = self._prompt_ids(messages)
        found = ids.count(self.audio_token_id)
        if found != len(audio_tokens):
            raise UserError(
                f"the chat {list(messages)!r} has {found} audio tokens for {len(audio_tokens)} audios: "
                f"write {self.audio_token} once for each"
            )
        lengths = iter(audio_tokens)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(lengths) if token == self.audio_token_id else 1)
        return expanded

    def _prompt_ids(self, messages: Messages) -> list[int]:
        """Kept for the chats of the last prompts: rendering one takes longer than all the rest."""
        key = repr(messages)
        if key not in self._rendered:
            if len(self._rendered) >= KEPT:
                self._rendered.pop(next(iter(self._rendered)))
            self._rendered[key] = self._encode(messages)
        return self._rendered[key]

    def _encode(self, messages: Messages) -> list[int]:
        plain = _plain_messages(messages, self.audio_token)
        literals: list[str] = []

        def mark(found: re.Match[str]) -> str:
            literals.append(found.group())
            return _MARK.format(len(literals) - 1)

        marked = [
            message | {"content": self._special.sub(mark, message["content"])} for message in plain
        ]
        text = self._render(marked, add_generation_prompt=True)
        parts = re.split(
            _MARK.format(r"(\d+)"), text
        )  # template's text, number of a literal, text, number, ...
        ids: list[int] = []
        for i, part in enumerate(parts):
            ids += (
                self._ids(literals[int(part)], plain=True)
                if i % 2
                else self._ids(part)
                if part
                else []
            )
        return ids if ids[: len(self._first_ids)] == self._first_ids else self._first_ids + ids

    def encode_training(
        self, messages: Messages, answer: str, audio_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """(ids, labels) of the chat and its answer: the labels are the answer and its end, NO_LABEL elsewhere.

        The answer is tokenised by itself, so that training sees exactly the prompt ids that decoding starts from.
        """
        prompt = self.encode_prompt(messages, audio_tokens)
        target = self._ids(answer, plain=True) + self.end_ids
        return prompt + target, [NO_LABEL] * len(prompt) + target

    def _special_tokens(self) -> re.Pattern[str]:
        """Matches the special tokens apart from the audio token, and what the marks begin with."""
        special = {*self.tokenizer.all_special_tokens, _MARK[0]}
        special |= {
            str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        return re.compile(
            "|".join(
                re.escape(s) for s in sorted(special - {self.audio_token}, key=len, reverse=True)
            )
        )

    def _ids_before_text(self) -> list[int]:
        """What the tokenizer writes before any text, such as Llama's and Gemma's BOS, which not every template repeats."""
        whole, bare = self.tokenizer(_PROBE)["input_ids"], self._ids(_PROBE)
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])

    def _find_end_of_turn(self) -> str:
        """What the template writes behind an answer, white space apart: one token, or the first of several if that is a special one.

        The end-of-text token where it writes nothing. Raises UserError where the tokenizer does not know it as a token.
        """
        question: Messages = [{"role": "user", "content": "?"}]
        full = self._render(
            [*question, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False
        )
        tail = full.rpartition(_PROBE)[2].strip() or self.tokenizer.eos_token
        if not tail:
            raise UserError(
                "the tokenizer has neither an end-of-turn in its chat template nor an eos_token: set eos_token"
            )
        if found := self._special.match(
            tail
        ):  # a template may write the end of the turn and that of the text
            tail = found.group()
        ids = self._ids(tail)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            found_as = (
                "its unknown token" if self.tokenizer.unk_token_id in ids else f"{len(ids)} tokens"
            )
            raise UserError(
                f"the chat template ends a turn with {tail!r}, which the tokenizer has as {found_as}: add it to the tokenizer as a special "
                "token, or give the tokenizer the chat template that belongs to it"
            )
        return tail

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        template = self.tokenizer.chat_template or CHATML
        if "strftime_now" in template:
            template = CONSTANT_DATE + template

        def render() -> str:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )

        roles = [message["role"] for message in messages]
        where = f"the chat template of the tokenizer in {self.tokenizer.name_or_path!r}"
        try:
            if template != CHATML:
                try_template((template, add_generation_prompt), render)
            text = render()
        except TemplateSyntaxError as error:
            raise UserError(
                f"{where} does not compile: line {error.lineno}: {error.message}. {REPLACE}"
            ) from error
        except TemplateError as error:
            hint = (
                ""
                if set(roles) <= {"user", "assistant"}
                else "Write what a refused turn says into the user's. "
            )
            raise UserError(
                f"{where} refuses turns of the roles {', '.join(roles)}: {first_words(error)}. {hint or REPLACE}".strip()
            ) from error
        except (TemplateTooSlowError, MemoryError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{where} loops or writes too much: {first_words(error)}. {REPLACE}"
            ) from error
        except Exception as error:  # a template is a program, which may raise anything
            kind = type(error).__name__
            raise UserError(
                f"{where} fails with {kind}: {first_words(error)}. {REPLACE}"
            ) from error
        written = len(text) - sum(len(str(message.get("content"))) for message in messages)
        if written > MAX_WRITTEN:
            raise UserError(f"{where} writes {written} characters around the messages. {REPLACE}")
        return text

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        """plain: what looks like a special token is text like any other."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)[
            "input_ids"
        ]


def _plain_messages(messages: Messages, audio_token: str) -> list[dict[str, Any]]:
    """The messages with each content as a string."""
    if isinstance(messages, (str, dict)) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise UserError(
            f"the chat {messages!r} is not a list of messages: give [{{'role': 'user', 'content': '{audio_token} ...'}}]"
        )
    if not messages or messages[-1]["role"] in ("assistant", "model"):
        raise UserError(
            "the chat ends with an assistant's turn or is empty: end it with the user's, which the model answers"
        )
    return [
        message | {"content": _plain_content(message.get("content"), audio_token)}
        for message in messages
    ]


def _plain_content(content: Any, audio_token: str) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "audio":
            parts.append(audio_token)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise UserError(f"{part!r} is no content of a message: give a string, or a list of {{'type': 'audio'}} and of "
                            "{'type': 'text', 'text': ...}")  # fmt: skip
    return " ".join(parts)
