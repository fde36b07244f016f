import pytest

from asrllm.collator.chat import NO_LABEL, ChatRenderer
from asrllm.errors import UserError
from asrllm.testing import tiny_tokenizer

AUDIO = "<|AUDIO|>"
LLAMA = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
WITHOUT_END = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"


def make_renderer(template=None):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AUDIO], special_tokens=True)
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer, AUDIO)


@pytest.mark.parametrize(("template", "end"), [(None, "<|im_end|>"), (LLAMA, "<|endoftext|>"), (WITHOUT_END, "<|im_end|>")])
def test_labels_are_the_answer_and_its_end(template, end):
    renderer = make_renderer(template)
    answer = f"assistant user one <|im_start|> {AUDIO} two"  # words that a search for a role would trip over
    ids, labels = renderer.encode_training(renderer.user_messages("Say assistant."), answer, [3])
    supervised = [label for label in labels if label != NO_LABEL]
    assert renderer.tokenizer.decode(supervised) == answer + end
    assert ids[-len(supervised) :] == supervised
    assert ids.count(renderer.audio_token_id) == 3
    assert labels[: -len(supervised)] == [NO_LABEL] * (len(ids) - len(supervised))
    assert supervised[-1] in renderer.stop_ids
    special = set(renderer.tokenizer.all_special_ids) - set(renderer.end_ids)
    assert not special & set(supervised), "what looks like a special token in a transcript is text"


def test_training_begins_with_the_ids_that_decoding_begins_with():
    renderer = make_renderer()
    messages = renderer.user_messages("Transcribe.")
    prompt = renderer.encode_prompt(messages, [5])
    ids, _ = renderer.encode_training(messages, "one", [5])
    assert ids[: len(prompt)] == prompt
    text = renderer.tokenizer.decode(prompt)
    assert text == f"<|im_start|>user\n{AUDIO * 5} Transcribe.<|im_end|>\n<|im_start|>assistant\n"


def test_several_audios_are_expanded_each_to_its_length():
    renderer = make_renderer()
    ids = renderer.encode_prompt([{"role": "user", "content": f"{AUDIO} and {AUDIO}"}], [2, 4])
    runs = "".join("a" if i == renderer.audio_token_id else "." for i in ids).replace(".", " ").split()
    assert runs == ["aa", "aaaa"]


@pytest.mark.parametrize("content", ["no audio", f"{AUDIO} {AUDIO}"])
def test_a_wrong_number_of_audio_tokens_is_one_sentence(content):
    with pytest.raises(UserError, match="audio tokens for 1 audios"):
        make_renderer().encode_prompt([{"role": "user", "content": content}], [2])
