"""The four sizes at which the same code runs. One dataclass says everything that differs."""

import dataclasses
import os

from .data import MINI
from .errors import UserError
from .ppo import PPOConfig


@dataclasses.dataclass(frozen=True)
class Scale:
    name: str
    policy: str  # the base policy: a folder or a name of the hub
    oracle: str  # the true reward: probability of positive sentiment
    sft: str | None = None  # a finished SFT policy; None: the run trains one on IMDb
    sft_steps: int = 0
    sft_learning_rate: float = 1e-5
    train_prompts: int = 2000
    heldout_prompts: int = 256
    completions: int = 4  # a prompt, all pairs of them labelled (DPO App. C.1)
    max_tokens: int = 32
    pairs_a_batch: int = 96
    epochs: float = 1.0
    learning_rate: float = 2e-4
    reward_model_epochs: float = 1.0
    reward_model_learning_rate: float = 3e-4
    evaluations: int = 4  # points measured along each training run
    best_of: int = 16
    ppo: PPOConfig = PPOConfig()
    ppo_targets: tuple[float, ...] = (9.0,)  # nats a response; the paper sweeps 3, 6, 9, 12
    dpo_betas: tuple[float, ...] = (0.1, 0.2, 0.3, 1.0)  # the paper: 0.05, 0.1, 1, 5

    @property
    def groups_a_batch(self) -> int:
        return max(1, self.pairs_a_batch // (self.completions * (self.completions - 1) // 2))

    def steps(self, epochs: float) -> int:
        """Updates in so many passes over the comparisons."""
        return max(1, round(epochs * (self.train_prompts // self.groups_a_batch)))


SMOKE_PPO = PPOConfig(rollouts=2, episodes=16, max_tokens=16)
SCALES = {
    "mini": Scale("mini", policy=str(MINI / "base"), sft=str(MINI / "sft"), oracle=str(MINI / "oracle")),
    "smoke": Scale(
        "smoke", policy=str(MINI / "base"), sft=str(MINI / "sft"), oracle=str(MINI / "oracle"), train_prompts=16,
        heldout_prompts=8, max_tokens=16, pairs_a_batch=24, evaluations=1, best_of=4, ppo=SMOKE_PPO,
        ppo_targets=(3.0,), dpo_betas=(0.1,),
    ),
    "gpt2": Scale(
        "gpt2", policy="gpt2", oracle="lvwerra/distilbert-imdb", sft_steps=400, train_prompts=8000,
        learning_rate=1e-5, reward_model_learning_rate=1e-5, pairs_a_batch=64, best_of=64,
        ppo=PPOConfig(rollouts=100, episodes=256, learning_rate=1.41e-5, max_tokens=48),
        ppo_targets=(3.0, 6.0, 9.0, 12.0), dpo_betas=(0.05, 0.1, 1.0, 5.0),
    ),
    "paper": Scale(
        "paper", policy="gpt2-large", oracle="siebert/sentiment-roberta-large-english", sft_steps=800,
        train_prompts=25_000, learning_rate=1e-6, reward_model_learning_rate=5e-6, reward_model_epochs=3.0,
        pairs_a_batch=64, best_of=128, ppo=PPOConfig(rollouts=200, episodes=1024, learning_rate=1.41e-5, max_tokens=60),
        max_tokens=60, ppo_targets=(3.0, 6.0, 9.0, 12.0), dpo_betas=(0.05, 0.1, 1.0, 5.0),
    ),
}  # fmt: skip


def chosen_scale(name: str | None = None) -> Scale:
    """The scale of that name, of RLHF_EDU_SCALE, or `mini`."""
    name = name or os.environ.get("RLHF_EDU_SCALE") or "mini"
    if name not in SCALES:
        raise UserError(f"unknown scale {name!r}: use one of {', '.join(SCALES)}")
    return SCALES[name]
