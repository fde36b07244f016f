"""Models exported as transformers' VoxtralForConditionalGeneration."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from asrllm.checkpoints.voxtral import hub_tokenizer, llm_problem
from asrllm.collator.chat import CHATML, ChatRenderer
from asrllm.commands.dispatch import main
from asrllm.commands.plan import plan
from asrllm.models.asr_llm.generation import make_features
from asrllm.models.auto import AutoModel
from asrllm.models.build import build_model, build_processor
from asrllm.models.model_args import EncoderPart, LlmPart, LoraPart, ModelConfig
from asrllm.models.pretrained import empty_llm
from asrllm.testing import tiny_llm, tiny_tokenizer, tiny_whisper, vowels
from asrllm.training.run_config import PlanRun
from tests.checkpoints.test_merge import run_of
from tests.composing import load_config
from tests.conftest import assert_done, run_script
from tests.models.asr_llm.test_modeling import batch_of, samples
from tests.models.test_llm_families import FAMILIES, SIZE

# the example of the model card, without the package and with all logits
SCRIPT = """
import json, sys
sys.modules["asrllm"] = None
import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, VoxtralForConditionalGeneration

folder, waves, output = sys.argv[1:]
extractor = AutoFeatureExtractor.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = VoxtralForConditionalGeneration.from_pretrained(folder)
chat = [{"role": "user", "content": "<|AUDIO|>" * 375 + " Transcribe."}]
options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
inputs = tokenizer.apply_chat_template(chat, **options)
logits, texts = [], []
for audio in np.load(waves).values():
    features = extractor(audio, sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        logits.append(model(**inputs, input_features=features).logits[0])
    tokens = model.generate(**inputs, input_features=features, max_new_tokens=10)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    texts.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
torch.save(torch.stack(logits), output)
print(json.dumps({"prompt": inputs["input_ids"][0].tolist(), "texts": texts}))
"""


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    return loud_whisper(tmp_path_factory.mktemp("voxtral") / "whisper", ffn_dim=64)


def loud_whisper(folder, **options):
    """Write a tiny Whisper whose frames depend on the audio enough to change a text."""
    file = tiny_whisper(folder, **options) / "model.safetensors"
    state = load_file(file)
    for name in ("encoder.conv1.weight", "encoder.conv2.weight"):
        state[name] *= 20
    save_file(state, file, {"format": "pt"})
    return folder


def family_llm(folder, kind):
    """Write a directory of a tiny LLM of one of FAMILIES, with random weights."""
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": 0}
    fields = SIZE | FAMILIES[kind] | ids | {"vocab_size": len(tokenizer)}
    fields["max_position_embeddings"] = 4096
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **fields)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model(whisper, llm, *, pad_to_30s="keep_silence", **changes):
    """Return a tiny model of Voxtral's shape, after a step of training."""
    config = {
        "audio_encoder": EncoderPart(
            model_type="whisper", pretrained_model=str(whisper), frozen=True, lora=None
        ),
        "llm": LlmPart(
            pretrained_model=str(llm),
            lora=LoraPart(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]),
        ),
        "projector": "voxtral",
        "projector_hidden_size": 32,
        "audio_encoder_projector_ds_rate": 4,
    }
    processor = build_processor(
        ModelConfig(**config | changes), pad_to_30s=pad_to_30s, prompts=("Transcribe.",)
    )
    torch.manual_seed(0)
    model = build_model(processor, frozen=("audio_encoder", "llm"), dtype=torch.float32)
    for weight in model.projector.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # the gradient of lora_A is zero in the first step
        model(**batch_of(model, samples(2))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def waves():
    return [vowels(seconds, seed=i) for i, seconds in enumerate((0.5, 2.0, 7.3, 30.0))]


@torch.no_grad()
def logits_of(model, wave):
    """Return the prompt of a transcription, and its logits (tokens, vocabulary)."""
    processor = model.processor
    chat = processor.renderer.user_messages("Transcribe.")
    (prompt,) = processor.encode_prompts(
        [chat], [1], [int(model.config.num_audio_tokens(len(wave)))]
    )
    features = make_features(model, [wave], [wave], [0])
    embeddings = model.embed(torch.tensor([prompt]), model.encode(*features))
    return prompt, model.llm(inputs_embeds=embeddings).logits[0]


def export(model, folder, *options):
    run_of(model, folder / "exp")
    arguments = ["export", str(folder / "exp"), "--output", str(folder / "saved")]
    return main([*arguments, "--as", "voxtral", "--dtype", "float32", *options])


def run_with_transformers(folder):
    """Run SCRIPT on folder/saved, and return what it prints, and the logits."""
    np.savez(folder / "waves.npz", *waves())
    paths = [folder / name for name in ("saved", "waves.npz", "logits.pt")]
    printed = run_python(folder, SCRIPT, *paths)
    return json.loads(printed.splitlines()[-1]), torch.load(folder / "logits.pt")


def run_python(folder, code, *arguments):
    """Run code in a directory, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PATH": ""},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied qwen2", "llama", "qwen3_moe"])
def test_transformers_computes_the_same_logits_and_texts(whisper, tmp_path, kind):
    llm = tmp_path / "llm"
    llm = tiny_llm(llm) if kind == "tied qwen2" else family_llm(llm, kind)
    model = make_model(whisper, llm)
    assert export(model, tmp_path) == 0
    found, logits = run_with_transformers(tmp_path)
    texts = model.transcribe(
        waves(), max_new_tokens=10, max_tokens_per_second=None, repetition_guard=None
    )
    assert found["texts"] == texts
    assert len(set(texts)) > 1
    size = model.causal_lm.config.vocab_size
    for wave, theirs in zip(waves(), logits, strict=True):
        prompt, mine = logits_of(model, wave)
        assert found["prompt"] == prompt
        torch.testing.assert_close(theirs[:, :size], mine, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_trained_run_is_planned_and_exported(world, whisper, tmp_path, capsys):
    more = {
        "model.audio_encoder.pretrained_model": whisper,
        "prompt_file": world.root / "prompts.txt",
        "model.projector": "voxtral",
        "model.audio_encoder_projector_ds_rate": 4,
        "data.pad_to_30s": "keep_silence",
        "data.sampler.max_tokens": 1600,
        "data.valid_data_config": "null",
        "trainer.num_steps": 1,
        "trainer.precision": "fp32",
    }
    keys = world.overrides(
        tmp_path / "exp", **{key.replace(".", "__"): v for key, v in more.items()}
    )
    found = plan(load_config("plan", keys, PlanRun))
    assert found["data"]["utterances per batch"] < 1600 / 375
    assert found["data"]["ratio of audio tokens"] > 0.8
    assert_done(run_script("train", *keys))
    arguments = ["--output", str(tmp_path / "saved"), "--as", "voxtral", "--dtype", "float32"]
    assert main(["export", str(tmp_path / "exp"), *arguments]) == 0
    assert "VoxtralForConditionalGeneration" in capsys.readouterr().out
    found, _ = run_with_transformers(tmp_path)
    model = AutoModel.from_pretrained(tmp_path / "exp")
    assert found["texts"] == model.transcribe(
        waves(), max_new_tokens=10, max_tokens_per_second=None, repetition_guard=None
    )


@pytest.mark.slow
def test_example_of_the_card_prints_the_text(whisper, world, tmp_path):
    model = make_model(whisper, world.llm)
    assert export(model, tmp_path) == 0
    assert not list((tmp_path / "saved").glob("*.py"))
    for path in (tmp_path / "saved").glob("*.[jm]*"):
        assert str(tmp_path) not in path.read_text(), path.name
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "library_name: transformers" in card
    wave = waves()[1]
    soundfile.write(tmp_path / "speech.wav", wave, 16000, subtype="FLOAT")
    code = card.split("```python\n")[1].split("```")[0]
    printed = run_python(tmp_path, 'import sys\nsys.modules["asrllm"] = None\n' + code)
    chat = model.processor.renderer.user_messages("Transcribe.")
    assert printed.strip() == model.generate([wave], [chat])[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pad_to_30s": True}, ["data.pad_to_30s=true", "data.pad_to_30s=keep_silence"]),
        ({"pad_to_30s": False}, ["data.pad_to_30s=false", "data.pad_to_30s=keep_silence"]),
        ({"projector": "mlp"}, ["model.projector=mlp", "model.projector=voxtral"]),
        (
            {"projector_hidden_size": 48},
            ["model.projector_hidden_size=48", "model.projector_hidden_size=32"],
        ),
        (
            {"audio_encoder_projector_ds_rate": 8, "tag_audio_boundary": True},
            ["ds_rate=8", "ds_rate=4", "boundary=true", "boundary=false"],
        ),
    ],
)
def test_settings_that_voxtral_does_not_have_are_rejected(
    world, whisper, tmp_path, capsys, changes, named
):
    assert_rejected(make_model(whisper, world.llm, **changes), tmp_path, capsys, named)


def assert_rejected(model, folder, capsys, named):
    """Check that an export ends with status 2 and a message, and writes nothing."""
    assert export(model, folder) == 2
    error = capsys.readouterr().err
    assert "--as voxtral" in error
    for text in named:
        assert text in error
    assert not (folder / "saved").exists()


def test_other_encoders_are_rejected(world, whisper, tmp_path, capsys):
    narrow = make_model(world.whisper, world.llm)
    assert_rejected(narrow, tmp_path, capsys, ["encoder_ffn_dim=64", "32"])
    zipformer = EncoderPart(
        model_type="zipformer", pretrained_model=str(world.zipformer), lora=None
    )
    other = make_model(whisper, world.llm, pad_to_30s=False, audio_encoder=zipformer)
    named = ["model.audio_encoder.model_type=zipformer", "model.audio_encoder.model_type=whisper"]
    assert_rejected(other, tmp_path, capsys, named)


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_llms_that_change_their_logits_have_a_problem(kind):
    fields = SIZE | FAMILIES[kind] | {"model_type": kind}
    problem = llm_problem(empty_llm(fields))
    assert bool(problem) == (kind in ("gemma2", "granite", "cohere"))


def test_llm_that_scales_its_logits_is_rejected(whisper, tmp_path, capsys):
    model = make_model(whisper, family_llm(tmp_path / "llm", "gemma2"))
    assert_rejected(model, tmp_path, capsys, ["'gemma2'", "logits", "Qwen2"])


@pytest.mark.parametrize("option", ["--keep-adapters", "--separate-adapter", "--parts"])
def test_options_about_other_files_are_rejected(tmp_path, capsys, option):
    arguments = ["export", str(tmp_path), "--output", str(tmp_path / "saved")]
    assert main([*arguments, "--as", "voxtral", option]) == 2
    assert option in capsys.readouterr().err


DATED = CHATML + "{% if add_generation_prompt %}{{ strftime_now('%d %b %Y') }}{% endif %}"


@pytest.mark.parametrize("template", [None, CHATML, DATED])
@pytest.mark.parametrize("bos", [False, True])
def test_saved_chat_template_gives_the_prompts_of_training(template, bos):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|AUDIO|>"], special_tokens=True)
    tokenizer.chat_template = template
    if bos:  # like Llama's, whose template may leave the BOS to the tokenizer
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    renderer = ChatRenderer(tokenizer, "<|AUDIO|>")
    chat = renderer.user_messages("Transcribe.")
    expected = renderer.encode_prompt(chat, [1])
    assert (expected[0] == 0) == bos
    saved = hub_tokenizer(renderer)
    ids = saved.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert tokenizer.chat_template == template
