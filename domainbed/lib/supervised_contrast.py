"""A supervised contrastive loss that tells pairs within a domain from pairs across domains."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SupConLossLambda(nn.Module):
    """Contrasts the classes, with other weights for pairs from one domain than for pairs across domains.

    Let ``e_ij = w_ij * exp(cosine_ij / temperature)``, w being lamda within a domain and 1 - lamda across. An image's
    loss is the mean of ``-log(e_ij / (sum_k e_ik + 1e-5) + 1e-5)`` over the other images j of its class, k over all
    other images. Images alone in their class are left out.

    Source: Prannay Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, https://arxiv.org/abs/2004.11362;
        the weights: Demirel, Aptoula and Ozkan 2023 (see ADRMX).
    Differs: as DomainBed, the sum of the n losses is divided by n + 1. It is 0 where all images are left out. Under
        autocast it is computed in float32.

    Args:
        lamda: weight of pairs within a domain, in [0, 1].
        temperature: above 0.
    """

    def __init__(self, lamda: float = 0.5, temperature: float = 0.07):
        super().__init__()
        self.lamda, self.temperature = lamda, temperature

    def forward(self, features: Tensor, labels: Tensor, domain_labels: Tensor) -> Tensor:
        """Scalar loss of features (N, D) with labels (N,) from the domains domain_labels (N,)."""
        with torch.autocast(features.device.type, enabled=False):
            unit = F.normalize(features if features.dtype == torch.float64 else features.float())
            similarity = unit @ unit.T / self.temperature
        others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        same_domain = (domain_labels[:, None] == domain_labels).to(similarity.dtype)
        weights = (1 - self.lamda + (2 * self.lamda - 1) * same_domain) * others
        terms = weights * similarity.exp()
        log_shares = torch.log(terms / (terms.sum(1, keepdim=True) + 1e-5) + 1e-5)
        positives = (labels[:, None] == labels) & others
        counts = positives.sum(1)
        losses = -(log_shares * positives).sum(1) / counts.clamp_min(1)  # 0 for images that are left out
        return losses.sum() / ((counts > 0).sum() + 1)
