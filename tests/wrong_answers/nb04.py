"""Answers to the exercises of notebook 04 as students write them."""

import torch
import torch.nn.functional as F

WRONG, RIGHT = {}, {}


def dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    h = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    return -F.logsigmoid(beta * h)


def dpo_swapped(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    h = (rejected_logps - ref_rejected_logps) - (chosen_logps - ref_chosen_logps)
    return -torch.log(torch.sigmoid(beta * h))


WRONG["04.1"] = [(dpo_swapped, "wrong way round")]
RIGHT["04.1"] = [dpo]
