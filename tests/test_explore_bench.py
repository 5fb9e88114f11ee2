"""The workbench: what is loaded and shared, and what visitors cannot get it to load."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from pathlib import Path

import pytest
import torch
from adapter_files import save_adapter
from tiny_merged import LOCAL, merged

from resa_hf.errors import ExploreError
from resa_hf.explore import bench as bench_module
from resa_hf.explore.bench import Workbench
from resa_hf.sae.autoencoder import TopKSAE
from resa_hf.sae.checkpoint import save_sae
from resa_hf.tiny import tiny_path

IDS = torch.tensor([[5, 17, 3, 41, 8, 50, 9]])


def make_bench(local=None, **settings):
    return Workbench(LOCAL | (local or {}), **{"device": "cpu"} | settings)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
def test_an_adapter_acts_with_its_strength(tiny_base, strength):
    opened = make_bench().open("tiny", ["source"])
    trained = logits(opened.tuned)
    with opened.at_strengths([strength]) as model:
        found = logits(model)
    torch.testing.assert_close(found, logits(merged(tiny_base, strength)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(opened.tuned), trained, atol=0, rtol=0)


def test_strength_0_is_the_base_to_the_bit(tiny_base):
    opened = make_bench().open("tiny", ["source"])
    with opened.at_strengths([0.0]) as model:
        assert torch.equal(logits(model), logits(tiny_base))
    assert torch.equal(logits(opened.base), logits(tiny_base))
    assert not torch.equal(logits(opened.tuned), logits(tiny_base))


def test_several_adapters_act_together(tiny_base, tmp_path):
    other = save_adapter(tmp_path / "other", tiny_base)
    opened = make_bench({"other": other}).open("tiny", ["source", "other"])
    with opened.at_strengths([0.5, 0.01]) as model:
        found = logits(model)
    expected = merged(merged(tiny_base, 0.5), 0.01, other)
    torch.testing.assert_close(found, logits(expected), atol=1e-4, rtol=1e-4)


def test_base_and_tuned_share_tensors_and_no_module():
    opened = make_bench().open("tiny", ["source"])
    places = {tensor.data_ptr() for tensor in (*opened.base.parameters(), *opened.base.buffers())}
    tuned = opened.tuned.get_base_model()
    shared = {t.data_ptr() for n, t in (*tuned.named_parameters(), *tuned.named_buffers()) if "lora_" not in n}
    assert shared == places
    assert not {id(module) for module in opened.base.modules()} & {id(module) for module in tuned.modules()}


def test_models_without_adapters_are_opened_once_more_without_new_weights():
    bench = make_bench()
    with_adapter, alone = bench.open("tiny", ["source"]), bench.open("tiny")
    assert alone.base is with_adapter.base
    assert alone.tuned is alone.base
    assert alone.lock is with_adapter.lock
    assert bench.open("tiny", ["source"]) is with_adapter


def test_who_waits_gets_what_another_loads(monkeypatch):
    calls, load = [], bench_module.load_causal_lm

    def slow(*args, **kwargs):
        calls.append(args)
        everybody.wait(timeout=30)
        return load(*args, **kwargs)

    everybody = threading.Barrier(2)
    monkeypatch.setattr(bench_module, "load_causal_lm", slow)
    bench = make_bench()
    with ThreadPoolExecutor(8) as pool:
        opened = [pool.submit(bench.open, "tiny", ["source"]) for _ in range(8)]
        everybody.wait(timeout=30)  # the first is loading
    assert len(calls) == 1
    assert len({id(one.result()) for one in opened}) == 1


def test_those_used_last_are_kept(tmp_path, tiny_base):
    bench = make_bench({"again": tiny_path("base"), "third": str(tiny_path("base"))})
    first = weakref.ref(bench.open("tiny").base)
    second = weakref.ref(bench.open("again").base)
    bench.open("tiny")
    bench.open("third")
    gc.collect()
    assert second() is None
    assert first() is bench.open("tiny").base


def write_sae(folder, hookpoint, seed=0):
    save_sae(TopKSAE(128, 256, 8, hookpoint=hookpoint, seed=seed), folder)


def test_saes_by_hookpoint(tmp_path):
    for hookpoint in ("layers.10", "layers.2"):
        write_sae(tmp_path / "saes" / hookpoint, hookpoint)
    write_sae(tmp_path / "saes" / "checkpoint-5" / "layers.1", "layers.1")
    bench = make_bench({"saes": tmp_path / "saes"})
    assert bench.sae("saes")[0] == "layers.2"
    hookpoint, sae = bench.sae("saes", "layers.10")
    assert (hookpoint, sae.hookpoint, sae.num_latents) == ("layers.10", "layers.10", 256)
    assert bench.sae("saes", "layers.10")[1] is sae
    with pytest.raises(ExploreError, match=r"no SAE at 'layers.3'. It has: layers.2, layers.10.$"):
        bench.sae("saes", "layers.3")


def test_a_folder_that_is_one_sae(tmp_path):
    write_sae(tmp_path / "sae", "layers.1")
    bench = make_bench({"sae": tmp_path / "sae"})
    assert bench.sae("sae")[0] == bench.sae("sae", "layers.1")[0] == "layers.1"
    with pytest.raises(ExploreError, match=r"no SAE at 'layers.3'. It has: layers.1.$"):
        bench.sae("sae", "layers.3")


@pytest.mark.parametrize(
    "typed", ["/", "..", "../..", "{tmp}/secret", "secret", "./secret/model", "file://{tmp}/secret/model"]
)
def test_no_path_is_read(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "model").mkdir(parents=True)
    bench, name = make_bench(), typed.format(tmp=tmp_path)
    for ask in (lambda: bench.open(name), lambda: bench.open("tiny", [name]), lambda: bench.sae(name)):
        with pytest.raises(ExploreError, match="on the Hub"):
            ask()


def test_adapters_are_few_and_different():
    for adapters in (["source"] * 2, ["source", *(f"a/b{n}" for n in range(4))]):
        with pytest.raises(ExploreError, match="At most 4 adapters"):
            make_bench().open("tiny", adapters)


def test_an_adapter_that_does_not_fit_is_refused_by_its_name(tmp_path, make_model):
    folder = save_adapter(tmp_path / "adapter", make_model("qwen2"))
    with pytest.raises(ExploreError, match="'other'.*does not fit 'tiny'.*layers.0") as raised:
        make_bench({"other": folder}).open("tiny", ["other"])
    assert str(tmp_path) not in str(raised.value)
    assert str(Path(bench_module.__file__).parents[1]) not in str(raised.value)


def test_offline_the_hub_is_not_asked():
    with pytest.raises(ExploreError, match="'owner/name' cannot be asked for: the Hub is switched off"):
        make_bench().open("owner/name")


def test_an_adapter_waits_for_whoever_uses_its_model():
    """Hooks and edits of another visitor were copied into the model with adapters, and stayed there for all."""
    bench = make_bench()
    base = bench.open("tiny")
    with ThreadPoolExecutor(1) as pool:
        with base.lock:
            hook = base.base.model.layers[0].register_forward_hook(lambda *_: None)
            opening = pool.submit(bench.open, "tiny", ["source"])
            with pytest.raises(FuturesTimeout):
                opening.result(timeout=1)
            hook.remove()
        tuned = opening.result(timeout=60).tuned
    assert not any(module._forward_hooks for module in tuned.modules())


def test_one_visitors_slow_model_keeps_nobody_else_waiting(monkeypatch):
    slow = threading.Event()
    load = bench_module.load_causal_lm

    def wait(place, **kwargs):
        if "slow" in str(place):
            slow.wait(timeout=60)
        return load(place, **kwargs)

    monkeypatch.setattr(bench_module, "load_causal_lm", wait)
    bench = make_bench({"slow": "me/slow"})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bench.open, "slow")
        assert bench.open("tiny").model_name == "tiny"
        slow.set()
        with pytest.raises(ExploreError, match="'slow' cannot be loaded|cannot be loaded"):
            waiting.result(timeout=60)
