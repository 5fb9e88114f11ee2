"""sae-lens alone, from what an SAE's metadata say: it finds model, hook and text, and measures what we measure."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ModelFactory
from datasets import Dataset
from hub_server import HubServer
from sae_lens import SAE, HookedSAETransformer
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_reference import config, rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from resa_hf.hookpoints import splice
from resa_hf.models import load_causal_lm, load_tokenizer
from resa_hf.sae.quality import sae_quality
from resa_hf.sae.trainer import SAETrainer

# Names that TransformerLens knows, for tiny models of the same architecture.
QWEN, LLAMA = "Qwen/Qwen2.5-1.5B", "someone/llama"
CHARACTERS = "0123456789+= abcdefghijklmnop"
MLP = "layers.1.mlp"


def make_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """One token a character; `adds_bos` as Llama's and DeepSeek's tokenizers do, Qwen's has none."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if adds_bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def texts(count: int, start: int = 0) -> Dataset:
    return Dataset.from_dict({"text": [f"{n} + {n} = {2 * n} abc"[: 9 + n % 7] for n in range(start, start + count)]})


@pytest.fixture
def trained(
    hub: HubServer, make_model: ModelFactory, tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[str, SAETrainer]:
    """The name of a model on the Hub, and the trainer of its SAEs, which lie in `tmp_path / "saes"`."""
    kind, settings = request.param
    name = QWEN if kind == "qwen2" else LLAMA
    # SAEs of weights so small make no difference to the logits that could be told from rounding.
    model = make_model(kind, initializer_range=0.2)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(adds_bos=kind == "llama").save_pretrained(tmp_path / "model")
    hub.create_repo(name, folder=tmp_path / "model")
    args = config(tmp_path, hookpoints=["layers.1", MLP], **settings)
    trainer = SAETrainer(load_causal_lm(name), args, texts(40), processing_class=load_tokenizer(name))
    trainer.train()
    trainer.save_model(str(tmp_path / "saes"))
    return name, trainer


def theirs(folder: Path, hookpoint: str) -> SAE[Any]:
    return SAE.load_from_disk(folder / "saes" / hookpoint)


def evaluated(model: Any, sae: SAE[Any], held_out: Dataset, excluded: Any = False) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = ActivationsStore.from_sae(model, sae, held_out, streaming=False)
        everything = get_eval_everything_config(4, len(held_out) // 4, len(held_out) // 4)
        metrics, _ = run_evals(sae, store, model, ActivationScaler(), everything, exclude_special_tokens=excluded)
    return {name: value for group in metrics.values() for name, value in group.items()}


def hooked_transformer(sae: SAE[Any]) -> Any:
    """As `sae_lens.evals` itself loads it, by the metadata alone."""
    metadata = sae.cfg.metadata
    return load_model(
        metadata.model_class_name,
        metadata.model_name,
        "cpu",
        model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
    )


def transformers_model(sae: SAE[Any]) -> Any:
    """Any model of transformers, whose hooks have the names of its modules."""
    sae.cfg.metadata.hook_name = sae.cfg.metadata.hf_hook_name
    return load_model("AutoModelForCausalLM", sae.cfg.metadata.model_name, "cpu")


def bridge(sae: SAE[Any]) -> Any:
    """TransformerLens' bridge takes its usual names of hooks in `run_with_hooks` in this mode only."""
    model = SAETransformerBridge.boot_transformers(sae.cfg.metadata.model_name, device="cpu")
    model.enable_compatibility_mode(no_processing=True)
    return model


@pytest.mark.parametrize(
    ("trained", "load"),
    [
        (("qwen2", {}), hooked_transformer),
        (("qwen2", {}), bridge),
        (("llama", {}), bridge),
        (("llama", {}), transformers_model),
    ],
    indirect=["trained"],
)
@pytest.mark.parametrize("hookpoint", ["layers.1", MLP])
def test_its_evaluation_agrees_with_ours(
    trained: tuple[str, SAETrainer], load: Any, hookpoint: str, tmp_path: Path
) -> None:
    name, trainer = trained
    held_out, sae = rows(8, seed=9), theirs(tmp_path, hookpoint)
    found = evaluated(load(sae), sae, held_out)
    # sae-lens puts zeros in the SAE's place.
    ours = sae_quality(load_causal_lm(name), trainer.saes[hookpoint], held_out, ablation="zero")
    assert 1 - found["explained_variance"] == pytest.approx(ours["fvu"], rel=1e-4)
    assert found["l0"] == pytest.approx(ours["l0"], rel=1e-5)
    assert found["ce_loss_without_sae"] == pytest.approx(ours["ce_clean"], rel=1e-5)
    assert found["ce_loss_with_sae"] == pytest.approx(ours["ce_spliced"], rel=1e-5)
    assert found["ce_loss_with_ablation"] == pytest.approx(ours["ce_ablated"], rel=1e-5)
    assert found["ce_loss_score"] == pytest.approx(ours["ce_recovered"], rel=1e-2)
    assert abs(ours["ce_spliced"] - ours["ce_clean"]) > 1e-3  # or the hook could be missing


@pytest.mark.parametrize("trained", [("llama", {"exclude_special_tokens": True})], indirect=True)
def test_it_leaves_out_the_tokens_that_training_left_out(trained: tuple[str, SAETrainer], tmp_path: Path) -> None:
    name, trainer = trained
    held_out, sae = trainer.train_dataset.select(range(8)), theirs(tmp_path, "layers.1")
    excluded = sae.cfg.metadata.exclude_special_tokens
    assert set(excluded) == set(trainer.processing_class.all_special_ids)
    found = evaluated(transformers_model(sae), sae, held_out, excluded)
    ours = sae_quality(load_causal_lm(name), trainer.saes["layers.1"], held_out, excluded_token_ids=excluded)
    everything = sae_quality(load_causal_lm(name), trainer.saes["layers.1"], held_out)
    assert 1 - found["explained_variance"] == pytest.approx(ours["fvu"], rel=1e-4)
    assert ours["fvu"] != pytest.approx(everything["fvu"], rel=1e-2)


@pytest.mark.parametrize("trained", [("qwen2", {}), ("llama", {"max_length": 12})], indirect=True)
def test_it_packs_text_as_training_did(trained: tuple[str, SAETrainer], tmp_path: Path) -> None:
    _, trainer = trained
    sae = theirs(tmp_path, "layers.1")
    model, metadata = bridge(sae), sae.cfg.metadata
    assert metadata.prepend_bos is (trainer.processing_class.bos_token_id is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = ActivationsStore.from_sae(model, sae, texts(40), streaming=False, sequence_separator_token="eos")
    assert store.get_batch_tokens(8).tolist() == trainer.train_dataset[:8]["input_ids"]


@pytest.mark.parametrize("trained", [("qwen2", {}), ("llama", {})], indirect=True)
def test_its_hooks_splice_as_ours_do(trained: tuple[str, SAETrainer], tmp_path: Path) -> None:
    name, trainer = trained
    ids = torch.tensor(rows(3, seed=8)["input_ids"][:])
    model = load_causal_lm(name)
    known = [HookedSAETransformer.from_pretrained_no_processing] if name == QWEN else []
    for load in (SAETransformerBridge.boot_transformers, *known):
        hooked = load(name, device="cpu")
        for hookpoint in ("layers.1", MLP):
            with torch.no_grad():
                found = hooked.run_with_saes(ids, saes=[theirs(tmp_path, hookpoint)])
                with splice(model, hookpoint, trainer.saes[hookpoint]):
                    expected = model(input_ids=ids).logits
                plain = model(input_ids=ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (expected - plain).abs().max() > 0.05


def test_rows_of_tokens_tell_their_length_and_their_bos(make_model: ModelFactory, tmp_path: Path) -> None:
    from resa_hf.sae.metadata import training_metadata

    def told(dataset: Any, **given: Any) -> tuple[int, bool | None]:
        trainer = SAETrainer(make_model("qwen2"), config(tmp_path, max_length=99), dataset, **given)
        metadata = training_metadata(trainer, trainer.saes["layers.1"])
        return metadata["context_size"], metadata["prepend_bos"]

    tokenizer = make_tokenizer(adds_bos=True)
    mixed = Dataset.from_dict({"input_ids": [[1, 5, 6], [1, 7, 8, 9], [4, 5]]})
    assert told(mixed, processing_class=tokenizer) == (4, False)
    assert told(mixed.select([0, 1]), processing_class=tokenizer) == (4, True)
    assert told(mixed) == (4, None)  # without a tokenizer nobody knows what a BOS is
    assert told(list(mixed), processing_class=tokenizer) == (99, None)
