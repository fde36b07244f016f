"""Which weights are trained: adapters, whole parts, patterns; and training in stages."""

import json

import pytest
import torch

from asrllm.errors import UserError
from asrllm.models.init_from import load_initial_weights
from asrllm.models.model_args import EncoderPart, LlmPart, LoraPart, PeftOptions
from asrllm.schema import build
from asrllm.testing import tiny_llm
from tests.models.asr_llm.test_modeling import batch_of, make_model, samples

WHISPER_LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "fc1"]}
ZIPFORMER_LORA = WHISPER_LORA | {"target_modules": ["in_proj", "out_proj"]}


def encoder_part(world, kind, **changes):
    lora = {"whisper": WHISPER_LORA, "zipformer": ZIPFORMER_LORA}[kind]
    values = {
        "model_type": kind,
        "pretrained_model": str(getattr(world, kind)),
        "frozen": True,
        "lora": LoraPart(**lora),
    }
    return EncoderPart(**values | changes)


def llm_lora(**options):
    values = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    return {"lora": LoraPart(**values | options)}


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whisper", "zipformer"])
def test_adapters_of_the_encoder_are_trained_saved_and_loaded(world, tmp_path, kind):
    model = make_model(
        world, audio_encoder=encoder_part(world, kind), audio_encoder_projector_ds_rate=2
    )
    adapters = {name for name, _ in model.audio_encoder.named_parameters() if "lora_" in name}
    assert len(adapters) >= 4
    assert {
        n.removeprefix("audio_encoder.")
        for n in trained_names(model)
        if n.startswith("audio_encoder.")
    } == adapters
    model(**batch_of(model, samples())).loss.backward()
    for name, parameter in model.audio_encoder.named_parameters():
        assert (parameter.grad is not None) == (name in adapters), name
        assert name not in adapters or parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path)
    waves = [s.wave for s in samples()]
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.transcribe(waves, max_new_tokens=8) == model.transcribe(waves, max_new_tokens=8)
    assert json.loads((tmp_path / "config.json").read_text())["audio_encoder_lora"]["r"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*q_proj"},
        {"options": PeftOptions(rank_pattern={"q_proj": 2})},
    ],
)
def test_options_are_passed_to_peft(world, tmp_path, options):
    model = make_model(world, llm=llm_lora(**options))
    given = model.llm.peft_config["default"]
    for key, value in LoraPart(**options).as_peft().items():
        if (key in options and key != "target_modules") or key == "rank_pattern":
            assert getattr(given, key) == value
    counts = {"all-linear": 14, r".*layers\.1\..*q_proj": 1}
    targets = [name for name, _ in model.llm.named_parameters() if "lora_A" in name]
    assert len(targets) == counts.get(options.get("target_modules"), 4)
    model(**batch_of(model, samples())).loss.backward()
    assert all(p.grad is not None for p in model.llm.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    waves = [s.wave for s in samples()]
    assert type(model).from_pretrained(tmp_path).transcribe(
        waves, max_new_tokens=8
    ) == model.transcribe(waves, max_new_tokens=8)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank_patern": {}}, r"'model\.llm\.lora\.options\.rank_patern'.*rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, r"'model\.llm\.lora\.options\.modules_to_save'"),
        ({"init_lora_weights": "pissa"}, r"options\.init_lora_weights='pissa' "),
        ({"rank_pattern": [1]}, r"options\.rank_pattern=\[1\] "),
        ({"rank_pattern": {"q_proj": 0}}, r"options\.rank_pattern\.q_proj=0 "),
        ({"lora_bias": 3}, r"options\.lora_bias=3 "),
        ({"alpha_pattern": {"(q": 1}}, r"lora\.options\.alpha_pattern: '\(q' "),
        ({"exclude_modules": "(q"}, r"lora\.options\.exclude_modules: '\(q' "),
        ({"layers_pattern": "("}, r"lora\.options\.layers_pattern: '\(' "),
        ({"rank_pattern": {"(?i)q_proj": 8}}, r"lora\.options\.rank_pattern: '\(\?i\)q_proj' "),
    ],
)
def test_invalid_options_of_peft_are_rejected(options, named):
    with pytest.raises(UserError, match=named):
        build(LlmPart, {"lora": {"options": options}}, group="model.llm.")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, r"lora\.target_modules: .*'v_porj'.*'v_proj'"),
        ({"target_modules": ["nothing"]}, r"lora\.target_modules: .*'nothing'.*q_proj"),
        ({"options": PeftOptions(rank_pattern={"k_proj": 2})}, r"lora .*rank_pattern.*k_proj"),
        (
            {"options": PeftOptions(exclude_modules=["o_porj"])},
            r"lora\.options\.exclude_modules: .*'o_porj'.*'o_proj'",
        ),
        (
            {"options": PeftOptions(layers_to_transform=[0, 70])},
            r"lora\.options\.layers_to_transform: .* 70",
        ),
    ],
)
def test_layers_that_the_model_does_not_have_are_rejected(world, options, named):
    """PEFT trains the other layers, at most with a warning."""
    with pytest.raises(UserError, match=f"model.llm.{named}"):
        make_model(world, llm=llm_lora(**options))


def test_layers_of_an_encoder_are_chosen_by_number(world):
    lora = LoraPart(**WHISPER_LORA, options=PeftOptions(layers_to_transform=[1]))
    model = make_model(world, audio_encoder=encoder_part(world, "whisper", lora=lora))
    names = [name for name in trained_names(model) if name.startswith("audio_encoder.")]
    assert names
    assert all(name.startswith("audio_encoder.layers.1.") for name in names)


def test_adapters_on_an_encoder_without_such_layers_or_that_is_trained_are_rejected(world):
    lora = LoraPart(**WHISPER_LORA | {"target_modules": ["nothing"]})
    with pytest.raises(UserError, match=r"model\.audio_encoder\.lora.*'nothing'"):
        make_model(world, audio_encoder=encoder_part(world, "whisper", lora=lora))
    with pytest.raises(
        UserError, match=r"model\.audio_encoder\.frozen=false .*model\.audio_encoder\.lora\.r=0"
    ):
        encoder_part(world, "whisper", frozen=False)


def test_only_the_projector_is_trained_without_adapters(world):
    model = make_model(world, llm=llm_lora(r=0))
    assert {name.partition(".")[0] for name in trained_names(model)} == {"projector"}


def test_patterns_freeze_parameters_by_name(world):
    encoder = encoder_part(world, "whisper", frozen=False, lora=None)
    patterns = ["audio_encoder.layers.0.*", "audio_encoder.conv?.*", "projector.*"]
    model = make_model(world, frozen=("llm",), patterns=patterns, audio_encoder=encoder)
    names = trained_names(model)
    assert {"audio_encoder.layers.1.fc1.weight", "audio_encoder.layer_norm.bias"} <= names
    assert not [
        n
        for n in names
        if n.startswith(("audio_encoder.layers.0.", "audio_encoder.conv", "projector."))
    ]
    assert model.inherited == tuple(
        n for n, _ in model.named_parameters() if n.startswith("projector.")
    )
    with pytest.raises(UserError, match=r"'projektor\.\*'.*'projector"):
        make_model(world, patterns=["projektor.*"])


# --- stages ---


def finished_run(model, folder):
    """Write the files of a run that load_initial_weights reads."""
    model.config.save_pretrained(folder)
    torch.save(
        {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad},
        folder / "pretrained.pt",
    )
    return folder


def test_run_loads_all_weights_that_an_earlier_run_trained(world, tmp_path):
    first = make_model(world, llm=llm_lora(r=0))
    with torch.no_grad():
        first.projector.mlp.linear1.weight.add_(1)
    second = make_model(world, audio_encoder=encoder_part(world, "whisper"))
    taken = load_initial_weights(second, finished_run(first, tmp_path))
    assert taken == {name for name, _ in first.named_parameters() if name.startswith("projector.")}
    for name, parameter in first.projector.named_parameters():
        assert torch.equal(parameter, second.projector.get_parameter(name))
    third = make_model(
        world, frozen=("llm", "audio_encoder"), init_from=str(tmp_path), patterns=["projector.*"]
    )
    assert set(third.inherited) == taken


def test_part_trained_in_full_may_be_frozen_or_get_adapters_next(world, tmp_path):
    first = make_model(
        world,
        frozen=("llm",),
        audio_encoder=encoder_part(world, "whisper", frozen=False, lora=None),
    )
    with torch.no_grad():
        first.audio_encoder.layers[0].self_attn.q_proj.weight.add_(1)
    run = str(finished_run(first, tmp_path))
    second = make_model(
        world, init_from=run, audio_encoder=encoder_part(world, "whisper"), patterns=["llm.*lora_*"]
    )
    changed = second.audio_encoder.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(changed, first.audio_encoder.layers[0].self_attn.q_proj.weight)
    base = {
        name
        for name, _ in second.named_parameters()
        if name.startswith("audio_encoder.") and "lora_" not in name
    }
    adapters = {
        name for name, _ in second.named_parameters() if name.startswith("llm.") and "lora_" in name
    }
    assert set(second.inherited) == base | adapters
    assert second.stored_weights() == {"audio_encoder": len(base), "llm": 0}
    with pytest.raises(UserError, match=r"exclude_from_checkpoint=\[audio_encoder\].* init_from"):
        make_model(world, init_from=run, exclude_from_checkpoint=["audio_encoder"])
    with pytest.raises(UserError, match=r"model\.audio_encoder\.frozen=false"):
        make_model(
            world,
            audio_encoder=encoder_part(world, "whisper", frozen=False, lora=None),
            exclude_from_checkpoint=["audio_encoder"],
        )


def test_another_base_model_is_rejected(world, tmp_path):
    finished_run(make_model(world), tmp_path)
    other = tiny_llm(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match=f"init_from='{tmp_path}' .*'{world.llm}'.*'{other}'"):
        load_initial_weights(
            make_model(world, llm=llm_lora() | {"pretrained_model": str(other)}), tmp_path
        )


def test_frozen_llm_recomputes_activations(world):
    """transformers recomputes in training mode only. The dropout of a frozen LLM stays off."""
    model = make_model(world, llm=llm_lora(r=0))
    model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = []
    model.llm.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**batch_of(model, samples())).loss.backward()
    assert len(calls) == 2
    assert not model.llm.model.layers[0].mlp.training
    model.eval()
    assert not model.llm.model.layers[0].training


def test_label_smoothing_applies_in_training_only(world):
    model = make_model(world)
    batch = batch_of(model, samples())
    plain = model(**batch).loss
    model.label_smoothing = 0.2
    assert model(**batch).loss == plain
    smoothed = model.train()(**batch).loss
    assert abs(smoothed - plain) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"audio_encoder_projector_ds_rate": 2},
            "audio_encoder_projector_ds_rate=4, .* 2\\.",
        ),
        ({"tag_audio_boundary": True}, "tag_audio_boundary=False, .* True"),
        ({"llm": llm_lora(lora_alpha=9)}, "lora=.*'lora_alpha': 8.*'lora_alpha': 9"),
        ({"llm": llm_lora(r=0)}, "lora={.* None"),
    ],
)
def test_differences_from_an_earlier_run_are_reported(world, tmp_path, changes, message):
    finished_run(make_model(world), tmp_path)
    with pytest.raises(UserError, match=message):
        load_initial_weights(make_model(world, **changes), tmp_path)


NAME = "projector.mlp.linear1.weight"
# how the weights of an earlier run can be damaged, and what the message must name
DAMAGED_WEIGHTS = {
    "empty": (lambda state: {}, "projector"),
    "no adapters": (
        lambda state: {key: value for key, value in state.items() if "lora_" not in key},
        "llm adapters",
    ),
    "int8": (lambda state: state | {NAME: state[NAME].to(torch.int8)}, NAME),
    "NaN": (lambda state: state | {NAME: state[NAME] * float("nan")}, NAME),
    "infinite": (lambda state: state | {NAME: state[NAME].double() + float("inf")}, NAME),
    "sparse": (lambda state: state | {NAME: state[NAME].to_sparse()}, NAME),
    "one value": (lambda state: state | {NAME: torch.zeros(1)}, NAME),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_damaged_weights_of_an_earlier_run_are_rejected(world, tmp_path, damage):
    run = finished_run(make_model(world), tmp_path)
    change, named = DAMAGED_WEIGHTS[damage]
    state = torch.load(run / "pretrained.pt", weights_only=True)
    torch.save(change(state), run / "pretrained.pt")
    model = make_model(world)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        load_initial_weights(model, run)
    assert f"init_from={str(run)!r}" in str(caught.value)
    assert named in str(caught.value)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name])


@pytest.mark.slow
def test_dropout_may_differ_and_weights_must_be_complete(world, tmp_path):
    finished_run(make_model(world), tmp_path)
    state = torch.load(tmp_path / "pretrained.pt", weights_only=True)
    assert load_initial_weights(make_model(world, llm=llm_lora(lora_dropout=0.5)), tmp_path) == set(
        state
    )
    name = "projector.mlp.linear1.weight"
    for change, message in (
        ({name: None}, f"init_from=.*'{name}'"),
        ({"projector.x": torch.zeros(1)}, "'projector.x' "),
        ({name: torch.zeros(2, 2)}, rf"'{name}' .* \(2, 2\) .* \(32, 64\) "),
    ):
        torch.save(
            {k: v for k, v in (state | change).items() if v is not None}, tmp_path / "pretrained.pt"
        )
        with pytest.raises(UserError, match=message):
            load_initial_weights(make_model(world), tmp_path)
    with pytest.raises(UserError, match=f"init_from='{tmp_path}/nothing' "):
        load_initial_weights(make_model(world), tmp_path / "nothing")
