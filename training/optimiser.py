"""Muon for the matrices of the layers, AdamW for embedding and norms.

Muon (momentum, then the nearest semi-orthogonal matrix by Newton-Schulz) needs markedly fewer
tokens than AdamW here, and tokens are what two cores lack. torch.optim.Muon computes in bfloat16,
which this machine emulates slowly; hence these few lines in float32.
"""

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
RMS = 0.2  # of an update per entry and unit of learning rate, as AdamW's typically is


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: five odd polynomials of the singular values."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() * 1.01 + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"].lerp_(parameter.grad, 1.0 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(buffer, group["momentum"]))
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                size = RMS * max(parameter.shape) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * size)


def build_optimisers(model: nn.Module, config: dict) -> list[torch.optim.Optimizer]:
    """Muon and AdamW; each group remembers its share of the peak rate as `scale`."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    muon = Muon(matrices, config["matrix_lr"], config["momentum"], config["weight_decay"])
    adam = torch.optim.AdamW(others, config["peak_lr"], betas=tuple(config["betas"]), weight_decay=0.0, fused=True)
    for optimiser, peak in ((muon, config["matrix_lr"]), (adam, config["peak_lr"])):
        for group in optimiser.param_groups:
            group["peak_lr"] = peak
    return [muon, adam]
