"""The divergence between teacher and student, from hidden states and the frozen LM heads, tiled over tokens.

A frozen head has no gradient of its own, so all that the backward needs is the divergence's gradient with respect to
the student's hidden states. It is known as soon as a tile's logits are: it is made in the forward, nothing is
recomputed, and no `[tokens, vocabulary]` tensor exists.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TrainingError
from ..hookpoints import backbone
from ..modes import evaluating
from ..not_finite import cause_of_logits
from ..sae.totals import wide_dtype


@dataclass(frozen=True)
class LMHead:
    """A frozen LM head: logits = cap(scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap).

    Attributes:
        weight (`torch.Tensor`): `[vocabulary, d_model]`.
        bias (`torch.Tensor` or `None`): `[vocabulary]`.
        scale (`float`): what the model multiplies its logits by (Cohere, Granite).
        softcap (`float` or `None`): the bound of the logits (Gemma 2).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[tokens, d_model]` -> `[tokens, vocabulary]` of at least float32: a fresh tensor, or `out`."""
        hidden = hidden.to(self.weight.dtype)
        if out is None:
            logits = hidden @ self.weight.T
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        elif out.dtype == self.weight.dtype:
            logits = torch.mm(hidden, self.weight.T, out=out)
        else:
            logits = out.copy_(hidden @ self.weight.T)
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def pull_back(self, grad_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient `[tokens, d_model]` to the hidden states, from the one to the logits (overwritten)."""
        if self.softcap is not None:
            grad_logits *= 1 - (logits / self.softcap) ** 2
        if self.scale != 1.0:
            grad_logits *= self.scale
        return grad_logits.to(self.weight.dtype) @ self.weight


def frozen_head(model: PreTrainedModel) -> LMHead:
    """Reads a causal LM's head, and proves on a few tokens that it gives the model's own logits.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The bare causal LM (not PEFT-wrapped; adapters inside it may be on).

    Raises:
        `ValueError`: if the head is trainable, carries an adapter, is quantised, or if the model makes its logits in a
            way that is not known here.
    """
    head = model.get_output_embeddings()
    if (
        not isinstance(head, nn.Linear)
        or type(head).__module__.startswith("peft.")
        or not head.weight.is_floating_point()
    ):
        raise ValueError(
            f"The LM head is a {type(head).__module__}.{type(head).__name__}, but the KL loss needs a plain frozen "
            "linear layer: leave 'lm_head' out of the adapter's target_modules and modules_to_save, and unquantised."
        )
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError("The LM head is trainable, but the KL loss is made for a frozen one: freeze `lm_head`.")
    config = model.config.get_text_config()
    # The names under which architectures state what they do to their logits, as trl's fused LM head reads them.
    scale = next((getattr(config, n) for n in ("logit_scale", "output_multiplier") if getattr(config, n, None)), 1.0)
    if getattr(config, "logits_scaling", None):
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    read = LMHead(head.weight, head.bias, float(scale), getattr(config, "final_logit_softcapping", None))
    _prove(model, read)
    return read


@torch.no_grad()
def _prove(model: PreTrainedModel, head: LMHead) -> None:
    tokens = torch.arange(4, device=head.weight.device)[None]
    with evaluating(model):
        hidden = backbone(model)(input_ids=tokens, use_cache=False).last_hidden_state
        expected = model(input_ids=tokens, use_cache=False).logits[0].to(torch.float32)
    if not expected.isfinite().all():
        raise TrainingError(f"{type(model).__name__} gives logits that are NaN or infinite: {cause_of_logits(model)}.")
    # Half precision rounds each logit to about 2^-8 of its size.
    tolerance = 1e-4 if head.weight.dtype.itemsize >= 4 else 2e-2
    if not torch.allclose(
        head.logits(hidden[0]).float(), expected, rtol=tolerance, atol=tolerance * expected.std().item()
    ):
        raise ValueError(
            f"{type(model).__name__} does something to its logits that resa-hf does not know (its head was read as "
            f"scale {head.scale}, softcap {head.softcap}), so the KL would be wrong. Please report this model."
        )


def tile_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens a tile. On CPU a tile's logits should stay in the cache; elsewhere larger tiles keep the device busy."""
    return max(64, (2**21 if device.type == "cpu" else 2**25) // vocabulary)


class TiledDivergence(torch.autograd.Function):
    """Per-token divergence `[tokens]` with the gradient to the student's hidden states made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        student_head: LMHead,
        teacher_head: LMHead,
        beta: float,
        temperature: float,
    ) -> torch.Tensor:
        tokens = student_hidden.shape[0]
        dtype = torch.promote_types(student_head.weight.dtype, torch.float32)
        divergence = torch.empty(tokens, dtype=dtype, device=student_hidden.device)
        grad = torch.empty_like(student_hidden) if student_hidden.requires_grad else None
        vocabulary = student_head.weight.shape[0]
        step = min(tile_tokens(vocabulary, student_hidden.device), max(tokens, 1))
        # Made once: on a CPU, the pages of a fresh tensor cost more than the pass that fills it.
        work = [torch.empty(step, vocabulary, dtype=dtype, device=student_hidden.device) for _ in range(4)]
        with torch.autocast(student_hidden.device.type, enabled=False):
            for start in range(0, tokens, step):
                tile = slice(start, start + step)
                student, teacher, p, q = (buffer[: len(student_hidden[tile])] for buffer in work)
                student_head.logits(student_hidden[tile], student)
                teacher_head.logits(teacher_hidden[tile], teacher)
                logits = student.clone() if student_head.softcap is not None else student
                if temperature != 1.0:
                    student, teacher = student.div_(temperature), teacher.div_(temperature)
                divergence[tile], grad_logits, scale = (
                    _forward_kl(student, teacher, p, q) if beta == 0.0 else _divergence(student, teacher, beta)
                )
                if grad is not None:
                    grad[tile] = student_head.pull_back(grad_logits, logits).div_(scale * temperature)
        ctx.save_for_backward(grad)
        return divergence

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].unsqueeze(-1).to(grad.dtype), None, None, None, None, None


def _forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, p: torch.Tensor, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(teacher || student) `[tokens]`; its gradient to the student's logits in units of a factor `[tokens, 1]`.

    Logits are overwritten, p and q are room for their exponentials: at large vocabularies the time goes into passes
    over such tensors. Of KL = sum (q - p) - sum p (log q - log p) the first sum is zero but for the rounding of the
    normalisers, which shifts every log q - log p alike: it takes that shift out again, which would drown a small KL.
    """
    wide = wide_dtype(student.device)
    z_p, z_q = (
        torch.exp(x.sub_(x.amax(-1, keepdim=True)), out=out).sum(-1, keepdim=True).to(wide)
        for x, out in ((teacher, p), (student, q))
    )
    ratio = z_q / z_p
    narrow = ratio.to(p.dtype)
    weighted = student.sub_(teacher).mul_(p).sum(-1, keepdim=True).to(wide)
    excess = q.addcmul_(p, narrow, value=-1)
    # What the rounding of a row's ratio has moved is known, and put back.
    value = (excess.sum(-1, keepdim=True).to(wide) + (narrow - ratio) * z_p) / z_q
    value -= weighted / z_p - ratio.log()
    return value.squeeze(-1).to(p.dtype), excess, z_q.to(p.dtype)


def _relative_entropy(difference: torch.Tensor, p: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
    """KL(p || q) by rows from `difference` log q - log p (overwritten), p, and `excess` q - p; see `_forward_kl`."""
    return excess.sum(-1) - difference.mul_(p).sum(-1)


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_forward_kl`, for 0 < `beta` <= 1: KL(student || teacher) for 1, else TRL's generalised Jensen-Shannon
    divergence (huggingface.co/papers/2306.13649, equation 1)."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    p, q = teacher.exp(), student.exp()
    if beta == 1.0:
        slope, value = student - teacher, _relative_entropy(teacher.sub_(student), q, p.sub_(q))
    else:
        mixture = beta * p + (1 - beta) * q
        log_mixture = mixture.log()
        slope = (1 - beta) * (student - log_mixture)
        value = beta * _relative_entropy(log_mixture - teacher, p, mixture - p)
        value += (1 - beta) * _relative_entropy(log_mixture.sub_(student), q, mixture - q)
    return value, q * (slope - (q * slope).sum(-1, keepdim=True)), value.new_ones(len(value), 1)


def token_divergence(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: LMHead,
    teacher_head: LMHead,
    beta: float = 0.0,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The divergence between teacher and student at every token.

    Args:
        student_hidden (`torch.Tensor`):
            `[tokens, d_model]`, the output of the student's backbone; the only input that gets a gradient.
        teacher_hidden (`torch.Tensor`):
            `[tokens, teacher's d_model]`.
        student_head, teacher_head (`LMHead`):
            Of one vocabulary.
        beta (`float`, *optional*, defaults to `0.0`):
            0 is KL(teacher || student), 1 is KL(student || teacher), in between the generalised JSD.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides both logits. There is no T^2 factor.

    Returns:
        `torch.Tensor`: `[tokens]` in nats, in at least float32, float64 for a float64 head.

    Raises:
        `ValueError`: if the vocabularies differ.
    """
    if student_head.weight.shape[0] != teacher_head.weight.shape[0]:
        raise ValueError(
            f"The student's LM head has {student_head.weight.shape[0]} tokens and the teacher's "
            f"{teacher_head.weight.shape[0]}; the KL needs one vocabulary."
        )
    divergence: torch.Tensor = TiledDivergence.apply(
        student_hidden, teacher_hidden, student_head, teacher_head, beta, temperature
    )
    return divergence


def token_cross_entropy(hidden: torch.Tensor, head: LMHead, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy `[tokens]` in nats of `labels` `[tokens]`, from `hidden` `[tokens, d_model]`; tiled alike.

    It is the KL to a one-hot teacher, so its gradient too is made in the forward.
    """
    entropy: torch.Tensor = TiledCrossEntropy.apply(hidden, head, labels)
    return entropy


class TiledCrossEntropy(torch.autograd.Function):
    """Per-token cross-entropy `[tokens]` with the gradient to the hidden states made in the forward."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: LMHead, labels: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        entropy = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        step = tile_tokens(head.weight.shape[0], hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], step):
                tile = slice(start, start + step)
                logits, target = head.logits(hidden[tile]), labels[tile].unsqueeze(-1)
                log_probs = logits.log_softmax(-1)
                entropy[tile] = -log_probs.gather(-1, target).squeeze(-1)
                if grad is not None:
                    grad_logits = log_probs.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=dtype))
                    grad[tile] = head.pull_back(grad_logits, logits)
        ctx.save_for_backward(grad)
        return entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0].unsqueeze(-1).to(grad.dtype), None, None
