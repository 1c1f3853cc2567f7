"""Distillation: the Kullback-Leibler divergence between a teacher's and a student's next tokens. Torch alone.

Notation: that of `gisp_hf.losses.objectives`; ``p`` and ``q`` are the next-token distributions of teacher and student.
The loss is the forward divergence ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` (Hinton et al., arXiv 1503.02531, at
temperature 1; used after pruning by Minitron, arXiv 2407.14679), averaged over the target tokens of the optimizer step.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gisp_hf.losses.objectives import IGNORE_INDEX


def forward_kl(
    outputs: Any,
    teacher_outputs: Any,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Mean ``KL(p || q)`` over the positions that predict a target.

    Args:
        outputs: of the student; its logits are (B, T, V) in any float type and are cast to float32.
        teacher_outputs: of the teacher on the same tokens, with logits of the same shape, on any device.
        labels: (B, T). They only say which positions count: the tokens themselves have no part in the loss.
        num_items_in_batch: targets in the whole step, from the Trainer. ``None`` takes the mean over this batch.

    Returns:
        Scalar float32, in nats per token: this batch's share of the step's mean.

    Raises:
        ValueError: there is no target at all, or logits and labels disagree in shape.
    """
    logits, teacher = _logits(outputs), _logits(teacher_outputs)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape or teacher.shape != logits.shape:
        raise ValueError(
            f"logits of the student {tuple(logits.shape)} and of the teacher {tuple(teacher.shape)} must both be "
            f"(batch, length, vocabulary) for labels {tuple(labels.shape)}"
        )
    is_target = labels[:, 1:] != IGNORE_INDEX
    log_q = F.log_softmax(logits[:, :-1][is_target.to(logits.device)].float(), dim=-1)  # (n, V)
    with torch.no_grad():
        chosen = teacher[:, :-1][is_target.to(teacher.device)].float()
        log_p = F.log_softmax(chosen, dim=-1).to(log_q.device)
    count = log_q.shape[0] if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=log_q.device)
    if not bool(torch.as_tensor(count).sum()):
        raise ValueError(
            f"no target among labels of shape {tuple(labels.shape)}: every label after the first position is "
            f"{IGNORE_INDEX}. Check that the answers were not masked or cut away."
        )
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / count


class Distillation(AbstractContextManager["Distillation"]):
    """A loss for ``Trainer(compute_loss_func=...)`` that compares the student with a teacher, on the same batch.

    ::

        with Distillation(student, teacher) as loss:
            Trainer(student, args, compute_loss_func=loss, ...).train()

    The Trainer gives a loss the outputs alone. A hook on the student keeps the inputs of its last forward pass, on
    which the teacher then runs, without gradients and in evaluation mode. Like the losses of
    `gisp_hf.losses.objectives` it does not depend on how a step is cut into micro-batches or spread over processes.

    Args:
        student: the model that is trained, before the Trainer wraps it.
        teacher: a causal language model with the same vocabulary, on any device and in any dtype. Its weights are not
            changed; it is in evaluation mode from here on.

    Raises:
        ValueError: if the vocabularies differ in size, or the teacher is an elastic model that is not at full width.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        check_teacher(student, teacher)
        self.teacher = teacher.eval()
        self._inputs: Mapping[str, Any] | None = None
        self._hook = student.register_forward_pre_hook(self._keep, with_kwargs=True)

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The loss of the last forward pass of the student; arguments, result and errors as in `forward_kl`."""
        if self._inputs is None:
            raise ValueError("the student has not run since its last loss; give its outputs once, as the Trainer does")
        inputs, self._inputs = self._inputs, None
        device = next(self.teacher.parameters()).device
        with torch.no_grad():
            found = self.teacher(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
        return forward_kl(outputs, found, labels, num_items_in_batch)

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Removes the hook. A second call does nothing."""
        self._hook.remove()
        self._inputs = None

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("input_ids", "attention_mask", "position_ids")
        self._inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}


def check_teacher(student: Any, teacher: Any) -> None:
    """Refuses a teacher whose logits cannot be compared with the student's.

    Raises:
        ValueError: if the vocabularies differ in size, or the teacher is an elastic model that is not at full width.
    """
    own, other = (model.get_input_embeddings().num_embeddings for model in (student, teacher))
    if own != other:
        raise ValueError(
            f"the teacher has {other:,} entries in its vocabulary and the student {own:,}: their logits cannot be "
            "compared; give the model that the level was cut from"
        )
    if sparsity := getattr(teacher, "sparsity", 0.0):
        raise ValueError(
            f"the teacher is an elastic model at sparsity {sparsity:g}; call teacher.set_sparsity(0) for full width"
        )


def _logits(outputs: Any) -> torch.Tensor:
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
