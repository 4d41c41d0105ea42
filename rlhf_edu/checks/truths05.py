"""The four broken trainings of notebook 05: a right one is `toy_run()`."""

import copy

import torch
import torch.nn.functional as F

BUGS = {  # what is shown as run 1, 2, 3, 4
    1: "mean",
    2: "swapped",
    3: "train mode",
    4: "no copy",
}


def toy_run(bug: str | None = None, *, steps: int = 40, beta: float = 0.5, pairs: int = 64) -> list[dict]:
    """DPO on a bigram model of 16 tokens in a tenth of a second, right or with one bug; one row an update.

    A response of 4 to 12 tokens is chosen if a larger share of its tokens is even.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        lengths = torch.randint(4, 13, (pairs, 2))
        ids = torch.randint(16, (pairs, 2, 13))
        mask = torch.arange(1, 13) <= lengths[..., None]  # (pairs, 2, 12)
        share = ((ids[..., 1:] % 2 == 0) & mask).sum(-1) / lengths
        better = share.argmax(1)
        policy = torch.nn.Sequential(
            torch.nn.Embedding(16, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 16)
        ).eval()
        reference = policy if bug == "no copy" else copy.deepcopy(policy)
        reference.train(bug == "train mode")
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
        rows = []
        for step in range(1, steps + 1):
            ratios = []
            for model in (policy, reference):
                tokens = model(ids[..., :-1]).log_softmax(-1).gather(-1, ids[..., 1:, None])[..., 0]
                ratios.append((tokens * mask).sum(-1) / (lengths if bug == "mean" else 1))  # (pairs, 2)
            ratio = ratios[0] - ratios[1]
            chosen = ratio.gather(1, better[:, None])[:, 0]
            h = chosen - (ratio.sum(1) - chosen)
            loss = -F.logsigmoid(beta * (-h if bug == "swapped" else h)).mean()
            rows.append({"step": step, "loss": loss.item(), "accuracy": (h > 0).double().mean().item()})
            rows[-1]["margin"] = h.mean().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return rows


def mystery_runs() -> dict[int, list[dict]]:
    """The four broken runs, by number."""
    return {number: toy_run(bug) for number, bug in BUGS.items()}
