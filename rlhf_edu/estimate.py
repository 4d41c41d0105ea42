"""What a run will need, before it starts: gigabytes and hours, from the model's size and a measured matmul rate.

A token costs 2 FLOPs a weight forward and 4 backward (Kaplan et al. 2020), with checkpointing 2 more. Weights,
gradients and AdamW's two averages are float32: 16 bytes a weight. Activations: Korthikanti et al. 2022, eq. 1.
"""

import sys
import time

import torch

from . import hub, parallel, sharding
from .errors import explained
from .scales import Scale
from .tokens import is_hub_name, require_hub
from .training import Memory, precision

# Share of the matmul rate that training reaches: ours, a guess for GPUs; small models reach less
UTILISATION = 0.4
PROMPT = 5  # tokens, the mean of 2 to 8


def size_of(config) -> dict:
    """Weights and shape of the transformer that a `transformers` configuration describes, built without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
    }


def lora_weights(config, rank: int) -> int:
    """Weights of an adapter on all linear layers but the last: A (rank, in) and B (out, rank) each."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    return sum(rank * sum(m.weight.shape) for m in layers)


def training_bytes(
    size: dict, sequences: int, tokens: int, memory: Memory, *, held: int = 0, trained=None, frozen_bytes: int = 4,
    predicted: int | None = None,
) -> dict:  # fmt: skip
    """Bytes of one device that trains: `sequences` of `tokens` each in a pass; `held` frozen weights beside it.

    trained: weights that learn, if not all (LoRA): then they come on top, and the others take `frozen_bytes` each.
    predicted: tokens of a sequence whose logits are computed, if not all (those of the response).
    """
    weights = 4 * size["weights"] if trained is None else frozen_bytes * size["weights"] + 4 * trained
    trained = size["weights"] if trained is None else trained
    wide = 1 if memory.bf16 else 2  # the formula's bytes are those of 16-bit activations
    layer = sequences * tokens * size["width"] * 34 + 5 * size["heads"] * sequences * tokens**2
    kept = 2 * sequences * tokens * size["width"] * size["layers"] + layer
    return {
        "weights": weights,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "frozen models": 4 * held,
        "activations": wide * (kept if memory.checkpointing else layer * size["layers"]),
        "logits": 3
        * 4
        * sequences
        * (predicted or tokens)
        * size["vocabulary"],  # float32: logits, log-softmax, its gradient
    }


def training_flops(weights: int, tokens: float, memory: Memory) -> float:
    return (8 if memory.checkpointing else 6) * weights * tokens


def job_flops(scale: Scale, weights: int) -> dict[str, float]:
    """FLOPs of the parts of the main job. Each prompt's completions are computed once however many pairs share them."""
    length = PROMPT + scale.max_tokens
    sequences = scale.groups_a_batch * scale.completions

    def preference(epochs):
        return training_flops(weights, scale.steps(epochs) * sequences * length, scale.memory)

    samples = scale.train_prompts * scale.completions + scale.heldout_prompts * scale.best_of
    episodes = scale.ppo.rollouts * scale.ppo.episodes * length
    ppo = training_flops(weights, episodes * scale.ppo.epochs, scale.memory)
    ppo += (2 + 2 + 2 + 2) * weights * episodes  # sampling, its log-probs, the reference, the reward
    pairs = (
        0.5 * scale.preferred_ft_seeds
        + 0.5 * len(scale.unlikelihood_alphas)
        + len(scale.dpo_betas)
        + 0.5
        + 1.5
    )
    runs = scale.preferred_ft_seeds + len(scale.unlikelihood_alphas) + len(scale.dpo_betas) + 1
    runs += 2 * len(scale.ppo_targets)
    return {
        "SFT": training_flops(weights, scale.sft_steps * scale.sft_batch * length, scale.memory),
        "samples": 2 * weights * samples * length,
        "reference": 2 * weights * scale.train_prompts * scale.completions * length,
        "reward model": preference(scale.reward_model_epochs),
        "preference runs": pairs * preference(scale.epochs),
        "PPO": 2 * len(scale.ppo_targets) * ppo,
        "evaluation": runs * scale.evaluations * scale.heldout_prompts * length * 6 * weights,
    }


def matmul_rate(device, memory: Memory, seconds: float = 0.5) -> float:
    """FLOPs a second of square matrix products, in the precision of training."""
    size = 4096 if torch.device(device).type == "cuda" else 512
    a = torch.randn(size, size, device=device)

    def step():
        with precision(memory, device):
            return a @ a

    def settle():
        if a.is_cuda:
            torch.cuda.synchronize()

    step(), settle()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        step(), settle()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)


def of_job(scale: Scale, device) -> str:
    """One paragraph: memory of a device and hours of the main job of a hub scale on what is at hand."""
    from transformers import AutoConfig

    if is_hub_name(scale.policy):
        require_hub(scale.policy)
    with explained(f"loading the model {scale.policy}", "connect to the network once, or use --scale mini"):
        config = AutoConfig.from_pretrained(scale.policy, revision=hub.revision(scale.policy))
    size = size_of(config)
    length, memory = PROMPT + scale.max_tokens, scale.memory
    batch = scale.groups_a_batch * scale.completions
    batch = min(batch, 4 * (memory.micro_batch or batch))
    # PPO holds the reference, the reward model and the true reward, here counted as one more policy each
    needs = training_bytes(size, batch, length, memory, held=3 * size["weights"])
    rate, several = matmul_rate(device, memory), parallel.processes()
    if sharding.wanted():  # and all weights at once to sample and to evaluate
        shares = {name: needs[name] / several for name in ("weights", "gradients", "AdamW")}
        needs |= shares | {"gathered weights": needs["weights"]}
    hours = sum(job_flops(scale, size["weights"]).values()) / (UTILISATION * rate * several) / 3600
    parts = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in needs.items())
    there = ""
    if torch.device(device).type == "cuda":
        there = f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.0f}"
    return (
        f"Estimate: {sum(needs.values()) / 1e9:.1f}{there} GB a device ({parts}); about {hours:.1f} hours on {several} "
        f"x {device} at {UTILISATION:.0%} of its {rate / 1e12:.2f} TFLOP/s"
    )


def peak_memory() -> str:
    """The most memory this process has held so far."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU"
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return "not known on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"
