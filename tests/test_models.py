"""Checkpoints: what is saved can be loaded by us, by transformers and by its pipeline, and damage is explained."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from rlhf_edu import models
from rlhf_edu.sampling import sample
from rlhf_edu.tokens import encode, load_tokenizer

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def saved(trained_policy, tokenizer, tmp_path):
    folder = tmp_path / "policy"
    models.save_model(trained_policy, tokenizer, folder, {"what": "a test"})
    return folder


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_round_trip(saved, trained_policy):
    again = models.load_policy(saved, "cpu")
    assert torch.equal(logits(again), logits(trained_policy))
    assert not again.training
    assert json.loads((saved / "card.json").read_text()) == {"what": "a test"}


def test_nothing_but_safetensors_and_text_is_written(saved):
    names = {p.name for p in saved.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "card.json"} <= names
    assert {p.suffix for p in saved.iterdir()} <= {".safetensors", ".json", ".txt", ".jinja"}
    assert [p.name for p in saved.parent.iterdir()] == ["policy"], "a temporary folder was left behind"


def test_transformers_loads_it_in_float32(saved, trained_policy):
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(trained_policy))
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr(), (
        "weights must stay tied"
    )


def test_half_is_stored_and_float32_is_loaded(trained_policy, tokenizer, tmp_path, saved):
    folder = tmp_path / "half"
    models.save_model(trained_policy, tokenizer, folder, half=True)
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, saved)]
    assert sizes[0] < 0.6 * sizes[1]
    for model in (models.load_policy(folder, "cpu"), AutoModelForCausalLM.from_pretrained(folder)):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert (logits(model) - logits(trained_policy)).abs().max() < 0.05
    assert trained_policy.dtype == torch.float32, "saving changed the model itself"


def test_pipeline_generates_what_we_sample(saved, trained_policy, tokenizer):
    generator = pipeline("text-generation", model=str(saved), device="cpu")
    assert generator.model.dtype == torch.float32
    text = "The film was"
    (out,) = generator(text, do_sample=False, max_new_tokens=20, return_full_text=False)
    (ids,) = sample(trained_policy, encode(tokenizer, [text]), eos_id=0, max_tokens=20, temperature=0)
    assert out["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) > 2


def test_its_tokenizer_travels_along(saved, tokenizer):
    for loaded in (load_tokenizer(saved), AutoTokenizer.from_pretrained(saved)):
        assert encode(loaded, ["The film was great."]) == encode(tokenizer, ["The film was great."])
        assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_saving_replaces_an_older_model(saved, policy, tokenizer):
    (saved / "left_over.txt").write_text("old")
    models.save_model(policy, tokenizer, saved)
    assert torch.equal(logits(models.load_policy(saved, "cpu")), logits(policy))
    assert not (saved / "left_over.txt").exists() and not (saved / "card.json").exists()


def test_failed_saving_keeps_the_older_model(
    saved, trained_policy, policy, tokenizer, one_sentence, monkeypatch
):
    def full(self, folder, **options):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(policy), "save_pretrained", full)
    with one_sentence(str(saved), "no space left", "earlier results are untouched"):
        models.save_model(policy, tokenizer, saved)
    assert torch.equal(logits(models.load_policy(saved, "cpu")), logits(trained_policy))
    assert [p.name for p in saved.parent.iterdir()] == ["policy"], "a part of a model was left behind"


def test_an_interrupt_between_old_and_new_leaves_the_old(saved, policy, tokenizer, monkeypatch):
    rename = type(saved).rename

    def interrupted(self, target):
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(saved), "rename", interrupted)
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        models.save_model(policy, tokenizer, saved)
    assert [p.name for p in saved.parent.iterdir()] == ["policy"]
    assert (saved / "model.safetensors").read_bytes() == before


# --- damage -----------------------------------------------------------------------------------------------------


def test_missing_folder_is_explained(tmp_path, one_sentence):
    for load in (models.load_policy, models.load_classifier):
        with one_sentence("no model folder", str(tmp_path / "nowhere"), "git checkout data"):
            load(tmp_path / "nowhere")
    for name in ("data/models/none", "outputs/mini-seed0/policy", "a folder/policy"):
        with one_sentence("no model folder", name):
            models.load_policy(name)


def test_hub_model_without_network_is_explained(one_sentence):
    with one_sentence("gpt2", "network", "--scale mini"):
        models.load_policy("gpt2")


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "missing"])
def test_damaged_weights_are_explained(saved, one_sentence, damage):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff" * 500}[damage])
    with one_sentence(str(saved), "restore the folder"):
        models.load_policy(saved)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model_type": "gpt2", "n_embd": 48, "vocab_size": 320}', "{}"]
)
def test_damaged_configuration_is_explained(saved, one_sentence, content):
    (saved / "config.json").write_text(content)
    with one_sentence(str(saved), "restore the folder"):
        models.load_policy(saved)


def test_missing_weights_are_found(saved, trained_policy, tokenizer, one_sentence):
    """A reward model's head is not in a policy: transformers would make up a random one."""
    with one_sentence(str(saved), "1 weights are missing"):
        models.load_classifier(saved)


def test_pickles_are_not_read(saved, trained_policy, one_sentence):
    (saved / "model.safetensors").unlink()
    torch.save(trained_policy.state_dict(), saved / "pytorch_model.bin")
    with one_sentence(str(saved)):
        models.load_policy(saved)


def test_a_pin_without_safetensors_is_explained(one_sentence):
    said = "x/y does not appear to have a file named model.safetensors. Checkout 'https://...' for available files."
    with one_sentence("no pickled weights", "data/hub.json"), models.safetensors_only("x/y"):
        raise OSError(said)
    with pytest.raises(OSError, match="another"), models.safetensors_only("x/y"):
        raise OSError("another")


def test_heads_of_more_than_one_layer_are_refused(tmp_path, one_sentence):
    """Log-probs are computed from the output embedding alone: here it would be without Gemma 2's cap."""
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0,
    )  # fmt: skip
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with one_sentence("final_logit_softcapping", "another policy"):
        models.load_policy(tmp_path)
    config.final_logit_softcapping = None
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    models.load_policy(tmp_path)


# --- what models are --------------------------------------------------------------------------------------------


def test_dropout_is_off_even_in_train_mode(trained_policy, tokenizer, tmp_path):
    """GPT-2 of the hub comes with dropout 0.1: policy and reference must agree all the same."""
    trained_policy.config.update({"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    models.save_model(trained_policy, tokenizer, tmp_path / "hub")
    policy = models.load_policy(tmp_path / "hub", "cpu").train()
    assert torch.equal(logits(policy), logits(policy))
    assert (logits(policy) - logits(trained_policy)).abs().max() < 1e-5
    reward = models.classifier_from(policy, labels=1, seed=0).train()
    assert torch.equal(logits(reward), logits(reward))


def test_new_policy_follows_its_seed_alone(tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (models.new_policy(tokenizer, s, layers=1, width=32, heads=2) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global random state was touched"
    assert torch.equal(logits(first), logits(again)) and not torch.equal(logits(first), logits(other))
    assert first.config.n_positions == 64 and first.config.vocab_size == len(tokenizer)
    assert (first.config.eos_token_id, first.config.pad_token_id) == (0, 1)


def test_activation_is_the_same_function_as_gpt2s(policy):
    twin = copy.deepcopy(policy)
    from transformers.activations import ACT2FN

    for block in twin.transformer.h:
        block.mlp.act = ACT2FN["gelu_new"]
    assert (logits(policy) - logits(twin)).abs().max() < 1e-6


def test_loaded_gpt2_gets_the_one_kernel_activation_and_the_same_gradients(policy, tokenizer, tmp_path):
    """Saved by anybody with GPT-2's own `gelu_new`, and saved again by us."""
    config = copy.deepcopy(policy.config)
    config.activation_function = "gelu_new"
    theirs = models.GPT2LMHeadModel(config).eval()
    theirs.load_state_dict(policy.state_dict())
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    ours = models.load_policy(tmp_path / "theirs", "cpu")
    assert "NewGELU" in str(theirs) and "NewGELU" not in str(ours)
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5
    models.save_model(ours, tokenizer, tmp_path / "ours")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()), logits(ours))


def test_copy_and_freeze(trained_policy):
    reference = models.freeze(models.copy_of(trained_policy.train()))
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    with torch.no_grad():
        next(trained_policy.parameters()).add_(1)
    assert not torch.equal(next(trained_policy.parameters()), next(reference.parameters()))
    assert all(p.requires_grad for p in trained_policy.parameters())


def test_value_head_starts_at_0(trained_policy):
    model = models.ValueModel(trained_policy)
    assert model.value(torch.randn(4, 32)).tolist() == [[0.0]] * 4
