"""Stage II as the released code does it, in our own words: two full forwards, a full softmax, `.item()` at each step.

The loss is `KLDivLoss(reduction="batchmean")` of the student's log-probabilities against the teacher's probabilities.
With `gradient="stop"` the SAE runs without gradient and its input is cut off, as in the released code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from resa_hf.sae.autoencoder import TopKSAE


def plain_sae(sae: TopKSAE, x: Tensor) -> Tensor:
    """Dense encoder, top-k, and a sum of decoder rows, as sparsify's forward."""
    latents = F.relu(F.linear(x - sae.b_dec, sae.W_enc.T, sae.b_enc))
    values, indices = latents.topk(sae.k, dim=-1, sorted=False)
    flat = F.embedding_bag(indices.flatten(0, -2), sae.W_dec, per_sample_weights=values.flatten(0, -2), mode="sum")
    return flat.view_as(x) + sae.b_dec


class PlainLoop:
    """
    A hand-written training loop over a PEFT model.

    Args:
        model (`peft.PeftModel`): the target with its adapter.
        sae (`TopKSAE`): the SAE.
        hookpoint (`int`): the decoder layer behind which it stands.
        gradient (`str`): "stop" or "flow".
        loss (`str`): "softmax", or "trl": what TRL's DistillationTrainer computes the divergence with.
    """

    def __init__(self, model: PeftModel, sae: TopKSAE, hookpoint: int, gradient: str, loss: str = "softmax") -> None:
        self.model, self.sae, self.gradient, self.loss = model.train(), sae, gradient, loss
        self.layer = model.get_base_model().model.layers[hookpoint]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=0.0)
        self.losses: list[float] = []

    def _replace(self, layer: Any, inputs: Any, x: Tensor) -> Tensor:
        if self.gradient == "flow":
            return plain_sae(self.sae, x)
        with torch.no_grad():
            return plain_sae(self.sae, x)

    def step(self, ids: Tensor) -> float:
        """One step on `ids` `[batch, tokens]`; the loss in nats a token."""
        whole = self.loss == "softmax"
        run = self.model if whole else self.model.get_base_model().model
        with torch.no_grad(), self.model.disable_adapter():
            teacher = run(input_ids=ids, use_cache=False)
        handle = self.layer.register_forward_hook(self._replace)
        student = run(input_ids=ids, use_cache=False)
        loss = self._softmax(student.logits, teacher.logits) if whole else self._trl(student[0], teacher[0])
        loss.backward()
        handle.remove()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        return self.losses[-1]

    def _softmax(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_probs = F.log_softmax(student[:, :-1].float(), dim=-1).flatten(0, 1)
        return F.kl_div(log_probs, F.softmax(teacher[:, :-1].float(), dim=-1).flatten(0, 1), reduction="batchmean")

    def _trl(self, student: Tensor, teacher: Tensor) -> Tensor:
        head = self.model.get_base_model().lm_head.weight
        states = [hidden[:, :-1].flatten(0, 1) for hidden in (student, teacher)]
        divergence, _ = ChunkedDivergenceFunction.apply(states[0], head, None, states[1], head, None, 0.0)
        return divergence.mean()
