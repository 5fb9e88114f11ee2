"""A training step of sparsify and of sae-lens on given activations, from the weights of one of our SAEs."""

import os
from typing import Any

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer as LensTrainer
from torch import Tensor

from resa_hf.sae.autoencoder import TopKSAE


class SparsifyMissing(RuntimeError):
    """sparsify cannot be imported here."""


class Sparsify:
    """
    What sparsify's trainer does with one hookpoint at a step, line by line: decoder norm, forward, firings, the FVU as
    a number (it waits for the device), backward, parallel gradient, schedule-free SignSGD, tokens since firing. It
    also copies the activations once or twice, to leave out tokens; that is left out here.
    """

    def __init__(self, start: TopKSAE) -> None:
        if not torch.cuda.is_available():
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        try:
            from schedulefree import ScheduleFreeWrapper
            from sparsify import SparseCoder, SparseCoderConfig
            from sparsify.sign_sgd import SignSGD
        except ImportError as error:
            raise SparsifyMissing(
                f"sparsify is not measured, since it cannot be imported ({error}). It is a package for this benchmark "
                "only: pip install --no-deps --target DIR eai-sparsify natsort schedulefree, and PYTHONPATH=DIR."
            ) from error
        config = SparseCoderConfig(num_latents=start.num_latents, k=start.k)
        self.sae = SparseCoder(start.d_in, config, start.device, dtype=torch.float32)
        with torch.no_grad():
            self.sae.encoder.weight.copy_(start.W_enc.t())
            self.sae.encoder.bias.copy_(start.b_enc)
            self.sae.W_dec.copy_(start.W_dec)
            self.sae.b_dec.copy_(start.b_dec)
        rate = 5e-3 / (start.num_latents / 2**14) ** 0.5
        self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=rate), momentum=0.95)
        self.optimizer.train()
        self._fired = torch.zeros(start.num_latents, dtype=torch.bool, device=start.device)
        self._since_fired = torch.zeros(start.num_latents, dtype=torch.long, device=start.device)
        self.losses: list[float] = []  # FVU

    def step(self, x: Tensor) -> None:
        self.sae.set_decoder_norm_to_unit_norm()
        x = x.float()
        variance = (x - x.mean(0)).pow(2).sum()
        out = self.sae(x, x, dead_mask=None, total_variance=variance)
        self._fired[out.latent_indices.flatten()] = True
        self.losses.append(float(out.fvu.detach()))
        out.fvu.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._since_fired += len(x)
        self._since_fired[self._fired] = 0
        self._fired.zero_()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """With the average of the iterates."""
        self.optimizer.eval()
        self.sae.set_decoder_norm_to_unit_norm()
        return self.sae(x.float()).sae_out


class SAELens:
    """A step of sae-lens' own `SAETrainer`: forward with its AuxK, backward, clipping, Adam, statistics of firings."""

    def __init__(self, start: TopKSAE, **settings: Any) -> None:
        device = str(start.device)
        config = TopKTrainingSAEConfig(
            d_in=start.d_in, d_sae=start.num_latents, k=start.k, device=device, dtype="float32", **settings
        )
        sae = TopKTrainingSAE(config)
        sae.load_state_dict({name: tensor.detach().clone() for name, tensor in start.state_dict().items()})
        total = SAETrainerConfig(
            total_training_samples=2**40, train_batch_size_samples=2**12, lr_end=3e-5, device=device
        )
        self._trainer = LensTrainer(total, sae, iter(()))
        self.losses: list[float] = []  # mean over tokens of the squared error

    def step(self, x: Tensor) -> None:
        out = self._trainer.step(x.float())
        self._trainer.n_training_steps += 1
        self.losses.append(
            float(out.losses["mse_loss"].detach())
        )  # its progress bar takes a number from the device, too

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self._trainer.sae(x.float())
