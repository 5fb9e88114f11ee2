"""`resa-hf COMMAND` with a fault in the middle of a step, alone or as one of several processes that torchrun starts.

python tests/fault_worker.py FAULT RANK FIRST LAST COMMAND...: in steps FIRST to LAST of process RANK
"""

import os
import signal
import sys

import torch
from transformers import Trainer

from resa_hf.cli import main

_training_step = Trainer.training_step


def faulty(fault, rank, first, last):
    """`Trainer.training_step` with a signal to its own process, a loss of NaN or an infinite gradient."""

    def step(self, model, inputs, *args, **kwargs):
        if self.args.process_index != rank or not first <= self.state.global_step + 1 <= last:
            return _training_step(self, model, inputs, *args, **kwargs)
        if fault.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, fault))
        if fault == "loss":
            compute = self.compute_loss
            self.compute_loss = lambda *a, **k: compute(*a, **k) * float("nan")
        loss = _training_step(self, model, inputs, *args, **kwargs)
        if fault == "loss":
            del self.compute_loss
        if fault == "gradient":
            next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    fault, rank, first, last, *words = sys.argv[1:]
    if fault != "none":
        Trainer.training_step = faulty(fault, int(rank), int(first), int(last))
    code = main(words)
    print(f"\nprocess {os.environ.get('RANK', '0')} ended with {code}", flush=True)
    sys.exit(code)
