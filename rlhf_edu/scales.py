"""The four sizes at which the same code runs. One dataclass says everything that differs.

Sources in the comments: DPO = Rafailov et al. 2023 (App. B, C.1), TRL = its IMDb example. "Ours" is a choice that
neither has; the defaults of `Scale` are those of the mini scale, chosen to fit the main job into minutes.
"Ours" in the two hub scales was never tried: no run of them is part of this project.
"""

import dataclasses
import os

from .data import MINI
from .errors import UserError
from .ppo import PPOConfig
from .training import Memory


@dataclasses.dataclass(frozen=True)
class Scale:
    name: str
    policy: str  # the base policy: a folder or a name of the hub
    oracle: str  # the true reward: probability of positive sentiment
    sft: str | None = None  # a finished SFT policy; None: the run trains one on IMDb
    sft_steps: int = 0
    sft_batch: int = 64  # demonstrations an update
    sft_learning_rate: float = 1e-5
    train_prompts: int = 2000
    heldout_prompts: int = 256
    completions: int = 4  # a prompt, all pairs of them labelled (DPO App. C.1)
    max_tokens: int = 32
    pairs_a_batch: int = 96
    epochs: float = 1.0
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.1  # share of the updates
    reward_model_epochs: float = 1.0
    reward_model_learning_rate: float = 3e-4
    evaluations: int = 4  # points measured along each training run
    best_of: int = 16
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)
    ppo_targets: tuple[float, ...] = (9.0,)  # nats a response; the paper sweeps 3, 6, 9, 12
    dpo_betas: tuple[float, ...] = (0.1, 0.2, 0.3, 1.0)  # the paper: 0.05, 0.1, 1, 5
    unlikelihood_alphas: tuple[float, ...] = (0.5,)  # the paper: 0.05, 0.1, 0.5, 1
    preferred_ft_seeds: int = 1  # the paper: two, as we count its 22 runs
    memory: Memory = dataclasses.field(default_factory=Memory)  # how an update fits into the device

    @property
    def groups_a_batch(self) -> int:
        pairs_a_prompt = self.completions * (self.completions - 1) // 2
        return max(1, round(self.pairs_a_batch / pairs_a_prompt))  # as pairs.pair_batch

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
    "gpt2": Scale(  # one GPU of 16 GB
        "gpt2",
        policy="openai-community/gpt2",
        oracle="distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        sft_steps=400,  # about one pass over 25,000 reviews: DPO App. C.1 has one epoch on a part
        sft_learning_rate=1e-5,  # ours
        train_prompts=8000,  # ours; the paper has 25,000
        max_tokens=48,  # ours
        pairs_a_batch=64,  # DPO App. B
        learning_rate=1e-5,  # ours: a model six times smaller than the paper's takes a larger step than its 1e-6
        reward_model_learning_rate=1e-5,  # ours
        best_of=64,  # ours
        # rate: TRL; episodes a rollout: ours, the paper has 1,024
        ppo=PPOConfig(rollouts=100, episodes=256, learning_rate=1.41e-5, max_tokens=48, sample_batch=128,
                      kl_horizon=5_000),  # ours, a fifth of the episodes
        ppo_targets=(3.0, 6.0, 9.0, 12.0),  # DPO App. C.1, as the next two
        dpo_betas=(0.05, 0.1, 1.0, 5.0),
        unlikelihood_alphas=(0.05, 0.1, 0.5, 1.0),
        memory=Memory(micro_batch=64, bf16=True),  # ours
    ),
    "paper": Scale(  # GPUs of 80 GB
        "paper",
        policy="openai-community/gpt2-large",  # DPO App. C.1, as the oracle
        oracle="siebert/sentiment-roberta-large-english",
        sft_steps=800,  # ours: two passes over 25,000 reviews; main text "until convergence", App. C.1 one epoch
        sft_learning_rate=1e-5,  # ours
        train_prompts=25_000,  # DPO App. C.1
        max_tokens=60,  # not stated; its target KLs of 3 to 12 nats are about 0.05 to 0.2 a token (OpenReview)
        pairs_a_batch=64,  # DPO App. B, as the rate: RMSprop there, AdamW here
        learning_rate=1e-6,
        schedule="constant",  # DPO App. B: 0 to 1e-6 over 150 updates, then constant
        warmup=0.066,  # 150 of 2,272 updates
        reward_model_epochs=3.0,  # DPO App. C.1, which keeps the best on held-out data; here the last
        reward_model_learning_rate=5e-6,  # ours
        best_of=128,  # DPO, its largest N for TL;DR and dialogue
        # episodes a rollout: DPO App. C.1; rate: TRL
        ppo=PPOConfig(rollouts=200, episodes=1024, learning_rate=1.41e-5, max_tokens=60, sample_batch=128,
                      kl_horizon=40_000),  # ours, a fifth of the episodes
        # the sweep of DPO App. C.1: 18 of its 22 runs (it has PPO-GT from TRL as well), and SimPO
        ppo_targets=(3.0, 6.0, 9.0, 12.0),
        dpo_betas=(0.05, 0.1, 1.0, 5.0),
        unlikelihood_alphas=(0.05, 0.1, 0.5, 1.0),
        preferred_ft_seeds=2,
        memory=Memory(micro_batch=32, bf16=True, checkpointing=False),  # ours
    ),
}  # fmt: skip


def chosen_scale(name: str | None = None, micro_batch: int | None = None) -> Scale:
    """The scale of that name, of RLHF_EDU_SCALE, or `mini`; with its own micro-batch, or this one."""
    name = name or os.environ.get("RLHF_EDU_SCALE") or "mini"
    if name not in SCALES:
        raise UserError(f"unknown scale {name!r}: use one of {', '.join(SCALES)}")
    if micro_batch is None:
        return SCALES[name]
    if micro_batch < 1:
        raise UserError(f"--micro-batch is {micro_batch}: make it 1 or more")
    memory = dataclasses.replace(SCALES[name].memory, micro_batch=micro_batch)
    return dataclasses.replace(SCALES[name], memory=memory)
