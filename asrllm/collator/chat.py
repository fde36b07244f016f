"""The one renderer of chats, for training and decoding: messages to tokens and labels."""

import functools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from asrllm.collator.template_process import TemplateLimitError, TemplateProcess
from asrllm.errors import UserError
from asrllm.text_files import first_words

Messages = Sequence[dict[str, Any]]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# precedes a template that writes today's date, so that decoding has the prompts of training
CONSTANT_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
IGNORE_INDEX = -100
MAX_WRITTEN = 200_000  # characters that a template may write around the messages
TEMPLATE_FIX = "Correct the template, or set model.llm.chat_template=chatml."
MAX_CACHED = 1000  # rendered chats
_PROBE = "asrllm probe"
_MARK = "\ufdd0{}\ufdd1"  # noncharacters, which no text contains


class ChatRenderer:
    """Renders chats with the tokenizer's own template, or with ChatML if it has none.

    The content of a message is a string with the audio token, or a list of {"type": "audio"} and
    {"type": "text", "text": ...}, which are joined by spaces. Other special tokens in a content are
    encoded as plain text, so that no prompt can end a turn.
    """

    def __init__(self, tokenizer: Any, audio_token: str) -> None:
        """
        Args:
            tokenizer: a tokenizer of transformers that has audio_token as one special token. It
                is not changed.
            audio_token: placeholder of the audio in messages.
        """
        self.tokenizer = tokenizer
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self._cache: dict[str, list[int]] = {}
        # a template is a program, possibly of a stranger
        self._render_limited = TemplateProcess(functools.partial(_render_chat, tokenizer))
        self._special = self._special_tokens()
        self._first_ids = self._ids_before_text()
        self.end_of_turn = self._find_end_of_turn()
        self.end_ids = self._ids(self.end_of_turn)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        stops = {self.end_ids[0], self.tokenizer.eos_token_id}
        return sorted(token for token in stops if token is not None)

    def user_messages(self, prompt: str) -> list[dict[str, str]]:
        """Return the chat of one audio with a prompt."""
        return [{"role": "user", "content": f"{self.audio_token} {prompt}".strip()}]

    def count_audios(self, messages: Messages) -> int:
        """Return the number of audio tokens in the rendered chat."""
        return self._prompt_ids(messages).count(self.audio_token_id)

    def encode_prompt(self, messages: Messages, audio_tokens: Sequence[int]) -> list[int]:
        """Return the tokens up to the beginning of the assistant's turn.

        Args:
            messages: the chat.
            audio_tokens: how often to repeat the audio token of each audio.

        Raises:
            UserError: the messages have another form, the template rejects a role, or the number of
                audio tokens differs from the number of audios.
        """
        ids = self._prompt_ids(messages)
        found = ids.count(self.audio_token_id)
        plain = plain_messages(messages, self.audio_token)
        written = sum(message["content"].count(self.audio_token) for message in plain)
        if written == len(audio_tokens) != found:
            raise UserError(
                f"{self._template_name()} turns {written} audio tokens ({self.audio_token}) of the "
                f"messages into {found}. {TEMPLATE_FIX}"
            )
        if found != len(audio_tokens):
            raise UserError(
                f"the chat {list(messages)!r} has {found} audio tokens for {len(audio_tokens)} "
                f"audios. Write {self.audio_token} once for each."
            )
        return self._expand_audio_tokens(ids, audio_tokens)

    def _expand_audio_tokens(self, ids: Sequence[int], repeats: Sequence[int]) -> list[int]:
        """Repeat each audio token as often as its audio has tokens."""
        lengths = iter(repeats)
        expanded: list[int] = []
        for token in ids:
            if token == self.audio_token_id:
                expanded += [token] * next(lengths)
            else:
                expanded.append(token)
        return expanded

    def _prompt_ids(self, messages: Messages) -> list[int]:
        """Return the tokens of a chat. They are cached because rendering takes the longest."""
        key = repr(messages)
        if key not in self._cache:
            if len(self._cache) >= MAX_CACHED:
                # the oldest chat, because a dict is in the order of insertion
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self._encode(messages)
        return self._cache[key]

    def _encode(self, messages: Messages) -> list[int]:
        literals: list[str] = []  # special tokens in contents, which are plain text there

        def mark(found: re.Match[str]) -> str:
            literals.append(found.group())
            return _MARK.format(len(literals) - 1)

        marked = []
        for message in plain_messages(messages, self.audio_token):
            content = self._special.sub(mark, message["content"])
            marked.append(message | {"content": content})
        text = self._render(marked, add_generation_prompt=True)
        ids: list[int] = []
        # the parts are text, the number of a literal, text, the number of a literal, ..., text
        for i, part in enumerate(re.split(_MARK.format(r"(\d+)"), text)):
            if i % 2:
                ids += self._ids(literals[int(part)], plain=True)
            elif part:
                ids += self._ids(part)
        # Not every template writes the BOS, which `_ids` leaves out.
        if ids[: len(self._first_ids)] != self._first_ids:
            ids = self._first_ids + ids
        return ids

    def encode_training(
        self, messages: Messages, answer: str, audio_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Return the tokens of a chat with its answer, and their labels.

        The answer is tokenized by itself, so that training sees exactly the prompt tokens from
        which decoding starts.

        Args:
            messages: the chat before the answer.
            answer: the assistant's text.
            audio_tokens: how often to repeat the audio token of each audio.

        Returns:
            Tokens and labels of the same length. The labels are the tokens of the answer and of the
            end of its turn, and IGNORE_INDEX elsewhere.
        """
        prompt = self.encode_prompt(messages, audio_tokens)
        target = self._ids(answer, plain=True) + self.end_ids
        return prompt + target, [IGNORE_INDEX] * len(prompt) + target

    def _special_tokens(self) -> re.Pattern[str]:
        """Return a pattern for the special tokens except the audio token, and for the marks."""
        special = {*self.tokenizer.all_special_tokens, _MARK[0]}
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                special.add(str(token))
        special.discard(self.audio_token)
        # A pattern takes the first alternative that fits, and one token may begin another.
        longest_first = sorted(special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def _ids_before_text(self) -> list[int]:
        """Return what the tokenizer writes before any text, like the BOS of Llama and Gemma.

        Not every chat template repeats it.
        """
        whole = self.tokenizer(_PROBE)["input_ids"]
        bare = self._ids(_PROBE)
        for n in range(len(whole)):
            if whole[n : n + len(bare)] == bare:
                return whole[:n]
        return []

    def _find_end_of_turn(self) -> str:
        """Return the token that the template writes after an answer.

        If the template writes several special tokens, the first one counts, because some write the
        end of the turn and the end of the text. If it writes nothing, the end-of-text token counts.

        Raises:
            UserError: the tokenizer does not have it as one token.
        """
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": _PROBE}
        full = self._render([question, answer], add_generation_prompt=False)
        tail = full.rpartition(_PROBE)[2].strip() or self.tokenizer.eos_token
        if not tail:
            raise UserError(
                "the tokenizer has neither an end of turn in its chat template nor an eos_token. "
                "Set eos_token."
            )
        first_special = self._special.match(tail)
        if first_special:
            tail = first_special.group()
        ids = self._ids(tail)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            encoded_as = f"{len(ids)} tokens"
            if self.tokenizer.unk_token_id in ids:
                encoded_as = "its unknown token"
            raise UserError(
                f"the chat template ends a turn with {tail!r}, which the tokenizer encodes as "
                f"{encoded_as}. Add it to the tokenizer as a special token, or give the tokenizer "
                "the chat template that belongs to it."
            )
        return tail

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        template = self.tokenizer.chat_template or CHATML
        if "strftime_now" in template:
            template = CONSTANT_DATE + template

        where = self._template_name()
        try:
            if template == CHATML:
                text = _render_chat(self.tokenizer, messages, template, add_generation_prompt)
            else:
                text = self._render_limited(messages, template, add_generation_prompt)
            text.encode()  # a template may write half of a surrogate pair
        except OSError:  # the system denies the process
            raise
        except TemplateSyntaxError as error:
            raise UserError(
                f"{where} does not compile: line {error.lineno}: {error.message}. {TEMPLATE_FIX}"
            ) from error
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            fix = TEMPLATE_FIX
            if not set(roles) <= {"user", "assistant"}:
                fix = "Move the text of a rejected turn into the user's turn."
            rejected = f"rejects turns of the roles {', '.join(roles)}"
            raise UserError(f"{where} {rejected}: {first_words(error)}. {fix}") from error
        except (TemplateLimitError, MemoryError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{where} loops or writes too much: {first_words(error)}. {TEMPLATE_FIX}"
            ) from error
        except Exception as error:  # a template is a program, which may raise anything
            kind = type(error).__name__
            raise UserError(
                f"{where} fails with {kind}: {first_words(error)}. {TEMPLATE_FIX}"
            ) from error
        if len(text) > _max_length(messages):
            raise UserError(
                f"{where} writes more than {MAX_WRITTEN} characters around the messages. "
                f"{TEMPLATE_FIX}"
            )
        return text

    def _template_name(self) -> str:
        return f"the chat template of the tokenizer in {self.tokenizer.name_or_path!r}"

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        """Return the tokens of a text; with `plain`, special tokens in it are plain text."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)
        return encoded["input_ids"]


def _render_chat(
    tokenizer: Any, messages: Messages, template: str, add_generation_prompt: bool
) -> str:
    """Return the text of a chat. It ends one character after `_max_length`."""
    text = tokenizer.apply_chat_template(
        list(messages),
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    return text[: _max_length(messages) + 1]


def _max_length(messages: Messages) -> int:
    """Return how many characters a template may write for messages."""
    return MAX_WRITTEN + sum(len(str(message.get("content"))) for message in messages)


def plain_messages(messages: Messages, audio_token: str) -> list[dict[str, Any]]:
    """Return the messages with each content as a string."""
    is_list = not isinstance(messages, (str, dict))
    if not is_list or not all(map(_is_message, messages)):
        example = f"[{{'role': 'user', 'content': '{audio_token} ...'}}]"
        raise UserError(f"the chat {messages!r} is not a list of messages. Write {example}.")
    if not messages or messages[-1]["role"] in ("assistant", "model"):
        raise UserError(
            "the chat is empty or ends with an assistant's turn. End it with a user's turn."
        )
    plain = []
    for message in messages:
        plain.append(message | {"content": _plain_content(message.get("content"), audio_token)})
    return plain


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _plain_content(content: Any, audio_token: str) -> str:
    if isinstance(content, str):
        return content
    parts: list[str] = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "audio":
            parts.append(audio_token)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise UserError(
                f"{part!r} is not the content of a message. Write a string, or a list of "
                "{'type': 'audio'} and {'type': 'text', 'text': ...}."
            )
    return " ".join(parts)
