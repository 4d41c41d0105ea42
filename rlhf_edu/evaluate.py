"""What a policy is worth: true reward, KL from the reference, Best-of-N, margins and log-probs against length."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.special import log_softmax
from scipy.stats import spearmanr

from .errors import UserError, numbers
from .logprobs import all_logps, predicting_states
from .pairs import TokenPairs
from .rewards import Score
from .sampling import sample
from .tokens import by_length, collate
from .win_rates import length_controlled_win_rate, win_rate  # noqa: F401 - part of this module for its users


def mean_and_error(values) -> tuple[float, float]:
    """Mean of finite values and its standard error, which is NaN where there is one value only."""
    values = numbers("values", values)
    if values.ndim != 1 or not values.size:
        raise UserError(f"values have shape {values.shape}: give a list of at least one")
    error = (values.std(ddof=1) / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
    return values.mean().item(), error


def evaluate_policy(
    policy, reference, prompts, score: Score, *, tokenizer, seed: int, max_tokens: int = 48, against=None
) -> dict:
    """Mean reward and mean sequence-level KL of samples at temperature 1, with standard errors over the prompts.

    `kl` sums the exact KL between the two next-token distributions over the steps of each sampled response;
    `kl_sampled` sums the log-ratios of the sampled tokens. Both estimate KL(policy || reference) in nats without
    bias, the first with far less noise.
    against: (prompts, K) rewards of K opponents' samples for each prompt; `win` is the percent of them that the
    policy's sample beats, a tie (to 1e-5, as rewards are stored) counting half.
    """
    responses = sample(policy, prompts, eos_id=tokenizer.eos_token_id, max_tokens=max_tokens, seed=seed)
    exact, sampled = sequence_kl(policy, reference, prompts, responses, tokenizer.pad_token_id)
    row = {}
    rewards = score(prompts, responses)
    columns = {"reward": rewards, "kl": exact, "kl_sampled": sampled}
    if against is not None:
        lead = np.asarray(rewards)[:, None] - against
        columns["win"] = 100 * np.where(abs(lead) <= 1e-5, 0.5, lead > 0).mean(axis=1)
    for name, values in columns.items():
        row[name], row[name + "_se"] = mean_and_error(values)
    row["length"] = float(np.mean([len(r) for r in responses]))
    row["ended"] = float(np.mean([r[-1] == tokenizer.eos_token_id for r in responses]))
    row["prompts"] = len(prompts)
    return row


@torch.no_grad()
def sequence_kl(policy, reference, prompts, responses, pad_id: int, *, batch_size: int = 64):
    """(exact, sampled) KL of policy from reference along each response, in nats; both (n,)."""
    order = by_length(prompts, responses)
    exact, sampled = np.zeros(len(prompts)), np.zeros(len(prompts))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], pad_id, policy.device)
        logps, ref_logps = (
            m.get_output_embeddings()(predicting_states(m, batch)).float().log_softmax(-1)
            for m in (policy, reference)
        )
        targets = batch["input_ids"][:, 1:][batch["response_mask"][:, 1:]][:, None]
        difference = logps - ref_logps
        lengths = [len(responses[i]) for i in rows]
        exact[rows] = [p.sum().item() for p in (logps.exp() * difference).sum(-1).double().split(lengths)]
        sampled[rows] = [p.sum().item() for p in difference.gather(-1, targets)[:, 0].double().split(lengths)]
    return exact, sampled


def best_of_n(rewards: np.ndarray, ns: Sequence[int], *, choose_by=None) -> pd.DataFrame:
    """Expected best of N for each N, from rewards (prompts, M), M >= N samples a prompt, with the KL bound.

    For each prompt the mean of the maximum over all M-choose-N subsets, without drawing any: the i-th smallest of
    M is the maximum of C(i-1, N-1) of them. The bound log N - (N-1)/N is exact only if no two responses tie.
    choose_by: (prompts, M) scores that pick the best, e.g. a learned reward's; by default the rewards themselves.
    """
    rewards = np.asarray(rewards, dtype=float)
    if rewards.ndim != 2 or not rewards.size or not np.isfinite(rewards).all():
        raise UserError(
            f"rewards have shape {rewards.shape}: give finite numbers, (prompts, samples of each)"
        )
    if not len(ns) or min(ns) < 1:
        raise UserError(f"Best-of-N is asked for N in {list(ns)}: give numbers of samples, each at least 1")
    scores = rewards if choose_by is None else numbers("choose_by", choose_by)
    if scores.shape != rewards.shape:
        raise UserError(
            f"choose_by has shape {scores.shape}, rewards {rewards.shape}: give a score for each sample"
        )
    ordered = np.take_along_axis(rewards, np.argsort(scores, axis=1, kind="stable"), axis=1)
    samples = ordered.shape[1]
    if max(ns) > samples:
        raise UserError(f"Best-of-{max(ns)} needs {max(ns)} samples a prompt, but there are {samples}")
    rows = []
    for n in ns:
        weights = np.array([math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)])
        reward, error = mean_and_error(ordered @ weights)
        rows.append(
            {"n": n, "reward": reward, "reward_se": error, "kl": math.log(n) - (n - 1) / n, "kl_se": 0.0}
        )
    return pd.DataFrame(rows)


def best_of_n_distribution(probabilities, rewards, n: int) -> np.ndarray:
    """Probability of each response being the best of n draws: (responses,), (responses,) -> (responses,).

    All of n draws are at most r with probability F(r)^n. What falls to the responses of one reward, F(r)^n minus
    the same just below r, is shared among them as the reference shares it: a tie goes to the first draw.
    """
    p, r = numbers("probabilities", probabilities), numbers("rewards", rewards)
    if p.shape != r.shape or p.ndim != 1 or not (p >= 0).all() or not abs(p.sum() - 1) < 1e-6 or not n >= 1:
        raise UserError(
            f"probabilities have shape {p.shape} and sum {p.sum():g}, rewards shape {r.shape}, n is {n}: give (responses,) "
            "of sum 1, none below 0, (responses,), and 1 or more"
        )
    up_to = np.array([p[r <= x].sum() for x in r])
    here = np.array([p[r == x].sum() for x in r])
    share = np.divide(p, here, out=np.zeros_like(p), where=here > 0)
    return share * (up_to**n - np.maximum(up_to - here, 0) ** n)


def tilted_frontier(rewards, betas: Sequence[float], *, logps=None) -> pd.DataFrame:
    """The best reward at its KL: pi* ~ pi_ref exp(r / beta) (DPO eq. 4), one row a beta, means over prompts.

    rewards: (prompts, responses). logps: reference log-probs of these responses, (prompts, responses), of all that
    there are; then the result is exact. Without logps they are samples of the reference, M a prompt, each of weight
    1/M: the KL cannot exceed log M and the reward stays below the true optimum's where few samples carry the weight.
    """
    rewards, betas = numbers("rewards", rewards), numbers("betas", betas)
    if rewards.ndim != 2 or not rewards.size or betas.ndim != 1 or not (betas > 0).all():
        raise UserError(
            f"rewards have shape {rewards.shape}, betas are {betas.tolist()}: give (prompts, responses) and numbers above 0"
        )
    if logps is None:
        reference = np.full_like(rewards, -math.log(rewards.shape[1]))
    elif (reference := numbers("logps", logps)).shape != rewards.shape:
        raise UserError(
            f"logps have shape {reference.shape}, rewards {rewards.shape}: give one for each response"
        )
    reference = log_softmax(reference, axis=1)
    rows = []
    for beta in betas:
        policy = log_softmax(reference + rewards / beta, axis=1)
        reward, error = mean_and_error((np.exp(policy) * rewards).sum(1))
        kl = (np.exp(policy) * (policy - reference)).sum(1).mean().item()
        rows.append({"beta": beta.item(), "reward": reward, "reward_se": error, "kl": kl})
    return pd.DataFrame(rows)


def reward_on_curve(kl, reward, x: float) -> float:
    """Reward of a curve at KL x, linear between its neighbouring points in order of KL: (points,), (points,).

    NaN where x lies outside the curve: nothing was measured there.
    """
    kl, reward = numbers("the KL of a curve", kl), numbers("the reward of a curve", reward)
    if kl.shape != reward.shape or kl.ndim != 1 or not len(kl):
        raise UserError(
            f"a curve has KL of shape {kl.shape}, reward of {reward.shape}: give (points,), one or more"
        )
    order = np.argsort(kl, kind="stable")
    return float(np.interp(x, kl[order], reward[order], left=math.nan, right=math.nan))


def length_tables(
    policy, reference_sums, pairs: TokenPairs, pad_id: int, *, reward
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What SimPO's Figure 2 is drawn from: (pairs: margin and length difference; responses: log-prob and length).

    reward: (sums, lengths, reference sums) -> the reward of each response; the last is None where `reference_sums` is.
    """
    sums = all_logps(policy, pad_id, pairs.prompts, pairs.responses).double().numpy()
    lengths = np.array([len(r) for r in pairs.responses])
    reference_sums = None if reference_sums is None else np.asarray(reference_sums, dtype=float)
    rewards = reward(sums, lengths, reference_sums)
    margins = pd.DataFrame(
        {
            "length_difference": lengths[pairs.chosen] - lengths[pairs.rejected],
            "margin": rewards[pairs.chosen] - rewards[pairs.rejected],
        }
    )
    responses = pd.DataFrame({"length": lengths, "logp_per_token": sums / lengths, "logp_sum": sums})
    return margins, responses


def spearman(table: pd.DataFrame, x: str = "length", y: str = "logp_per_token") -> float:
    """Rank correlation of two columns; NaN where one of them is constant, since then there is none."""
    first, second = numbers(x, table[x]), numbers(y, table[y])
    if len(first) < 2 or len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return float(spearmanr(first, second).statistic)
