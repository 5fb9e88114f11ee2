"""The SAEs that are trained and spliced: TopK on sae-lens' classes, and a thin wrapper for sae-lens' other kinds."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn

from .sparse import SparseDecode, TopKEncode
from .tiles import tiles


class TopKSAE(TopKTrainingSAE):
    """
    TopK sparse autoencoder: `z = TopK(ReLU(W_enc (x - b_dec) + b_enc))`, `x~ = W_dec z + b_dec`.

    The formula of the paper [Resa](https://huggingface.co/papers/2506.09967), section 3, and of
    [Gao et al.](https://huggingface.co/papers/2406.04093). A subclass of sae-lens' `TopKTrainingSAE` with the same
    parameters (`W_enc` [d_in, num_latents], `b_enc`, `W_dec` [num_latents, d_in], `b_dec`), whose forward and backward
    touch active latents only. sae-lens' hook points therefore do not fire.

    Args:
        d_in (`int`):
            Width of the activations.
        num_latents (`int`):
            Number of latents.
        k (`int`, *optional*, defaults to `32`):
            Number of active latents a token, at most `num_latents`.
        hookpoint (`str`, *optional*):
            Where the activations come from, for example `"layers.12"`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            dtype of the parameters.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Device of the parameters.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial weights; they are the same on every device. The global random state is not used.
        metadata (`dict[str, Any]`, *optional*):
            How the SAE came about; saved with it. Values that JSON can hold.

    Raises:
        `ValueError`: if a size is not positive, or `k` exceeds `num_latents`.
    """

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int = 32,
        *,
        hookpoint: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        if d_in < 1 or num_latents < 1:
            raise ValueError(f"d_in and num_latents must be positive, not {d_in} and {num_latents}.")
        if not 1 <= k <= num_latents:
            raise ValueError(f"k must be between 1 and num_latents ({num_latents}), not {k}.")
        self._seed = seed
        super().__init__(
            TopKTrainingSAEConfig(
                d_in=d_in,
                d_sae=num_latents,
                dtype=str(dtype).removeprefix("torch."),
                device=str(device),
                apply_b_dec_to_input=True,
                k=k,
                rescale_acts_by_decoder_norm=False,
                metadata=SAEMetadata(),
            )
        )
        self.hookpoint = hookpoint
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def from_weights(
        cls,
        encoder: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        k: int,
        hookpoint: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Self:
        """
        An SAE that holds the given tensors, without a copy of them.

        Args:
            encoder (`torch.Tensor`): one latent a row, shape [num_latents, d_in].
            b_enc (`torch.Tensor`): shape [num_latents].
            W_dec (`torch.Tensor`): shape [num_latents, d_in].
            b_dec (`torch.Tensor`): shape [d_in].
            k (`int`): number of active latents a token.
            hookpoint (`str`, *optional*): where the activations come from.
            metadata (`dict[str, Any]`, *optional*): how the SAE came about.
        """
        num_latents, d_in = encoder.shape
        sae = cls(d_in, num_latents, k, hookpoint=hookpoint, dtype=encoder.dtype, device="meta", metadata=metadata)
        tensors = {"W_enc": encoder.contiguous().t(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        sae.load_state_dict(tensors, assign=True)
        sae.to(device=encoder.device)
        return sae

    def initialize_weights(self) -> None:
        """Encoder rows uniform as in `nn.Linear`, decoder its transpose with unit norm, biases zero."""
        num_latents, d_in = self.cfg.d_sae, self.cfg.d_in
        rows = torch.empty(num_latents, d_in, device="meta" if self.device.type == "meta" else "cpu")
        if rows.device.type != "meta":
            bound = 1 / math.sqrt(d_in)
            rows.uniform_(-bound, bound, generator=torch.Generator().manual_seed(self._seed))
        rows = rows.to(self.device, self.dtype)
        # sae-lens keeps W_enc as [d_in, num_latents]. A view of [num_latents, d_in] storage has that shape, while the
        # rows of active latents stay contiguous.
        self.W_enc = nn.Parameter(rows.t())
        self.b_enc = nn.Parameter(rows.new_zeros(num_latents))
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(rows.new_zeros(d_in))

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self.cfg.d_in)

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return int(self.cfg.d_sae)

    @property
    def k(self) -> int:
        """Number of active latents a token."""
        return int(self.cfg.k)

    @property
    def k_aux(self) -> int:
        """Number of dead latents in the AuxK loss, `d_in // 2` as in Gao et al., appendix B.1."""
        return min(max(1, self.d_in // 2), self.num_latents)

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        The k largest latents of each token, in no particular order.

        Args:
            x (`torch.Tensor`): activations, shape [..., d_in], any floating dtype.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: values (not negative, dtype of the SAE) and indices (int64), both of
            shape [..., k].
        """
        # Autocast would choose latents by bf16 pre-activations. The SAE's own dtype decides.
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
            values, indices = TopKEncode.apply(flat, self.b_dec, self.W_enc.t(), self.b_enc, self.k)
        return values.view(*x.shape[:-1], self.k), indices.view(*x.shape[:-1], self.k)

    def decode_sparse(self, values: Tensor, indices: Tensor, *, bias: bool = True) -> Tensor:
        """
        The reconstruction from active latents.

        Args:
            values (`torch.Tensor`): shape [..., k].
            indices (`torch.Tensor`): int64, shape [..., k].
            bias (`bool`, *optional*, defaults to `True`): whether to add `b_dec`.

        Returns:
            `torch.Tensor`: shape [..., d_in], dtype of the SAE.
        """
        k = values.shape[-1]
        with torch.autocast(values.device.type, enabled=False):
            values = values.to(self.W_dec.dtype)
            flat = SparseDecode.apply(values.reshape(-1, k), indices.reshape(-1, k), self.W_dec)
            out: Tensor = flat.view(*values.shape[:-1], self.d_in)
            return out + self.b_dec if bias else out

    def encode(self, x: Tensor) -> Tensor:
        """
        All latents of each token.

        Args:
            x (`torch.Tensor`): activations, shape [..., d_in].

        Returns:
            `torch.Tensor`: shape [..., num_latents], zero but for k entries, dtype of the SAE.
        """
        values, indices = self.encode_sparse(x)
        return values.new_zeros(*values.shape[:-1], self.num_latents).scatter(-1, indices, values)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """
        The reconstruction from a dense tensor of latents, which need not be sparse.

        Args:
            feature_acts (`torch.Tensor`): shape [..., num_latents].

        Returns:
            `torch.Tensor`: shape [..., d_in], dtype of the SAE.
        """
        return feature_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """
        The reconstruction of activations, as `splice` wants it.

        Args:
            x (`torch.Tensor`): activations, shape [..., d_in].

        Returns:
            `torch.Tensor`: shape and dtype of `x`.
        """
        return self.decode_sparse(*self.encode_sparse(x)).to(x.dtype)

    @torch.no_grad()
    def unit_norm_decoder(self) -> None:
        """Scales each row of the decoder to norm 1, in place. A row of zeros stays."""
        for (rows,) in tiles(self.W_dec):
            rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_decoder_gradient(self) -> None:
        """
        Takes from each row of the decoder's gradient its part along the row, which a unit norm would undo anyway.

        Expects rows of unit norm. Without it, optimisers with a memory accumulate a part that never acts.
        """
        if self.W_dec.grad is not None:
            for rows, grad in tiles(self.W_dec, self.W_dec.grad):
                grad.addcmul_((grad * rows).sum(dim=1, keepdim=True), rows, value=-1)


class SAELensSAE(nn.Module):
    """
    Any other SAE of sae-lens (standard, gated, jumprelu, ...) behind the interface of [`TopKSAE`].

    Args:
        sae (`sae_lens.SAE`):
            The SAE.
        k (`int`, *optional*):
            Number of active latents a token, if it is a TopK SAE (one that normalises its input); else `None`.
        hookpoint (`str`, *optional*):
            Where the activations come from.
        metadata (`dict[str, Any]`, *optional*):
            How the SAE came about.
    """

    def __init__(
        self,
        sae: SAE[Any],
        *,
        k: int | None = None,
        hookpoint: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.sae = sae
        self.k = k
        self.hookpoint = hookpoint
        self.metadata: dict[str, Any] = dict(metadata or {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # sae-lens casts its input to the dtype that its own `to` was last told, and a parent's `to` does not tell it.
        parameter = next(self.sae.parameters())
        self.sae.dtype, self.sae.device = parameter.dtype, parameter.device
        return self

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return int(self.sae.cfg.d_in)

    @property
    def num_latents(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    def encode(self, x: Tensor) -> Tensor:
        """Latents, shape [..., num_latents], of activations of shape [..., d_in]."""
        with torch.autocast(x.device.type, enabled=False):
            latents: Tensor = self.sae.encode(x)
        return latents

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Activations, shape [..., d_in], of latents of shape [..., num_latents]."""
        with torch.autocast(feature_acts.device.type, enabled=False):
            out: Tensor = self.sae.decode(feature_acts.to(self.sae.dtype))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of activations, with the shape and dtype of `x`."""
        return self.decode(self.encode(x)).to(x.dtype)
