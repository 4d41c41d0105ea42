"""The runs behind the figures: which methods, with which settings; every one starts from SFT."""

import dataclasses
from collections.abc import Callable

from . import losses, rewards
from .scales import Scale

# The labeler of the length part: one token is worth as much as 0.01 of the oracle's reward, noise as below.
LENGTH_LABELER = rewards.Labeler(temperature=0.1, length_preference=0.1)
# SimPO has no reference to hold it: its learning rate matters most, as its authors say
SIMPO_RATE = 0.5


@dataclasses.dataclass(frozen=True)
class Run:
    """One curve of the frontier."""

    name: str
    method: str
    knob: str = ""
    loss: Callable | None = None  # a loss of `losses`; None: PPO
    loss_kwargs: dict = dataclasses.field(default_factory=dict)
    rate: float = 1.0  # times the scale's learning rate
    epochs: float = 1.0  # times the scale's epochs
    cost: float = 1.0  # relative seconds, for the time left
    seed: int = 0  # added to the job's: another order of the same comparisons


def sweep(scale: Scale) -> list[Run]:
    """The curves of the frontier; every method starts from SFT and sees the same comparisons."""
    runs = [
        Run(f"Preferred-FT seed {n}" if n else "Preferred-FT", "Preferred-FT", "", losses.preferred_ft_loss,
            epochs=0.5, seed=n)
        for n in range(scale.preferred_ft_seeds)
    ]  # fmt: skip
    runs += [
        Run(f"Unlikelihood alpha={a:g}", "Unlikelihood", f"alpha={a:g}", losses.unlikelihood_loss, {"alpha": a},
            epochs=0.5)
        for a in scale.unlikelihood_alphas
    ]  # fmt: skip
    runs += [
        Run(f"DPO beta={beta:g}", "DPO", f"beta={beta:g}", losses.dpo_loss, {"beta": beta})
        for beta in scale.dpo_betas
    ]
    runs.append(
        Run(
            "SimPO",
            "SimPO",
            "beta=2 gamma=1",
            losses.simpo_loss,
            {"beta": 2.0, "gamma": 1.0},
            SIMPO_RATE,
            0.5,
        )
    )
    for method in ("PPO", "PPO-GT"):
        runs += [Run(f"{method} target={t:g}", method, f"target={t:g}", cost=1.5) for t in scale.ppo_targets]
    return runs


LENGTH_RUNS = [
    Run("length SimPO", "SimPO", "", losses.simpo_loss, {"beta": 2.0, "gamma": 1.0}, SIMPO_RATE, 0.5),
    Run("length SimPO w-o LN", "SimPO w/o LN", "", losses.simpo_loss,
        {"beta": 2.0, "gamma": 1.0, "length_normalize": False}, SIMPO_RATE, 0.5),
    Run("length DPO", "DPO", "", losses.dpo_loss, {"beta": 0.1}, epochs=0.5),
]  # fmt: skip


def simpo_reward(sums, lengths, reference_sums):
    """SimPO eq. 4, as its Figure 2a measures all models: beta times the mean log-prob, whatever was trained."""
    return 2.0 * sums / lengths


def slug(name: str) -> str:
    return name.replace(" ", "_").replace("=", "").replace("/", "")
