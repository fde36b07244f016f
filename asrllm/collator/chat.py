"""One renderer of chats for training and decoding: messages -> token ids, the audio token expanded, the labels by spans."""

from collections.abc import Sequence
from typing import Any

from asrllm.errors import UserError

Messages = Sequence[dict[str, Any]]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_LABEL = -100
KEPT = 1000  # rendered chats
_PROBE = "asrllm probe"


class ChatRenderer:
    """Renders with the tokenizer's own chat template, or with ChatML where it has none.

    tokenizer: a transformers tokenizer that knows `audio_token` as one special token.
    """

    def __init__(self, tokenizer: Any, audio_token: str) -> None:
        self.tokenizer, self.audio_token = tokenizer, audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self._rendered: dict[str, list[int]] = {}
        self.end_of_turn = self._find_end_of_turn()
        self.end_ids = self._ids(self.end_of_turn)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        stops = {self.end_ids[0], self.tokenizer.eos_token_id}
        return sorted(i for i in stops if i is not None)

    def user_messages(self, prompt: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{self.audio_token} {prompt}".strip()}]

    def encode_prompt(self, messages: Messages, audio_tokens: Sequence[int]) -> list[int]:
        """Ids up to where the assistant begins to speak; the i-th audio token stands `audio_tokens[i]` times."""
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
            self._rendered[key] = self._ids(self._render(messages, add_generation_prompt=True))
        return self._rendered[key]

    def encode_training(self, messages: Messages, answer: str, audio_tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """(ids, labels) of the chat and its answer: the labels are the answer and its end, NO_LABEL elsewhere.

        The answer is tokenised by itself, so that training sees exactly the prompt ids that decoding starts from.
        """
        prompt = self.encode_prompt(messages, audio_tokens)
        target = self._ids(answer, plain=True) + self.end_ids
        return prompt + target, [NO_LABEL] * len(prompt) + target

    def _find_end_of_turn(self) -> str:
        """What the template writes behind an answer, white space apart; the end-of-text token where it writes nothing."""
        question: Messages = [{"role": "user", "content": "?"}]
        full = self._render([*question, {"role": "assistant", "content": _PROBE}], add_generation_prompt=False)
        tail = full.rpartition(_PROBE)[2].strip()
        if not tail and not self.tokenizer.eos_token:
            raise UserError("the tokenizer has neither an end-of-turn in its chat template nor an eos_token: set eos_token")
        return tail or self.tokenizer.eos_token

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        template = self.tokenizer.chat_template or CHATML
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _ids(self, text: str, *, plain: bool = False) -> list[int]:
        """plain: what looks like a special token is text like any other."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
