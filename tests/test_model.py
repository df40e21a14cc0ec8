"""Opening a model: what it is, without a weight; what cannot be opened, in one message; no code from a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from autotune.errors import InputError
from autotune.model import load_model, load_tokenizer, open_model


def refusal(source, **options) -> InputError:
    with pytest.raises(InputError) as error:
        open_model(str(source), **options)
    return error.value


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_every_floating_tensor_is_in_a_group_or_kept_with_a_reason(models, name):
    opened = open_model(str(models(name)))
    stored = {tensor for tensor, info in opened.checkpoint.tensors.items() if info.floating}
    grouped = [member.tensor for group in opened.spec.groups for member in group.members]
    kept = [tensor.tensor for tensor in opened.spec.kept]
    assert stored == set(grouped) | set(kept)
    shared = {"model.embed_tokens.weight"} if name == "llama-tied" else {"transformer.wte.weight"}
    assert set(grouped) & set(kept) <= shared  # tied: looked up as it is, and multiplied as lm_head
    assert all(tensor.reason for tensor in opened.spec.kept)
    assert opened.spec.kept_bytes == sum(tensor.bytes for tensor in opened.spec.kept)


@pytest.mark.parametrize(
    ("name", "architecture", "task", "tied"),
    [
        ("llama", "LlamaForCausalLM", "causal-lm", False),
        ("llama-tied", "LlamaForCausalLM", "causal-lm", True),
        ("gpt2", "GPT2LMHeadModel", "causal-lm", True),
        ("bert", "BertModel", "encoder", False),
    ],
)
def test_what_a_model_is(models, name, architecture, task, tied):
    spec = open_model(str(models(name))).spec
    assert (spec.architecture, spec.task, spec.tied_embeddings) == (architecture, task, tied)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert"])
def test_dense_bytes_are_those_of_the_file(models, name):
    opened = open_model(str(models(name)))
    assert opened.spec.dense_bytes == sum(info.bytes for info in opened.checkpoint.tensors.values() if info.floating)


@pytest.mark.parametrize(("name", "asked", "runs_in"), [("llama", None, "fp32"), ("llama-bf16", None, "bf16")])
def test_the_checkpoints_own_numbers_are_the_default(models, name, asked, runs_in):
    opened = open_model(str(models(name)), asked)
    assert opened.spec.dtype == runs_in
    assert next(load_model(opened).parameters()).dtype == opened.dtype


def test_another_dtype_can_be_asked_for(llama):
    opened = open_model(str(llama), "bf16")
    assert opened.spec.dtype == "bf16"
    assert next(load_model(opened).parameters()).dtype == torch.bfloat16


def test_opening_allocates_no_weight(llama, monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    assert open_model(str(llama)).spec.groups


def test_a_bare_config_is_enough_for_latency(llama, tmp_path):
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    assert refusal(tmp_path).code == "model.missing"
    opened = open_model(str(tmp_path / "config.json"), latency_only=True)
    assert opened.spec.model_hash is None
    assert [group.name for group in opened.spec.groups] == [group.name for group in open_model(str(llama)).spec.groups]
    assert torch.equal(load_model(opened).lm_head.weight, load_model(opened).lm_head.weight)  # random, but seeded


def test_a_spec_survives_json(opened_llama):
    spec = opened_llama.spec
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize("source", ["no/such/folder/at/all", "./gone", "/gone", "org/name"])
def test_a_source_that_is_nothing_says_what_to_give(source):
    error = refusal(source)
    assert error.code == "model.missing"
    assert source in error.message
    assert "revision" in error.hint


def test_an_unreachable_hub_id_is_one_message():
    assert refusal("org/name@main").code == "model.hub"  # tests are offline


def test_a_folder_without_config_is_refused(tmp_path):
    assert refusal(tmp_path).code == "model.missing"


def test_code_in_the_checkpoint_is_never_run(checkpoint_copy, tmp_path):
    marker = tmp_path / "marker"
    code = f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (checkpoint_copy / "own.py").write_text(code)
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change_config(checkpoint_copy, auto_map=auto_map)  # of an architecture that transformers ships: ignored
    opened = open_model(str(checkpoint_copy))
    load_model(opened)
    assert opened.spec.architecture == "LlamaForCausalLM"
    change_config(checkpoint_copy, model_type="unheard-of")
    error = refusal(checkpoint_copy)
    assert error.code == "model.remote_code"
    assert "code" in error.hint
    assert not marker.exists()


def test_trust_remote_code_is_no_ones_parameter():
    import inspect

    assert "trust_remote_code" not in inspect.signature(open_model).parameters
    assert "trust_remote_code" not in inspect.signature(load_model).parameters


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "unheard-of"},
        {"hidden_size": "many"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"vocab_size": -1},
    ],
)
def test_a_config_that_makes_no_model_is_one_message(checkpoint_copy, values):
    change_config(checkpoint_copy, **values)
    assert refusal(checkpoint_copy).code in ("model.architecture", "model.corrupt")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"model_type": "resnet"}'])
def test_a_config_that_is_no_config_is_one_message(checkpoint_copy, text):
    (checkpoint_copy / "config.json").write_text(text)
    assert refusal(checkpoint_copy).code == "model.architecture"


def test_a_shape_that_differs_from_the_config_is_named(checkpoint_copy):
    change_config(checkpoint_copy, intermediate_size=192)
    error = refusal(checkpoint_copy)
    assert error.code == "model.corrupt"
    assert "mlp." in error.message
    assert "192" in error.message


def test_a_missing_tensor_is_named(checkpoint_copy):
    change_tensors(checkpoint_copy, lambda tensors: tensors.pop("model.norm.weight"))
    error = refusal(checkpoint_copy)
    assert error.code == "model.corrupt"
    assert "model.norm.weight" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name_and_count(checkpoint_copy, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[[3, 70]] = value

    change_tensors(checkpoint_copy, spoil)
    opened = open_model(str(checkpoint_copy))
    with pytest.raises(InputError, match=r"up_proj\.weight holds 2 ") as error:
        load_model(opened)
    assert error.value.code == "model.nonfinite"
    assert str(checkpoint_copy) in error.value.message


def test_large_finite_weights_are_fine(checkpoint_copy):
    change_tensors(checkpoint_copy, lambda tensors: tensors["model.norm.weight"].fill_(3e38))  # their sum is infinite
    load_model(open_model(str(checkpoint_copy)))


def test_a_folder_without_tokenizer_has_none(llama):
    assert load_tokenizer(llama) is None


def test_loaded_models_need_no_gradient_and_are_in_eval_mode(opened_llama):
    model = load_model(opened_llama)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
