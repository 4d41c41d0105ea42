"""LoRA: the reference is the policy with its adapter off; and training from a configuration file."""

import copy
import json
import math
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
import transformers

from rlhf_edu import data, estimate, lora, losses, models, ppo, recipe, sampling, training
from rlhf_edu.__main__ import main
from rlhf_edu.errors import UserError
from rlhf_edu.logprobs import all_logps
from rlhf_edu.preference import train_preference

pytest.importorskip("peft", reason="LoRA needs peft: pip install -e .[gpu]")

LLAMA = Path(__file__).parents[1] / "configs" / "llama3_8b_ultrafeedback_simpo.json"


@pytest.fixture
def comparisons(sentences):
    rows = [
        {"prompt": s.split(" ", 2)[0], "chosen": " " + s.split(" ", 1)[1], "rejected": " was boring."}
        for s in sentences[:24]
    ]
    return datasets.Dataset.from_list(rows)


def logps_of(model, tokenizer, demonstrations):
    prompts, responses = (part[:10] for part in demonstrations)
    return all_logps(model, tokenizer.pad_token_id, prompts, responses)


def trained(policy, comparisons, tokenizer, steps=4, loss=losses.dpo_loss, **more):
    config = training.TrainConfig(steps=steps, learning_rate=1e-2, save_seconds=0)
    return train_preference(
        policy, comparisons, loss, tokenizer=tokenizer, config=config, reference=lora.Reference(policy), batch_size=8,
        **more,
    )  # fmt: skip


def llama(tokenizer, folder):
    """A tiny Llama with a chat template, as a folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return models.load_policy(folder)


def test_the_adapter_starts_as_nothing_and_alone_learns(policy, tokenizer, comparisons, demonstrations):
    base = copy.deepcopy(policy)
    before = logps_of(base, tokenizer, demonstrations)
    lora.add_lora(policy, rank=4, seed=1)
    assert torch.equal(logps_of(policy, tokenizer, demonstrations), before)  # B = 0
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    learning = {n: p.clone() for n, p in policy.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in n for n in learning)
    metrics = trained(policy, comparisons, tokenizer)
    assert metrics["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference agree
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[n], p) and now[n].grad is None for n, p in frozen.items())
    assert all(not torch.equal(now[n], p) for n, p in learning.items())
    assert {n for n, p in now.items() if p.requires_grad} == set(learning)
    assert not torch.allclose(logps_of(policy, tokenizer, demonstrations), before)
    assert torch.equal(logps_of(lora.Reference(policy), tokenizer, demonstrations), before)


def test_the_reference_is_off_only_inside(policy, tokenizer, comparisons, demonstrations):
    lora.add_lora(policy, rank=2)
    trained(policy, comparisons, tokenizer)
    on = logps_of(policy, tokenizer, demonstrations)
    learns = [p.requires_grad for p in policy.parameters()]
    with pytest.raises(RuntimeError, match="on the way"), lora.adapter_off(policy):
        assert not torch.equal(logps_of(policy, tokenizer, demonstrations), on)
        raise RuntimeError("on the way")
    assert torch.equal(logps_of(policy, tokenizer, demonstrations), on)
    assert [p.requires_grad for p in policy.parameters()] == learns


def test_merged_saved_and_loaded_it_is_the_same_policy(
    policy, tokenizer, comparisons, demonstrations, tmp_path
):
    base = copy.deepcopy(policy)
    lora.add_lora(policy, rank=4)
    trained(policy, comparisons, tokenizer)
    want = logps_of(policy, tokenizer, demonstrations)
    plain = lora.merged(policy)
    assert torch.allclose(logps_of(plain, tokenizer, demonstrations), want, atol=1e-5, rtol=0)
    assert not [n for n, _ in plain.named_parameters() if "lora" in n]
    assert torch.equal(
        logps_of(policy, tokenizer, demonstrations), want
    )  # the copy was merged, not the policy
    models.save_model(plain, tokenizer, tmp_path / "plain")
    assert torch.allclose(
        logps_of(models.load_policy(tmp_path / "plain"), tokenizer, demonstrations), want, atol=1e-5, rtol=0
    )
    lora.save_adapter(policy, tmp_path / "adapter")
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} <= {".safetensors", ".json"}
    again = lora.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logps_of(again, tokenizer, demonstrations), want)
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)


def test_a_resumed_run_ends_as_an_uninterrupted_one(policy, tokenizer, comparisons, tmp_path):
    def fresh():
        return lora.add_lora(copy.deepcopy(policy), rank=4, seed=3)

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt

    whole = trained(fresh(), comparisons, tokenizer, after_step=lambda step: None)
    with pytest.raises(KeyboardInterrupt):
        trained(fresh(), comparisons, tokenizer, folder=tmp_path / "run", after_step=stop)
    state = tmp_path / "run" / "state.safetensors"
    assert state.stat().st_size < 100_000  # the adapter and its optimizer alone
    resumed = trained(fresh(), comparisons, tokenizer, folder=tmp_path / "run", after_step=lambda step: None)
    pd.testing.assert_frame_equal(resumed, whole)


def test_ppo_with_the_adapter_off_as_reference(policy, tokenizer, demonstrations):
    lora.add_lora(policy, rank=4)
    config = ppo.PPOConfig(rollouts=2, episodes=8, epochs=1, minibatches=1, max_tokens=6, learning_rate=1e-2)
    metrics = ppo.train_ppo(
        policy, demonstrations[0], lambda p, r: torch.tensor([float(len(x)) for x in r]).numpy(), tokenizer=tokenizer,
        reference=lora.Reference(policy), config=config,
    )  # fmt: skip
    assert metrics["kl"].iloc[0] == pytest.approx(0, abs=1e-6) and metrics["kl"].iloc[-1] != 0


def test_a_llama_in_bfloat16_under_a_float32_adapter(tokenizer, comparisons, demonstrations, tmp_path):
    llama(tokenizer, tmp_path / "llama")
    policy = models.load_policy(tmp_path / "llama", dtype=torch.bfloat16)
    lora.add_lora(policy, rank=2)
    kinds = {p.requires_grad: p.dtype for p in policy.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    metrics = trained(policy, comparisons, tokenizer)
    assert metrics["loss"].notna().all()
    assert len(sampling.sample(policy, [[5, 6]], eos_id=tokenizer.eos_token_id, max_tokens=3, seed=0)) == 1


def chats(path):
    def chat(answer):
        return [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": answer}]

    rows = [
        {"prompt": "How was it?", "chosen": chat(f"It was great {i}."), "rejected": chat("Bad.")}
        for i in range(12)
    ]
    data.write_jsonl(path, rows)
    return path


def written(tmp_path, **changes):
    settings = json.loads(LLAMA.read_text()) | {"architecture": None} | changes
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("rank", [None, 2])
def test_the_llama_configuration_runs_on_a_stand_in(tokenizer, tmp_path, rank, capsys):
    llama(tokenizer, tmp_path / "llama")
    path = written(
        tmp_path, policy=str(tmp_path / "llama"), comparisons=str(chats(tmp_path / "chats.jsonl")), batch=4,
        max_prompt=32, max_tokens=16, lora_rank=rank, learning_rate=1e-3,
    )  # fmt: skip
    assert main(["train", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "Estimate for one device" in capsys.readouterr().out
    metrics = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert len(metrics) == 3 and metrics["loss"].notna().all()
    start = models.load_policy(tmp_path / "llama")
    if rank:
        end = lora.load_adapter(copy.deepcopy(start), tmp_path / "out" / "adapter")
    else:
        end = models.load_policy(tmp_path / "out" / "policy")
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(end(ids).logits, start(ids).logits)


def test_an_interrupted_run_goes_on_with_a_smaller_micro_batch(tokenizer, tmp_path, monkeypatch):
    """As it is told to where the GPU's memory was too small."""
    llama(tokenizer, tmp_path / "llama")
    settings = {
        "policy": str(tmp_path / "llama"), "comparisons": str(chats(tmp_path / "chats.jsonl")), "batch": 4, "max_prompt": 32,
        "max_tokens": 16, "learning_rate": 1e-3, "lora_rank": None,
    }  # fmt: skip
    update, calls, config = recipe.Progress.update, [], recipe.TrainConfig
    monkeypatch.setattr(recipe, "TrainConfig", lambda *given, **more: config(*given, **more, save_seconds=0))

    def interrupted(self, *given, **more):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return update(self, *given, **more)

    monkeypatch.setattr(recipe.Progress, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(recipe.load(written(tmp_path, micro_batch=4, **settings)), tmp_path / "out")
    assert (tmp_path / "out" / "run" / "state.safetensors").exists()
    resumed = recipe.train(recipe.load(written(tmp_path, micro_batch=1, **settings)), tmp_path / "out")
    whole = recipe.train(recipe.load(written(tmp_path, micro_batch=4, **settings)), tmp_path / "whole")
    assert len(calls) < 2 * len(whole) + 2  # it did go on
    assert resumed["loss"].tolist() == pytest.approx(whole["loss"].tolist(), abs=1e-4)


def test_a_response_ends_as_the_chat_template_ends_it(tokenizer):
    tokenizer, chat = (
        copy.deepcopy(tokenizer),
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    )
    row = {"prompt": "a", "chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "c"}]}
    begin = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    ask = "{% if add_generation_prompt %}<assistant>{% endif %}"
    for end, kept in (("<|im_end|>\n", "<|im_end|>"), (tokenizer.eos_token, ""), ("\n", "")):
        tokenizer.chat_template = f"{begin}{end}{{% endfor %}}{ask}"
        texts = recipe.as_texts(row, tokenizer)
        assert (texts["chosen"], texts["rejected"]) == (f"b{kept}", f"c{kept}")
        assert texts["prompt"] == f"<user>a{end}<assistant>"
    tokenizer.chat_template = f"{begin}{{% endfor %}}{{% if add_generation_prompt %}}<answer>{{% endif %}}"
    with pytest.raises(UserError, match="as texts"):
        recipe.as_texts(row, tokenizer)


def test_the_arithmetic_of_llama_3_8b_by_hand():
    """Llama 3 8B has 8,030,261,248 weights. Rank 16: a layer has q, o (4096 + 4096), k, v (4096 + 1024), and three
    of the MLP (4096 + 14336): 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) = 1,310,720; 32 layers 41,943,040."""
    given = recipe.load(LLAMA)
    config = transformers.AutoConfig.for_model(**given.architecture)
    assert estimate.size_of(config)["weights"] == 8_030_261_248
    assert estimate.lora_weights(config, 16) == 41_943_040
    full, thin = recipe.memory_of(given, None), recipe.memory_of(given, 16)
    assert full["weights"] + full["gradients"] + full["AdamW"] == 16 * 8_030_261_248
    assert thin["weights"] == 2 * 8_030_261_248 + 4 * 41_943_040 and thin["AdamW"] == 8 * 41_943_040
    assert thin["logits"] == 3 * 4 * 2 * 1024 * 128_256
    assert "not run here" in given.sources["status"]


def test_the_arithmetic_agrees_with_an_adapter_that_is_there(policy, tokenizer, tmp_path):
    lora.add_lora(policy, rank=3)
    there = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert estimate.lora_weights(policy.config, 3) == there
    other = lora.add_lora(llama(tokenizer, tmp_path / "llama"), rank=3)
    there = sum(p.numel() for p in other.parameters() if p.requires_grad)
    assert estimate.lora_weights(other.config, 3) == there


def test_what_users_get_wrong_is_said_in_one_sentence(policy, tokenizer, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="rank of LoRA is 0"):
        lora.add_lora(policy, rank=0)
    with pytest.raises(UserError, match="no adapter to switch off"):
        lora.Reference(policy)
    with pytest.raises(UserError, match=f"no {lora.ADAPTER} in"):
        lora.load_adapter(policy, tmp_path)
    lora.add_lora(policy, rank=1)
    with pytest.raises(UserError, match="has an adapter already"):
        lora.add_lora(policy, rank=1)
    for changes, said in (
        ({"loss": "dop"}, "no loss 'dop'"),
        ({"batch": 0}, "batch is 0"),
        ({"colour": 1}, "no setting 'colour'"),
    ):
        assert main(["train", str(written(tmp_path, **changes))]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="no chat template"):
        recipe.as_texts({"prompt": "a", "chosen": [{}], "rejected": [{}]}, tokenizer)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs peft"):
        lora.add_lora(policy)
