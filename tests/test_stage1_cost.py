"""What makes a step of Stage I fast and small: the same numbers as the plain formula, no large tensor, no waiting."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from sae_reference import HOOKPOINTS, config, rows
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from resa_hf.sae import sparse, tiles
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.objective import SAEBank, sae_step
from resa_hf.sae.signum import ScheduleFreeSignum
from resa_hf.sae.topk import largest
from resa_hf.sae.trainer import SAETrainer

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("entries", "k"), [(8192, 32), (4096, 128), (96, 5), (97, 5), (64, 60), (30, 30), (1, 1)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinite", "nan"])
def test_largest_are_those_of_topk(entries: int, k: int, kind: str) -> None:
    x = random(23, entries)
    if kind == "ties":
        x = x.mul(2).round()
    elif kind == "infinite":
        x[:, 3:] = -torch.inf
    elif kind == "nan":
        x[::2, entries // 2] = torch.nan
    values, indices = largest(x, k)
    expected = x.topk(k, dim=-1).values
    torch.testing.assert_close(values.sort(descending=True).values, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.gather(1, indices), values, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 100, 2**18])
def test_signum_in_tiles_gives_the_bits_of_the_formula(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "_ELEMENTS_CPU", elements)
    # As the SAE has them: W_enc a view of transposed storage, matrices and vectors, and a scalar.
    shapes = [random(48, 16).t(), random(48, 16, seed=1), random(48, seed=2), random(1, seed=3)[0]]
    parameters = [torch.nn.Parameter(start.to(dtype)) for start in shapes]
    optimizer = ScheduleFreeSignum(parameters, lr=0.03, momentum=0.9)
    zs, xs, ys = ([p.detach().clone() for p in parameters] for _ in range(3))
    for step in range(1, 5):
        for number, parameter in enumerate(parameters):
            grad = random(*parameter.shape, seed=10 * step + number, dtype=dtype)
            grad[grad.abs() < 0.3] = 0
            parameter.grad = grad
            zs[number] = zs[number].add(torch.sign(grad), alpha=-0.03)
            xs[number] = torch.lerp(xs[number], zs[number], 0.03**2 / sum([0.03**2] * step))
            ys[number] = torch.lerp(xs[number], zs[number], 1 - 0.9)
        optimizer.step()
        for parameter, z, x, y in zip(parameters, zs, xs, ys, strict=True):
            assert torch.equal(optimizer.state[parameter]["z"], z)
            assert torch.equal(optimizer.state[parameter]["x"], x)
            assert torch.equal(parameter, y)
    optimizer.use_average()
    assert all(map(torch.equal, parameters, xs))
    optimizer.use_training_point()
    assert all(map(torch.equal, parameters, ys))


def test_passes_over_the_decoder_in_tiles_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = TopKSAE(16, 48, 4)
    W_dec, grad = random(48, 16, seed=1), random(48, 16, seed=2)
    monkeypatch.setattr(tiles, "_ELEMENTS_CPU", 5 * 16)
    sae.W_dec.data, sae.W_dec.grad = W_dec.clone(), grad.clone()
    sae.remove_parallel_decoder_gradient()
    assert torch.equal(sae.W_dec.grad, torch.addcmul(grad, (grad * W_dec).sum(1, keepdim=True), W_dec, value=-1))
    sae.unit_norm_decoder()
    assert torch.equal(sae.W_dec, W_dec / W_dec.norm(dim=1, keepdim=True))


def dense_gradients(sae: TopKSAE, x: Tensor, weight: Tensor, dead: Tensor, alpha: float) -> dict[str, Tensor]:
    """Loss and gradients by autograd in float64 through a dense encoder, for the latents that the SAE chose."""
    w = {name: getattr(sae, name).detach().double().requires_grad_() for name in NAMES}
    found = sparse.select(x.to(sae.dtype) - sae.b_dec.detach(), sae.W_enc.detach().t(), sae.b_enc.detach(), sae.k)
    counted = x.double()[weight > 0]
    pre = torch.relu((counted - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    error = counted - (
        pre.gather(1, found.indices[weight > 0])[..., None] * w["W_dec"][found.indices[weight > 0]]
    ).sum(1)
    error = error - w["b_dec"]
    variance = (counted - counted.mean(0)).square().sum()
    loss = error.square().sum() / variance
    values, indices = torch.where(dead, pre, 0).topk(sae.k_aux, dim=1)
    rest = error.detach() - (values[..., None] * w["W_dec"][indices]).sum(1)
    loss = loss + alpha * min(1.0, int(dead.sum()) / sae.k_aux) * rest.square().sum() / variance
    loss.backward()
    return {"loss": loss.detach(), **{name: tensor.grad for name, tensor in w.items()}}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_gradients_made_in_the_forward_equal_dense_autograd(
    dtype: torch.dtype, tolerance: float, alpha: float
) -> None:
    sae = TopKSAE(16, 192, 5, dtype=dtype)
    with torch.no_grad():
        sae.b_enc += 0.1 * random(192, seed=4, dtype=dtype)
        sae.b_dec += random(16, seed=5, dtype=dtype)
    x, dead = random(60, 16, seed=6, dtype=dtype) * 2 + 1, torch.arange(192) < 90
    weight = (torch.arange(60) % 7 != 0).to(dtype)
    step = sae_step(sae, x, weight, dead, alpha)
    (step.loss / 3).backward()  # as with three steps of accumulation
    expected = dense_gradients(sae, x, weight, dead, alpha)
    assert float(step.loss.detach()) == pytest.approx(float(expected["loss"]), rel=tolerance)
    for name in NAMES:
        ours = getattr(sae, name).grad
        assert ours.dtype == dtype
        assert float((3 * ours.double() - expected[name]).norm() / expected[name].norm()) < tolerance, name


def test_activations_in_bfloat16_count_as_what_they_are() -> None:
    x, ones = random(40, 16, dtype=torch.bfloat16), torch.ones(40)
    one, other = TopKSAE(16, 96, 5), TopKSAE(16, 96, 5)
    sae_step(one, x, ones).loss.backward()
    sae_step(other, x.float(), ones).loss.backward()
    for name in NAMES:
        assert torch.equal(getattr(one, name).grad, getattr(other, name).grad), name


def test_without_autograd_no_gradient_is_made_and_a_second_backward_is_refused() -> None:
    sae, x, ones = TopKSAE(16, 96, 5), random(40, 16), torch.ones(40)
    with torch.no_grad():
        plain = sae_step(sae, x, ones).loss
    loss = sae_step(sae, x, ones).loss
    assert torch.equal(plain, loss)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


class Watching(TorchDispatchMode):
    """Sees every tensor that is made: its largest number of elements, and what is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, torch.dtype, StorageWeakRef]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.made.append((one.numel(), one.dtype, StorageWeakRef(one.untyped_storage())))
        return result


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_no_tensor_of_tokens_times_latents_is_made(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_MAX_ELEMENTS_CPU", 256 * 2048)
    sae = TopKSAE(16, 2048, 4)
    optimizer = ScheduleFreeSignum(sae.parameters(), lr=1e-3)
    with Watching() as watching:
        step = sae_step(sae, random(tokens, 16), torch.ones(tokens), torch.arange(2048) < 1000, 0.1)
        step.loss.backward()
        sae.remove_parallel_decoder_gradient()
        optimizer.step()
        sae.unit_norm_decoder()
        sae(random(tokens, 16)).sum().backward()
    assert max(elements for elements, _, _ in watching.made) == 256 * 2048  # however many tokens


def test_after_the_forward_of_several_saes_none_holds_activations() -> None:
    tokens = 4096
    saes = {f"layers.{index}": TopKSAE(16, 128, 4, seed=index) for index in range(3)}
    x = {hookpoint: random(tokens, 16, dtype=torch.bfloat16) for hookpoint in saes}
    weights = dict.fromkeys(saes, torch.ones(tokens))
    with Watching() as watching:
        steps = SAEBank(saes)(x, weights, dict.fromkeys(saes, torch.arange(128) < 50), 0.1)
    wide = [held for elements, dtype, held in watching.made if elements == tokens * 16 and dtype == torch.float32]
    assert len(wide) >= 2 * len(saes)
    assert all(held.expired() for held in wide)
    assert all(step.loss.requires_grad for step in steps.values())


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to be waited for: its numbers become Python's, or decide a shape."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in self.FORBIDDEN or any(one is not None and one.dtype == torch.bool for one in indices):
            raise AssertionError(f"aten.{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "waiting",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: bool(x.any()), torch.unique],
)
def test_the_guard_against_waiting_can_fail(waiting: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="waits"):
        waiting(torch.ones(3))


class GuardedTrainer(SAETrainer):
    """Forbids waiting in the forwards and backwards of a step, and from their end to that of the optimiser's step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Before the decoder norm's, which it guards too.
        self.callback_handler.callbacks.insert(0, GuardedOptimizer())
        self.forwards = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.forwards += 1
        with NoWaiting():
            return super().training_step(*args, **kwargs)


class GuardedOptimizer(TrainerCallback):
    def __init__(self) -> None:
        self._guard = NoWaiting()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._guard.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._guard.__exit__(None, None, None)


def test_a_step_does_not_wait_for_the_device(
    make_model: ModelFactory, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a cache, Transformers looks for packed sequences: one wait a forward, before anything of it is queued.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    args = config(
        tmp_path,
        hookpoints=HOOKPOINTS,
        auxk_alpha=0.1,
        dead_after_tokens=100,
        max_norm_ratio=5.0,
        exclude_special_tokens=True,
        gradient_accumulation_steps=2,
        logging_steps=100,
    )
    trainer = GuardedTrainer(make_model("qwen2"), args, rows(48), processing_class=tiny_tokenizer)
    trainer.train()
    assert trainer.forwards == 2 * args.max_steps


class Held(TrainerCallback):
    """Elements of the tensors that were made since training began and are alive after each step."""

    def __init__(self) -> None:
        self.elements: list[int] = []
        self._watching = Watching()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watching.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        made = self._watching.made
        made[:] = [one for one in made if not one[2].expired()]
        self.elements.append(sum({held.cdata: elements for elements, _, held in made}.values()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watching.__exit__(None, None, None)


def test_memory_does_not_grow_with_the_tokens_of_the_run(make_model: ModelFactory, tmp_path: Path) -> None:
    held = Held()
    args = config(tmp_path, hookpoints=HOOKPOINTS, max_steps=12, logging_steps=5)
    SAETrainer(make_model("qwen2"), args, rows(48), callbacks=[held]).train()
    assert len(held.elements) == 12
    assert min(held.elements) > 3 * 3 * 48 * 32  # the gradients, z and x of three SAEs at least
    assert max(held.elements[2:]) <= held.elements[1]
