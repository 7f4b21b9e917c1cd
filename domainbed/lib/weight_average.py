"""The running mean of a network's weights."""

import copy
from typing import Any

import torch
from torch import nn


class ErmPlusPlusMovingAvg:
    """For an algorithm that predicts with the mean of its weights over the updates since ``sma_start_iter``.

    Until then the averaged network is a copy of the current one. The mean begins with that last copy and gives all
    the updates equal weights; BatchNorm's running statistics are averaged as weights are.

    Source: Devansh Arpit, Huan Wang, Yingbo Zhou and Caiming Xiong, Ensemble of Averages, NeurIPS 2022,
        https://arxiv.org/abs/2110.10832, equation 2, as ERM++ (https://arxiv.org/abs/2304.01973) takes it over.

    Attributes:
        network: what is trained.
        network_sma: the average, in evaluation mode.
        sma_start_iter: the first update that is averaged with those before.
        global_iter: updates so far.
        sma_count: how many of them are averaged, but for the first.

    Args:
        network: what is trained.
    """

    network: Any  # a subclass may know more of it

    def __init__(self, network: nn.Module):
        self.network = network
        self.network_sma = copy.deepcopy(network).eval()
        self.sma_start_iter = 600
        self.global_iter = 0
        self.sma_count = 0

    @torch.no_grad()
    def update_sma(self) -> None:
        """Takes the network's weights of this update in."""
        self.global_iter += 1
        averaging = self.global_iter >= self.sma_start_iter
        self.sma_count += averaging
        current = self.network.state_dict()
        for name, mean in self.network_sma.state_dict().items():
            if "num_batches_tracked" in name:  # counts what the averaged network itself has seen
                continue
            mean.copy_((mean * self.sma_count + current[name]) / (1.0 + self.sma_count) if averaging else current[name])
