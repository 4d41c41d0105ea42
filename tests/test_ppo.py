"""PPO on tiny policies: it raises what is rewarded, stays near the reference, and counts every token rightly."""

import copy
import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_edu import models, ppo, training
from rlhf_edu.logprobs import all_token_logps
from rlhf_edu.models import ValueModel
from rlhf_edu.ppo import PPOConfig, ppo_forward, pretraining_loss, roll_out, train_ppo
from rlhf_edu.sampling import sample
from rlhf_edu.tokens import encode

CONFIG = PPOConfig(rollouts=3, episodes=16, epochs=2, minibatches=2, max_tokens=8, learning_rate=1e-3)


@pytest.fixture
def prompts(tokenizer):
    return encode(
        tokenizer, ["The film", "This movie", "The plot was", "Her", "His music was so", "Her acting"]
    )


def share_of(*wanted: int):
    """A score: the share of some tokens in a response."""
    return lambda prompts, responses: np.array([np.mean([t in wanted for t in r]) for r in responses])


def noise(prompts, responses):
    """A score that has nothing to do with the response, so that there is nothing to learn from it."""
    return np.random.default_rng(sum(responses[0])).normal(size=len(responses))


def nothing(prompts, responses):
    return np.zeros(len(responses))


def logps_alone(policy, prompts, responses, temperature=1.0) -> list[torch.Tensor]:
    """Log-probs of the response tokens, one sequence at a time."""
    out = []
    with torch.no_grad():
        for p, r in zip(prompts, responses, strict=True):
            logits = policy(torch.tensor([[*p, *r]])).logits[0, len(p) - 1 : -1] / temperature
            out.append(logits.log_softmax(-1)[range(len(r)), r])
    return out


# --- learning ---------------------------------------------------------------------------------------------------


def test_raises_the_share_of_rewarded_tokens(policy, tokenizer, prompts):
    """A twelfth of the vocabulary at first, more than half of all tokens in the end."""
    reference, wanted = copy.deepcopy(policy), range(100, 127)
    config = PPOConfig(rollouts=10, episodes=48, max_tokens=6, learning_rate=2e-2, kl_coefficient=0.001)
    metrics = train_ppo(
        policy, prompts * 8, share_of(*wanted), tokenizer=tokenizer, reference=reference, config=config
    )
    by_rollout = metrics["score"].iloc[:: config.updates_a_rollout]
    assert len(metrics) == 10 * config.updates_a_rollout
    assert by_rollout.iloc[0] < 0.15 and by_rollout.iloc[-1] > 0.5
    drawn = sample(policy, prompts * 10, eos_id=tokenizer.eos_token_id, max_tokens=6, seed=99)
    assert share_of(*wanted)(None, drawn).mean() > 0.5
    assert metrics["kl"].iloc[-1] > 1, "such a policy is far from the reference"


def test_a_score_of_nothing_changes_nothing(trained_policy, tokenizer, prompts):
    """No reward and no distance from the reference: every advantage is 0, and so is every step."""
    reference = copy.deepcopy(trained_policy)
    config = dataclasses.replace(CONFIG, kl_coefficient=0.2)
    metrics = train_ppo(
        trained_policy, prompts, nothing, tokenizer=tokenizer, reference=reference, config=config
    )
    assert metrics["kl"].abs().max() < 1e-3
    for p, q in zip(trained_policy.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-3)


def test_the_penalty_keeps_it_near_the_reference(trained_policy, tokenizer, prompts):
    """Rewarded at random it drifts; a KL coefficient holds it."""
    ends = []
    for coefficient in (0.0, 2.0):
        config = dataclasses.replace(
            CONFIG, rollouts=8, episodes=36, learning_rate=3e-3, kl_coefficient=coefficient
        )
        metrics = train_ppo(
            copy.deepcopy(trained_policy), prompts * 6, noise, tokenizer=tokenizer, reference=trained_policy,
            config=config,
        )  # fmt: skip
        ends.append(metrics["kl"].iloc[-16:].mean())  # the last four rollouts
    assert 0 < 2 * ends[1] < ends[0] and ends[1] < 1.5, ends


def test_the_penalty_pulls_back_to_the_reference(trained_policy, tokenizer, prompts):
    """Started away from it and rewarded with nothing, the policy comes back; without a penalty it does not."""
    reference, moved = copy.deepcopy(trained_policy), trained_policy
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    config = dataclasses.replace(CONFIG, rollouts=10, episodes=48, kl_coefficient=1.0, learning_rate=3e-3)
    ends = []
    for coefficient in (1.0, 0.0):
        metrics = train_ppo(
            copy.deepcopy(moved), prompts * 8, nothing, tokenizer=tokenizer, reference=reference,
            config=dataclasses.replace(config, kl_coefficient=coefficient),
        )  # fmt: skip
        kl = metrics["kl"].iloc[:: config.updates_a_rollout]
        assert kl.iloc[0] > 0.5
        ends.append(kl.iloc[-1] / kl.iloc[0])
    assert ends[0] < 0.4 and ends[1] > 0.6, ends


# --- the rollout ------------------------------------------------------------------------------------------------


def test_first_rollout_has_kl_0_and_ratio_1(policy, tokenizer, prompts):
    metrics = train_ppo(
        policy, prompts, noise, tokenizer=tokenizer, reference=copy.deepcopy(policy), config=CONFIG
    )
    assert metrics["kl"][0] == pytest.approx(0, abs=1e-5)
    assert metrics["step_kl"][0] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"][0] == 0
    assert metrics["step_kl"][1] > 1e-8, "the second update starts away from the sampling policy"


def test_rewards_by_hand(trained_policy, policy, tokenizer, prompts):
    """With a value of 0, gamma = lambda = 1: returns are the rewards still to come, KL at every token, score last."""
    model = ValueModel(trained_policy)
    config = dataclasses.replace(
        CONFIG,
        kl_coefficient=0.3,
        gamma=1.0,
        lam=1.0,
        whiten_advantages=False,
        whiten_rewards=False,
        max_tokens=20,
    )
    score = share_of(trained_policy.config.eos_token_id)
    rollout = roll_out(model, policy, prompts, score, tokenizer, config, 0, {"kl_coefficient": 0.3})
    assert sorted(map(len, rollout.prompts)) == sorted(map(len, prompts))
    assert len({len(r) for r in rollout.responses}) > 1, "padding must be at stake"
    logps = logps_alone(trained_policy, rollout.prompts, rollout.responses)
    refs = logps_alone(policy, rollout.prompts, rollout.responses)
    scores = score(None, rollout.responses)
    for i in range(len(prompts)):
        rewards = -0.3 * (logps[i] - refs[i])
        rewards[-1] += scores[i]
        to_come = rewards.flip(0).cumsum(0).flip(0)
        assert (rollout.logps[i] - logps[i]).abs().max() < 1e-5
        assert (rollout.returns[i] - to_come).abs().max() < 1e-4
        assert torch.equal(rollout.advantages[i], rollout.returns[i])
        assert torch.equal(rollout.values[i], torch.zeros(len(rollout.responses[i])))
    kl = np.mean([(a - b).sum().item() for a, b in zip(logps, refs, strict=True)])
    assert rollout.metrics["kl"] == pytest.approx(kl, abs=1e-3) and kl > 1
    assert rollout.metrics["score"] == pytest.approx(scores.mean())
    assert rollout.metrics["length"] == np.mean([len(r) for r in rollout.responses])


@pytest.mark.parametrize("gamma, lam", [(0.0, 0.9), (1.0, 0.5), (0.9, 0.5), (1.0, 0.0)])
def test_discount_and_lambda_reach_gae(trained_policy, tokenizer, prompts, gamma, lam):
    """With a value of 0, a score of 1 at the end is worth (gamma lambda)^k to the token k places before it."""
    config = dataclasses.replace(CONFIG, gamma=gamma, lam=lam, whiten_advantages=False)
    rollout = roll_out(
        ValueModel(trained_policy),
        trained_policy,
        prompts,
        lambda p, r: np.ones(len(r)),
        tokenizer,
        config,
        0,
        {"kl_coefficient": 0.0},
    )
    for advantages in rollout.advantages:
        before = range(len(advantages) - 1, -1, -1)
        assert advantages.tolist() == pytest.approx([(gamma * lam) ** k for k in before], abs=1e-6)


def test_advantages_are_whitened(trained_policy, policy, tokenizer, prompts):
    rollout = roll_out(
        ValueModel(trained_policy),
        policy,
        prompts * 4,
        share_of(5),
        tokenizer,
        CONFIG,
        0,
        {"kl_coefficient": 0.1},
    )
    advantages = torch.cat(rollout.advantages)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_missing_eos_score(trained_policy, tokenizer, prompts):
    """A response that never ends gets the stated score instead of its own; one that ends keeps it."""
    config = dataclasses.replace(
        CONFIG, max_tokens=12, episodes=36, missing_eos_score=-2.0, whiten_advantages=False
    )
    rollout = roll_out(
        ValueModel(trained_policy), trained_policy, prompts * 6, lambda p, r: np.ones(len(r)), tokenizer, config, 0,
        {"kl_coefficient": 0.0},
    )  # fmt: skip
    ended = [r[-1] == tokenizer.eos_token_id for r in rollout.responses]
    assert 0 < sum(ended) < len(ended), "the test needs both kinds"
    for end, returns in zip(ended, rollout.returns, strict=True):
        assert returns[-1].item() == (1.0 if end else -2.0)
    assert rollout.metrics["score"] == pytest.approx(np.where(ended, 1.0, -2.0).mean())


def test_value_is_that_of_the_state_before_the_token(trained_policy, tokenizer, prompts):
    model = ValueModel(trained_policy)
    torch.nn.init.normal_(model.value.weight, generator=torch.Generator().manual_seed(0))
    responses = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17], [18], [19, 20, 0]]
    with torch.no_grad():
        logps, values = ppo_forward(model, prompts, responses, tokenizer.pad_token_id, 1.0)
        expected = []
        for p, r in zip(prompts, responses, strict=True):
            for t in range(len(r)):  # the state in which token t is chosen: prompt and earlier tokens alone
                hidden = trained_policy.base_model(torch.tensor([[*p, *r[:t]]])).last_hidden_state[0, -1]
                expected.append(model.value(hidden).item())
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.tensor(expected).std() > 0.5
    flat = torch.cat(all_token_logps(trained_policy, tokenizer.pad_token_id, prompts, responses))
    assert (logps - flat).abs().max() < 1e-5


def test_log_probs_are_those_of_the_sampling_temperature(trained_policy, tokenizer, prompts):
    config = dataclasses.replace(CONFIG, temperature=0.5)
    rollout = roll_out(
        ValueModel(trained_policy),
        trained_policy,
        prompts,
        nothing,
        tokenizer,
        config,
        0,
        {"kl_coefficient": 0.0},
    )
    expected = logps_alone(trained_policy, rollout.prompts, rollout.responses, temperature=0.5)
    for a, b in zip(rollout.logps, expected, strict=True):
        assert (a - b).abs().max() < 1e-5
    assert rollout.metrics["kl"] == pytest.approx(0.0, abs=1e-5)  # the reference is the same model


def test_value_head_learns(trained_policy, tokenizer, prompts):
    """A constant reward of 1 at the end is foreseen at every token."""
    config = dataclasses.replace(
        CONFIG, rollouts=15, episodes=24, learning_rate=3e-3, kl_coefficient=0.0, value_weight=1.0,
        lam=1.0, whiten_advantages=False,
    )  # fmt: skip
    metrics = train_ppo(
        trained_policy, prompts * 4, lambda p, r: np.ones(len(r)), tokenizer=tokenizer,
        reference=copy.deepcopy(trained_policy), config=config,
    )  # fmt: skip
    assert metrics["value_loss"].iloc[0] == pytest.approx(0.5, abs=0.05)
    assert metrics["value_loss"].iloc[-1] < 0.05


# --- PPO-ptx ----------------------------------------------------------------------------------------------------


def test_ptx_weight_zero_is_ppo(trained_policy, tokenizer, prompts):
    rest = {"tokenizer": tokenizer, "reference": copy.deepcopy(trained_policy), "config": CONFIG}
    plain, zero = copy.deepcopy(trained_policy), copy.deepcopy(trained_policy)
    one = train_ppo(plain, prompts, share_of(5), **rest)
    two = train_ppo(zero, prompts, share_of(5), pretraining=[[5, 6, 7], [8, 9]], ptx_weight=0.0, **rest)
    assert one["loss"].tolist() == pytest.approx(two["loss"].tolist(), abs=1e-6)
    assert "pretraining_loss" not in one and two["pretraining_loss"].notna().all()
    for p, q in zip(plain.parameters(), zero.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_ptx_adds_the_weighted_loss_of_the_texts(trained_policy, tokenizer, prompts):
    """InstructGPT eq. 2 by hand: minus gamma times the mean log-prob of every token but a text's first."""
    texts = [[7, 8, 9], [10, 11, 12, 13, 14]]
    logps = logps_alone(trained_policy, [t[:1] for t in texts], [t[1:] for t in texts])
    expected = -torch.cat(logps).mean().item()
    assert pretraining_loss(trained_policy, texts, tokenizer.pad_token_id).item() == pytest.approx(
        expected, abs=1e-5
    )
    config = dataclasses.replace(CONFIG, rollouts=1, epochs=1, minibatches=1)
    rest = {"tokenizer": tokenizer, "reference": copy.deepcopy(trained_policy), "config": config}
    plain = train_ppo(copy.deepcopy(trained_policy), prompts, share_of(5), **rest)
    ptx = train_ppo(
        copy.deepcopy(trained_policy), prompts, share_of(5), pretraining=texts, ptx_weight=3.0, **rest
    )
    assert ptx["pretraining_loss"][0] == pytest.approx(expected, abs=1e-5)
    assert ptx["loss"][0] - plain["loss"][0] == pytest.approx(3 * expected, abs=1e-4)


def test_ptx_keeps_what_the_reward_would_forget(trained_policy, tokenizer, prompts, demonstrations):
    texts = [[*p, *r] for p, r in zip(*demonstrations, strict=True)]
    train_texts, heldout = texts[::2], texts[1::2]
    config = dataclasses.replace(CONFIG, rollouts=8, kl_coefficient=0.0)
    after = {}
    for weight in (None, 2.0):
        policy = copy.deepcopy(trained_policy)
        extra = {} if weight is None else {"pretraining": train_texts, "ptx_weight": weight}
        train_ppo(
            policy, prompts * 4, share_of(5), tokenizer=tokenizer, reference=copy.deepcopy(trained_policy),
            config=config, **extra,
        )  # fmt: skip
        with torch.no_grad():
            after[weight] = pretraining_loss(policy, heldout, tokenizer.pad_token_id).item()
    assert after[2.0] < after[None] - 0.1


def test_ptx_refuses_texts_it_cannot_use(trained_policy, tokenizer, prompts, one_sentence):
    rest = {"tokenizer": tokenizer, "reference": trained_policy, "config": CONFIG}
    for pretraining, weight in (([], 1.0), ([[5]], 1.0), ([[5, 6]], -1.0)):
        with one_sentence("pretraining", "two tokens"):
            train_ppo(trained_policy, prompts, nothing, pretraining=pretraining, ptx_weight=weight, **rest)


# --- the adaptive coefficient, and resuming ---------------------------------------------------------------------


def test_adaptive_coefficient_follows_the_measured_kl(trained_policy, policy, tokenizer, prompts):
    """Far above the target it rises by 20 % per horizon, the most there is; fixed without a target."""
    config = dataclasses.replace(
        CONFIG, rollouts=3, episodes=6, kl_coefficient=0.5, kl_target=0.01, kl_horizon=60
    )
    rest = {"tokenizer": tokenizer, "reference": policy}
    metrics = train_ppo(copy.deepcopy(trained_policy), prompts, nothing, config=config, **rest)
    by_rollout = metrics["kl_coefficient"].iloc[:: config.updates_a_rollout]
    assert by_rollout.tolist() == pytest.approx([0.5, 0.5 * 1.02, 0.5 * 1.02**2])
    fixed = dataclasses.replace(config, kl_target=None)
    assert set(train_ppo(trained_policy, prompts, nothing, config=fixed, **rest)["kl_coefficient"]) == {0.5}


@pytest.mark.parametrize("stop", [1, 2])
def test_interrupted_and_resumed_equals_uninterrupted(
    trained_policy, tokenizer, prompts, tmp_path, monkeypatch, stop
):
    """Stopped while rollout `stop` is scored; the coefficient, the value head and the optimizer go on from there."""
    monkeypatch.setattr(ppo, "TrainConfig", functools.partial(training.TrainConfig, save_seconds=0))
    config = dataclasses.replace(CONFIG, kl_target=0.05, kl_horizon=40, learning_rate=3e-3)
    rest = {"tokenizer": tokenizer, "reference": copy.deepcopy(trained_policy), "config": config}
    calls = []

    def score(prompts, responses):
        calls.append(len(responses))
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return share_of(5)(prompts, responses)

    whole_policy, broken, resumed_policy = (copy.deepcopy(trained_policy) for _ in range(3))
    whole = train_ppo(whole_policy, prompts * 3, share_of(5), **rest)
    with pytest.raises(KeyboardInterrupt):
        train_ppo(broken, prompts * 3, score, folder=tmp_path, **rest)
    rollouts_left = []

    def count(prompts, responses):
        rollouts_left.append(1)
        return share_of(5)(prompts, responses)

    resumed = train_ppo(resumed_policy, prompts * 3, count, folder=tmp_path, **rest)
    assert len(rollouts_left) == config.rollouts - stop, "finished rollouts are not done again"
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    assert whole["kl_coefficient"].nunique() == 3
    for p, q in zip(whole_policy.parameters(), resumed_policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_interrupted_inside_a_rollout_it_goes_on_at_its_start(
    trained_policy, tokenizer, prompts, tmp_path, monkeypatch
):
    """A rollout must be sampled by the policy that stood at its start: checkpoints within it would be useless."""
    monkeypatch.setattr(ppo, "TrainConfig", functools.partial(training.TrainConfig, save_seconds=0))
    rest = {"tokenizer": tokenizer, "reference": copy.deepcopy(trained_policy), "config": CONFIG}
    whole_policy, broken = copy.deepcopy(trained_policy), copy.deepcopy(trained_policy)
    whole = train_ppo(whole_policy, prompts * 3, noise, **rest)
    steps = CONFIG.rollouts * CONFIG.updates_a_rollout

    def interrupt(share, note):
        if round(share * steps) == CONFIG.updates_a_rollout + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_ppo(broken, prompts * 3, noise, folder=tmp_path, progress=interrupt, **rest)
    resumed = train_ppo(trained_policy, prompts * 3, noise, folder=tmp_path, **rest)
    pd.testing.assert_frame_equal(whole, resumed, check_exact=True)
    for p, q in zip(whole_policy.parameters(), trained_policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_of_other_ppo_settings_is_refused(
    trained_policy, tokenizer, prompts, tmp_path, monkeypatch, one_sentence
):
    monkeypatch.setattr(ppo, "TrainConfig", functools.partial(training.TrainConfig, save_seconds=0))
    rest = {"tokenizer": tokenizer, "reference": copy.deepcopy(trained_policy), "folder": tmp_path}

    def interrupt(share, note):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_ppo(trained_policy, prompts, nothing, config=CONFIG, progress=interrupt, **rest)
    with one_sentence("other settings", "delete"):
        train_ppo(trained_policy, prompts, nothing, config=dataclasses.replace(CONFIG, clip=0.3), **rest)


def test_reference_and_its_gradients_are_left_alone(trained_policy, tokenizer, prompts):
    reference = models.freeze(copy.deepcopy(trained_policy))
    before = copy.deepcopy(reference)
    train_ppo(trained_policy, prompts, share_of(5), tokenizer=tokenizer, reference=reference, config=CONFIG)
    for p, q in zip(reference.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None
